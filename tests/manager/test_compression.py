"""Compression of live requests: ratios, reports, stats, and later calls on them."""

import asyncio
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.compression.methods import CompressionMethod, plan_compression, smallest_num_blocks
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.types import TokenFormat
from tests.support import compressed
from tests.support.compressed import decode, robust_payload
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
from tests.support.event_loops import on_loop, settle
from tests.support.internals import state_of

# Ratios.


@pytest.mark.parametrize("source", [NATIVE, INT8, INT4])
def test_plan_compression_meets_the_ratio_for_every_length_or_returns_none(source):
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
def test_compress_cache_meets_the_ratio_frees_blocks_and_reports(way):
    ratio, method = WAYS[way]
    manager = make()
    handle = begin(manager, "a")
    begin(manager, "b", TOKENS[:9])
    before = picture(manager)
    with pytest.raises(
        errors.CompressionError, match="(?s)'a'.*0.12 of its 8 blocks.*larger ratio"
    ):
        manager.compress_cache("a", 0.12, method)
    assert picture(manager) == before and handle.compression is None
    manager.compress_cache("a", ratio, method)

    kept, size = kept_tokens(way), SIZES[method.token_format]
    num_blocks = blocks_in(len(kept), method.token_format)
    table, stats, report = handle.block_table(), handle.stats(), handle.compression
    assert table.sequence_length == handle.num_tokens() == 30 == len(kept) + table.num_pruned
    assert tokens_of(handle) == kept and table.block_size == size
    assert len(set(table.physical_blocks)) == num_blocks <= ratio * 8
    assert table.free_tokens() == num_blocks * size - len(kept)
    assert (stats.blocks_allocated, stats.tokens_stored) == (num_blocks, len(kept))
    assert stats.memory_bytes == num_blocks * BLOCK_BYTES
    assert stats.utilization == len(kept) / (num_blocks * size)
    for cache in handle.kv_cache(1):
        assert cache.shape == (len(kept), 2, 16) and cache.dtype == jnp.float32

    assert report.ratio == num_blocks / 8 and handle.clone_handle().compression == report
    assert report.freed_bytes == (8 - num_blocks) * BLOCK_BYTES
    assert (report.num_tokens, report.num_kept_tokens) == (30, len(kept))
    assert report.token_format == method.token_format and report.seconds > 0
    assert (report.pruning_error > 0) == (report.fitting_error > 0) == (len(kept) < 30)
    assert (report.attention_error > 0) or way == "rounded"
    assert manager.free_block_count() == BLOCKS - num_blocks - 3
    assert manager.stats().used_memory_bytes == (num_blocks + 3) * BLOCK_BYTES
    for i in range(4):  # Freed blocks are native again.
        assert tokens_of(begin(manager, i, TOKENS[:4])) == TOKENS[:4]
    assert tokens_of(handle) == kept
    manager.check()


def test_compress_cache_by_default_rounds_before_it_drops_tokens():
    manager = make()
    handle = begin(manager, "a", [*range(1, 33)])
    manager.compress_cache("a", 0.5)
    report = handle.compression
    assert report.num_kept_tokens == report.num_tokens == 32 and report.ratio <= 0.5
    assert report.token_format != NATIVE and tokens_of(handle) == [*range(1, 33)]
    manager.check()


def test_compress_cache_leaves_a_request_within_the_ratio_as_it_is():
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


def test_compress_cache_allows_a_ratio_that_is_exactly_a_number_of_blocks():
    """3 / 8 of 8 blocks are 3, in spite of rounding."""
    for num_blocks in range(1, 9):
        for allowed in range(1, num_blocks + 1):
            assert math.floor(allowed / num_blocks * num_blocks + 1e-9) == allowed
    manager = make()
    handle = begin(manager, "a")
    manager.compress_cache("a", 3 / 8, TO_INT8)
    assert handle.stats().blocks_allocated == 3


# Stats.


def test_compression_stats_count_the_compressed_requests_that_are_resident():
    manager = make()

    def stats():
        stats = manager.compression_stats()
        saved = stats.memory_saved_bytes / BLOCK_BYTES
        return stats.compressed_caches, stats.avg_compression_ratio, saved

    assert stats() == (0, 1.0, 0)
    handle = begin(manager, "a", TOKENS[:21])
    manager.compress_cache("a", 0.5, TO_INT8)
    report = handle.compression
    assert (report.ratio, report.num_tokens) == (2 / 6, 21)
    manager.extend(handle, 9)
    assert handle.compression == report, "a report is of the time of the compression"
    assert stats() == (1, 3 / 8, 4)
    other = begin(manager, "b")
    manager.compress_cache("b", 0.5, PRUNE)
    assert stats() == (2, (3 + 4) / 16, 8)
    seconds = (handle.compression.seconds + other.compression.seconds) / 2
    assert manager.compression_stats().avg_compression_time_ms == pytest.approx(1e3 * seconds)
    manager.swap_out("a")
    assert stats() == (1, 4 / 8, 4)
    manager.swap_in("a")
    assert stats() == (2, (3 + 4) / 16, 8)
    manager.compress_cache("a", 0.25, TO_INT4)
    assert handle.compression.freed_bytes == (4 + 1) * BLOCK_BYTES, "of both compressions"
    manager.deallocate("b")
    assert stats() == (1, 2 / 8, 5)
    manager.deallocate("a")
    assert stats() == (0, 1.0, 0)


# Later calls.


@ways
def test_run_decodes_compressed_and_native_requests_together(way):
    ratio, method = WAYS[way]
    manager = make()
    handle, other = begin(manager, "a", TOKENS), begin(manager, "b", TOKENS[:7])
    manager.compress_cache("a", ratio, method)
    kept, free = kept_tokens(way), manager.free_block_count()
    q = jnp.full((4, 1, 4, 16), 1e-9, jnp.float32)  # Equal weights for all tokens.
    for step in range(2):
        kv = robust_payload(state_of(manager).pool, [60 + step, 70 + step, 1, 1])
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
    num_blocks = [blocks_in(len(kept) + n, method.token_format) for n in (0, 2)]
    assert manager.free_block_count() == free - (num_blocks[1] - num_blocks[0]) - 1
    before = picture(manager)
    with pytest.raises(errors.SequenceTooLongError):
        manager.extend(handle, 1)
    assert picture(manager) == before
    manager.check()


@jax.jit
def cut_all(state, seq_ids):
    return fj.truncate(state, seq_ids, jnp.zeros_like(seq_ids))


def test_truncate_to_nothing_ends_the_compression():
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
    """A step that writes a token, as a model does."""
    batch = PagedBatch.of(state, seq_ids, jnp.ones_like(seq_ids), num_tokens=1)
    token = jnp.ones((1, 1, 2, 16), jnp.float32)
    return state.with_pools(batch.write(0, token, token).pools), None


@pytest.mark.parametrize(("formats", "num_traces"), [((INT8,), 1), ((), 2)])
def test_token_formats_named_in_advance_save_steps_a_compilation(formats, num_traces):
    manager, traced = make(token_formats=formats), []
    step = jax.jit(lambda *args: (traced.append(1), write_first(*args))[1], donate_argnums=0)
    handle = manager.allocate(manager.new_request("a", 30))
    manager.run(step, [handle])
    manager.compress_cache("a", 0.5, TO_INT8)
    for _ in range(3):
        manager.run(step, [handle])
    assert len(traced) == num_traces and state_of(manager).pool.formats == (NATIVE, INT8)


# Queries, and the async manager.


def test_compress_cache_scores_and_fits_with_the_queries_given():
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
async def test_async_compress_cache_makes_room_for_an_allocate_that_waits():
    manager = AsyncKvCacheManager(make())
    handles = [await manager.allocate(manager.new_request(i, 30)) for i in range(3)]
    for handle in handles:
        fill(manager.manager, handle, TOKENS)
    waiting = asyncio.ensure_future(manager.allocate(manager.new_request("late", 20)))
    await settle()
    assert not waiting.done() and manager.free_block_count() == 0
    with pytest.raises(errors.CompressionError):
        await manager.compress_cache(0, 0.1, TO_INT8)
    await settle()
    assert not waiting.done()
    await manager.compress_cache(0, 0.5, TO_INT8)
    late = await waiting
    assert late.num_tokens() == 20 and manager.free_block_count() == 0
    assert tokens_of(handles[0]) == TOKENS
    assert manager.compression_stats().compressed_caches == 1
    await manager.check()
