"""`record_queries`: the query vectors of the model, without a change of the state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.decoding.prefill import PrefillOptions, prefill
from ferrum_jax.integrations.nnx import nnx_model
from ferrum_jax.integrations.queries import record_queries
from ferrum_jax.types import TokenFormat
from tests.support import tiny_model
from tests.support.caches import same_bits, snapshot
from tests.support.managers import make_manager

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8]]
NUM_LAST = 3
LAST = [prompt[-NUM_LAST:] for prompt in PROMPTS]
SMALL = PrefillOptions(chunk_tokens=4, rows_per_step=4)


@pytest.fixture(scope="module")
def model():
    """`(model_fn, params)` of the tiny decoder, and its weights by name."""
    decoder = tiny_model.tiny_decoder()
    return *nnx_model(decoder), tiny_model.weights_of(decoder)


@pytest.fixture
def state(model):
    model_fn, params, _ = model
    state, _ = fj.allocate(fj.init(tiny_model.tiny_cache()), [2, 0], list(map(len, PROMPTS)))
    return prefill(model_fn, params, state, [2, 0], PROMPTS, options=SMALL)[1]


def recorded(model, state, seq_ids=(2, 0), tokens=LAST):
    model_fn, params, _ = model
    return record_queries(model_fn, params, state, seq_ids, tokens, num_q_heads=tiny_model.HEADS)


def scanned(params, tokens, batch):
    """A model that scans over its layers with the batch as carry; layer l's queries are scaled."""
    x = params[tokens]
    kv = x[:, :, : tiny_model.KV_HEADS]

    def layer(batch, index):
        batch = batch.write(index, kv, kv)
        q = x * (index + 1).astype(jnp.float32)
        return batch, batch.last(batch.attend(index, q))

    batch, seen = jax.lax.scan(layer, batch, jnp.arange(tiny_model.LAYERS, dtype=jnp.int32))
    return seen[-1].reshape(tokens.shape[0], -1), batch.pools


def test_record_queries_returns_the_first_layers_queries_as_the_weights_say(model, state):
    *_, weights = model
    block = jax.tree.map(np.asarray, weights["block_0"])
    queries = np.asarray(recorded(model, state))
    assert queries.shape == (2, tiny_model.LAYERS, tiny_model.HEADS, NUM_LAST, tiny_model.HEAD_DIM)
    for got, prompt in zip(queries, PROMPTS, strict=True):
        x = np.asarray(weights["embed"]["embedding"])[prompt]
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * block["attention_norm"]["scale"]
        query = block["attention"]["query"]
        q = jnp.asarray(np.einsum("tw,whd->thd", x, query["kernel"]) + query["bias"])
        positions = jnp.arange(len(prompt), dtype=jnp.int32)[None]
        want = np.asarray(tiny_model.rotary(q[None], positions))[0, -NUM_LAST:]
        np.testing.assert_allclose(got[0].swapaxes(0, 1), want, rtol=1e-4, atol=1e-5)


def test_record_queries_of_few_and_of_many_tokens_agree_in_later_layers(model, state):
    before = snapshot(state)
    few = recorded(model, state)
    assert same_bits(state, before)
    many = recorded(model, state, tokens=[prompt[-5:] for prompt in PROMPTS])
    np.testing.assert_allclose(many[:, :, :, -NUM_LAST:], few, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(few[:, 1]).max()) > 0.1


def test_record_queries_of_a_model_that_scans_over_its_layers(state):
    shape = tiny_model.VOCAB, tiny_model.HEADS, tiny_model.HEAD_DIM
    params = jax.random.normal(jax.random.key(0), shape, jnp.float32)
    queries = recorded((scanned, params, None), state)
    x = np.asarray(params)[np.asarray(LAST)].swapaxes(1, 2)
    for layer in range(tiny_model.LAYERS):
        np.testing.assert_allclose(queries[:, layer], (layer + 1) * x, rtol=1e-6)


def test_record_queries_refuses_another_number_of_query_heads(model, state):
    model_fn, params, _ = model
    with pytest.raises(AssertionError):
        record_queries(model_fn, params, state, [2, 0], LAST, num_q_heads=2)


def test_compress_cache_takes_recorded_queries(model):
    model_fn, params, _ = model
    spec = tiny_model.tiny_cache()
    sizes = ("num_layers", "num_kv_heads", "head_dim", "max_seqs")
    geometry = {name: getattr(spec, name) for name in sizes} | {"max_sequence_length": 32}
    manager = make_manager(geometry=geometry, block_size=4, max_blocks=spec.num_blocks)
    prompt = (PROMPTS[0] * 3)[:16]
    handle = manager.allocate(manager.new_request("a", initial_tokens=len(prompt)))

    def read(state, seq_ids):
        return prefill(model_fn, params, state, seq_ids, [prompt], options=SMALL)[::-1]

    def queries_of(state, seq_ids):
        return state, recorded(model, state, seq_ids, [prompt[-NUM_LAST:]])

    manager.run(read, [handle])
    (queries,) = manager.run(queries_of, [handle])
    method = CompressionMethod(
        token_format=TokenFormat.Native, scorer="observed_attention", num_sinks=1, num_recent=2
    )
    manager.compress_cache("a", 0.5, method, queries)
    assert handle.compression is not None
    assert handle.compression.num_kept_tokens == 8 and handle.compression.attention_error > 0
