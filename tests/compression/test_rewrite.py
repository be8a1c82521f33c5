"""Rewritten rows: their tokens, and the positions of later tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.types import NULL_SEQ
from tests.support.caches import held_lens, num_free, same_bits, snapshot
from tests.support.compressed import decode, format_of, put_row, read, row_tokens, write_kv
from tests.support.rewritten_rows import (
    INT4,
    INT8,
    NATIVE,
    PRUNE,
    PRUNE_KEYS,
    TO_INT4,
    TO_INT8,
    block_ids_of,
    compress,
    new_state,
)
from tests.support.tiny_model import rotary

# What a row holds afterwards.


def test_tokens_are_rounded_in_place_of_fewer_blocks():
    state = new_state({0: 32, 1: 30})
    before, size = read(state, 0), state.pool.tokens_per_block(INT8)
    state, ok, _ = compress(state, 0, 32, TO_INT8)
    assert ok and format_of(state, 0) == INT8 and held_lens(state)[:2] == [32, 30]
    assert block_ids_of(state, 0).size == -(-32 // size)
    for old, new in zip(before, read(state, 0), strict=True):
        step = np.abs(old).max(-1, keepdims=True) / 127
        assert (np.abs(new - old) <= 0.51 * step).all()
    fj.check_state(state)


def test_a_compressed_row_is_compressed_further():
    state = new_state({0: 32}, is_random=False)
    state, ok, _ = compress(state, 0, 32, TO_INT8)
    state, ok_too, _ = compress(state, 0, 32, TO_INT4)
    assert ok and ok_too and format_of(state, 0) == INT4
    assert row_tokens(state, 0) == [*range(1, 33)]
    assert num_free(state) == 24 - -(-32 // state.pool.tokens_per_block(INT4))
    fj.check_state(state)


@pytest.mark.parametrize("num_kept", [5, 6, 8, 29])
def test_pruning_keeps_the_selected_tokens_bit_for_bit(num_kept):
    state = new_state({0: 30, 1: 7})
    before = read(state, 0)
    state, ok, loss = compress(state, 0, num_kept, PRUNE)
    kept = [0, 1, *range(32 - num_kept, 30)]  # Two sinks, and the last ones.
    for old, new in zip(before, read(state, 0), strict=True):
        assert new.tobytes() == np.ascontiguousarray(old[:, kept]).tobytes()
    assert ok and format_of(state, 0) == NATIVE
    assert held_lens(state)[0] == num_kept and int(state.tables.seq_lens[0]) == 30
    assert np.asarray(state.tables.num_pruned).tolist() == [30 - num_kept, 0, 0, 0, 0, 0]
    assert num_free(state) == 24 - -(-num_kept // 4) - 2
    np.testing.assert_allclose(loss.error, loss.pruning_error, rtol=1e-5)
    fj.check_state(state)


def kept_of(before, after):
    """Which tokens each layer and head holds, found by their bits: i[L, K, H]."""
    same = (before.k[:, None] == after.k[:, :, None]).all(-1)  # [L, K, T, H]
    assert (same.sum(2) == 1).all(), "a key is not one of the old ones"
    kept = same.argmax(2)
    values = np.take_along_axis(before.v, kept[..., None], axis=1)
    assert values.tobytes() == after.v.tobytes(), "a value left its key"
    return kept


def test_heads_choose_for_themselves_and_keep_key_with_value_in_order():
    state = new_state({0: 30})
    before = read(state, 0)
    state, ok, _ = compress(state, 0, 12, PRUNE_KEYS)
    kept = kept_of(before, read(state, 0))
    assert ok and kept.shape == (2, 12, 2)
    assert (np.diff(kept, axis=1) > 0).all()
    assert (kept[:, 0] == 0).all() and (kept[:, -2:] == [[28], [29]]).all()
    chosen = {tuple(kept[layer, :, head]) for layer in range(2) for head in range(2)}
    assert len(chosen) == 4, "the test needs heads that choose differently"


def test_a_row_that_is_pruned_twice_counts_all_dropped_tokens():
    state = new_state({0: 30}, is_random=False)
    state, _, _ = compress(state, 0, 20, PRUNE)
    state, ok, _ = compress(state, 0, 6, PRUNE)
    assert ok and row_tokens(state, 0) == [1, 2, 27, 28, 29, 30]
    assert int(state.tables.num_pruned[0]) == 24
    fj.check_state(state)


# Positions.


ROWS = jnp.asarray([2, NULL_SEQ, NULL_SEQ, NULL_SEQ], jnp.int32)


def decode_turned(state, positions, q, k, v):
    """Decodes a token of row 2 as a model with rotary embeddings does; out is [L, Hq, D]."""
    q = jnp.broadcast_to(q, (4, 1, *q.shape))
    kv = [jnp.broadcast_to(x[:, None, None], (2, 4, 1, *x.shape[1:])) for x in (k, v)]
    keys = jnp.stack([rotary(x, positions) for x in kv[0]])
    state, (out, ok) = decode(state, ROWS, KeysAndValues(keys, kv[1]), rotary(q, positions))
    assert bool(ok)
    return state, np.asarray(out[:, 0, 0])


def turned(x, positions):
    """Rotary embedding in float64 of x [T, H, D] at positions [T]."""
    half = x.shape[-1] // 2
    rates = 100.0 ** (-np.arange(half) / half)
    turns = np.exp(1j * np.asarray(positions)[:, None, None] * rates)
    pairs = (x[..., :half] + 1j * x[..., half:]) * turns
    return np.concatenate([pairs.real, pairs.imag], -1)


def masked_attention(q, k, v, is_seen):
    """One query [Hq, D] on tokens [T, H, D], of which each head sees some: is_seen [T, H]."""
    group = q.shape[0] // k.shape[1]
    out = np.zeros_like(q, np.float64)
    for head, one in enumerate(q):
        seen = is_seen[:, head // group]
        keys, values = k[seen, head // group], v[seen, head // group]
        logits = keys @ one / np.sqrt(q.shape[1])
        shares = np.exp(logits - logits.max())
        out[head] = shares / shares.sum() @ values
    return out


@pytest.mark.parametrize("rewrite", [PRUNE, PRUNE_KEYS], ids=["window", "per head"])
def test_tokens_after_pruning_have_the_positions_of_the_whole_sequence(rewrite):
    num_tokens, num_kept, num_more = 30, 9, 5
    state = new_state({2: num_tokens})
    rng = np.random.default_rng(1)
    total = num_tokens + num_more
    q = rng.normal(size=(total, 4, 16)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, total, 2, 16)).astype(np.float32)
    keys = np.stack([turned(x[:num_tokens], range(num_tokens)) for x in k]).astype(np.float32)
    state = write_kv(state, 2, KeysAndValues(keys, v[:, :num_tokens]))
    before = read(state, 2)
    state, ok, _ = compress(state, 2, num_kept, rewrite)
    assert ok
    kept = kept_of(before, read(state, 2))
    assert num_kept < num_tokens // 3
    for position in range(num_tokens, total):
        grown, _ = fj.extend(state, [2], [1], max_new_tokens=1)
        positions = PagedBatch.of(grown, ROWS, [1, 0, 0, 0], num_tokens=1).positions
        assert positions.tolist() == [[position], [-1], [-1], [-1]]
        state, out = decode_turned(state, positions, q[position], k[:, position], v[:, position])
        errors = []
        for layer in range(2):
            is_seen = np.zeros((position + 1, 2), bool)
            is_seen[num_tokens:] = True
            np.put_along_axis(is_seen, kept[layer], True, axis=0)
            for at in (position, position - num_tokens + num_kept):  # Right, and by slots.
                where = [*range(num_tokens), *range(at - position + num_tokens, at + 1)]
                want = masked_attention(
                    turned(q[position][None], [at])[0],
                    turned(k[layer, : position + 1], where),
                    v[layer, : position + 1],
                    is_seen,
                )
                errors.append(np.linalg.norm(out[layer] - want) / np.linalg.norm(want))
        assert max(errors[::2]) < 1e-4
        assert min(errors[1::2]) > 0.1, "the test would not notice wrong positions"
    fj.check_state(state)


def test_chunks_after_pruning_have_the_positions_of_the_whole_sequence():
    state = new_state({0: 30})
    state, _, _ = compress(state, 0, 6, PRUNE)
    state, ok = fj.extend(state, [0], [7], max_new_tokens=7)
    batch = PagedBatch.of(state, [0, 1], [3, 0], num_tokens=4)
    assert bool(ok) and batch.positions.tolist() == [[34, 35, 36, -1], [-1] * 4]
    held = block_ids_of(state, 0)
    size = state.pool.slots_per_block
    slots = [held[p // 4] * size + p % 4 for p in (10, 11, 12)]
    assert batch.slots()[0, :3].tolist() == slots
    earlier = PagedBatch.of(state, [0], [2], num_tokens=2, seq_lens=[32])
    assert earlier.positions.tolist() == [[30, 31]]
    assert earlier.slots()[0].tolist() == [held[p // 4] * size + p % 4 for p in (6, 7)]
    before = PagedBatch.of(state, [0], [2], num_tokens=2, seq_lens=[20])  # All dropped.
    assert before.positions.tolist() == [[-1, -1]]


def test_truncate_cuts_a_pruned_row_by_the_length_of_its_sequence():
    state = new_state({0: 30, 1: 5}, is_random=False)
    state, _, _ = compress(state, 0, 6, PRUNE)
    kept = row_tokens(state, 0)
    state, ok = fj.extend(state, [0], [3], max_new_tokens=3)
    state = put_row(state, 0, [61, 62, 63], 6)
    state, ok = fj.truncate(state, [0, 1], [31, 4])
    assert bool(ok) and row_tokens(state, 0) == [*kept, 61], "speculated tokens that were refused"
    state, ok = fj.extend(state, [0], [1], max_new_tokens=1)
    assert PagedBatch.of(state, [0], [1], num_tokens=1).positions.tolist() == [[31]]
    for length in (33, 24, 1):
        before = snapshot(state)
        state, ok = fj.truncate(state, [1, 0], [3, length])
        assert not bool(ok) and same_bits(state, before)
    fj.check_state(state)


@pytest.mark.parametrize("length", range(25, 31))
def test_truncate_of_a_pruned_row_keeps_no_token_from_beyond_the_cut(length):
    """Token t is at position t - 1."""
    state = new_state({0: 30}, is_random=False)
    state, _, _ = compress(state, 0, 6, PRUNE)
    kept = row_tokens(state, 0)
    state, ok = fj.truncate(state, [0], [length])
    assert bool(ok) and max(row_tokens(state, 0)) <= length
    assert row_tokens(state, 0) == kept[: length - 24]
    state, _ = fj.extend(state, [0], [1], max_new_tokens=1)
    assert PagedBatch.of(state, [0], [1], num_tokens=1).positions.tolist() == [[length]]
    fj.check_state(state)
