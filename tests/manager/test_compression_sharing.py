"""What others notice of a request that is compressed, and what is refused."""

import dataclasses
import math

import numpy as np
import pytest

from ferrum_jax.compression.methods import (
    CompressionMethod,
)
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    CompressionError,
    OutOfBlocksError,
    OutOfHostMemoryError,
    SwappedOutError,
    UnknownRequestError,
)
from tests.support.compressed_managers import (
    BLOCK_BYTES,
    BLOCKS,
    NATIVE,
    PRUNE,
    PRUNE_INT4,
    TO_INT4,
    TO_INT8,
    TOKENS,
    WAYS,
    begin,
    bits_of,
    compute,
    fill,
    kept_tokens,
    make,
    make_caching,
    picture,
    tokens_of,
    ways,
)
from tests.support.managers import cached_prefixes
from tests.support.parts import device_of

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
    manager.run(lambda state, _: (state, None), [handle])
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
    bits, report, shape = bits_of(handle), handle.compression, handle.live_request().shape
    manager.swap_out("a")
    assert manager.free_block_count() == BLOCKS and handle.num_tokens() == 30
    assert num_blocks <= device_of(manager).swapping.host_bytes / BLOCK_BYTES < num_blocks + 0.5
    assert handle.kv_cache(0) == (None, None) and handle.stats().memory_bytes == 0
    other = begin(manager, "b")  # Takes the row and the blocks.
    manager.check()
    manager.swap_in("a")
    assert bits_of(handle) == bits and handle.compression == report
    assert handle.live_request().shape == shape and tokens_of(other) == TOKENS
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
    bits, report, shape = bits_of(handle), handle.compression, handle.live_request().shape
    if is_away:
        one.swap_out("a")
    one.move_to("a", other)
    one.check()
    if is_away:
        other.swap_in("a")
    assert bits_of(handle) == bits and handle.compression == report
    assert handle.live_request().shape == shape and handle.num_tokens() == 30
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
    row = begin(manager, "a").live_request().seq_id
    manager.compress_cache("a", ratio, method)
    manager.deallocate("a")
    handle = begin(manager, "b", TOKENS[:9])
    assert handle.live_request().seq_id == row, "the test needs the same row"
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
        {"learning_rate": math.inf},
        {"scale": math.inf},
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
