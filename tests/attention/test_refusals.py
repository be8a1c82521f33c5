"""What attention refuses, and in which words."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from ferrum_jax.attention import AttentionOptions, paged_attention
from tests.attention.test_paged_attention import KERNELS
from tests.support.attention_oracle import problem


@KERNELS
@pytest.mark.parametrize(
    "changes",
    [
        {"q": jnp.zeros((3, 4, 16))},
        {"q": jnp.zeros((4, 32))},
        {"q": jnp.zeros((2, 4, 32))},
        {"q": jnp.zeros((3, 4, 32), jnp.int32)},
        {"layer": 0.5},
        {"block_ids": jnp.zeros((3,), jnp.int32)},
        {"held_lens": jnp.zeros((2,), jnp.int32)},
        {"held_lens": jnp.zeros((3,), jnp.float32)},
        {"q_lens": jnp.zeros((1,), jnp.int32)},
        {"layer": jnp.zeros((1,), jnp.int32)},
        {"options": AttentionOptions(sinks=jnp.zeros(3))},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_wrong_shapes_are_refused_when_traced(kernel, changes):
    names = ("q", "pool", "layer", "block_ids", "held_lens", "q_lens", "options")
    args = {**dict(zip(names, problem().args(), strict=True)), **changes}
    with pytest.raises(AssertionError):
        jax.eval_shape(kernel, *(args[name] for name in names))


def test_heads_that_do_not_divide_are_refused():
    p = problem(heads=(4, 2))
    p = dataclasses.replace(p, q=p.q[:, :3])
    with pytest.raises(ValueError, match="3 heads.*2 KV heads"):
        paged_attention(*p.args())


@pytest.mark.parametrize("varying", ["q", "pool", "lens"])
def test_inside_shard_map_it_says_what_to_give_that(varying):
    q, pool, layer, block_ids, held_lens, _, _ = problem().args()
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    names = ("q", "pool", "ids", "lens")
    specs = tuple(PartitionSpec("x") if name == varying else PartitionSpec() for name in names)

    def attend(q, pool, block_ids, held_lens):
        return paged_attention(q, pool, layer, block_ids, held_lens)

    mapped = functools.partial(
        jax.shard_map, attend, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("x")
    )
    args = q, pool, block_ids, held_lens
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
    p, want = (dataclasses.replace(p, options=x) for x in (options, plain))
    np.testing.assert_array_equal(paged_attention(*p.args()), paged_attention(*want.args()))


def layers_of(attend):
    """A loss of queries that pass through `attend` in each layer, rematerialized."""
    _, pool, _, block_ids, held_lens, _, _ = problem().args()
    pool = dataclasses.replace(pool, k=jnp.ones_like(pool.k), v=jnp.ones_like(pool.v))

    def loss(q):
        layer = jax.checkpoint(lambda q, i: (q + attend(q, pool, i, block_ids, held_lens), None))
        return lax.scan(layer, q, jnp.arange(pool.num_layers))[0].sum()

    return loss


@pytest.mark.parametrize("num_queries", [1, 9], ids=["native", "xla"])
def test_a_gradient_is_refused_on_every_path(transform, num_queries):
    q, *args = problem(num_queries=num_queries).args()
    tangents = jnp.ones_like(q)
    for gradient in (
        lambda q: jax.grad(lambda q: paged_attention(q, *args).sum())(q),
        lambda q: jax.jvp(lambda q: paged_attention(q, *args), (q,), (tangents,)),
    ):
        with pytest.raises(TypeError, match="no gradient.*stop_gradient.*dense attention"):
            transform(gradient)(q)


def test_a_gradient_is_refused_inside_scan_remat_and_vmap():
    q = jnp.asarray(problem().q)
    with pytest.raises(TypeError, match="no gradient"):
        jax.jit(jax.vmap(jax.grad(layers_of(paged_attention))))(q[None])


def test_a_gradient_goes_past_attention_that_is_told_to_stop_it():
    q = jnp.asarray(problem().q)
    loss = layers_of(lambda q, *args: paged_attention(lax.stop_gradient(q), *args))
    gradients = jax.jit(jax.vmap(jax.grad(loss)))(jnp.stack([q, -q]))
    np.testing.assert_array_equal(gradients, jnp.ones_like(gradients))
