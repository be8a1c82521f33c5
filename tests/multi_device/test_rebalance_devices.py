"""`plan_rebalance` and `rebalance_devices`: load is spread over the preferred devices."""

import pytest

from ferrum_jax.manager.balance import CacheMove
from ferrum_jax.manager.moves import load_of
from tests.support.internals import device_of, devices_of
from tests.support.managers import BLOCK_BYTES, PREFIXES, tokens_of
from tests.support.multi_device import CPU, begin, begin_with, make_multi, tokens_for, used, where


def test_rebalance_devices_moves_the_fewest_bytes_and_reports_the_moves():
    manager = make_multi(3)
    for name, num_tokens in {"a": 9, "b": 6, "c": 3, "d": 3}.items():
        begin(manager, name, num_tokens, CPU[0])
    assert used(manager) == [7, 0, 0]
    plan = manager.plan_rebalance(tolerance=0.2)
    assert used(manager) == [7, 0, 0] and manager.last_rebalance == ()
    manager.rebalance_devices(tolerance=0.2)
    assert manager.last_rebalance == tuple(plan)
    assert sum(move.num_bytes for move in plan) == 4 * BLOCK_BYTES
    assert sorted(used(manager)) == [2, 2, 3]
    for name, num_tokens in {"a": 9, "b": 6, "c": 3, "d": 3}.items():
        assert tokens_of(manager.get_handle(name)) == tokens_for(name, num_tokens)
    manager.check()
    manager.rebalance_devices(0.2)
    assert manager.last_rebalance == ()


def test_plan_rebalance_counts_cached_prefixes_as_room_and_moves_whole_requests():
    manager = make_multi(2, enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    prompt = tokens_for("p", 12)
    for name in "ab":
        begin_with(manager, name, prompt, CPU[0])
    begin_with(manager, "gone", prompt[::-1], CPU[1])
    manager.deallocate("gone")
    load = load_of(device_of(devices_of(manager)[CPU[0]]))
    assert [cache.num_bytes for cache in load.caches] == [4 * BLOCK_BYTES] * 2
    assert sum(cache.freed_bytes for cache in load.caches) == 0  # What one leaves, the other holds.
    assert load_of(device_of(devices_of(manager)[CPU[1]])).used_bytes == 0
    assert manager.plan_rebalance(0.1) == []
    manager.check()


def test_rebalance_devices_leaves_out_moves_that_became_impossible_or_needless(monkeypatch):
    manager = make_multi(2)
    for name, num_tokens, device in (("a", 6, 0), ("b", 6, 0), ("c", 3, 1), ("big", 15, 1)):
        begin(manager, name, num_tokens, CPU[device])
    move = {"source": CPU[0], "target": CPU[1], "num_bytes": 1}
    plan = [CacheMove(request_id=name, **move) for name in ("a", "nobody", "c", "b")]
    monkeypatch.setattr(manager, "plan_rebalance", lambda tolerance: plan)
    manager.rebalance_devices()
    assert [done.request_id for done in manager.last_rebalance] == ["a"]
    assert where(manager) == {"b": CPU[0], "c": CPU[1], "big": CPU[1], "a": CPU[1]}


def test_rebalance_devices_leaves_out_requests_swapped_out_or_ended_meanwhile(monkeypatch):
    manager = make_multi(2)
    for name in ("away", "ended", "here"):
        begin(manager, name, 6, CPU[0])
    move = {"source": CPU[0], "target": CPU[1], "num_bytes": 2 * BLOCK_BYTES}
    plan = [CacheMove(request_id=name, **move) for name in ("away", "ended", "here")]
    source = device_of(devices_of(manager)[CPU[0]])
    get = source.requests.get

    def look_and_be_overtaken(name):
        """Another thread ends the request between the look and the move."""
        request = get(name)
        if name == "ended" and request is not None:
            with source.access.changing():
                source.free([request])
        return request

    monkeypatch.setattr(manager, "plan_rebalance", lambda tolerance: plan)
    manager.swap_out("away")
    monkeypatch.setattr(source.requests, "get", look_and_be_overtaken)
    manager.rebalance_devices()
    monkeypatch.undo()
    assert [done.request_id for done in manager.last_rebalance] == ["here"]
    assert where(manager) == {"away": CPU[0], "here": CPU[1]}
    manager.check()


@pytest.mark.parametrize("tolerance", [-0.1, 1.1, float("nan")])
def test_rebalance_devices_refuses_a_tolerance_outside_0_to_1(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        make_multi(1).rebalance_devices(tolerance)
