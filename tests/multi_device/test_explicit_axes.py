"""A cache over a mesh with axes of type Explicit, compared with one on a single device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import ferrum_jax as fj
from ferrum_jax import Engine, EngineOptions, GenerateOptions, RequestOptions, Sampling
from ferrum_jax.attention import paged_attention
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.sharding import init_sharded
from ferrum_jax.types import TokenFormat
from tests.support import head_parallel
from tests.support.caches import filled, lies_over, num_compilations, tiny_spec
from tests.support.head_parallel import PARAMS, PROMPTS, SPEC, Decoder

STEP = StepOptions(chunk_tokens=3, chunks_per_step=2)
SAMPLING = Sampling(temperature=0.8, top_k=9, top_p=0.95)
ROWS = [4, 0, 2]
MODELS = ["plain", "head-parallel"]
"""A model that knows no mesh, with whole weights; and one that shards weights and activations."""


@pytest.fixture
def mesh():
    """Two devices, for one KV head each, in the context of which a test runs."""
    pair = jax.devices()[:2]
    explicit = jax.make_mesh((2,), ("tp",), axis_types=(AxisType.Explicit,), devices=pair)
    with jax.set_mesh(explicit):
        yield explicit


def model_over(mesh, model):
    """A model function and its parameters."""
    if model == "plain":
        return Decoder(), jax.device_put(PARAMS, NamedSharding(mesh, P()))
    return Decoder("tp"), head_parallel.over(mesh)


def generated(model_fn, params, state):
    """Logits after three prompts, and the tokens drawn behind them."""
    options = GenerateOptions(max_new_tokens=8, sampling=SAMPLING)
    keys = jax.random.split(jax.random.key(3), 3)
    state, ok = fj.allocate(state, ROWS[:2], [len(prompt) for prompt in PROMPTS[:2]])
    logits, state = fj.prefill(model_fn, params, state, ROWS, PROMPTS[:3])  # The third row grows.
    first = options.choose(logits, keys)
    out = fj.generate(model_fn, params, state, ROWS, first, options=options, key=keys)
    assert bool(ok) and bool(out.ok)
    lens = np.asarray(out.state.seq_lens)
    return np.asarray(logits), np.asarray(out.tokens), lens, out.state


def serve(model_fn, params, state):
    options = fj.ServeOptions(max_new_tokens=6, step=STEP)
    return fj.serve(model_fn, params, state, ROWS, PROMPTS, options=options)


@pytest.fixture(scope="module")
def generated_alone():
    return generated(Decoder(), PARAMS, fj.init(SPEC))


@pytest.fixture(scope="module")
def served_alone():
    return serve(Decoder(), PARAMS, fj.init(SPEC)).tokens.tolist()


@pytest.mark.parametrize("model", MODELS)
def test_prefill_and_generate_equal_those_on_one_device(generated_alone, mesh, model):
    want, want_tokens, want_lens, _ = generated_alone
    sharded = init_sharded(SPEC, mesh, "tp")
    logits, tokens, lens, state = generated(*model_over(mesh, model), sharded)
    np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-5)
    assert tokens.tolist() == want_tokens.tolist()
    fj.check_state(state)
    assert lens.tolist() == want_lens.tolist()
    assert all(lies_over(x, P(None, None, "tp")) for x in jax.tree.leaves(state.pools))
    assert all(lies_over(x, P()) for x in jax.tree.leaves(state.page_tables))


def test_serve_equals_serve_on_one_device_and_compiles_once(served_alone, mesh):
    model = model_over(mesh, "head-parallel")
    first = serve(*model, init_sharded(SPEC, mesh, "tp"))
    before = num_compilations()
    again = serve(*model, first.state)
    assert num_compilations() == before
    for out in (first, again):
        assert out.tokens.tolist() == served_alone and out.ok.all()


def test_engine_over_a_mesh_answers_as_serve_on_one_device(served_alone, mesh):
    manager = fj.PagedKvCacheManager(
        fj.CacheConfig(block_size=4, max_blocks=48, initial_blocks=24),
        fj.CacheGeometry(groups=SPEC.groups, max_seqs=4, max_sequence_length=32),
        fj.ManagerOptions(mesh=mesh),
    )
    options = EngineOptions(max_rows=4, step=STEP)
    with Engine(*model_over(mesh, "plain"), manager, options) as engine:
        answers = [engine.submit(p, RequestOptions(max_new_tokens=6)) for p in PROMPTS]
        assert [answer.result() for answer in answers] == served_alone
    manager.check()


@pytest.mark.parametrize("backend", ["xla", "cpu"])
@pytest.mark.parametrize("heads", [None, "tp"], ids=["replicated", "over-heads"])
def test_attention_returns_the_sharding_of_its_queries(mesh, backend, heads):
    """Whichever backend computes it, and also for rows in several formats."""
    spec = tiny_spec(num_kv_heads=2, head_dim=32, block_size=4)
    q = np.random.default_rng(0).normal(size=(2, 3, 4, 32)).astype(np.float32)
    alone = filled(spec, {0: 7, 1: 3})
    state = init_sharded(spec, mesh, "tp")
    leaves, structure = jax.tree.flatten(state)
    state = structure.unflatten(
        map(jax.device_put, jax.tree.leaves(alone), (x.sharding for x in leaves))
    )
    placed = jax.device_put(q, NamedSharding(mesh, P(None, None, heads)))
    for change in (lambda x: x, lambda x: enable_formats(x, [TokenFormat.Int8])):
        one, over = change(alone), change(state)
        rows = {
            "held_lens": np.int32([7, 3]),
            "q_lens": np.int32([3, 2]),
            "token_formats": np.zeros(2, np.int32),
        }

        @jax.jit
        def attend(q, state, rows=rows):
            out = paged_attention(
                q, state.pool, 1, block_ids=state.tables.block_ids[:2], backend=backend, **rows
            )
            assert jax.typeof(out).sharding.spec == jax.typeof(q).sharding.spec
            return out

        want = attend(q, one)
        got = attend(placed, over)
        assert lies_over(got, P(None, None, heads))
        np.testing.assert_allclose(np.asarray(got), np.asarray(want), rtol=1e-5, atol=1e-5)


def test_arguments_that_devices_would_have_to_exchange_are_refused(mesh):
    state = init_sharded(tiny_spec(num_kv_heads=2, head_dim=8), mesh, "tp")
    tokens = jnp.ones((2, 2, 8), jnp.float32)
    for spec in (P("tp"), P(None, None, "tp")):
        divided = jax.device_put(tokens, NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=r"v is divided as .*'tp'.* the cache needs.*reshard"):
            fj.write(state.pool, 0, [0, 1], tokens, divided)
    rows = {"block_ids": np.zeros((2, 5), np.int32), "held_lens": np.ones(2, np.int32)}
    with pytest.raises(ValueError, match=r"q is divided as .* the cache needs"):
        paged_attention(jax.device_put(tokens, NamedSharding(mesh, P("tp"))), state.pool, 0, **rows)
