"""Sharing, compressing and faults across devices. Run by `test_multi_device.py`."""

import numpy as np
import pytest

from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import CorruptFileError, GeometryMismatchError, UnknownRequestError
from ferrum_jax.manager.balance import CacheMove
from ferrum_jax.types import TokenFormat
from tests.multi_device.cases import PREFIXES, begin, begin_with, tokens_for, used, where
from tests.support.managers import BLOCK_BYTES, refused, start, tokens_of, write_tokens
from tests.support.multi_device import CPU, DAMAGES, all_of, damage, make_multi
from tests.support.parts import devices_of

PRUNING = CompressionMethod(token_format=TokenFormat.Native, num_sinks=1, num_recent=2)


def test_requests_share_a_beginning_on_one_device_and_not_across_two():
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


def test_every_pool_is_defragmented():
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


def test_prefix_caching_begins_on_every_device():
    manager = make_multi(2)
    manager.enable_prefix_caching(PREFIXES)
    prompt = tokens_for("p", 7)
    for device in CPU[:2]:
        begin_with(manager, device, prompt, device)
    reports = manager.explain_lookup(prompt)
    assert [reports[device].num_cached_tokens for device in CPU[:2]] == [6, 6]


def test_a_compressed_cache_moves_bit_for_bit_and_counts_where_it_is():
    manager = make_multi(2)
    for name, device in (("a", CPU[0]), ("b", CPU[1])):
        begin(manager, name, 12, device)
    manager.compress_cache("a", 0.5, PRUNING)
    handle = manager.get_handle("a")
    kept = [np.asarray(part) for part in handle.kv_cache(1)]
    assert len(kept[0]) == 6 and handle.num_tokens() == 12
    for target in (CPU[1], CPU[0], CPU[1]):
        manager.move_cache("a", target)
        now = [np.asarray(part) for part in handle.kv_cache(1)]
        assert [part.tobytes() for part in now] == [part.tobytes() for part in kept]
    manager.compress_cache("b", 0.25, PRUNING)
    stats = manager.compression_stats()
    assert stats.compressed_caches == 2
    assert stats.avg_compression_ratio == pytest.approx((0.5 + 0.25) / 2)
    assert stats.memory_saved_bytes == 5 * BLOCK_BYTES
    assert stats.avg_compression_time_ms > 0
    manager.check()


def test_nothing_is_compressed_at_first():
    stats = make_multi(2).compression_stats()
    assert (stats.compressed_caches, stats.memory_saved_bytes) == (0, 0)
    assert (stats.avg_compression_ratio, stats.avg_compression_time_ms) == (1.0, 0.0)


def test_a_rebalance_leaves_out_who_was_swapped_out_or_ended_meanwhile(monkeypatch):
    manager = make_multi(2)
    for name in ("away", "ended", "here"):
        begin(manager, name, 6, CPU[0])
    move = {"source": CPU[0], "target": CPU[1], "num_bytes": 2 * BLOCK_BYTES}
    plan = [CacheMove(request_id=name, **move) for name in ("away", "ended", "here")]
    source = devices_of(manager)[CPU[0]]
    holds = source.holds

    def look_and_be_overtaken(name):
        """Another thread ends the request between the look and the move."""
        is_here = holds(name)
        if name == "ended" and is_here:
            source.deallocate(name)
        return is_here

    monkeypatch.setattr(manager, "plan_rebalance", lambda tolerance: plan)
    manager.swap_out("away")
    monkeypatch.setattr(source, "holds", look_and_be_overtaken)
    manager.rebalance_devices()
    monkeypatch.undo()
    assert [done.request_id for done in manager.last_rebalance] == ["here"]
    assert where(manager) == {"away": CPU[0], "here": CPU[1]}
    manager.check()


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_moves_nowhere_and_its_request_can_still_end(tmp_path, how):
    manager = make_multi(2, tiers=TierConfig(host_budget_bytes=0, disk_directory=tmp_path))
    begin(manager, "a", 8, CPU[0])
    other = begin(manager, "b", 4, CPU[1])
    manager.swap_out("a")
    (path,) = (tmp_path / "cpu-0").glob("*.kvblocks")
    good = damage(path, how)
    before = all_of(manager)
    for call in (lambda: manager.move_cache("a", CPU[1]), lambda: manager.swap_in("a")):
        assert refused(call) is CorruptFileError
        assert all_of(manager) == before
    path.write_bytes(good)
    manager.move_cache("a", CPU[1])
    manager.swap_in("a")
    assert tokens_of(manager.get_handle("a")) == tokens_for("a", 8)
    manager.swap_out("a")
    (path,) = (tmp_path / "cpu-1").glob("*.kvblocks")
    damage(path, how)
    manager.deallocate("a")
    assert refused(manager.swap_in, "a") is UnknownRequestError
    write_tokens(manager, other, [7], begin=3)
    assert tokens_of(other)[3:] == [7]
    manager.check()


def test_a_manager_that_is_closed_gives_the_directory_of_every_device_back(tmp_path):
    tiers = TierConfig(host_budget_bytes=0, disk_directory=tmp_path)
    for _ in range(2):  # The second one finds no directory in use.
        with make_multi(2, tiers=tiers) as manager:
            for name, device in (("a", CPU[0]), ("b", CPU[1])):
                begin(manager, name, 6, device)
                manager.swap_out(name)
            assert len(list(tmp_path.glob("*/*.kvblocks"))) == 2
        assert not list(tmp_path.glob("*/*.kvblocks"))
