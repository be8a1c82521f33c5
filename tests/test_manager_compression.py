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
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    CompressionError,
    OutOfBlocksError,
    OutOfHostMemoryError,
    SwappedOutError,
    UnknownRequestError,
)
from ferrum_jax.formats import KeysAndValues
from ferrum_jax.integrations.batch import PagedBatch
from ferrum_jax.manager.async_manager import AsyncKvCacheManager
from ferrum_jax.types import TokenFormat
from tests import compressed
from tests.compressed import decode, payload, tokens_in
from tests.helpers import num_compilations
from tests.loops import on_loop, settle
from tests.managers import Clock, cached_prefixes, make_manager, whole
from tests.prefix_managers import CONFIG

NATIVE, INT8, INT8_INT4, INT4 = TokenFormat
BLOCKS = 24
MODEL = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
BLOCK_BYTES = 2 * 2 * 2 * 4 * 16 * 4  # Keys and values, layers, heads, tokens, numbers, float32.
SIZES = {NATIVE: 4, INT8: 12, INT8_INT4: 16, INT4: 21}  # Tokens a block.
TO_INT8 = CompressionMethod(token_format=INT8, scorer=None)
TO_INT4 = CompressionMethod(token_format=INT4, scorer=None)
PRUNE = CompressionMethod(token_format=NATIVE, scorer="window", num_sinks=2, num_recent=3)
PRUNE_INT4 = dataclasses.replace(PRUNE, token_format=INT4)
WAYS = {"rounded": (0.5, TO_INT8), "pruned": (0.5, PRUNE), "both": (0.13, PRUNE_INT4)}
ways = pytest.mark.parametrize("way", WAYS)
TOKENS = [*range(1, 31)]


def make(**config):
    """24 blocks of 4 tokens, for 6 requests of at most 32; all formats enabled from the first."""
    config = {"clock": Clock(), "token_formats": tuple(TokenFormat), **config}
    sizes = {"block_size": 4, "max_blocks": BLOCKS, "initial_blocks": BLOCKS}
    limits = {"max_seqs": 6, "max_sequence_length": 32}
    model = {**MODEL, **limits, **config.pop("geometry", {})}
    return make_manager(**{**sizes, **config}, geometry=model)


def make_caching(**config):
    return make(enable_prefix_caching=True, prefix_cache_config=CONFIG, **config)


def fill(manager, handle, tokens, begin=0):
    """Writes tokens from `begin`, a place among those that the request holds."""

    def step(state, seq_ids):
        return compressed.put(state, int(seq_ids[0]), tokens, begin), None

    manager.run(step, [handle])


def begin(manager, name, tokens=TOKENS, **more):
    handle = manager.allocate(manager.new_request(name, len(tokens), **more))
    fill(manager, handle, tokens)
    return handle


def compute(manager, name, prompt):
    """Allocates a request with a prompt, and computes what is not cached of it."""
    handle = manager.allocate(manager.new_request(name, prompt_token_ids=prompt))
    skip = handle.num_cached_tokens
    fill(manager, handle, prompt[skip:], skip)
    return handle


def numbers_of(handle):
    """Keys and values of all layers, float32 [L, T, H, D]."""
    layers = [handle.kv_cache(layer) for layer in range(handle.num_layers())]
    return KeysAndValues(
        *(np.stack([np.asarray(x) for x in kv]) for kv in zip(*layers, strict=True))
    )


def bits_of(handle):
    return [x.tobytes() for x in numbers_of(handle)]


def tokens_of(handle):
    return tokens_in(handle.entry().cache.state.pool, numbers_of(handle))


def picture(manager):
    """All that a call could change, and what is compiled for."""
    state = manager._cache.state
    reports = {name: entry.compression for name, entry in manager._entries.items()}
    return whole(manager), state.pool.formats, state.tables.block_sizes, reports


def blocks_in(num_tokens, token_format=NATIVE):
    return -(-num_tokens // SIZES[token_format])


def kept_tokens(way):
    """What a request of `TOKENS` then holds."""
    return {
        "rounded": TOKENS,
        "pruned": [1, 2, *range(17, 31)],  # 4 blocks of 4.
        "both": [1, 2, *range(12, 31)],  # One block of 21.
    }[way]


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
        kv = payload(manager._cache.state.pool, [60 + step, 70 + step, 1, 1])
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
    assert len(traced) == num_traces and manager._cache.state.pool.formats == (NATIVE, INT8)


def test_a_second_compression_of_the_same_sizes_compiles_nothing():
    manager = make()
    for name in "ab":
        begin(manager, name)
    manager.compress_cache("a", 0.5, TO_INT8)
    before = num_compilations()
    manager.compress_cache("b", 0.5, TO_INT8)
    assert num_compilations() == before


# Others who hold the same blocks.

PROMPT = [*range(40, 69)]  # Seven full blocks, and a token.


def test_cached_blocks_stay_what_they_were_for_all_others():
    manager = make_caching()
    a = compute(manager, "a", PROMPT)
    manager.commit(a)
    b = compute(manager, "b", PROMPT)
    assert b.num_cached_tokens == 28
    cached, bits = cached_prefixes(manager), bits_of(b)
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.check()
    assert cached_prefixes(manager) == cached and bits_of(b) == bits
    assert tokens_of(a) == PROMPT and len(set(cached.values())) == 7
    assert not set(a.block_table().physical_blocks) & set(b.block_table().physical_blocks)
    assert a.compression.freed_bytes == -2 * BLOCK_BYTES, "its own one is used again, two taken"
    c = compute(manager, "c", PROMPT)
    assert c.num_cached_tokens == 28 and bits_of(c) == bits
    for name in "abc":
        manager.deallocate(name)
    d = compute(manager, "d", PROMPT)
    assert d.num_cached_tokens == 28 and bits_of(d) == bits
    manager.check()


@ways
def test_what_a_compressed_request_computes_is_not_cached(way):
    ratio, method = WAYS[way]
    manager = make_caching()
    prompt = [*range(40, 70)]
    handle = compute(manager, "a", prompt)
    manager.compress_cache("a", ratio, method)
    assert manager.commit(handle) == 0
    manager.extend(handle, 2)
    assert manager.commit(handle, [5, 6]) == 0
    assert not cached_prefixes(manager) and manager.stats().cached_blocks == 0
    assert compute(manager, "b", prompt).num_cached_tokens == 0
    manager.check()


def test_a_compressed_request_commits_nothing_when_it_comes_back_either():
    manager = make_caching()
    a = compute(manager, "a", PROMPT)
    manager.commit(a)
    manager.compress_cache("a", 0.5, TO_INT8)
    cached, bits = cached_prefixes(manager), bits_of(a)
    manager.swap_out("a")
    manager.check()
    manager.swap_in("a")
    assert cached_prefixes(manager) == cached and bits_of(a) == bits
    manager.check()


def test_cached_blocks_go_where_compression_needs_blocks():
    """Seven idle cached blocks fill the pool, with a request whose blocks are all shared."""
    manager = make_caching()
    manager.commit(compute(manager, "old", [*range(80, 109)]))
    manager.deallocate("old")
    a = begin(manager, "a", [*range(1, 33)])
    b = begin(manager, "b", [*range(1, 33)])
    manager.share_prefix("a", "b", 32)
    taken = manager.allocate_blocks(BLOCKS - 7 - 8)
    assert manager.free_block_count() == 0
    manager.compress_cache("a", 0.5, TO_INT8)
    assert tokens_of(a) == tokens_of(b) == [*range(1, 33)]
    assert manager.stats().cached_blocks == 7 - 3
    manager.free_blocks(taken)
    manager.check()


def test_compressing_what_another_request_shares_leaves_it_alone():
    manager = make()
    a, b = begin(manager, "a"), begin(manager, "b")
    manager.share_prefix("a", "b", 28)
    bits = bits_of(b)
    free = manager.free_block_count()
    manager.compress_cache("a", 0.5, TO_INT8)
    assert bits_of(b) == bits and tokens_of(a) == TOKENS
    assert manager.free_block_count() == free - 2
    manager.compress_cache("b", 0.5, PRUNE)
    assert tokens_of(a) == TOKENS and tokens_of(b) == kept_tokens("pruned")
    manager.check()
    manager.deallocate("a")
    assert manager.free_block_count() == BLOCKS - 4
    manager.check()


@ways
def test_a_compressed_request_does_not_share(way):
    ratio, method = WAYS[way]
    manager = make()
    for name in "ab":
        begin(manager, name)
    manager.compress_cache("a", ratio, method)
    before = picture(manager)
    for source, target in ("ab", "ba"):
        with pytest.raises(CompressionError, match="'a' is compressed.*Share first"):
            manager.share_prefix(source, target, 4)
        assert picture(manager) == before
    manager.check()


# Leaving the device.


@pytest.mark.parametrize("tier", ["host", "disk"])
@ways
def test_a_compressed_request_comes_back_bit_for_bit(way, tier, tmp_path):
    ratio, method = WAYS[way]
    tiers = TierConfig()
    if tier == "disk":
        tiers = TierConfig(host_budget_bytes=0, disk_directory=tmp_path)
    manager = make(tiers=tiers)
    handle = begin(manager, "a")
    manager.compress_cache("a", ratio, method)
    num_blocks = handle.stats().blocks_allocated
    bits, report, shape = bits_of(handle), handle.compression, handle.entry().shape
    manager.swap_out("a")
    assert manager.free_block_count() == BLOCKS and handle.num_tokens() == 30
    assert num_blocks <= manager._swapping.host_bytes / BLOCK_BYTES < num_blocks + 0.5
    assert handle.kv_cache(0) == (None, None) and handle.stats().memory_bytes == 0
    other = begin(manager, "b")  # Takes the row and the blocks.
    manager.check()
    manager.swap_in("a")
    assert bits_of(handle) == bits and handle.compression == report
    assert handle.entry().shape == shape and tokens_of(other) == TOKENS
    assert manager.free_block_count() == BLOCKS - num_blocks - 8
    manager.extend(handle, 1)
    fill(manager, handle, [99], shape.num_tokens)
    assert tokens_of(handle) == [*kept_tokens(way), 99]
    manager.check()


@ways
@pytest.mark.parametrize("is_away", [False, True], ids=["resident", "swapped out"])
def test_a_compressed_request_moves_to_another_manager_bit_for_bit(way, is_away):
    ratio, method = WAYS[way]
    one, other = make(), make()
    begin(other, "b")
    handle = begin(one, "a")
    one.compress_cache("a", ratio, method)
    bits, report, shape = bits_of(handle), handle.compression, handle.entry().shape
    if is_away:
        one.swap_out("a")
    one.move_to("a", other)
    one.check()
    if is_away:
        other.swap_in("a")
    assert bits_of(handle) == bits and handle.compression == report
    assert handle.entry().shape == shape and handle.num_tokens() == 30
    assert one.free_block_count() == BLOCKS
    assert one.compression_stats().compressed_caches == 0
    assert other.compression_stats().compressed_caches == 1
    other.extend(handle, 2)
    fill(other, handle, [98, 99], shape.num_tokens)
    assert tokens_of(handle) == [*kept_tokens(way), 98, 99]
    other.check()


def test_defragment_and_gc_keep_compressed_requests():
    manager = make()
    begin(manager, "gap", [*range(1, 33)])
    a, b = begin(manager, "a"), begin(manager, "b")
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.compress_cache("b", 0.13, PRUNE_INT4)
    bits = bits_of(a), bits_of(b)
    manager.deallocate("gap")
    manager.defragment()
    manager.gc()
    assert (bits_of(a), bits_of(b)) == bits
    blocks = a.block_table().physical_blocks + b.block_table().physical_blocks
    assert sorted(blocks) == [0, 1, 2, 3]
    assert {a.num_tokens(), b.num_tokens()} == {30}
    manager.check()


def test_a_pool_that_grows_and_shrinks_keeps_compressed_requests():
    manager = make(initial_blocks=8, max_blocks=32, enable_pooling=False, token_formats=())
    tokens = [*range(1, 33)]
    a = begin(manager, "a", tokens)
    b = manager.allocate(manager.new_request("b", 32))
    manager.share_prefix("a", "b", 32)
    taken = manager.allocate_blocks(8)
    assert manager.total_block_count() == 16 and manager.free_block_count() == 0
    manager.compress_cache("a", 0.5, TO_INT8)  # Of its blocks it can write none.
    assert manager.total_block_count() == 32
    assert tokens_of(a) == tokens_of(b) == tokens
    manager.check()
    bits = bits_of(a)
    manager.free_blocks(taken)
    manager.deallocate("b")
    manager.gc()
    assert manager.total_block_count() == 8 and bits_of(a) == bits
    manager.check()


@ways
def test_freed_blocks_and_rows_start_native_for_the_next_request(way):
    ratio, method = WAYS[way]
    manager = make()
    row = begin(manager, "a").entry().seq_id
    manager.compress_cache("a", ratio, method)
    manager.deallocate("a")
    handle = begin(manager, "b", TOKENS[:9])
    assert handle.entry().seq_id == row, "the test needs the same row"
    assert handle.compression is None and handle.block_table().block_size == 4
    assert tokens_of(handle) == TOKENS[:9] and manager.free_block_count() == BLOCKS - 3
    manager.check()


# What is refused.

BAD = {
    "ratio 0": (ValueError, "a", (0.0, TO_INT8)),
    "ratio below 0": (ValueError, "a", (-0.5, TO_INT8)),
    "ratio above 1": (ValueError, "a", (1.01, TO_INT8)),
    "ratio NaN": (ValueError, "a", (math.nan, TO_INT8)),
    "ratio infinite": (ValueError, "a", (math.inf, TO_INT8)),
    "ratio no number": (ValueError, "a", ("half", TO_INT8)),
    "no queries for a scorer": (
        ValueError,
        "a",
        (0.5, CompressionMethod(scorer="observed_attention")),
    ),
    "no queries for a fit": (ValueError, "a", (0.5, dataclasses.replace(PRUNE, fit_steps=2))),
    "more bits than now": (CompressionError, "compressed", (0.1, PRUNE)),
    "an unknown request": (UnknownRequestError, "nobody", (0.5, TO_INT8)),
    "a request that is away": (SwappedOutError, "away", (0.5, TO_INT8)),
    "too few bits to be had": (CompressionError, "a", (0.2, TO_INT8)),
    "recent tokens that must stay": (CompressionError, "a", (0.13, CompressionMethod())),
}


@pytest.fixture(scope="module")
def busy_manager():
    manager = make_caching()
    for name in ("a", "compressed", "away"):
        begin(manager, name, TOKENS[:29] if name == "away" else TOKENS)
        if name == "compressed":
            manager.compress_cache(name, 0.5, TO_INT8)
    manager.swap_out("away")
    return manager


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_refused_and_changes_nothing(busy_manager, name):
    error, request_id, args = BAD[name]
    before = picture(busy_manager)
    with pytest.raises(error) as info:
        busy_manager.compress_cache(request_id, *args)
    assert len(str(info.value)) > 20
    assert picture(busy_manager) == before
    busy_manager.check()


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 16), (2, 3, 2, 16), (2, 1, 2, 16), (2, 4, 2, 8), (2, 4, 16)],
    ids=["layers", "three heads for two", "one head for two", "head_dim", "axes"],
)
def test_queries_of_another_model_are_refused_and_nothing_changes(shape):
    manager = make(token_formats=())
    begin(manager, "a")
    before = picture(manager)
    with pytest.raises((ValueError, AssertionError)):
        manager.compress_cache("a", 0.25, TO_INT4, np.ones(shape, np.float32))
    assert picture(manager) == before, "formats included"
    manager.check()


@pytest.mark.parametrize(
    "change",
    [
        {"scorer": "unknown"},
        {"num_sinks": -1},
        {"num_recent": 1.5},
        {"fit_steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"token_format": 1},
    ],
    ids=str,
)
def test_a_method_that_makes_no_sense_is_refused_when_it_is_made(change):
    with pytest.raises((ValueError, TypeError), match=next(iter(change)) + "|unknown"):
        CompressionMethod(**change)


def test_a_pool_whose_numbers_cannot_be_packed_says_so_and_still_drops_tokens():
    manager = make(geometry={"dtype": "int8"}, token_formats=())
    handle = manager.allocate(manager.new_request("a", 30))
    before = picture(manager)
    with pytest.raises(ValueError, match="int8 cannot be written as Int8"):
        manager.compress_cache("a", 0.5, TO_INT8)
    with pytest.raises(CompressionError):
        manager.compress_cache("a", 0.5, CompressionMethod(scorer=None))
    assert picture(manager) == before
    manager.compress_cache("a", 0.5, dataclasses.replace(PRUNE, token_format=None))
    assert handle.stats().blocks_allocated == 4 and handle.compression.token_format == NATIVE
    manager.check()


def test_without_blocks_for_what_is_shared_nothing_changes():
    manager = make()
    begin(manager, "a", [*range(1, 33)])
    begin(manager, "b", [*range(1, 33)])
    manager.share_prefix("a", "b", 32)
    manager.allocate_blocks(BLOCKS - 8 - 2)  # Three blocks are needed.
    before = picture(manager)
    with pytest.raises(OutOfBlocksError, match="compress_cache of 'a'"):
        manager.compress_cache("a", 0.5, TO_INT8)
    assert picture(manager) == before
    manager.check()


def test_a_request_that_finds_no_room_elsewhere_stays_compressed():
    manager = make(tiers=TierConfig(host_budget_bytes=2 * BLOCK_BYTES))
    handle = begin(manager, "a")
    manager.compress_cache("a", 0.5, TO_INT8)
    before = picture(manager)
    with pytest.raises(OutOfHostMemoryError):
        manager.swap_out("a")
    assert picture(manager) == before and tokens_of(handle) == TOKENS
    manager.compress_cache("a", 0.25, TO_INT4)
    manager.swap_out("a")
    manager.swap_in("a")
    assert tokens_of(handle) == TOKENS
    manager.check()


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
