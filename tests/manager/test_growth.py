"""Growth of the pool, and `gc`. The random programs of several devices test shrinking."""

from ferrum_jax.errors import OutOfBlocksError
from tests.support.managers import (
    BLOCK_BYTES,
    make_manager,
    refused,
    start,
    tokens_of,
    write_tokens,
)

# Growth.


def test_extend_doubles_the_pool_up_to_max_blocks():
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


def test_allocate_grows_the_pool_once_for_one_large_request():
    manager = make_manager(initial_blocks=1)
    assert manager.can_allocate(manager.new_request("a", 15))
    start(manager, "a", 15)
    assert (manager.total_block_count(), manager.stats().growth_count) == (8, 1)
    manager.allocate_blocks(5)
    assert (manager.total_block_count(), manager.stats().growth_count) == (12, 2)


def test_allocate_uses_freed_blocks_before_the_pool_grows():
    manager = make_manager(initial_blocks=6)
    for i in range(4):
        start(manager, i, 15)
        manager.deallocate(i)
    assert (manager.total_block_count(), manager.stats().growth_count) == (6, 0)


# Collection.


def test_gc_reports_its_time():
    times = iter(range(100))
    manager = make_manager(clock=lambda: next(times) / 4)
    assert manager.gc().gc_time_ms == 500  # The clock is read three times.


def test_gc_frees_a_request_whose_handle_was_in_a_refused_extend():
    manager = make_manager()
    handle = start(manager, "a", 4)
    assert refused(manager.extend, handle, 100)
    del handle
    assert manager.gc().caches_freed == 1


def test_gc_keeps_a_grown_pool_with_enable_pooling():
    manager = make_manager(initial_blocks=3)
    start(manager, "a", 15)
    manager.gc()
    assert (manager.total_block_count(), manager.free_block_count()) == (6, 6)
