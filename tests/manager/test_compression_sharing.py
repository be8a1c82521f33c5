"""Compressed requests beside shared and cached blocks, in other tiers, and refusals."""

import dataclasses
import math

import numpy as np
import pytest

from ferrum_jax import errors
from ferrum_jax.compression.methods import CompressionMethod
from tests.support.compressed_managers import (
    BLOCK_BYTES,
    BLOCKS,
    NATIVE,
    PRUNE,
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

# Cached blocks.

PROMPT = [*range(40, 69)]  # Seven full blocks and one token.


def test_compress_cache_leaves_cached_blocks_as_they_were():
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
    assert a.compression.freed_bytes == -2 * BLOCK_BYTES, "two blocks are taken"
    c = compute(manager, "c", PROMPT)
    assert c.num_cached_tokens == 28 and bits_of(c) == bits
    for name in "abc":
        manager.deallocate(name)
    d = compute(manager, "d", PROMPT)
    assert d.num_cached_tokens == 28 and bits_of(d) == bits
    manager.check()


def test_commit_of_a_compressed_request_caches_nothing():
    manager = make_caching()
    handle = compute(manager, "a", PROMPT)
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.extend(handle, 2)
    manager.run(lambda state, _: (state, None), [handle])
    assert manager.commit(handle, [5, 6]) == 0
    manager.swap_out("a")
    manager.swap_in("a")
    assert not cached_prefixes(manager) and manager.stats().cached_blocks == 0
    manager.check()


def test_compress_cache_evicts_cached_blocks_when_it_needs_blocks():
    """Seven idle cached blocks fill the pool, and all blocks of the request are shared."""
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


# Other tiers and managers.


@ways
def test_swap_out_and_move_to_keep_the_bits_and_the_report_of_a_compressed_request(way):
    ratio, method = WAYS[way]
    manager, other = make(), make()
    handle = begin(manager, "a")
    manager.compress_cache("a", ratio, method)
    num_blocks = handle.stats().blocks_allocated
    before = bits_of(handle), handle.compression, handle.live_request().shape
    manager.swap_out("a")
    assert num_blocks <= manager.stats().host_bytes / BLOCK_BYTES < num_blocks + 0.5
    assert handle.num_tokens() == 30 and handle.stats().memory_bytes == 0
    begin(manager, "b")  # Takes the row and the blocks.
    manager.swap_in("a")
    assert (bits_of(handle), handle.compression, handle.live_request().shape) == before
    manager.move_to("a", other)
    assert (bits_of(handle), handle.compression, handle.live_request().shape) == before
    assert manager.free_block_count() == BLOCKS - 8
    assert manager.compression_stats().compressed_caches == 0
    assert other.compression_stats().compressed_caches == 1
    other.extend(handle, 2)
    fill(other, handle, [98, 99], len(kept_tokens(way)))
    assert tokens_of(handle) == [*kept_tokens(way), 98, 99]
    other.check()


def test_compress_cache_grows_the_pool_and_gc_shrinks_it():
    manager = make(initial_blocks=8, max_blocks=32, enable_pooling=False, token_formats=())
    tokens = [*range(1, 33)]
    a = begin(manager, "a", tokens)
    b = manager.allocate(manager.new_request("b", 32))
    manager.share_prefix("a", "b", 32)
    taken = manager.allocate_blocks(8)
    assert manager.total_block_count() == 16 and manager.free_block_count() == 0
    manager.compress_cache("a", 0.5, TO_INT8)  # All its blocks are shared.
    assert manager.total_block_count() == 32
    assert tokens_of(a) == tokens_of(b) == tokens
    manager.check()
    bits = bits_of(a)
    manager.free_blocks(taken)
    manager.deallocate("b")
    manager.gc()
    assert manager.total_block_count() == 8 and bits_of(a) == bits
    manager.check()


# Refusals.

BAD = {
    "ratio 0": (ValueError, "a", (0.0, TO_INT8)),
    "ratio below 0": (ValueError, "a", (-0.5, TO_INT8)),
    "ratio above 1": (ValueError, "a", (1.01, TO_INT8)),
    "ratio NaN": (ValueError, "a", (math.nan, TO_INT8)),
    "ratio infinite": (ValueError, "a", (math.inf, TO_INT8)),
    "ratio not a number": (ValueError, "a", ("half", TO_INT8)),
    "no queries for a scorer": (
        ValueError,
        "a",
        (0.5, CompressionMethod(scorer="observed_attention")),
    ),
    "no queries for a fit": (ValueError, "a", (0.5, dataclasses.replace(PRUNE, fit_steps=2))),
    "more bits than now": (errors.CompressionError, "compressed", (0.1, PRUNE)),
    "an unknown request": (errors.UnknownRequestError, "missing", (0.5, TO_INT8)),
    "a request that is swapped out": (errors.SwappedOutError, "away", (0.5, TO_INT8)),
    "fewer bits than any format": (errors.CompressionError, "a", (0.2, TO_INT8)),
    "recent tokens that must stay": (errors.CompressionError, "a", (0.13, CompressionMethod())),
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
def test_compress_cache_that_is_refused_changes_nothing(busy_manager, name):
    error, request_id, args = BAD[name]
    before = picture(busy_manager)
    with pytest.raises(error) as info:
        busy_manager.compress_cache(request_id, *args)
    assert len(str(info.value)) > 20
    assert picture(busy_manager) == before
    busy_manager.check()


def test_share_prefix_refuses_a_compressed_request(busy_manager):
    before = picture(busy_manager)
    for names in (("a", "compressed"), ("compressed", "a")):
        with pytest.raises(
            errors.CompressionError, match="'compressed' is compressed.*Share first"
        ):
            busy_manager.share_prefix(*names, 4)
    assert picture(busy_manager) == before


@pytest.mark.parametrize(
    "shape",
    [(3, 4, 2, 16), (2, 3, 2, 16), (2, 1, 2, 16), (2, 4, 2, 8), (2, 4, 16)],
    ids=["layers", "three heads for two", "one head for two", "head_dim", "axes"],
)
def test_compress_cache_refuses_queries_of_another_shape(shape):
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
def test_compression_method_refuses_wrong_values(change):
    with pytest.raises((ValueError, TypeError), match=next(iter(change)) + "|unknown"):
        CompressionMethod(**change)


def test_compress_cache_of_an_int8_pool_can_only_drop_tokens():
    manager = make(geometry={"dtype": "int8"}, token_formats=())
    handle = manager.allocate(manager.new_request("a", 30))
    before = picture(manager)
    with pytest.raises(ValueError, match="int8 cannot store tokens as Int8"):
        manager.compress_cache("a", 0.5, TO_INT8)
    with pytest.raises(errors.CompressionError):
        manager.compress_cache("a", 0.5, CompressionMethod(scorer=None))
    assert picture(manager) == before
    manager.compress_cache("a", 0.5, dataclasses.replace(PRUNE, token_format=None))
    assert handle.stats().blocks_allocated == 4 and handle.compression.token_format == NATIVE
    manager.check()
