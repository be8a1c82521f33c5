"""Layer groups in a decoding loop: windows that free blocks, beside one group for all layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import AttentionOptions, CacheSpec, GenerateOptions, KeyValue, LayerGroup
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.prefill import PrefillOptions
from ferrum_jax.integrations.queries import record_queries
from tests.support.caches import same_bits, snapshot
from tests.support.grouped_decoder import (
    GROUPS,
    HEAD_DIM,
    HEADS,
    ONE_GROUP,
    PAYLOAD,
    PROMPTS,
    SIZES,
    Decoder,
    attend,
    random_params,
)

SMALL_STEPS = PrefillOptions(chunk_tokens=8, rows_per_step=2)


@pytest.fixture(scope="module")
def params():
    return random_params()


def decoded(spec, params, *, names_windows, max_new_tokens=20):
    """Prefills PROMPTS into rows without room, and decodes; returns logits, tokens and state."""
    model = Decoder(names_windows)
    rows = range(len(PROMPTS))
    logits, state = fj.prefill(model, params, fj.init(spec), rows, PROMPTS, options=SMALL_STEPS)
    fj.check_state(state)
    options = GenerateOptions(max_new_tokens=max_new_tokens)
    out = fj.generate(model, params, state, rows, jnp.argmax(logits, -1), options=options)
    assert bool(out.ok)
    fj.check_state(out.state)
    return np.asarray(logits), np.asarray(out.tokens), out.state


def test_groups_decode_the_same_tokens_as_one_group_and_hold_fewer_blocks(params):
    want_logits, want, whole = decoded(ONE_GROUP, params, names_windows=True)
    logits, tokens, state = decoded(GROUPS, params, names_windows=False)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(tokens, want)
    np.testing.assert_array_equal(state.seq_lens, whole.seq_lens)
    full, local = np.asarray(state.tables.num_blocks_held).reshape(2, -1)
    assert (local <= -(-(5 + 1) // 4) + 1).all() and full.max() == 13


@pytest.mark.parametrize("window", [4, 6])
def test_a_window_that_is_one_token_too_short_or_too_long_shows(params, window):
    local = LayerGroup("local", [0, 2], PAYLOAD, window)
    wrong = CacheSpec(groups=[GROUPS.groups[0], local], **SIZES)
    want = decoded(GROUPS, params, names_windows=False)[0]
    assert np.abs(decoded(wrong, params, names_windows=False)[0] - want).max() > 1e-3


def test_prefill_extends_chunk_by_chunk_so_that_a_window_holds_one_step_at_most(params):
    spec = dataclasses.replace(GROUPS, num_blocks=8 + 5)  # 8 for all tokens, 5 for the window.
    options = PrefillOptions(chunk_tokens=8, rows_per_step=1)
    _, state = fj.prefill(Decoder(False), params, fj.init(spec), [2], PROMPTS[:1], options=options)
    assert state.seq_lens.tolist() == [0, 0, 29, 0]
    assert not bool(fj.allocate(fj.init(spec), [2], [29])[1])


def test_a_prefill_without_room_is_refused_and_changes_nothing(params):
    spec = dataclasses.replace(GROUPS, num_blocks=9)
    state = fj.init(spec)
    before = snapshot(state)
    with pytest.raises(fj.FerrumError, match=r"9 of 9 blocks"):
        fj.prefill(Decoder(False), params, state, [0], PROMPTS[:1], options=SMALL_STEPS)
    assert same_bits(state, before)


def test_queries_are_recorded_of_the_layers_that_keep_all_tokens(params):
    last = [prompt[-3:] for prompt in PROMPTS]
    recorded = []
    for spec, names_windows in ((ONE_GROUP, True), (GROUPS, False)):
        model, rows = Decoder(names_windows), range(len(PROMPTS))
        _, state = fj.prefill(model, params, fj.init(spec), rows, PROMPTS, options=SMALL_STEPS)
        recorded.append(record_queries(model, params, state, rows, last, num_q_heads=HEADS))
    of_all, of_full = recorded
    assert of_full.shape == (3, 2, HEADS, 3, HEAD_DIM)
    np.testing.assert_allclose(of_full, of_all[:, [1, 3]], rtol=1e-5, atol=1e-5)


def test_a_scan_over_the_layers_of_a_group_may_trace_the_index(params):
    local = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"][::2])
    batch = PagedBatch.of(fj.allocate(fj.init(GROUPS), [0], 6)[0], [0], 6, num_tokens=6)
    x = params["embed"][jnp.arange(6)][None]

    def layer(carry, args):
        x, batch = carry
        index, weights = args
        return attend(batch, index, x, weights, group="local"), None

    (scanned, _), _ = jax.lax.scan(layer, (x, batch), (jnp.arange(2), local))
    for i, weights in ((0, params["layers"][0]), (2, params["layers"][2])):
        x, batch = attend(batch, i, x, weights)
    np.testing.assert_allclose(scanned, x, rtol=1e-6)


# A group of another geometry, and layers that share a cache.

TWO_POOLS = CacheSpec(
    groups=[
        LayerGroup("local", [0, 1], PAYLOAD, 5),
        LayerGroup("full", [2], KeyValue(2, 4, "float32"), num_blocks=7),
    ],
    shared_layers={3: 2},
    **SIZES,
)


def test_a_shared_layer_reads_the_cache_of_another_one_and_cannot_be_written():
    state, ok = fj.allocate(fj.init(TWO_POOLS), [1], 5)
    batch = PagedBatch.of(state, [1], 5, num_tokens=5)
    k, v, q = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 4))
    batch = batch.write(2, k, v)
    np.testing.assert_array_equal(batch.attend(3, q), batch.attend(2, q))
    with pytest.raises(ValueError, match=r"Layer 3 has no cache of its own"):
        batch.write(3, k, v)
    for have, want in zip(fj.gather(state.with_pools(batch.pools), 3, 1), (k, v), strict=True):
        np.testing.assert_array_equal(have[:5], want[0])


def test_pools_of_other_geometry_fail_together():
    state, ok = fj.allocate(fj.init(TWO_POOLS), [0, 1], [20, 4])
    assert bool(ok)
    before = snapshot(state)
    state, ok = fj.extend(state, [0, 1], [8, 1], max_new_tokens=8)
    assert not bool(ok) and same_bits(state, before)  # The pool of "full" has 1 block left.
    fj.check_state(state)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda b, q: b.attend(0, q, AttentionOptions(sliding_window=6)), r"window of 6.*keeps 5"),
        (lambda b, q: b.attend(jnp.int32(0), q), r"pass group="),
        (lambda b, q: b.attend(4, q), r"Layer 4 was asked for; the cache has 3 layers, counted"),
        (lambda b, q: b.attend(0, q, group="globe"), r"no layer group 'globe'"),
        (lambda b, q: b.attend(2, q, group="local"), r"it has 2, counted"),
        (lambda b, q: b.slots(), r"Name one"),
    ],
)
def test_a_wrong_layer_group_or_window_is_refused(call, message):
    batch = PagedBatch.of(fj.init(TWO_POOLS), [0], 1, num_tokens=1)
    with pytest.raises(ValueError, match=message):
        call(batch, jnp.zeros((1, 1, 2, HEAD_DIM)))


def test_a_model_that_leaves_a_layer_of_a_group_unwritten_is_refused(params):
    def model(params, tokens, batch):
        x, batch = attend(batch, 1, params["embed"][tokens], params["layers"][1])
        return batch.last(x) @ params["embed"].T, batch.pools

    with pytest.raises(ValueError, match=r"memory of layers \[0, 2, 3\] is unused"):
        fj.prefill(model, params, fj.init(GROUPS), [0], PROMPTS[:1], options=SMALL_STEPS)
