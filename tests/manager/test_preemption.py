"""Preemption: which requests are swapped out to make room, and when none is."""

import pytest

import ferrum_jax as fj
from ferrum_jax import Priority, errors
from ferrum_jax.config import TierConfig
from tests.support.bad_policies import BadRequestPolicy, complaints
from tests.support.managers import BLOCK_BYTES, refused, start, whole, write_tokens
from tests.support.prefix_managers import PROMPT, keep, make


def test_allocate_asks_the_preemption_policy_once():
    class Changing(BadRequestPolicy):
        num_asked = 0

        def select_eviction_candidates(self, required_memory, active_caches):
            self.num_asked += 1
            self.mode = "all" if self.num_asked % 2 else "raise"
            return super().select_eviction_candidates(required_memory, active_caches)

    manager = make(num_blocks=6, preemption_policy=Changing())
    keep(manager, "a", PROMPT[:6])
    manager.deallocate("a")
    start(manager, "b", 9, priority=Priority.Low)
    manager.allocate(manager.new_request("c", 12))
    manager.check()
    with complaints():
        before = whole(manager)
        urgent = manager.new_request("d", 15, priority=Priority.High)
        assert refused(manager.allocate, urgent) is errors.OutOfBlocksError
    assert whole(manager) == before


@pytest.fixture
def full_manager():
    """9 blocks: 2 are cached and idle, 6 belong to three requests of rising priority."""
    manager = make(num_blocks=9, preemption_policy=fj.LruEvictionPolicy())
    keep(manager, "gone", [1, 2, 3, 4, 5, 6])
    manager.deallocate("gone")
    for priority in (Priority.Low, Priority.Normal, Priority.High):
        handle = start(manager, priority.name, 6, priority=priority)
        write_tokens(manager, handle, [40 + priority] * 6)
    return manager


def swapped_out(manager) -> list:
    return [name for name, handle in manager.list_handles() if handle.key_cache(0) is None]


def test_allocate_takes_free_blocks_before_it_evicts_and_evicts_before_it_preempts(full_manager):
    start(full_manager, "one", 3, priority=Priority.Critical)
    assert full_manager.stats().cached_blocks == 2 and not swapped_out(full_manager)
    start(full_manager, "two", 3, priority=Priority.Critical)
    assert full_manager.stats().cached_blocks == 1 and not swapped_out(full_manager)
    full_manager.extend(full_manager.get_handle("two"), 9)
    assert full_manager.stats().cached_blocks == 0 and swapped_out(full_manager) == ["Low"]
    assert full_manager.stats().preemption_count == 1


def test_allocate_preempts_only_less_urgent_requests(full_manager):
    before = whole(full_manager)
    request = full_manager.new_request("c", 12, priority=Priority.Low)
    assert not full_manager.can_allocate(request)
    assert refused(full_manager.allocate, request) is errors.OutOfBlocksError
    assert refused(full_manager.allocate_blocks, 6) is errors.OutOfBlocksError
    assert whole(full_manager) == before
    start(full_manager, "c", 12, priority=Priority.Normal)
    assert swapped_out(full_manager) == ["Low"]
    full_manager.check()


def test_allocate_preempts_a_less_urgent_request_for_its_row():
    manager = make(preemption_policy=fj.LruEvictionPolicy())
    for i in range(5):
        start(manager, i, 1, priority=Priority.Low if i == 2 else Priority.Normal)
    assert manager.can_allocate(manager.new_request("c", 3, priority=Priority.Normal))
    start(manager, "c", 3, priority=Priority.Normal)
    assert swapped_out(manager) == [2]
    assert refused(manager.swap_in, 2) is errors.OutOfRowsError


def test_allocate_does_not_preempt_a_request_for_which_the_tiers_have_no_room():
    room = TierConfig(host_budget_bytes=BLOCK_BYTES)
    manager = make(num_blocks=4, preemption_policy=fj.LruEvictionPolicy(), tiers=room)
    start(manager, "a", 6, priority=Priority.Low)
    start(manager, "b", 6, priority=Priority.Low)
    before = whole(manager)
    assert not manager.can_allocate(manager.new_request("c", 3))
    assert refused(start, manager, "c", 3) is errors.OutOfBlocksError
    assert refused(manager.swap_out, "a") is errors.OutOfHostMemoryError
    assert whole(manager) == before


def test_swap_out_makes_a_request_unusable_until_swap_in():
    manager = make()
    handle = keep(manager, "a")
    manager.swap_out("a")
    manager.swap_out("a")  # A second call changes nothing.
    before = whole(manager)
    for call in (
        lambda: manager.extend(handle, 1),
        lambda: manager.commit(handle, [1]),
        lambda: manager.run(lambda state, rows: (state, None), [handle]),
        lambda: handle.block_table(),
    ):
        assert refused(call) is errors.SwappedOutError
    assert (handle.num_tokens(), handle.kv_cache(0), handle.is_valid()) == (7, (None, None), True)
    assert whole(manager) == before
    manager.deallocate("a")
    assert manager.stats().host_bytes == 0 and not handle.is_valid()
