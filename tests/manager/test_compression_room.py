"""The blocks that a compression is written to when those of the request are cached."""

import pytest

from ferrum_jax.errors import OutOfBlocksError
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.policies.requests import LruEvictionPolicy
from ferrum_jax.types import Priority
from tests.support.compressed_managers import (
    BLOCK_BYTES,
    TO_INT8,
    TOKENS,
    begin,
    compute,
    make_caching,
    picture,
    tokens_of,
)


@pytest.mark.parametrize("num_taken", range(9))
def test_compress_cache_of_cached_blocks_succeeds_however_full_the_pool_is(num_taken):
    """Of 16 blocks, the request holds 8, all cached; `allocate_blocks` takes `num_taken` others."""
    manager = make_caching(max_blocks=16, initial_blocks=16)
    tokens = [*range(40, 72)]
    a = compute(manager, "a", tokens)
    manager.commit(a)
    manager.allocate_blocks(num_taken)
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.check()
    assert tokens_of(a) == tokens and a.stats().blocks_allocated == 3
    assert a.compression.freed_bytes == (8 - 3) * BLOCK_BYTES, "free, or idle in the cache"
    stats, num_gone = manager.stats(), max(0, num_taken - 5)  # Three are needed.
    assert stats.free_blocks + stats.evictable_blocks == 16 - num_taken - 3
    assert (stats.cached_blocks, stats.eviction_count) == (8 - num_gone, num_gone)
    num_found = min(28, 4 * (8 - num_gone))
    assert manager.explain_lookup(tokens[:29]).num_cached_tokens == num_found
    manager.deallocate("a")
    b = compute(manager, "b", tokens[:29])
    assert b.num_cached_tokens == num_found and tokens_of(b) == tokens[:29]
    manager.check()


@pytest.mark.parametrize(("others", "num_freed"), [("hold", 0), ("pin", 0), ("continue", 5)])
def test_compress_cache_evicts_only_cached_blocks_without_other_users(others, num_freed):
    """Other requests or prefixes use five of its blocks; idle prefixes are evicted first."""
    manager = make_caching(max_blocks=16, initial_blocks=16)
    tokens = [*range(40, 72)]
    a = compute(manager, "a", tokens)
    manager.commit(a)
    if others == "hold":
        compute(manager, "b", tokens[:23])  # Five blocks of "a".
    elif others == "pin":
        b = compute(manager, "b", tokens[:21])
        manager.commit(b, retention=Retention(is_pinned=True))
        manager.deallocate("b")
    else:
        b = compute(manager, "b", [*tokens[:20], *range(1, 13)])  # Three more blocks.
        manager.commit(b)
        manager.deallocate("b")
    manager.allocate_blocks(manager.free_block_count())
    manager.compress_cache("a", 0.5, TO_INT8)
    manager.check()
    assert tokens_of(a) == tokens
    assert manager.explain_lookup(tokens[:21]).num_cached_tokens == 20
    assert manager.stats().eviction_count == 3
    assert a.compression.freed_bytes == num_freed * BLOCK_BYTES


def test_compress_cache_of_pinned_blocks_needs_free_blocks():
    manager = make_caching(max_blocks=8, initial_blocks=8)
    a = compute(manager, "a", [*range(40, 72)])
    manager.commit(a, retention=Retention(is_pinned=True))
    before = picture(manager)
    with pytest.raises(OutOfBlocksError, match="compress_cache of 'a'"):
        manager.compress_cache("a", 0.5, TO_INT8)
    assert picture(manager) == before
    manager.check()


def test_compress_cache_does_not_preempt_where_eviction_is_enough():
    manager = make_caching(max_blocks=12, initial_blocks=12, preemption_policy=LruEvictionPolicy())
    begin(manager, "low", TOKENS[:13], priority=Priority.Low)
    a = compute(manager, "a", [*range(40, 72)])
    manager.commit(a)
    manager.compress_cache("a", 0.5, TO_INT8)
    assert manager.stats().preemption_count == 0 and manager.stats().eviction_count == 3
    assert a.compression.freed_bytes == 5 * BLOCK_BYTES
    manager.check()


def test_compress_cache_does_not_report_preempted_blocks_as_freed():
    """Seven blocks of the request are pinned; two more than its last block are needed."""
    manager = make_caching(max_blocks=12, initial_blocks=12, preemption_policy=LruEvictionPolicy())
    tokens = [*range(40, 72)]
    a = compute(manager, "a", tokens[:29])
    manager.commit(a, retention=Retention(is_pinned=True))
    begin(manager, "low", TOKENS[:13], priority=Priority.Low)
    manager.compress_cache("a", 0.5, TO_INT8)
    assert manager.stats().preemption_count == 1 and not manager.stats().eviction_count
    assert a.compression.freed_bytes == -2 * BLOCK_BYTES, "seven stay pinned"
    manager.check()
