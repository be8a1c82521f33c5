"""Writing, gathering and copying: tokens are stored in their slots, and in no others."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.types import NULL_BLOCK
from tests.support.caches import (
    contents,
    filled,
    held_lens,
    payload,
    put,
    same_bits,
    snapshot,
    tiny_spec,
)
from tests.support.pools import keys, values, with_arrays

# Two heads of four numbers, so that axes cannot be mistaken for one another.
MOST, LEAST = 2**31 - 1, -(2**31)


def spec_of(dtype):
    return tiny_spec(num_layers=3, num_kv_heads=2, head_dim=4, dtype=dtype)


def random_pool(dtype, seed=0):
    """A pool in which every number differs from its neighbours, as `write` stores it."""
    pool = fj.init(spec_of(dtype)).pool
    rng = np.random.default_rng(seed)
    slots = np.arange(pool.num_blocks * pool.block_size)
    for layer in range(pool.num_layers):
        k, v = rng.normal(size=(2, slots.size, pool.num_kv_heads, pool.head_dim))
        pool = fj.write(pool, layer, slots, k.astype(np.float32), v.astype(np.float32))
    return pool


def test_write_puts_each_token_into_its_slot_of_one_layer(transform, dtype):
    pool = fj.init(spec_of(dtype)).pool
    slots = np.int32([7, 35, 0])
    k, v = payload(pool, 1, [11, 300, 5])
    pool = transform(fj.write)(pool, np.int32(1), slots, k, v)
    for array, tokens in ((keys(pool), k), (values(pool), v)):
        got = np.asarray(array if array.dtype == pool.dtype else array.view(pool.dtype))
        want = np.zeros(got.shape, np.float32)
        for slot, token in zip(slots, tokens, strict=True):
            want[slot // 3, 1, :, slot % 3] = token
        np.testing.assert_array_equal(got.astype(np.float32), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "int8"])
def test_write_rounds_to_the_dtype_of_the_pool(dtype):
    pool = fj.init(spec_of(dtype)).pool
    k = np.random.default_rng(0).normal(scale=30, size=(1, 2, 4)).astype(np.float32)
    pool = fj.write(pool, 0, [4], k, -k)
    state, ok = fj.allocate(fj.init(spec_of(dtype)).with_pools([pool]), [0], [5])
    got_k, got_v = fj.gather(state, 0, 0)
    assert bool(ok) and got_k.dtype == got_v.dtype == jnp.dtype(dtype)
    if dtype == "int8":
        k = np.rint(k)
    want = k[0].astype(jnp.dtype(dtype))
    np.testing.assert_array_equal(np.asarray(got_k)[4].view(np.uint8), want.view(np.uint8))
    np.testing.assert_array_equal(np.asarray(got_v)[4].astype(np.float32), -want.astype(np.float32))


def test_slots_layers_and_blocks_outside_the_pool_are_dropped(dtype):
    pool = random_pool(dtype)
    before = snapshot(pool)
    for layer, slot in ((0, -1), (0, -36), (0, 36), (-1, 0), (-3, 0), (3, 0)):
        pool = fj.write(pool, layer, [slot], *payload(pool, 0, [9]))
    outside = [NULL_BLOCK, 12, MOST, LEAST]
    pool = fj.copy_blocks(pool, [*outside, 1, 1, 1, 1], [0, 1, 2, 3, *outside])
    assert same_bits(pool, before)


def test_write_takes_slots_of_any_rank(dtype):
    flat, shaped = random_pool(dtype), random_pool(dtype)
    k, v = payload(flat, 0, range(1, 7))
    flat = fj.write(flat, 2, [5, 9, -1, 30, 31, 32], k, v)
    k, v = (x.reshape(2, 3, 2, 4) for x in (k, v))
    shaped = fj.write(shaped, 2, [[5, 9, -1], [30, 31, 32]], k, v)
    assert same_bits(flat, snapshot(shaped))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_one_outlier_of_a_narrow_pool_does_not_spoil_the_attention_of_its_row(dtype):
    state, ok = fj.allocate(fj.init(spec_of(dtype)), [0], 3)
    assert bool(ok)
    k = np.ones((1, 3, 2, 4), np.float32)
    k[0, 0, 0] = [1000, -1e30, np.inf, -np.inf]
    batch = PagedBatch.of(state, [0], 3, num_tokens=3).write(0, k, np.ones_like(k))
    np.testing.assert_allclose(batch.attend(0, jnp.ones((1, 3, 2, 4))), 1, rtol=1e-6)


def test_write_refuses_shapes_that_do_not_fit_the_pool():
    pool = random_pool("float32")
    for shape in ((1, 1, 4), (1, 2, 3), (2, 2, 4), (2, 4)):
        wrong, right = np.zeros(shape, np.float32), np.zeros((1, 2, 4), np.float32)
        for name, kv in (("k", (wrong, right)), ("v", (right, wrong))):
            message = (
                rf"{name} must have shape \(1, 2, 4\).*num_kv_heads \(2\) and head_dim \(4\).*got "
                rf"{re.escape(str(shape))}.*Make the cache with the model's own num_kv_heads"
            )
            for array in (np.asarray, jnp.asarray):
                with pytest.raises(AssertionError, match=message):
                    fj.write(pool, 0, [0], *map(array, kv))
    with pytest.raises(AssertionError, match=r"layer must be a single integer, got shape \(1,\)"):
        fj.write(pool, [0], [0], right, right)


def test_write_does_not_read_numpy_arrays_after_it_returns():
    slow = jax.jit(lambda x, m: x + 0 * jnp.tanh(m @ m @ m @ m)[0, 0])  # Still to be computed.
    memory = np.empty(12 * 32 + 64, np.uint8)  # JAX on CPU reads aligned arrays where they are.
    k = memory[-memory.ctypes.data % 64 :][: 12 * 32].view(np.float32).reshape(12, 2, 4)
    for _ in range(3):
        pool = random_pool("float32")
        pool = with_arrays(pool, slow(keys(pool), np.ones((600, 600), np.float32)), values(pool))
        k[...] = 1
        pool = fj.write(pool, 0, np.arange(12, dtype=np.int32) * 3, k, k)
        k[...] = 2  # The next step's keys.
        assert (np.asarray(keys(pool))[:, 0, :, 0] == 1).all()


def test_gather_returns_a_sequence_in_order_followed_by_zeros(transform, dtype):
    state = fj.free(filled(spec_of(dtype), {0: 3, 1: 15, 2: 4}), [1])
    state, _ = fj.extend(state, [2], [4], max_new_tokens=4)  # Its blocks are not neighbours.
    state = put(state, {(2, position): 900 + position for position in range(4, 8)})
    tokens = [*range(300, 304), *range(904, 908)]
    for layer in range(3):
        got = transform(fj.gather)(state, np.int32(layer), np.int32(2))
        for have, want in zip(got, payload(state.pool, layer, tokens), strict=True):
            assert have.shape == (15, 2, 4) and have.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(np.asarray(have, np.float32)[:8], want)
            assert not np.asarray(have, np.float32)[8:].any()


def test_gather_of_the_first_blocks_is_the_beginning_of_all():
    state = filled(tiny_spec(), {1: 8})
    for max_blocks in (1, 2, 9):
        first = fj.gather(state, 0, 1, max_blocks=max_blocks)
        for got, whole in zip(first, fj.gather(state, 0, 1), strict=True):
            assert len(got) == min(3 * max_blocks, len(whole))
            np.testing.assert_array_equal(got, whole[: len(got)])
    with pytest.raises(ValueError, match="max_blocks must be at least 1"):
        fj.gather(state, 0, 1, max_blocks=0)


@pytest.mark.parametrize(("layer", "row"), [(0, 3), (0, 5), (0, -1), (-1, 0), (3, 0)])
def test_gather_of_an_absent_row_or_layer_is_zero(dtype, layer, row):
    state = filled(spec_of(dtype), {0: 15, 4: 15}).with_pools([random_pool(dtype)])
    for got in fj.gather(state, layer, row):
        assert got.shape == (15, 2, 4) and not np.asarray(got, np.float32).any()


def test_copy_blocks_reads_every_bit_of_every_layer_before_it_writes(transform, dtype):
    odd = np.tile(np.array([np.nan, -0.0, np.inf, 1e-40], np.float32), (1, 2, 1))
    pool = fj.write(random_pool(dtype), 1, [5], odd, -odd)  # Into block 1.
    want = snapshot(pool)
    sources, targets = np.int32([5, 7, 3, 1, 2, 11]), np.int32([3, 5, 7, 4, 11, 0])
    for leaf in want:
        leaf[targets] = leaf[sources]
    assert same_bits(transform(fj.copy_blocks)(pool, sources, targets), want)


def test_allocate_and_free_leave_older_states_readable(spec):
    old = filled(spec, {0: 4})
    new, ok = fj.allocate(old, [1], [3])
    newer = fj.free(new, [0])
    assert bool(ok) and held_lens(old) == [4, 0, 0, 0, 0] and held_lens(newer) == [0, 3, 0, 0, 0]
    assert contents(old, 0) == contents(new, 0) == list(range(100, 104))
