"""Requests and their handles: room given, room taken back, and the books kept exactly."""

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import InvalidHandleError
from tests.support.managers import (
    BLOCK_BYTES,
    Clock,
    make_manager,
    refused,
    start,
    tokens_of,
    write_tokens,
)


@pytest.fixture
def manager():
    return make_manager()


# The books.


def test_one_allocation_counts_once(manager):
    start(manager, "a", 10)
    assert manager.stats() == fj.CacheManagerStats(
        total_memory_bytes=12 * BLOCK_BYTES,
        used_memory_bytes=4 * BLOCK_BYTES,
        active_caches=1,
        total_blocks=12,
        free_blocks=8,
        cache_hit_rate=0.0,
        eviction_count=0,
        allocation_count=1,
        allocation_failures=0,
        growth_count=0,
    )


def test_the_memory_reported_is_the_memory_allocated(manager):
    pool = manager.run(lambda state, rows: (state, state.pool), [])
    assert manager.stats().total_memory_bytes == pool.k.nbytes + pool.v.nbytes


def test_only_allocations_count_as_allocations(manager):
    handle = start(manager, "a", 1)
    manager.extend(handle, 5)
    manager.allocate_blocks(2)
    assert refused(manager.extend, handle, 100) and refused(manager.allocate_blocks, 100)
    stats = manager.stats()
    assert (stats.allocation_count, stats.allocation_failures) == (1, 0)
    assert (stats.free_blocks, manager.free_block_count()) == (8, 8)


def test_blocks_follow_the_lengths(manager):
    free = manager.free_block_count
    handle = start(manager, "a", 4)
    assert (handle.num_tokens(), free()) == (4, 10)
    manager.extend(handle, 2)  # Fits into the last block.
    assert (handle.num_tokens(), free()) == (6, 10)
    manager.extend(handle, 1)
    assert (handle.num_tokens(), free()) == (7, 9)
    manager.extend(handle, 8)
    assert (handle.num_tokens(), free()) == (15, 7)
    manager.extend(handle, 0)
    assert (handle.num_tokens(), free()) == (15, 7)
    manager.deallocate("a")
    assert free() == 12
    manager.check()


def test_a_request_may_start_without_tokens(manager):
    handle = start(manager, "a")
    assert (handle.num_tokens(), handle.block_table().num_blocks()) == (0, 0)
    assert handle.stats().utilization == 0.0
    assert handle.key_cache(0).shape == (0, 1, 2)
    manager.extend(handle, 4)
    write_tokens(manager, handle, [1, 2, 3, 4])
    assert tokens_of(handle) == [1, 2, 3, 4]
    manager.check()


def test_requests_without_tokens_take_rows_of_their_own(manager):
    handles = [start(manager, i) for i in range(5)]
    assert manager.free_block_count() == 12
    for i, handle in enumerate(handles):
        manager.extend(handle, 2)
        write_tokens(manager, handle, [i + 1, i + 11])
    assert [tokens_of(handle) for handle in handles] == [[i + 1, i + 11] for i in range(5)]


def test_several_requests_are_extended_in_one_call(manager):
    handles = [start(manager, i, length) for i, length in enumerate([2, 3, 0])]
    manager.extend_all(handles, 4)
    assert [handle.num_tokens() for handle in handles] == [6, 7, 4]
    assert manager.free_block_count() == 12 - 2 - 3 - 2
    manager.extend_all([], 4)
    manager.check()


def test_nothing_leaks_over_many_lives(manager):
    for life in range(12):
        handle = start(manager, "a", 1 + life)
        manager.extend(handle, 3)
        manager.deallocate("a")
    manager.check()
    stats = manager.stats()
    assert (stats.free_blocks, stats.active_caches, stats.allocation_count) == (12, 0, 12)


def test_requests_do_not_disturb_each_other(manager):
    first, second = start(manager, "a", 4), start(manager, "b", 5)
    write_tokens(manager, first, [11, 12, 13, 14])
    write_tokens(manager, second, [21, 22, 23, 24, 25])
    manager.extend(first, 4)  # Across a block's edge.
    write_tokens(manager, first, [15, 16, 17, 18], begin=4)
    manager.deallocate("b")
    third = start(manager, "c", 6)
    write_tokens(manager, third, [31, 32, 33, 34, 35, 36])
    assert tokens_of(first) == [11, 12, 13, 14, 15, 16, 17, 18]
    assert tokens_of(third) == [31, 32, 33, 34, 35, 36]


def test_a_new_request_reads_nothing_of_the_one_before(manager):
    write_tokens(manager, start(manager, "a", 6), [42] * 6)
    manager.deallocate("a")
    handle = start(manager, "b", 6)
    assert not np.asarray(handle.key_cache(0)).any()


def test_freed_blocks_are_zeroed_and_others_are_not(manager):
    kept = start(manager, "kept", 4)
    write_tokens(manager, kept, [1, 2, 3, 4])
    write_tokens(manager, start(manager, "gone", 7), [42] * 7)
    manager.deallocate("gone")
    blocks = list(kept.block_table().physical_blocks)

    def left_over(state, seq_ids):
        return state, np.delete(np.array(state.pool.k), blocks, axis=0).any()

    assert not manager.run(left_over, [])
    assert tokens_of(kept) == [1, 2, 3, 4]


def test_a_manager_that_does_not_scrub_leaves_the_pool_alone():
    manager = make_manager(scrub_freed_blocks=False)
    write_tokens(manager, start(manager, "a", 6), [42] * 6)
    pointer = manager.run(lambda state, _: (state, state.pool.k.unsafe_buffer_pointer()), [])
    manager.deallocate("a")
    after = manager.run(lambda state, _: (state, state.pool.k.unsafe_buffer_pointer()), [])
    assert after == pointer
    assert np.asarray(start(manager, "b", 6).key_cache(0)).any()


def test_a_change_asked_for_inside_a_step_is_refused(manager):
    handle = start(manager, "a", 4)

    def step(state, seq_ids):
        manager.extend(handle, 1)
        return state, None

    with pytest.raises(RuntimeError, match="before or after run"):
        manager.run(step, [handle])
    manager.check()
    manager.extend(handle, 1)


# Handles.


def test_a_handle_lists_its_blocks_in_the_order_of_its_tokens(manager):
    handle, other = start(manager, "a", 4), start(manager, "b", 3)
    manager.extend(handle, 4)
    table = handle.block_table()
    assert table == fj.BlockTable(physical_blocks=(0, 1, 3), sequence_length=8, block_size=3)
    assert [table.logical_to_physical(i) for i in range(3)] == [0, 1, 3]
    assert (table.num_blocks(), table.free_tokens(), table.has_free_space()) == (3, 1, True)
    assert other.block_table().physical_blocks == (2,)
    assert not other.block_table().has_free_space()
    assert handle.block_table_mut() == table and handle.as_any() is handle


def test_a_handle_tells_what_is_cached():
    geometry = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 4, "dtype": "bfloat16"}
    handle = start(make_manager(geometry=geometry), "a", 4)
    assert (handle.num_layers(), handle.num_heads(), handle.head_dim()) == (3, 2, 4)
    assert (handle.device(), handle.request_id) == (fj.Device("cpu"), "a")
    key, value = handle.kv_cache(2)
    assert key.shape == value.shape == (4, 2, 4)
    assert key.dtype == value.dtype == "bfloat16"


def test_what_was_written_is_read_back_in_each_dtype(dtype):
    manager = make_manager(geometry={"dtype": dtype})
    handle = start(manager, "a", 7)
    write_tokens(manager, handle, range(1001, 1008))
    assert tokens_of(handle) == list(range(1001, 1008))
    assert handle.key_cache(1).dtype == handle.value_cache(1).dtype == dtype


def test_what_was_read_stays_as_it_was(manager):
    handle = start(manager, "a", 15)  # As long as a row: nothing is cut off the copy.
    write_tokens(manager, handle, range(1, 16))
    key = handle.key_cache(0)
    before = np.array(key, copy=True)
    write_tokens(manager, handle, range(101, 116))
    manager.deallocate("a")
    np.testing.assert_array_equal(key, before)


def test_a_handle_is_a_live_view(manager):
    handle = start(manager, "a", 1)
    clone, found = handle.clone_handle(), manager.get_handle("a")
    manager.extend(clone, 3)
    for view in (handle, clone, found, dict(manager.list_handles())["a"]):
        assert view.num_tokens() == 4
        assert view.cache_id() == handle.cache_id()
        assert view.block_table() == handle.block_table()


def test_a_handle_costs_what_its_blocks_cost():
    clock = Clock()
    handle = start(make_manager(clock=clock), "a", 4)
    assert handle.stats() == fj.CacheHandleStats(
        memory_bytes=2 * BLOCK_BYTES,
        blocks_allocated=2,
        tokens_stored=4,
        utilization=4 / 6,
        last_access=100.0,
    )


def test_extending_and_running_are_accesses():
    clock = Clock()
    manager = make_manager(clock=clock)
    handle, other = start(manager, "a", 1), start(manager, "b", 1)
    clock.now = 101.0
    manager.extend(handle, 1)
    assert handle.stats().last_access == 101.0
    clock.now = 102.0
    manager.run(lambda state, rows: (state, None), [handle, None])
    assert handle.stats().last_access == 102.0
    assert other.stats().last_access == 100.0


def test_deallocation_ends_every_handle(manager):
    handle = start(manager, "a", 4)
    clone = handle.clone_handle()
    assert clone.is_valid()
    manager.deallocate("a")
    assert manager.free_block_count() == 12
    for dead in (handle, clone):
        assert not dead.is_valid()
        assert dead.request_id == "a" and dead.cache_id()
        assert "deallocated" in repr(dead)
        for use in (
            dead.block_table,
            dead.block_table_mut,
            dead.device,
            dead.num_tokens,
            dead.num_layers,
            dead.num_heads,
            dead.head_dim,
            dead.clone_handle,
            dead.stats,
            lambda dead=dead: dead.key_cache(0),
            lambda dead=dead: dead.value_cache(0),
            lambda dead=dead: dead.kv_cache(0),
            lambda dead=dead: manager.extend(dead, 1),
            lambda dead=dead: manager.run(lambda state, rows: (state, None), [dead]),
        ):
            with pytest.raises(InvalidHandleError, match=r"'a'.*deallocated.*[Aa]llocate it again"):
                use()


def test_the_same_id_gets_a_fresh_cache(manager):
    before = start(manager, "a", 4)
    manager.deallocate("a")
    after = start(manager, "a", 2)
    assert after.cache_id() != before.cache_id()
    assert (before.is_valid(), after.is_valid(), after.num_tokens()) == (False, True, 2)
    assert refused(manager.extend, before, 1) is InvalidHandleError


def test_a_cache_id_is_unique_among_managers(manager):
    caches = [start(m, "a") for m in (manager, make_manager())] + [start(manager, "b")]
    assert len({handle.cache_id() for handle in caches}) == 3


def test_a_clone_does_not_keep_blocks(manager):
    clone = start(manager, "a", 4).clone_handle()
    manager.deallocate("a")
    assert (manager.free_block_count(), manager.get_handle("a")) == (12, None)
    assert not clone.is_valid()


def test_requests_are_found_by_id(manager):
    handles = [start(manager, name) for name in ("a", ("b", 1), 7)]
    assert [(name, h.cache_id()) for name, h in manager.list_handles()] == [
        (name, h.cache_id()) for name, h in zip(["a", ("b", 1), 7], handles, strict=True)
    ]
    assert manager.get_handle(("b", 1)).request_id == ("b", 1)
    assert manager.get_handle("c") is None


def test_a_new_request_asks_for_what_the_pool_has(manager):
    request = manager.new_request("a", initial_tokens=4, priority=fj.Priority.High)
    assert request == fj.AllocationRequest(
        request_id="a",
        initial_tokens=4,
        max_sequence_length=15,
        num_layers=2,
        num_heads=1,
        head_dim=2,
        device=fj.Device("cpu"),
        dtype=fj.DataType.FP32,
        priority=fj.Priority.High,
    )
    assert manager.new_request("a", max_sequence_length=7).max_sequence_length == 7
