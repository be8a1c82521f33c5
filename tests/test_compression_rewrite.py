"""Rewriting one row: what it then holds, what was lost, and that nothing else changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.compression import rewrite as rewriting
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.compression.rewrite import (
    Rewrite,
    compress_row,
    reference_queries,
    sample_queries,
)
from ferrum_jax.formats import KeysAndValues
from ferrum_jax.integrations.batch import PagedBatch
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.types import NULL_SEQ, TokenFormat
from tests.compressed import (
    contents,
    decode,
    empty_state,
    format_of,
    poisoned,
    put,
    random_kv,
    read,
    small_spec,
    with_rows,
    write_kv,
)
from tests.helpers import num_compilations, num_free, same_bits, seq_lens, snapshot
from tests.test_compiled import IN_PLACE, pool_sized_results
from tests.tiny_model import rotary

NATIVE, INT8, INT8_INT4, INT4 = TokenFormat
WINDOW = CompressionMethod(scorer="window", num_sinks=2, num_recent=3)
KEYS = CompressionMethod(scorer="key_difference", num_sinks=1, num_recent=2)
FITTED = dataclasses.replace(KEYS, fit_steps=20)


def how(source, target, method=None):
    """A row of at most 8 blocks before and after: few programs serve all tests."""
    return Rewrite(
        source=source, target=target, max_source_blocks=8, max_target_blocks=8, method=method
    )


TO_INT8, TO_INT4 = how(NATIVE, INT8), how(INT8, INT4)
PRUNE, PRUNE_KEYS = how(NATIVE, NATIVE, WINDOW), how(NATIVE, NATIVE, KEYS)
PRUNE_TO_INT4 = how(NATIVE, INT4, WINDOW)


def new_state(rows, *, is_random=True):
    """Native rows of so many tokens, in a pool that is NaN elsewhere."""
    state = poisoned(empty_state())
    state, ok = with_rows(state, {row: (NATIVE, count) for row, count in rows.items()})
    assert ok
    for row, count in rows.items():
        if is_random:
            state = write_kv(state, row, random_kv(state.pool, count, seed=row))
        else:
            state = put(state, row, range(1, count + 1))
    return state


def queries_of(state, seed=3):
    """f32[L, Hq, Q, D] as a model has them, two query heads for each KV head."""
    pool = state.pool
    shape = pool.num_layers, 2 * pool.num_kv_heads, 3, pool.head_dim
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compress(state, row, num_kept, rewrite):
    queries = reference_queries(queries_of(state), state.pool.num_kv_heads)
    state, ok, loss = compress_row(state, row, num_kept, queries, rewrite)
    return state, bool(ok), jax.tree.map(np.asarray, loss)


def block_ids_of(state, row):
    held = int(state.tables.num_blocks_held[row])
    return np.asarray(state.tables.block_ids)[row, :held]


def bytes_of(state, block_ids):
    return [np.array(x)[block_ids].tobytes() for x in (state.pool.k, state.pool.v)]


# What a row holds afterwards.


def test_tokens_are_rounded_in_place_of_fewer_blocks():
    state = new_state({0: 32, 1: 30})
    before, size = read(state, 0), state.pool.tokens_per_block(INT8)
    state, ok, _ = compress(state, 0, 32, TO_INT8)
    assert ok and format_of(state, 0) == INT8 and seq_lens(state)[:2] == [32, 30]
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
    assert contents(state, 0) == [*range(1, 33)]
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
    assert seq_lens(state)[0] == num_kept
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


def test_pruned_twice_a_row_counts_all_that_it_lost():
    state = new_state({0: 30}, is_random=False)
    state, _, _ = compress(state, 0, 20, PRUNE)
    state, ok, _ = compress(state, 0, 6, PRUNE)
    assert ok and contents(state, 0) == [1, 2, 27, 28, 29, 30]
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
def test_tokens_after_pruning_stand_where_they_would_have_stood(rewrite):
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


def test_chunks_after_pruning_continue_at_their_positions_too():
    state = new_state({0: 30})
    state, _, _ = compress(state, 0, 6, PRUNE)
    state, ok = fj.extend(state, [0], [7], max_new_tokens=7)
    batch = PagedBatch.of(state, [0, 1], [3, 0], num_tokens=4)
    assert bool(ok) and batch.positions.tolist() == [[34, 35, 36, -1], [-1] * 4]
    held = block_ids_of(state, 0)
    size = state.pool.slots_per_block
    slots = [held[p // 4] * size + p % 4 for p in (10, 11, 12)]
    assert batch.slots[0, :3].tolist() == slots
    earlier = PagedBatch.of(state, [0], [2], num_tokens=2, seq_lens=[8])
    assert earlier.positions.tolist() == [[30, 31]]


# What nobody else notices.


@pytest.mark.parametrize("rewrite", [TO_INT8, PRUNE], ids=["rounded", "pruned"])
def test_no_byte_of_another_row_changes(rewrite):
    state = new_state({0: 30, 1: 17, 3: 9})
    blocks = {row: block_ids_of(state, row) for row in (1, 3)}
    before = {row: bytes_of(state, blocks[row]) for row in blocks}
    num_kept = 30 if rewrite is TO_INT8 else 7
    state, ok, _ = compress(state, 0, num_kept, rewrite)
    assert ok
    for row in blocks:
        assert block_ids_of(state, row).tolist() == blocks[row].tolist()
        assert bytes_of(state, blocks[row]) == before[row]
        assert format_of(state, row) == NATIVE
    fj.check_state(state)


@pytest.mark.parametrize("compressed", [0, 1])
def test_blocks_that_another_row_holds_too_stay_as_they_are_for_it(compressed):
    other = 1 - compressed
    state = new_state({0: 30}, is_random=False)
    state, _ = fj.fork(state, [0], [1])
    held = block_ids_of(state, other)
    before, was_free = bytes_of(state, held), num_free(state)
    state, ok, _ = compress(state, compressed, 30, TO_INT8)
    num_blocks = -(-30 // state.pool.tokens_per_block(INT8))
    assert ok and num_free(state) == was_free - (num_blocks - 1), "its own last block is reused"
    assert block_ids_of(state, other).tolist() == held.tolist()
    assert bytes_of(state, held) == before
    assert not set(block_ids_of(state, compressed)) & set(held.tolist())
    assert contents(state, other) == contents(state, compressed) == [*range(1, 31)]
    fj.check_state(state)
    state = fj.free(state, [compressed])
    assert num_free(state) == 24 - 8 and bytes_of(state, held) == before
    fj.check_state(state)


def test_both_holders_may_be_compressed_one_after_the_other():
    state = new_state({0: 30}, is_random=False)
    state, _ = fj.fork(state, [0], [1])
    state, ok, _ = compress(state, 0, 30, TO_INT8)
    state, ok_too, _ = compress(state, 1, 7, PRUNE)
    assert ok and ok_too
    assert contents(state, 0) == [*range(1, 31)]
    assert contents(state, 1) == [1, 2, 26, 27, 28, 29, 30]
    num_blocks = -(-30 // state.pool.tokens_per_block(INT8))
    assert num_free(state) == 24 - num_blocks - 2
    fj.check_state(state)


REFUSED = {
    "more than it holds": (0, 31, PRUNE),
    "nothing": (0, 0, PRUNE),
    "less than nothing": (0, -1, PRUNE),
    "a free row": (4, 1, PRUNE),
    "no row": (-1, 1, PRUNE),
    "a row out of range": (6, 1, PRUNE),
    "too few free blocks": (0, 29, PRUNE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_no_bit(name):
    """Row 0 shares all of its 7 full blocks, and 6 are free."""
    state = new_state({0: 30, 2: 32, 3: 2})
    state, ok = fj.fork(state, [0], [1])
    assert bool(ok) and num_free(state) == 6
    row, num_kept, rewrite = REFUSED[name]
    before = snapshot(state)
    state, ok, _ = compress(state, row, num_kept, rewrite)
    assert not ok and same_bits(state, before)
    fj.check_state(state)


def test_a_row_that_would_need_more_blocks_than_a_row_may_hold_is_refused():
    """Back to a format of more bits, which the facade never asks for."""
    state = new_state({0: 32}, is_random=False)
    state, _, _ = compress(state, 0, 32, TO_INT8)
    state, ok = fj.extend(state, [0], [8], max_new_tokens=8)
    assert bool(ok)
    state = put(state, 0, range(33, 41), 32)
    before = snapshot(state)
    wide = Rewrite(source=INT8, target=NATIVE, max_source_blocks=8, max_target_blocks=16)
    state, ok, _ = compress(state, 0, 40, wide)
    assert not ok and same_bits(state, before)


def test_rows_and_counts_are_data_to_one_program():
    state = new_state({0: 30, 1: 11, 2: 19})
    state, _, _ = compress(state, 0, 7, PRUNE)
    before = num_compilations()
    queries = reference_queries(queries_of(state), 2)
    for row, num_kept in ((1, 6), (2, 18), (5, 3)):
        state, _, _ = compress_row(state, np.int32(row), np.int32(num_kept), queries, PRUNE)
    assert num_compilations() == before
    assert seq_lens(state) == [7, 6, 18, 0, 0, 0]


def test_the_pool_is_rewritten_in_place():
    """Scratch is some times the row, whatever the pool."""
    spec = small_spec(dtype="bfloat16", num_blocks=4093, num_layers=3)
    state = enable_formats(fj.init(spec), [INT8])
    rewrite = Rewrite(source=NATIVE, target=INT8, max_source_blocks=8, max_target_blocks=4)
    queries = jnp.zeros((3, 2, 4, 16), jnp.float32)

    def program(state, queries):
        return rewriting._compress_row(state, jnp.int32(0), jnp.int32(9), queries, rewrite)

    compiled = jax.jit(program, donate_argnums=0).lower(state, queries).compile()
    made = pool_sized_results(compiled, state.pool)
    assert made and {opcode for _, opcode in made} <= IN_PLACE
    row_bytes = 3 * 2 * 2 * 32 * 16 * 4  # Layers, keys and values, heads, tokens, float32.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * row_bytes
    pool = state.pool
    places = {x.unsafe_buffer_pointer() for x in (pool.k, pool.v)}
    after, _, _ = compiled(state, queries)
    assert pool.k.is_deleted() and pool.v.is_deleted()
    assert {x.unsafe_buffer_pointer() for x in (after.pool.k, after.pool.v)} == places


# What was lost.


def outputs(kv, queries):
    """Attention of every query to all tokens, layer by layer: float64 [L, Hq, Q, D]."""
    group = queries.shape[1] // kv.k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), group, axis=2) for x in kv)
    logits = np.einsum("lhqd,lthd->lhqt", queries, k) / np.sqrt(queries.shape[-1])
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("lhqt,lthd->lhqd", shares / shares.sum(-1, keepdims=True), v)


def errors(got, want, queries):
    """Relative L2 error of each layer's outputs."""
    difference = outputs(got, queries) - outputs(want, queries)
    axes = 1, 2, 3
    return np.sqrt((difference**2).sum(axes) / (outputs(want, queries) ** 2).sum(axes))


def test_losses_are_what_numpy_finds():
    state = new_state({0: 30})
    before, queries = read(state, 0), queries_of(state)
    state, _, loss = compress(state, 0, 9, PRUNE_TO_INT4)
    kept = [0, 1, *range(23, 30)]
    pruned = KeysAndValues(*(x[:, kept] for x in before))
    np.testing.assert_allclose(loss.pruning_error, errors(pruned, before, queries), rtol=1e-3)
    np.testing.assert_allclose(loss.fitting_error, loss.pruning_error, rtol=1e-6)
    np.testing.assert_allclose(loss.error, errors(read(state, 0), before, queries), rtol=1e-3)
    assert (np.abs(loss.error - loss.pruning_error) > 1e-4).all(), "rounding is part of it"


def test_losses_of_a_second_rounding_are_its_own():
    state = new_state({0: 30})
    state, _, first = compress(state, 0, 30, TO_INT8)
    middle, queries = read(state, 0), queries_of(state)
    state, _, second = compress(state, 0, 30, TO_INT4)
    np.testing.assert_allclose(second.error, errors(read(state, 0), middle, queries), rtol=1e-3)
    for loss in (first, second):
        assert not loss.pruning_error.any() and not loss.fitting_error.any()
        assert (loss.error > 0).all()
    assert (second.error > 5 * first.error).all()


def test_fitting_makes_up_for_some_of_the_pruning_on_the_queries_given():
    state = new_state({0: 30})
    before, queries = read(state, 0), queries_of(state)
    state, ok, loss = compress(state, 0, 12, how(NATIVE, NATIVE, FITTED))
    assert ok and (loss.fitting_error <= loss.pruning_error * (1 + 1e-5)).all()
    assert (loss.fitting_error < 0.9 * loss.pruning_error).any()
    np.testing.assert_allclose(loss.error, loss.fitting_error, rtol=1e-4)
    np.testing.assert_allclose(loss.error, errors(read(state, 0), before, queries), rtol=1e-3)
    fj.check_state(state)


def test_sampled_queries_are_as_wide_as_the_keys_and_of_these_alone():
    """Whatever lies in other blocks, NaN even, is not looked at."""
    state = new_state({0: 30, 1: 9})
    kv = read(state, 1)
    queries = np.asarray(sample_queries(state, jnp.int32(1), PRUNE))
    assert queries.shape == (2, 2, 16, 16) and np.isfinite(queries).all()
    width = np.sqrt((kv.k**2).mean(1))  # [L, H, D]
    np.testing.assert_allclose(queries.std(axis=(2, 3)), width.mean(-1), rtol=0.25)
    assert not np.array_equal(queries[0] / width[0][:, None], queries[1] / width[1][:, None])
