"""Calls that concern the pools of all devices together."""

import pytest

from ferrum_jax.config import TierConfig
from ferrum_jax.errors import GeometryMismatchError
from tests.support.internals import devices_of, pool_of
from tests.support.managers import start, tokens_of
from tests.support.multi_device import CPU, all_of, begin, make_multi, tokens_for, used


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
