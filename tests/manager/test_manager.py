"""Requests, their handles, and stats of a manager.

The random programs of `random_operations.py` test the lengths, blocks and bytes of all requests.
"""

import functools

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
    whole,
    write_tokens,
)
from tests.support.pools import keys, pool_bytes


@pytest.fixture
def manager():
    return make_manager()


# Stats and blocks.


def test_stats_after_one_allocate(manager):
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
        group_blocks={"all": 4},
    )


def test_stats_report_the_memory_of_the_pool(manager):
    pool = manager.run(lambda state, rows: (state, state.pool), [])
    assert manager.stats().total_memory_bytes == pool_bytes(pool)


def test_allocate_without_tokens_takes_no_block(manager):
    handle = start(manager, "a")
    assert (handle.num_tokens(), handle.block_table().num_blocks()) == (0, 0)
    assert handle.stats().utilization == 0.0
    assert handle.key_cache(0).shape == (0, 1, 2)


def test_allocate_blocks_takes_the_lowest_free_ids_after_defragment(manager):
    for name in "abc":
        start(manager, name, 5)
    taken = manager.allocate_blocks(1)
    manager.deallocate("a")
    manager.defragment()
    before = whole(manager)
    manager.defragment()
    assert manager.allocate_blocks(0) == []
    manager.free_blocks([])
    assert whole(manager) == before
    assert manager.allocate_blocks(2) == [4, 5]
    manager.free_blocks(np.asarray([*taken, 4, 5]))
    assert manager.free_block_count() == 12 - 4
    manager.check()


def test_deallocate_leaves_the_pool_alone_without_scrub_freed_blocks():
    manager = make_manager(scrub_freed_blocks=False)
    write_tokens(manager, start(manager, "a", 6), [42] * 6)
    pointer = manager.run(lambda state, _: (state, keys(state.pool).unsafe_buffer_pointer()), [])
    manager.deallocate("a")
    after = manager.run(lambda state, _: (state, keys(state.pool).unsafe_buffer_pointer()), [])
    assert after == pointer
    assert np.asarray(start(manager, "b", 6).key_cache(0)).any()


# Handles.


def test_block_table_lists_blocks_in_the_order_of_the_tokens(manager):
    handle, other = start(manager, "a", 4), start(manager, "b", 3)
    manager.extend(handle, 4)
    table = handle.block_table()
    assert table == fj.BlockTable(physical_blocks=(0, 1, 3), sequence_length=8, block_size=3)
    assert [table.logical_to_physical(i) for i in range(3)] == [0, 1, 3]
    assert (table.num_blocks(), table.free_tokens(), table.has_free_space()) == (3, 1, True)
    assert other.block_table().physical_blocks == (2,)
    assert not other.block_table().has_free_space()
    assert handle.block_table_mut() == table and handle.as_any() is handle


def test_a_handle_reports_its_geometry_and_arrays():
    geometry = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 4, "dtype": "bfloat16"}
    handle = start(make_manager(geometry=geometry), "a", 4)
    assert (handle.num_layers(), handle.num_heads(), handle.head_dim()) == (3, 2, 4)
    assert (handle.device(), handle.request_id) == (fj.Device("cpu"), "a")
    key, value = handle.kv_cache(2)
    assert key.shape == value.shape == (4, 2, 4)
    assert key.dtype == value.dtype == "bfloat16"


def test_key_cache_returns_a_copy(manager):
    handle = start(manager, "a", 15)  # A full row: the copy is not cut.
    write_tokens(manager, handle, range(1, 16))
    key = handle.key_cache(0)
    before = np.array(key, copy=True)
    write_tokens(manager, handle, range(101, 116))
    manager.deallocate("a")
    np.testing.assert_array_equal(key, before)


def test_handles_and_clones_show_what_extend_changed(manager):
    handle = start(manager, "a", 1)
    clone, found = handle.clone_handle(), manager.get_handle("a")
    manager.extend(clone, 3)
    for view in (handle, clone, found, dict(manager.list_handles())["a"]):
        assert view.num_tokens() == 4
        assert view.cache_id() == handle.cache_id()
        assert view.block_table() == handle.block_table()


def test_handle_stats_count_whole_blocks():
    clock = Clock()
    handle = start(make_manager(clock=clock), "a", 4)
    assert handle.stats() == fj.CacheHandleStats(
        memory_bytes=2 * BLOCK_BYTES,
        blocks_allocated=2,
        tokens_stored=4,
        utilization=4 / 6,
        last_access=100.0,
    )


def test_last_access_is_set_by_extend_and_run():
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


def test_deallocate_invalidates_every_handle(manager):
    handle = start(manager, "a", 4)
    clone = handle.clone_handle()
    assert clone.is_valid()
    manager.deallocate("a")
    assert manager.free_block_count() == 12
    for dead in (handle, clone):
        assert not dead.is_valid()
        assert dead.request_id == "a" and dead.cache_id()
        assert "deallocated" in repr(dead)
        readers = "block_table block_table_mut device num_tokens num_layers num_heads head_dim"
        calls = [getattr(dead, name) for name in [*readers.split(), "clone_handle", "stats"]]
        for read in (dead.key_cache, dead.value_cache, dead.kv_cache):
            calls.append(functools.partial(read, 0))
        calls.append(functools.partial(manager.extend, dead, 1))
        for call in calls:
            with pytest.raises(InvalidHandleError, match=r"'a'.*deallocated.*[Aa]llocate it again"):
                call()


def test_allocate_gives_each_request_a_new_cache_id(manager):
    before = start(manager, "a", 4)
    manager.deallocate("a")
    after = start(manager, "a", 2)
    others = start(manager, "b"), start(make_manager(), "a")
    assert len({handle.cache_id() for handle in (before, after, *others)}) == 4
    assert (before.is_valid(), after.is_valid(), after.num_tokens()) == (False, True, 2)
    assert refused(manager.extend, before, 1) is InvalidHandleError


def test_get_handle_and_list_handles_find_requests_by_id(manager):
    handles = [start(manager, name) for name in ("a", ("b", 1), 7)]
    assert [(name, h.cache_id()) for name, h in manager.list_handles()] == [
        (name, h.cache_id()) for name, h in zip(["a", ("b", 1), 7], handles, strict=True)
    ]
    assert manager.get_handle(("b", 1)).request_id == ("b", 1)
    assert manager.get_handle("c") is None


def test_new_request_asks_for_the_geometry_of_the_pool(manager):
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
