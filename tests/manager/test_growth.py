"""How the pool follows the demand: it doubles, and gives back what nobody holds."""

import pytest

import ferrum_jax as fj
from ferrum_jax.errors import OutOfBlocksError, UnknownRequestError
from tests.support.managers import (
    BLOCK_BYTES,
    Clock,
    make_manager,
    refused,
    start,
    tokens_of,
    write_tokens,
)

# Growth.


def test_the_pool_doubles_on_demand_up_to_its_limit():
    manager = make_manager(initial_blocks=2, max_blocks=10)
    handle = start(manager, "a")
    sizes = []
    for token in range(1, 16):
        manager.extend(handle, 1)
        write_tokens(manager, handle, [token], begin=token - 1)
        sizes.append((manager.total_block_count(), manager.stats().growth_count))
    assert sizes == [(2, 0)] * 6 + [(4, 1)] * 6 + [(8, 2)] * 3
    other = start(manager, "b", 15)
    assert (manager.total_block_count(), manager.free_block_count()) == (10, 0)
    assert manager.stats().total_memory_bytes == 10 * BLOCK_BYTES
    assert tokens_of(handle) == list(range(1, 16))
    write_tokens(manager, other, range(101, 116))
    assert tokens_of(handle) == list(range(1, 16))
    assert refused(manager.allocate, manager.new_request("c", 1)) is OutOfBlocksError
    assert manager.stats().growth_count == 3
    manager.check()


def test_one_large_demand_is_one_growth():
    manager = make_manager(initial_blocks=1)
    assert manager.can_allocate(manager.new_request("a", 15))
    start(manager, "a", 15)
    assert (manager.total_block_count(), manager.stats().growth_count) == (8, 1)
    manager.allocate_blocks(5)
    assert (manager.total_block_count(), manager.stats().growth_count) == (12, 2)


def test_freed_blocks_are_used_before_the_pool_grows():
    manager = make_manager(initial_blocks=6)
    for i in range(4):
        start(manager, i, 15)
        manager.deallocate(i)
    assert (manager.total_block_count(), manager.stats().growth_count) == (6, 0)


def test_a_growth_for_which_memory_is_short_changes_nothing(monkeypatch):
    manager = make_manager(initial_blocks=3)
    handle = start(manager, "a", 7)
    write_tokens(manager, handle, range(1, 8))

    def no_memory(state, num_blocks):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("ferrum_jax.manager.pool.pool.resize", no_memory)
        with pytest.raises(MemoryError):
            start(manager, "b", 1)
        with pytest.raises(MemoryError):
            manager.extend(handle, 3)
    manager.check()
    assert (manager.total_block_count(), manager.free_block_count()) == (3, 0)
    start(manager, "b", 1)
    assert tokens_of(handle) == list(range(1, 8))
    assert (manager.total_block_count(), manager.free_block_count()) == (6, 2)
    manager.check()


# Garbage.


def test_gc_frees_the_requests_whose_handles_are_gone():
    manager = make_manager(clock=Clock())
    start(manager, "dropped", 4)
    kept = start(manager, "kept", 4)
    through_clone = start(manager, "cloned", 1).clone_handle()
    assert manager.gc() == fj.CacheGcStats(
        memory_freed=2 * BLOCK_BYTES, caches_freed=1, gc_time_ms=0
    )
    assert [name for name, _ in manager.list_handles()] == ["kept", "cloned"]
    assert kept.is_valid() and through_clone.is_valid()
    assert manager.gc().caches_freed == 0
    assert refused(manager.deallocate, "dropped") is UnknownRequestError
    manager.check()


def test_gc_tells_how_long_it_took():
    times = iter(range(100))
    assert (
        make_manager(clock=lambda: next(times) / 4).gc().gc_time_ms == 500
    )  # Three looks at the clock.


def test_a_handle_of_a_refused_call_is_not_kept_alive():
    manager = make_manager()
    handle = start(manager, "a", 4)
    assert refused(manager.extend, handle, 100)
    del handle
    assert manager.gc().caches_freed == 1


def test_gc_returns_what_the_pool_grew_when_pooling_is_off():
    manager = make_manager(initial_blocks=3, enable_pooling=False)
    first = [start(manager, name, 4) for name in "abc"]
    last = start(manager, "d", 7)
    write_tokens(manager, last, range(1, 8))
    assert manager.total_block_count() == 12
    assert manager.gc().memory_freed == 0
    assert manager.total_block_count() == 12
    del first
    assert manager.gc().caches_freed == 3
    assert (manager.total_block_count(), manager.free_block_count()) == (3, 0)
    assert last.block_table().physical_blocks == (0, 1, 2)
    assert tokens_of(last) == list(range(1, 8))
    manager.check()
    manager.extend(last, 8)
    assert (manager.total_block_count(), tokens_of(last)[:7]) == (6, list(range(1, 8)))


def test_the_pool_does_not_shrink_below_a_block_that_was_taken_by_itself():
    manager = make_manager(initial_blocks=3, enable_pooling=False)
    blocks = manager.allocate_blocks(7)
    manager.free_blocks([block for block in blocks if block != 4])
    manager.gc()
    assert (manager.total_block_count(), manager.free_block_count()) == (6, 5)
    manager.check()
    manager.free_blocks([4])
    manager.gc()
    assert manager.total_block_count() == 3


def test_gc_keeps_a_grown_pool_when_pooling_is_on():
    manager = make_manager(initial_blocks=3)
    start(manager, "a", 15)
    manager.gc()
    assert (manager.total_block_count(), manager.free_block_count()) == (6, 6)
