"""What `paged_attention` refuses, and its error messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ferrum_jax.attention import AttentionOptions, explain_backend, paged_attention
from tests.support.attention_problems import problem


@pytest.mark.parametrize(
    "changes",
    [
        {"q": jnp.zeros((3, 4, 16))},
        {"q": jnp.zeros((4, 32))},
        {"q": jnp.zeros((2, 4, 32))},
        {"q": jnp.zeros((3, 4, 32), jnp.int32)},
        {"layer": 0.5},
        {"layer": jnp.zeros((1,), jnp.int32)},
        {"block_ids": jnp.zeros((3,), jnp.int32)},
        {"held_lens": jnp.zeros((2,), jnp.int32)},
        {"held_lens": jnp.zeros((3,), jnp.float32)},
        {"q_lens": jnp.zeros((1,), jnp.int32)},
        {"token_formats": jnp.zeros((2,), jnp.int32)},
        {"token_formats": jnp.zeros((3,), jnp.float32)},
        {"options": AttentionOptions(sinks=jnp.zeros(3))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_shapes_are_refused_when_traced(changes):
    with pytest.raises(AssertionError):
        jax.eval_shape(paged_attention, **{**problem().arguments(), **changes})


@pytest.mark.parametrize("function", [paged_attention, explain_backend])
def test_missing_and_unknown_arrays_of_rows_are_refused_by_name(function):
    arguments = problem().arguments()
    lens = arguments.pop("held_lens")
    with pytest.raises(TypeError, match=r"\['held_lens'\] are missing"):
        function(**arguments)
    with pytest.raises(TypeError, match=r"\['seqlens'\] unknown"):
        function(**arguments, held_lens=lens, seqlens=lens)


def test_heads_that_do_not_divide_are_refused():
    p = problem(heads=(4, 2))
    with pytest.raises(ValueError, match="3 heads.*2 KV heads"):
        paged_attention(**p.replace(q=p.q[:, :3]).arguments())


@pytest.mark.parametrize("varying", ["q", "pool", "lens"])
def test_inside_shard_map_it_says_what_to_give_that(varying):
    arguments = problem().arguments()
    args = tuple(arguments[name] for name in ("q", "pool", "block_ids", "held_lens"))
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    names = ("q", "pool", "ids", "lens")
    specs = tuple(PartitionSpec("x") if name == varying else PartitionSpec() for name in names)

    def attend(q, pool, block_ids, held_lens):
        return paged_attention(q, pool, 1, block_ids=block_ids, held_lens=held_lens)

    mapped = functools.partial(
        jax.shard_map, attend, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x")
    )
    with pytest.raises(ValueError, match="axes .'x'.*check_vma=False"):
        jax.jit(mapped())(*args)
    out = jax.jit(mapped(check_vma=False))(*args)
    np.testing.assert_allclose(out, attend(*args), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value", "what"),
    [
        ("sliding_window", 0, "at least 1"),
        ("sliding_window", 3.5, "an integer"),
        ("sliding_window", "3", "an integer"),
        ("sliding_window", True, "an integer"),
        ("sliding_window", 2**40, "at most 2147483647"),
        ("soft_cap", 0.0, "positive"),
        ("soft_cap", np.inf, "finite"),
        ("soft_cap", np.nan, "a number"),
        ("soft_cap", np.ones(2), "a number"),
        ("scale", np.inf, "finite"),
        ("scale", np.float32(-np.inf), "finite"),
        ("scale", np.nan, "a number"),
        ("scale", "1", "a number"),
        ("scale", 1e38, "zero or from 1e-37 to 1e\\+37"),
        ("scale", -1e-38, "zero or from 1e-37"),
    ],
)
def test_impossible_options_are_refused_by_name(field, value, what):
    with pytest.raises(ValueError, match=f"{field} must be {what}"):
        AttentionOptions(**{field: value})


def test_numbers_of_numpy_are_options_too():
    p = problem(num_queries=3)
    plain = AttentionOptions(scale=0.5, sliding_window=6, soft_cap=2.0)
    options = AttentionOptions(
        scale=np.float32(0.5), sliding_window=np.int64(6), soft_cap=np.float64(2)
    )
    got, want = (paged_attention(**p.replace(options=x).arguments()) for x in (options, plain))
    np.testing.assert_array_equal(got, want)


def layers_of(attend):
    """A loss of queries that pass through `attend` in each layer, rematerialized."""
    arguments = problem().arguments()
    pool = arguments["pool"]
    pool = jax.tree.map(jnp.ones_like, pool)

    def layer(q, i):
        return q + attend(**{**arguments, "q": q, "pool": pool, "layer": i}), None

    return lambda q: lax.scan(jax.checkpoint(layer), q, jnp.arange(pool.num_layers))[0].sum()


@pytest.mark.parametrize("backend", ["cpu", "xla", None])
def test_a_gradient_is_refused_by_every_backend(transform, backend):
    arguments = problem(num_queries=3).arguments()
    q = arguments.pop("q")

    def attend(q):
        return paged_attention(q, **arguments, backend=backend)

    for gradient in (
        lambda q: jax.grad(lambda q: attend(q).sum())(q),
        lambda q: jax.jvp(attend, (q,), (jnp.ones_like(q),)),
    ):
        with pytest.raises(TypeError, match="no gradient.*stop_gradient.*dense attention"):
            transform(gradient)(q)


def test_a_gradient_is_refused_inside_scan_remat_and_vmap():
    q = jnp.asarray(problem().q)
    with pytest.raises(TypeError, match="no gradient"):
        jax.jit(jax.vmap(jax.grad(layers_of(paged_attention))))(q[None])


def test_a_gradient_passes_attention_under_stop_gradient():
    q = jnp.asarray(problem().q)
    loss = layers_of(lambda q, **rest: paged_attention(lax.stop_gradient(q), **rest))
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([q, -q]))
    np.testing.assert_array_equal(gradients, jnp.ones_like(gradients))
