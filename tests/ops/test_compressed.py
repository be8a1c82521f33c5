"""Rows in compressed formats: writing tokens, and attention over rows of all formats."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.ops.compressed import encode_blocks, read_blocks
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.types import NULL_SEQ, TokenFormat
from tests.support.caches import num_compilations, same_bits, slots_of, snapshot
from tests.support.compressed import (
    MAX_WRITES,
    decode,
    empty_state,
    expected_attention,
    mixed_state,
    poisoned,
    random_kv,
    read,
    with_rows,
    write_kv,
)
from tests.support.mixed_rows import (
    INT4,
    INT8,
    INT8_INT4,
    NATIVE,
    Q_HEADS,
    ROWS,
    SEQ_IDS,
    formats,
    new_state,
    pool_bits,
    queries,
)
from tests.support.pools import keys, with_arrays

# Writing.


@pytest.mark.parametrize(
    ("token_format", "dtype"),
    [(INT8, "float32"), (INT4, "float32"), (INT4, "float16"), (INT8_INT4, "bfloat16")],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_write_token_by_token_equals_encode_blocks(token_format, dtype):
    state = empty_state([token_format], dtype=dtype)
    size = state.pool.tokens_per_block(token_format)
    state, _ = with_rows(state, {2: (token_format, 2 * size)})
    # Multiples of 1/8, so that sums are exact in whichever order a rotation takes them.
    kv = jax.tree.map(lambda x: np.rint(16 * x) / 8, random_kv(state.pool, 2 * size))
    rng = np.random.default_rng(0)
    slots = slots_of(state, [(2, place) for place in range(2 * size)])
    pool = state.pool
    for token in rng.permutation(2 * size):
        for layer in range(pool.num_layers):
            one = (x[layer, token] for x in kv)
            pool = fj.write(pool, layer, slots[token], *one, token_format)
    block_ids = np.asarray(state.tables.block_ids)[2, :2]
    for layer in range(pool.num_layers):
        tokens = KeysAndValues(*(jnp.asarray(x[layer]).swapaxes(0, 1) for x in kv))
        halves = encode_blocks(pool, tokens, token_format)
        for array, half in zip(pool.arrays.values(), halves, strict=True):
            assert np.asarray(array)[block_ids, layer].tobytes() == np.asarray(half).tobytes()
    others = np.delete(np.asarray(keys(pool)), block_ids, axis=0)
    assert not others.any(), "other blocks were written"


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_write_changes_no_bit_of_other_tokens_whatever_the_words_look_like(dtype):
    state = new_state(dtype)
    bits = np.dtype(f"uint{8 * state.pool.stored_dtype.itemsize}")
    rng = np.random.default_rng(0)
    arrays = []
    for _ in range(2):
        words = rng.integers(0, np.iinfo(bits).max, keys(state.pool).shape, bits, endpoint=True)
        nan = {2: 0x7C01, 4: 0x7F800001}[bits.itemsize]
        words[..., ::3] = np.asarray(nan + rng.integers(0, 99, words[..., ::3].shape), bits)
        arrays.append(jnp.asarray(words.view(state.pool.stored_dtype)))
    state = state.with_pools([with_arrays(state.pool, *arrays)])
    rows = {0: (NATIVE, 5), 1: (INT8, 20), 2: (INT8_INT4, 20), 3: (INT4, 20)}
    state, _ = with_rows(state, rows)
    before = pool_bits(jax.tree.map(jnp.copy, state.pool))
    shape = (3, state.pool.num_kv_heads, state.pool.head_dim)
    slots = slots_of(state, [(row, 1) for row in (0, 2, 3)])
    kv = np.ones(shape, np.float32), np.ones(shape, np.float32)
    formats = np.int32([NATIVE, INT8_INT4, INT4])
    pool = jax.jit(fj.write)(state.pool, np.int32(1), slots, *kv, formats)
    written = np.asarray(state.tables.block_ids)[[0, 2, 3], 0]
    for then, now in zip(before, pool_bits(pool), strict=True):
        is_changed = then != now
        assert not np.delete(is_changed, written, axis=0).any()
        assert not is_changed[:, 0].any(), "another layer"
        native, *packed = is_changed[written, 1]
        assert not native[:, [0, 2, 3]].any()
        for block in packed:  # Its numbers and scales, of keys and values, and nothing else.
            assert block.reshape(block.shape[0], -1).sum(-1).max() <= 2 * state.pool.head_dim


@pytest.mark.parametrize("token_format", TokenFormat, ids=lambda x: x.name)
def test_write_drops_slots_outside_the_pool_in_every_format(token_format):
    """Any number below zero, too: blocks have more slots than native tokens."""
    state = mixed_state(ROWS)
    before, size = snapshot(state.pool), state.pool.num_blocks * state.pool.slots_per_block
    slots = np.full(MAX_WRITES, -1, np.int32)
    slots[:40] = -1 - np.arange(40)
    slots[40:50] = size + np.arange(10)
    slots[50:52] = -(2**31), 2**31 - 1
    ones = np.ones((MAX_WRITES, state.pool.num_kv_heads, state.pool.head_dim), np.float32)
    formats = np.full(MAX_WRITES, token_format, np.int32)
    pool = fj.write(state.pool, 0, slots, ones, ones, formats)
    assert same_bits(pool, before)
    pool = fj.write(pool, pool.num_layers, np.arange(MAX_WRITES), ones, ones, formats)
    assert same_bits(pool, before)


def test_a_row_is_read_only_in_its_own_format():
    state = mixed_state(ROWS)
    for row, (token_format, _) in ROWS.items():
        for other in TokenFormat:
            k, v = fj.gather(state, 0, row, other)
            assert bool(jnp.any(k)) == bool(jnp.any(v)) == (other == token_format)


@formats
def test_read_blocks_returns_all_slots(transform, token_format):
    state = mixed_state({1: (token_format, 13)})
    size = state.pool.tokens_per_block(token_format)
    read_layer = transform(lambda pool, ids: read_blocks(pool, jnp.int32(1), ids, token_format))
    k, v = read_layer(state.pool, state.tables.block_ids[1, :1])
    assert k.shape == v.shape == (state.pool.num_kv_heads, size, state.pool.head_dim)
    count = min(size, 13)
    # Another program may multiply and add in one instruction, where this one rounds in between.
    np.testing.assert_allclose(
        k[:, :count].swapaxes(0, 1), read(state, 1).k[1, :count], rtol=0, atol=1e-6
    )


# Attention.


@formats
@pytest.mark.parametrize("head_dim", [16, 64], ids=["by XLA", "by native code"])
def test_the_largest_numbers_of_float16_stay_finite_when_read_and_attended_to(
    token_format, head_dim
):
    state = poisoned(empty_state([token_format], dtype="float16", head_dim=head_dim))
    state, _ = with_rows(state, {0: (token_format, 5), 1: (token_format, 5)})
    signs = np.sign(random_kv(state.pool, 5).v)
    # All equal, a rotated vector is a single number: far beyond the largest of float16.
    for row, v in ((0, np.full_like(signs, 5e4)), (1, 65504 * signs)):
        state = write_kv(state, row, KeysAndValues(signs, v))
        got = read(state, row).v
        assert np.isfinite(got).all()
        assert np.abs(got - v).max() <= (100 if row == 0 else 0.75 * 65504)  # In 4 bits.
    q = jnp.zeros((2, Q_HEADS, head_dim), jnp.float16)
    plain = AttentionOptions()
    out = attend(state, jnp.int32(1), jnp.asarray([0, 1], jnp.int32), q, None, plain)
    assert out.dtype == jnp.float16 and np.isfinite(out).all()
    np.testing.assert_allclose(np.asarray(out[0], np.float32), 5e4, rtol=2e-3)


@formats
@pytest.mark.parametrize(
    ("head_dim", "dtype"), [(16, "bfloat16"), (64, "float32")], ids=["by XLA", "by native code"]
)
def test_a_number_that_is_not_finite_makes_its_own_row_nan_and_no_other(
    token_format, head_dim, dtype
):
    state = empty_state([token_format], dtype=dtype, head_dim=head_dim)
    state, _ = with_rows(state, {row: (token_format, 5) for row in range(3)})
    for row, bad in ((0, "k"), (1, "v"), (2, "")):
        kv = random_kv(state.pool, 5)
        if bad:
            getattr(kv, bad)[1, 2, 1, 3] = np.inf
        state = write_kv(state, row, kv)
    assert np.isnan(read(state, 0).k[1, 2, 1]).all()
    assert np.isnan(read(state, 1).v[1, 2, 1]).all()
    q = jnp.ones((3, Q_HEADS, head_dim), jnp.float32)
    rows = jnp.arange(3, dtype=jnp.int32)
    out = np.asarray(attend(state, jnp.int32(1), rows, q, None, AttentionOptions()))
    assert np.isnan(out[:2, 2:]).all(), "the heads that read that vector"
    assert np.isfinite(out[:2, :2]).all() and np.isfinite(out[2]).all()


OPTIONS = {
    "plain": AttentionOptions(),
    "all": AttentionOptions(
        sliding_window=11,
        soft_cap=3.0,
        scale=0.4,
        sinks=jnp.asarray([0.5, -1.0, 2.0, 0.0], jnp.float32),
    ),
}


@jax.jit
def attend(state, layer, seq_ids, q, q_lens, options):
    tables = state.tables
    rows = jnp.where(seq_ids == NULL_SEQ, tables.max_seqs, seq_ids)
    batch = PagedBatch.of(state, rows, jnp.zeros_like(rows), num_tokens=1)
    return paged_attention(
        q,
        state.pool,
        layer,
        options=options,
        block_ids=batch.rows[0].block_ids,
        held_lens=batch.rows[0].held_lens,
        q_lens=q_lens,
        token_formats=batch.rows[0].token_formats,
    )


def assert_attends(state, seq_ids, q, q_lens, options, layer=1):
    got = attend(state, jnp.int32(layer), jnp.asarray(seq_ids, jnp.int32), q, q_lens, options)
    assert got.dtype == q.dtype
    want = expected_attention(state, layer, seq_ids, q, q_lens, options)
    # In bfloat16 `gather` rounds what attention sees in float32, and the output is rounded.
    tolerance = 2e-5 if q.dtype == jnp.float32 else 3e-2
    got = np.asarray(got, np.float32)
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=tolerance)
    return got


def test_decoding_with_a_window_a_cap_and_sinks_equals_the_reference():
    rows = {0: (NATIVE, 9), 1: (INT8_INT4, 15), 2: (INT8_INT4, 17), 3: (INT8_INT4, 23)}
    state = mixed_state(rows, formats=[INT8_INT4])
    out = assert_attends(state, SEQ_IDS, queries(len(SEQ_IDS)), None, OPTIONS["all"])
    assert not out[[2, 4]].any(), "a free row, and no row"
    assert all(out[i].any() for i in (0, 1, 3, 5))


def test_chunks_with_a_window_a_cap_and_sinks_equal_the_reference():
    rows = {0: (NATIVE, 9), 1: (INT8, 15), 2: (INT4, 17), 3: (INT4, 23)}
    state = mixed_state(rows, dtype="bfloat16", formats=[INT8, INT4])
    q_lens = jnp.asarray([5, 2, 0, 3, 0, 1], jnp.int32)
    q = queries(len(SEQ_IDS), 5, dtype="bfloat16")
    out = assert_attends(state, SEQ_IDS, q, q_lens, OPTIONS["all"])
    for row, count in enumerate(q_lens.tolist()):
        assert not out[row, count:].any() and (not count or out[row, count - 1].any())


def decode_one(state, seq_ids, seed):
    """Decodes a random token in each row, which attention must see as the reference does."""
    kv = random_kv(state.pool, len(seq_ids), seed)
    q = queries(len(seq_ids), 1, seed=seed + 1)
    ids = jnp.asarray(seq_ids, jnp.int32)
    state, (out, ok) = decode(state, ids, jax.tree.map(lambda x: x[:, :, None], kv), q)
    assert bool(ok)
    for layer in range(state.pool.num_layers):
        want = expected_attention(state, layer, seq_ids, q, None, OPTIONS["plain"])
        np.testing.assert_allclose(out[layer], want, atol=2e-5)
    return state, kv


def test_rows_of_all_formats_are_decoded_together_token_by_token():
    """Blocks fill up and new ones begin, each row at its own pace."""
    state = mixed_state(ROWS)
    written = {row: read(state, row) for row in ROWS}
    for step in range(9):
        state, kv = decode_one(state, [0, 1, 2, 3], 50 + step)
    fj.check_state(state)
    for row, (token_format, length) in ROWS.items():
        now = read(state, row)
        assert now.k.shape[1] == length + 9
        for old, new in zip(written[row], now, strict=True):
            np.testing.assert_array_equal(new[:, :length], old)  # No old token was rounded again.
        bound = {NATIVE: 0, INT8: 0.01, INT8_INT4: 0.01, INT4: 0.25}[token_format]
        error = np.linalg.norm(now.k[:, -1] - kv.k[:, row]) / np.linalg.norm(kv.k[:, row])
        assert error <= bound


def test_a_program_serves_rows_of_any_formats_and_lengths_without_compiling_again():
    decode_one(mixed_state(ROWS), [0, 1, 2, 3], 1)
    others = [
        mixed_state({0: (INT4, 40), 1: (INT4, 1), 3: (NATIVE, 31), 4: (INT8, 12)}, seed=20),
        mixed_state({5: (INT8, 33)}, seed=30),
        mixed_state({row: (NATIVE, 4 + row) for row in range(5)}, seed=40),
    ]
    before = num_compilations()
    for state, seq_ids in zip(others, ([1, 0, 3, 4], [5, 2, 1, 0], [4, 2, 1, 0]), strict=True):
        decode_one(state, seq_ids, 2)
    assert num_compilations() == before
