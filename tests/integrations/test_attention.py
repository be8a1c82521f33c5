"""Paged attention inside Flax modules: the parameters and outputs of Flax's own attention."""

import copy
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import ferrum_jax as fj
from ferrum_jax.attention import AttentionOptions
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.prefill import PrefillOptions, prefill
from ferrum_jax.integrations import linen as paged_linen
from ferrum_jax.integrations.nnx import PagedAttention, _frozen, nnx_model
from tests.support.tiny_model import (
    LinenDecoder,
    dense_logits,
    random_module,
    tiny_cache,
    tiny_decoder,
    weights_of,
)

LEN, FEATURES = 7, 12
X = np.random.default_rng(0).normal(size=(2, LEN, FEATURES)).astype(np.float32)
CAUSAL = nn.make_causal_mask(jnp.ones((2, LEN)))


def in_chunks(call, spec: fj.CacheSpec) -> np.ndarray:
    """Feeds X to `call(x, batch) -> (y, batch)`: five tokens, then two and padding."""
    state, ok = fj.allocate(fj.init(spec), [1, 0], LEN)
    assert bool(ok)
    padded = jnp.pad(X, ((0, 0), (0, 3), (0, 0)), constant_values=9.0)
    run = jax.jit(lambda x, batch: call(x, batch))
    batch = PagedBatch.of(state, [1, 0], [5, 5], num_tokens=5, seq_lens=[5, 5])
    first, batch = run(padded[:, :5], batch)
    state = state.with_pools(batch.pools)
    batch = PagedBatch.of(state, [1, 0], [2, 2], num_tokens=5)
    second, _ = run(padded[:, 5:], batch)
    return np.concatenate([first, second[:, :2]], axis=1)


def spec_for(num_kv_heads: int, head_dim: int, **changes) -> fj.CacheSpec:
    return tiny_cache(num_layers=3, num_kv_heads=num_kv_heads, head_dim=head_dim, **changes)


def flax_attention(seed: int = 0, **changes) -> nnx.MultiHeadAttention:
    def make():
        sizes = {"num_heads": 4, "in_features": FEATURES, "decode": False, **changes}
        return nnx.MultiHeadAttention(**sizes, rngs=nnx.Rngs(0))

    return random_module(make, seed)


@nnx.jit
def flax_output(attention: nnx.MultiHeadAttention, mask: jax.Array = CAUSAL) -> jax.Array:
    return attention(jnp.asarray(X), mask=mask)


@pytest.mark.parametrize(
    "changes",
    [{"num_kv_heads": 2, "qkv_features": 32, "out_features": 5}, {"normalize_qk": True}],
    ids=["grouped", "normalized"],
)
def test_a_wrapped_nnx_module_gives_its_own_outputs(changes):
    attention = flax_attention(**changes)
    paged = PagedAttention(attention, layer=2)
    spec = spec_for(attention.num_kv_heads, attention.head_dim)
    np.testing.assert_allclose(in_chunks(paged, spec), flax_output(attention), atol=1e-5)


def test_an_nnx_checkpoint_loads_under_the_same_names():
    trained, paged = flax_attention(0), PagedAttention(flax_attention(1), layer=0)
    params = nnx.state(trained, nnx.Param)
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(paged, nnx.Param))
    nnx.update(paged, params)
    np.testing.assert_allclose(in_chunks(paged, spec_for(4, 3)), flax_output(trained), atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"qkv_features": 32, "out_features": 5, "use_bias": False}, {"normalize_qk": True}],
    ids=["wide", "normalized"],
)
def test_a_linen_checkpoint_gives_the_same_outputs(changes):
    attention = nn.MultiHeadDotProductAttention(num_heads=4, **changes)
    rng = np.random.default_rng(1)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype),
        jax.eval_shape(attention.init, jax.random.key(0), jnp.asarray(X)),
    )
    expected = jax.jit(attention.apply)(variables, jnp.asarray(X), mask=CAUSAL)
    paged = paged_linen.PagedAttention(num_heads=4, layer=1, **changes)

    def call(x, batch):
        y, batch = paged.apply(variables, x, batch)
        return y, batch

    spec = spec_for(4, changes.get("qkv_features", FEATURES) // 4)
    np.testing.assert_allclose(in_chunks(call, spec), expected, atol=1e-5)


def test_linen_and_nnx_decoders_agree_on_the_same_weights():
    model = tiny_decoder()
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
    results = []
    for model_fn, params in (
        nnx_model(model),
        (LinenDecoder().apply, {"params": weights_of(model)}),
    ):
        state, _ = fj.allocate(fj.init(tiny_cache()), [0, 1], [3, 6])
        options = PrefillOptions(chunk_tokens=4, rows_per_step=4)
        logits, _ = prefill(model_fn, params, state, [0, 1], prompts, options=options)
        results.append(np.asarray(logits))
    np.testing.assert_allclose(*results, atol=1e-5)


def test_rotary_sees_positions_and_options_reach_attention():
    seen = []

    def rotary(x, positions):
        jax.debug.callback(lambda p: seen.append(p.tolist()), positions, ordered=True)
        return x

    attention = flax_attention()
    options = AttentionOptions(sliding_window=2)
    paged = PagedAttention(attention, layer=0, rotary=rotary, options=options)
    near = np.tri(LEN, dtype=bool) & ~np.tri(LEN, k=-2, dtype=bool)
    expected = flax_output(attention, jnp.asarray(near)[None, None])
    np.testing.assert_allclose(in_chunks(paged, spec_for(4, 3)), expected, atol=1e-5)
    jax.effects_barrier()
    assert seen[::2] == seen[1::2] == [[[0, 1, 2, 3, 4]] * 2, [[5, 6, -1, -1, -1]] * 2]


def test_sinks_are_data_of_the_model():
    attention = flax_attention()
    options = AttentionOptions(sinks=jnp.full(4, 50.0))
    paged = PagedAttention(attention, layer=0, options=options)
    assert 4 in [leaf.size for leaf in jax.tree.leaves(nnx.state(paged))]
    # All attention goes to the sinks, which have no value: only the bias is left.
    out = in_chunks(paged, spec_for(4, 3))
    np.testing.assert_allclose(out, np.broadcast_to(attention.out.bias[...], out.shape), atol=1e-5)


def test_half_precision_modules_stay_close():
    half, full = flax_attention(dtype=jnp.bfloat16), flax_attention()
    out = in_chunks(PagedAttention(half, layer=0), spec_for(4, 3, dtype="bfloat16"))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), flax_output(full), atol=0.05)


@dataclasses.dataclass
class Config:
    """Like the configurations of many models: compared by value, and not hashable."""

    widths: list = dataclasses.field(default_factory=lambda: [16, 32])
    names: dict = dataclasses.field(default_factory=lambda: {"a": {1, 2}, "b": [bytearray(b"x")]})


class Configured(nnx.Module):
    def __init__(self, decoder, config, traces):
        self.decoder, self.config, self.traces = decoder, config, traces

    def __call__(self, tokens, batch):
        self.traces(1)
        return self.decoder(tokens, batch)


def test_a_model_of_unhashable_structure_is_compiled_once_for_all_parameters():
    traces = []
    for seed in range(2):
        model_fn, params = nnx_model(Configured(tiny_decoder(seed), Config(), traces.append))
        state, _ = fj.allocate(fj.init(tiny_cache()), [0, 1], [3, 6])
        options = PrefillOptions(chunk_tokens=4, rows_per_step=4)
        prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9]]
        logits, _ = prefill(model_fn, params, state, [0, 1], prompts, options=options)
        expected = dense_logits(weights_of(tiny_decoder(seed)), prompts[1])[-1]
        np.testing.assert_allclose(logits[1], expected, atol=1e-4)
    assert len(traces) == 1


@pytest.mark.parametrize("change", [{"widths": [16, 33]}, {"names": {"a": {1, 2}, "b": []}}, {}])
def test_models_are_equal_if_their_unhashable_configurations_are(change):
    decoder = tiny_decoder()
    first, second = (
        nnx_model(Configured(decoder, Config(**changes), print))[0] for changes in ({}, change)
    )
    assert (first == second) == (not change)
    assert change or hash(first) == hash(second)


def test_a_structure_is_compared_as_it_was():
    config = Config()
    model_fn, _ = nnx_model(Configured(tiny_decoder(), config, print))
    config.widths.append(64)
    assert model_fn == nnx_model(Configured(tiny_decoder(), Config(), print))[0]
    assert model_fn != nnx_model(Configured(tiny_decoder(), config, print))[0]


def test_arrays_and_objects_in_a_structure_are_compared_by_value():
    class Same:
        __hash__ = None  # type: ignore[assignment]

        def __init__(self, value):
            self.value = value

        def __eq__(self, other):
            return self.value == other.value

    values = [np.arange(3), Same(1), (Same(1), [1]), {"a": np.ones(2)}]
    others = [np.arange(4), Same(2), (Same(1), [2]), {"a": np.zeros(2)}]
    for value, other in zip(values, others, strict=True):
        assert _frozen(value) == _frozen(copy.deepcopy(value)) != _frozen(other)
        assert hash(_frozen(value)) == hash(_frozen(copy.deepcopy(value)))


def test_another_attention_is_refused_with_the_call_to_use():
    with pytest.raises(TypeError, match="Linear has no query.*attend_new"):
        PagedAttention(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), layer=0)


def test_heads_that_do_not_divide_are_refused():
    state = fj.init(spec_for(4, 3))
    batch = PagedBatch.of(state, [0], [0], num_tokens=1)
    paged = paged_linen.PagedAttention(num_heads=4, num_kv_heads=3, layer=0)
    with pytest.raises(ValueError, match="num_kv_heads"):
        paged.init(jax.random.key(0), jnp.zeros((1, 1, FEATURES)), batch)
