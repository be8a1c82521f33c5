"""Requests that are compressed while they live: what comes back, and all that goes on as before."""

import asyncio
import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.compression.methods import (
    CompressionMethod,
    plan_compression,
    smallest_num_blocks,
)
from ferrum_jax.errors import (
    CompressionError,
)
from ferrum_jax.formats import KeysAndValues
from ferrum_jax.integrations.batch import PagedBatch
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import TokenFormat
from tests.support import compressed
from tests.support.compressed import decode, payload
from tests.support.compressed_managers import (
    BLOCK_BYTES,
    BLOCKS,
    INT4,
    INT8,
    NATIVE,
    PRUNE,
    SIZES,
    TO_INT4,
    TO_INT8,
    TOKENS,
    WAYS,
    begin,
    blocks_in,
    fill,
    kept_tokens,
    make,
    picture,
    tokens_of,
    ways,
)
from tests.support.helpers import num_compilations
from tests.support.loops import on_loop, settle
from tests.support.parts import pool_of

# Ratios.


@pytest.mark.parametrize("source", [NATIVE, INT8, INT4])
def test_a_plan_meets_the_ratio_whatever_the_length_or_there_is_none(source):
    methods = [
        CompressionMethod(),
        CompressionMethod(num_sinks=0, num_recent=0),
        CompressionMethod(num_sinks=3, num_recent=5),
        CompressionMethod(scorer=None),
        *(CompressionMethod(token_format=f) for f in TokenFormat if f >= source),
        *(CompressionMethod(token_format=f, scorer=None) for f in TokenFormat if f >= source),
        CompressionMethod(token_format=INT4, num_sinks=1, num_recent=1),
    ]
    offers = [SIZES, {NATIVE: 4}, {NATIVE: 4, INT8: 4}]
    planned = refused = 0
    for method, sizes in itertools.product(methods, offers):
        if source not in sizes or (method.token_format or NATIVE) not in sizes:
            continue
        for count, max_blocks in itertools.product(range(1, 90), range(0, 24)):
            plan = plan_compression(method, count, source, sizes, max_blocks)
            least = smallest_num_blocks(method, count, source, sizes)
            assert (plan is None) == (least > max_blocks)
            if plan is None:
                refused += 1
                continue
            planned += 1
            assert plan.num_blocks <= max_blocks
            assert plan.num_blocks == -(-plan.num_kept // sizes[plan.token_format])
            assert plan.token_format >= source
            assert method.token_format in (None, plan.token_format)
            must_stay = min(count, max(1, method.num_sinks + method.num_recent))
            assert must_stay <= plan.num_kept <= count
            if method.scorer is None:
                assert plan.num_kept == count
    assert planned and refused


@ways
@pytest.mark.parametrize("ratio_too_low", [False, True])
def test_a_ratio_is_met_or_refused(way, ratio_too_low):
    ratio, method = WAYS[way]
    manager = make()
    handle = begin(manager, "a")
    if ratio_too_low:
        before = picture(manager)
        with pytest.raises(CompressionError, match="(?s)'a'.*0.12 of its 8 blocks.*larger ratio"):
            manager.compress_cache("a", 0.12, method)
        assert picture(manager) == before and handle.compression is None
    else:
        manager.compress_cache("a", ratio, method)
        stats = handle.stats()
        assert stats.memory_bytes <= ratio * 8 * BLOCK_BYTES
        assert handle.compression.ratio == stats.blocks_allocated / 8 <= ratio
        assert handle.num_tokens() == 30 and tokens_of(handle) == kept_tokens(way)
    manager.check()


def test_by_default_rounding_is_tried_before_dropping():
    manager = make()
    handle = begin(manager, "a", [*range(1, 33)])
    manager.compress_cache("a", 0.5)
    report = handle.compression
    assert report.num_kept_tokens == report.num_tokens == 32 and report.ratio <= 0.5
    assert report.token_format != NATIVE and tokens_of(handle) == [*range(1, 33)]
    manager.check()


def test_a_request_within_the_ratio_stays_as_it_is():
    manager = make()
    begin(manager, "a")
    begin(manager, "short", [1])
    manager.allocate(manager.new_request("none", 0))
    before = picture(manager)
    manager.compress_cache("a", 1.0, TO_INT8)
    manager.compress_cache("short", 1, TO_INT8)
    for ratio in (1.0, 0.01):
        manager.compress_cache("none", ratio, TO_INT8)
    assert picture(manager) == before
    manager.compress_cache("a", 0.5, TO_INT8)
    before = picture(manager)
    for ratio in (0.5, 0.4, 3 / 8, 1.0):
        manager.compress_cache("a", ratio, TO_INT8)
    assert picture(manager) == before


def test_a_ratio_that_is_a_whole_number_of_blocks_allows_these():
    """3 / 8 of 8 blocks are 3, whatever floats make of it."""
    for num_blocks in range(1, 9):
        for allowed in range(1, num_blocks + 1):
            assert math.floor(allowed / num_blocks * num_blocks + 1e-9) == allowed
    manager = make()
    handle = begin(manager, "a")
    manager.compress_cache("a", 3 / 8, TO_INT8)
    assert handle.stats().blocks_allocated == 3


# What comes back, and what is told.


@ways
def test_blocks_go_back_to_the_pool(way):
    ratio, method = WAYS[way]
    manager = make()
    handle = begin(manager, "a")
    begin(manager, "b", TOKENS[:9])
    kept = kept_tokens(way)
    num_blocks = blocks_in(len(kept), method.token_format)
    manager.compress_cache("a", ratio, method)
    assert manager.free_block_count() == BLOCKS - num_blocks - 3
    stats = manager.stats()
    assert stats.used_memory_bytes == (num_blocks + 3) * BLOCK_BYTES
    assert stats.free_blocks == manager.free_block_count()
    report = handle.compression
    assert report.freed_bytes == (8 - num_blocks) * BLOCK_BYTES
    assert (report.num_tokens, report.num_kept_tokens) == (30, len(kept))
    assert report.token_format == method.token_format and report.seconds > 0
    assert (report.pruning_error > 0) == (report.fitting_error > 0) == (len(kept) < 30)
    assert (report.attention_error > 0) or way == "rounded"
    again = [begin(manager, f"c{i}", TOKENS[:4]) for i in range(4)]
    assert all(tokens_of(c) == TOKENS[:4] for c in again) and tokens_of(handle) == kept
    manager.check()
    for name, _ in manager.list_handles():
        manager.deallocate(name)
    assert manager.free_block_count() == BLOCKS
    manager.check()


def test_stats_are_of_the_requests_that_are_compressed_now():
    manager = make()
    assert manager.compression_stats().compressed_caches == 0
    assert manager.compression_stats().avg_compression_ratio == 1.0
    a, b = begin(manager, "a"), begin(manager, "b")
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.compress_cache("b", 0.5, PRUNE)
    stats = manager.compression_stats()
    assert stats.compressed_caches == 2
    assert stats.memory_saved_bytes == (5 + 4) * BLOCK_BYTES
    assert stats.avg_compression_ratio == (3 / 8 + 4 / 8) / 2
    seconds = (a.compression.seconds + b.compression.seconds) / 2
    assert stats.avg_compression_time_ms == pytest.approx(1e3 * seconds)
    manager.compress_cache("a", 0.25, TO_INT4)
    assert a.compression.freed_bytes == (8 - 2) * BLOCK_BYTES, "over all its compressions"
    assert manager.compression_stats().memory_saved_bytes == (6 + 4) * BLOCK_BYTES
    manager.deallocate("a")
    stats = manager.compression_stats()
    assert (stats.compressed_caches, stats.avg_compression_ratio) == (1, 0.5)
    manager.deallocate("b")
    stats = manager.compression_stats()
    assert (stats.compressed_caches, stats.memory_saved_bytes) == (0, 0)


def test_stats_are_of_the_requests_that_are_here():
    manager = make()
    for name, method in (("a", TO_INT8), ("b", PRUNE)):
        begin(manager, name)
        manager.compress_cache(name, 0.5, method)
    manager.swap_out("a")
    stats = manager.compression_stats()
    assert (stats.compressed_caches, stats.avg_compression_ratio) == (1, 4 / 8)
    assert stats.memory_saved_bytes == 4 * BLOCK_BYTES
    manager.swap_in("a")
    stats = manager.compression_stats()
    assert (stats.compressed_caches, stats.avg_compression_ratio) == (2, (3 + 4) / 16)
    assert stats.memory_saved_bytes == 9 * BLOCK_BYTES


def test_a_report_is_of_the_compression_and_stats_are_of_what_came_later_too():
    manager = make()
    handle = begin(manager, "a", TOKENS[:21])
    manager.compress_cache("a", 0.5, TO_INT8)
    report = handle.compression
    assert (report.ratio, report.num_tokens) == (2 / 6, 21)
    manager.extend(handle, 11)
    assert handle.compression == report
    assert manager.compression_stats().avg_compression_ratio == 3 / 8
    assert manager.compression_stats().memory_saved_bytes == 4 * BLOCK_BYTES


@ways
def test_a_handle_tells_what_there_is(way):
    ratio, method = WAYS[way]
    manager = make()
    handle = begin(manager, "a")
    assert handle.compression is None
    manager.compress_cache("a", ratio, method)
    kept, size = kept_tokens(way), SIZES[method.token_format]
    num_blocks = blocks_in(len(kept), method.token_format)
    assert handle.num_tokens() == 30
    table = handle.block_table()
    assert table.sequence_length == len(kept) and table.block_size == size
    assert len(table.physical_blocks) == num_blocks == len(set(table.physical_blocks))
    assert table.free_tokens() == num_blocks * size - len(kept)
    for cache in handle.kv_cache(1):
        assert cache.shape == (len(kept), 2, 16) and cache.dtype == jnp.float32
    stats = handle.stats()
    assert (stats.blocks_allocated, stats.tokens_stored) == (num_blocks, len(kept))
    assert stats.memory_bytes == num_blocks * BLOCK_BYTES
    assert stats.utilization == len(kept) / (num_blocks * size)
    assert handle.clone_handle().compression == handle.compression


# Going on.


@ways
def test_a_request_grows_in_its_format_up_to_its_own_length(way):
    ratio, method = WAYS[way]
    manager = make()
    handle = begin(manager, "a")
    manager.compress_cache("a", ratio, method)
    kept = kept_tokens(way)
    free = manager.free_block_count()
    manager.extend(handle, 2)
    fill(manager, handle, [101, 102], len(kept))
    assert handle.num_tokens() == 32 and tokens_of(handle) == [*kept, 101, 102]
    num_new = blocks_in(len(kept) + 2, method.token_format) - blocks_in(
        len(kept), method.token_format
    )
    assert manager.free_block_count() == free - num_new
    before = picture(manager)
    with pytest.raises(fj.errors.SequenceTooLongError):
        manager.extend(handle, 1)
    assert picture(manager) == before
    manager.check()


@ways
def test_decoding_goes_on_beside_requests_that_are_not_compressed(way):
    ratio, method = WAYS[way]
    manager = make()
    handle, other = begin(manager, "a", TOKENS), begin(manager, "b", TOKENS[:7])
    manager.compress_cache("a", ratio, method)
    kept = kept_tokens(way)
    q = jnp.full((4, 1, 4, 16), 1e-9, jnp.float32)  # Sees all tokens alike.
    for step in range(2):
        kv = payload(pool_of(manager).state.pool, [60 + step, 70 + step, 1, 1])
        kv = jax.tree.map(lambda x: x[:, :, None], kv)
        out, ok = manager.run(
            decode, [handle, other, None, None], kv, q, extends=True, reserve_tokens=1
        )
        held = [[*kept, *range(60, 61 + step)], [*TOKENS[:7], *range(70, 71 + step)]]
        want = [-np.mean(tokens) for tokens in held]
        assert bool(ok)
        np.testing.assert_allclose(out[1, :2, 0, 0, 0], want, rtol=2e-3)
    assert tokens_of(handle) == [*kept, 60, 61] and tokens_of(other) == [*TOKENS[:7], 70, 71]
    assert (handle.num_tokens(), other.num_tokens()) == (32, 9)
    manager.check()


@jax.jit
def cut_all(state, seq_ids):
    return fj.truncate(state, seq_ids, jnp.zeros_like(seq_ids))


def test_a_request_that_is_cut_to_nothing_is_compressed_no_more():
    manager = make()
    handle = begin(manager, "a")
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.run(cut_all, [handle], extends=True)
    assert handle.num_tokens() == 0 and manager.free_block_count() == BLOCKS
    manager.extend(handle, 5)
    fill(manager, handle, [7, 8, 9, 10, 11])
    assert tokens_of(handle) == [7, 8, 9, 10, 11] and handle.stats().blocks_allocated == 2
    manager.check()
    assert handle.compression is None and manager.compression_stats().compressed_caches == 0


def write_first(state, seq_ids):
    """A step that writes a token, as every step of a model does."""
    batch = PagedBatch.of(state, seq_ids, jnp.ones_like(seq_ids), num_tokens=1)
    token = jnp.ones((1, 1, 2, 16), jnp.float32)
    return dataclasses.replace(state, pool=batch.write(0, token, token).pool), None


@pytest.mark.parametrize(("formats", "num_traces"), [((INT8,), 1), ((), 2)])
def test_formats_named_in_advance_spare_steps_a_compilation(formats, num_traces):
    manager, traced = make(token_formats=formats), []
    step = jax.jit(lambda *args: (traced.append(1), write_first(*args))[1], donate_argnums=0)
    handle = manager.allocate(manager.new_request("a", 30))
    manager.run(step, [handle])
    manager.compress_cache("a", 0.5, TO_INT8)
    for _ in range(3):
        manager.run(step, [handle])
    assert len(traced) == num_traces and pool_of(manager).state.pool.formats == (NATIVE, INT8)


def test_a_second_compression_of_the_same_sizes_compiles_nothing():
    manager = make()
    for name in "ab":
        begin(manager, name)
    manager.compress_cache("a", 0.5, TO_INT8)
    before = num_compilations()
    manager.compress_cache("b", 0.5, TO_INT8)
    assert num_compilations() == before


# Queries of the model, and coroutines.


def test_queries_given_choose_tokens_and_fit_them():
    manager = make()
    handle = manager.allocate(manager.new_request("a", 30))
    rng = np.random.default_rng(0)
    shape = 2, 30, 2, 16
    kv = KeysAndValues(*(rng.normal(size=shape).astype(np.float32) for _ in range(2)))

    def step(state, seq_ids):
        return compressed.write_kv(state, int(seq_ids[0]), kv), None

    manager.run(step, [handle])
    method = CompressionMethod(
        token_format=NATIVE, scorer="observed_attention", num_sinks=1, num_recent=1, fit_steps=10
    )
    queries = rng.normal(size=(2, 4, 3, 16)).astype(np.float32)
    manager.compress_cache("a", 0.5, method, queries)
    report = handle.compression
    assert 0 < report.fitting_error <= report.pruning_error
    assert report.attention_error == pytest.approx(report.fitting_error, rel=1e-4)
    assert report.num_kept_tokens == 16
    manager.check()


@on_loop
async def test_a_coroutine_compresses_and_those_who_wait_are_served():
    manager = AsyncKvCacheManager(make())
    handles = [await manager.allocate(manager.new_request(i, 30)) for i in range(3)]
    for handle in handles:
        fill(manager.manager, handle, TOKENS)
    waiting = asyncio.ensure_future(manager.allocate(manager.new_request("late", 20)))
    await settle()
    assert not waiting.done() and manager.free_block_count() == 0
    with pytest.raises(CompressionError):
        await manager.compress_cache(0, 0.1, TO_INT8)
    await settle()
    assert not waiting.done()
    await manager.compress_cache(0, 0.5, TO_INT8)
    late = await waiting
    assert late.num_tokens() == 20 and manager.free_block_count() == 0
    assert tokens_of(handles[0]) == TOKENS
    assert manager.compression_stats().compressed_caches == 1
    await manager.check()
