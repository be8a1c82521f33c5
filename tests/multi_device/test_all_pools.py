"""Calls that concern the pools of all devices together."""

import dataclasses

import pytest

from ferrum_jax import MemoryPressure
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    GeometryMismatchError,
)
from tests.support.internals import devices_of, pool_of
from tests.support.managers import (
    BLOCK_BYTES,
    PREFIXES,
    refused,
    start,
    tokens_of,
)
from tests.support.multi_device import (
    CPU,
    all_of,
    begin,
    begin_with,
    make_multi,
    tokens_for,
    used,
    where,
)


def test_stats_is_the_sum_of_device_stats():
    manager = make_multi(3, initial_blocks=2)
    for name, device in (("a", 0), ("b", 1), ("c", 1)):
        begin(manager, name, 5, CPU[device])
    manager.swap_out("c")
    manager.move_cache("a", CPU[2])
    refused(start, manager, "a")
    parts, whole = manager.device_stats(), manager.stats()
    assert list(parts) == CPU[:3]
    for field in dataclasses.fields(whole):
        numbers = [getattr(part, field.name) for part in parts.values()]
        assert getattr(whole, field.name) == sum(numbers), field.name
    assert (whole.active_caches, whole.allocation_count, whole.allocation_failures) == (3, 3, 1)
    assert whole.host_bytes == 2 * BLOCK_BYTES


def test_gc_frees_requests_without_handles_on_every_device():
    manager = make_multi(2)
    kept = start(manager, "kept", 3, device=CPU[1])
    for name, device in (("a", 0), ("b", 1)):
        start(manager, name, 4, device=CPU[device])
    got = manager.gc()
    assert (got.caches_freed, got.memory_freed) == (2, 4 * BLOCK_BYTES)
    assert where(manager) == {"kept": CPU[1]} and kept.is_valid()


def test_set_pressure_callback_reports_the_pressure_of_all_pools_together():
    manager, told = make_multi(2), []
    manager.set_pressure_callback(lambda level: (told.append(level), manager.stats()))
    handles = [start(manager, "a", 15), start(manager, "b", 9, device=CPU[0])]
    assert told == []  # The first pool is full, the second empty.
    handles.append(start(manager, "c", 12))
    assert told.pop() == MemoryPressure.Medium and not told  # 12 of 16 blocks.
    manager.extend(handles[2], 3)
    assert told.pop() == MemoryPressure.High and not told
    for name in "ab":
        refused(manager.move_cache, name, CPU[1])
    assert not told
    manager.deallocate("c")
    assert told.pop() == MemoryPressure.Low and not told


def test_check_finds_a_request_that_is_on_another_device_than_recorded():
    manager = make_multi(2)
    handle = begin(manager, "a", 4)
    manager.check()
    handle.live_request().pool = pool_of(devices_of(manager)[CPU[1]])
    with pytest.raises(AssertionError, match="not its own"):
        manager.check()


def test_share_prefix_needs_both_requests_on_one_device():
    manager = make_multi(2)
    begin(manager, "a", 8, CPU[1])
    start(manager, "b", 8, device=CPU[1])
    begin(manager, "far", 8, CPU[0])
    manager.share_prefix("a", "b", 8)
    assert tokens_of(manager.get_handle("b")) == tokens_for("a", 8)
    assert used(manager) == [3, 4]
    before = all_of(manager)
    with pytest.raises(GeometryMismatchError, match="cpu:1, cpu:0.*move_cache"):
        manager.share_prefix("a", "far", 3)
    assert all_of(manager) == before
    manager.move_cache("b", CPU[0])
    assert tokens_of(manager.get_handle("b")) == tokens_for("a", 8)
    assert used(manager) == [6, 3]
    manager.check()


def test_defragment_compacts_every_pool():
    manager = make_multi(2)
    for device in CPU[:2]:
        for name in "ab":
            begin(manager, (name, device), 6, device)
        manager.deallocate(("a", device))
    manager.defragment()
    for device in CPU[:2]:
        handle = manager.get_handle(("b", device))
        assert handle.block_table().physical_blocks == (0, 1)
        assert tokens_of(handle) == tokens_for(("b", device), 6)
    manager.check()


def test_enable_prefix_caching_applies_to_every_device():
    manager = make_multi(2)
    manager.enable_prefix_caching(PREFIXES)
    prompt = tokens_for("p", 7)
    for device in CPU[:2]:
        begin_with(manager, device, prompt, device)
    reports = manager.explain_lookup(prompt)
    assert [reports[device].num_cached_tokens for device in CPU[:2]] == [6, 6]


def test_compression_stats_are_empty_at_first():
    stats = make_multi(2).compression_stats()
    assert (stats.compressed_caches, stats.memory_saved_bytes) == (0, 0)
    assert (stats.avg_compression_ratio, stats.avg_compression_time_ms) == (1.0, 0.0)


def test_close_releases_the_directory_of_every_device(tmp_path):
    tiers = TierConfig(host_budget_bytes=0, disk_directory=tmp_path)
    for _ in range(2):  # The second one finds no directory in use.
        with make_multi(2, tiers=tiers) as manager:
            for name, device in (("a", CPU[0]), ("b", CPU[1])):
                begin(manager, name, 6, device)
                manager.swap_out(name)
            assert len(list(tmp_path.glob("*/*.kvblocks"))) == 2
        assert not list(tmp_path.glob("*/*.kvblocks"))
