"""Who has to make room, who need not, and that a refusal leaves all as it was."""

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import Priority, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.policies.blocks import Retention
from tests.support.bad_policies import BadRequestPolicy, complaints
from tests.support.managers import (
    BLOCK_BYTES,
    refused,
    start,
    tokens_of,
    whole,
    write_tokens,
)
from tests.support.prefix_managers import PROMPT, compute, found, keep, make

# Refusals, and what is foretold.


def test_sharing_needs_no_block_where_nothing_is_copied():
    manager = make(num_blocks=4)
    start(manager, "a", 6)
    start(manager, "b", 6)
    for num_tokens in (3, 4):
        manager.share_prefix("a", "b", num_tokens)
    manager.check()


def test_sharing_is_refused_where_a_block_is_needed_and_there_is_none():
    manager = make(num_blocks=5)
    for name, length in (("a", 6), ("b", 6)):
        start(manager, name, length)
    manager.share_prefix("a", "b", 6)
    start(manager, "c", 9)
    before = whole(manager)
    assert refused(manager.share_prefix, "c", "b", 4) is errors.OutOfBlocksError
    assert whole(manager) == before


@pytest.mark.parametrize("call", ["allocate", "extend", "swap_in", "allocate_blocks"])
def test_a_refusal_lets_no_cached_block_go(call):
    manager = make(num_blocks=8)
    start(manager, "away", 9)
    manager.swap_out("away")
    keep(manager, "a", PROMPT[:6])
    manager.deallocate("a")
    handle = start(manager, "b", 12)
    others = [start(manager, name, 3) for name in "cd"]
    calls = {
        "allocate": lambda: start(manager, "e", 3 * 3),
        "extend": lambda: manager.extend_all([handle, *others], 3),
        "swap_in": lambda: manager.swap_in("away"),
        "allocate_blocks": lambda: manager.allocate_blocks(3),
    }
    before = whole(manager)
    assert refused(calls[call]) is errors.OutOfBlocksError
    assert whole(manager) == before


def test_blocks_of_two_requests_are_not_counted_for_one_that_would_leave():
    manager = make(num_blocks=5, preemption_policy=fj.LruEvictionPolicy())
    start(manager, "a", 6, priority=Priority.Low)
    start(manager, "b", 6)
    manager.share_prefix("a", "b", 6)
    urgent = manager.new_request("c", 15)
    before = whole(manager)
    assert not manager.can_allocate(urgent)
    assert refused(manager.allocate, urgent) is errors.OutOfBlocksError
    assert whole(manager) == before


def test_a_policy_is_asked_once_so_that_it_cannot_change_its_mind():
    class Moody(BadRequestPolicy):
        num_asked = 0

        def select_eviction_candidates(self, required_memory, active_caches):
            self.num_asked += 1
            self.mode = "all" if self.num_asked % 2 else "raise"
            return super().select_eviction_candidates(required_memory, active_caches)

    manager = make(num_blocks=6, preemption_policy=Moody())
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


# Who has to make room.


@pytest.fixture
def crowd():
    """9 blocks: 2 are cached and idle, 6 belong to three requests of rising urgency."""
    manager = make(num_blocks=9, preemption_policy=fj.LruEvictionPolicy())
    keep(manager, "gone", [1, 2, 3, 4, 5, 6])
    manager.deallocate("gone")
    for priority in (Priority.Low, Priority.Normal, Priority.High):
        handle = start(manager, priority.name, 6, priority=priority)
        write_tokens(manager, handle, [40 + priority] * 6)
    return manager


def away(manager) -> list:
    return [name for name, handle in manager.list_handles() if handle.key_cache(0) is None]


def test_free_blocks_are_used_before_cached_ones_and_these_before_anybodys(crowd):
    start(crowd, "one", 3, priority=Priority.Critical)
    assert crowd.stats().cached_blocks == 2 and not away(crowd)
    start(crowd, "two", 3, priority=Priority.Critical)
    assert crowd.stats().cached_blocks == 1 and not away(crowd)
    crowd.extend(crowd.get_handle("two"), 9)
    assert crowd.stats().cached_blocks == 0 and away(crowd) == ["Low"]
    assert crowd.stats().preemption_count == 1


def test_only_who_is_less_urgent_has_to_leave(crowd):
    before = whole(crowd)
    request = crowd.new_request("c", 12, priority=Priority.Low)
    assert not crowd.can_allocate(request)
    assert refused(crowd.allocate, request) is errors.OutOfBlocksError
    assert refused(crowd.allocate_blocks, 6) is errors.OutOfBlocksError
    assert whole(crowd) == before
    start(crowd, "c", 12, priority=Priority.Normal)
    assert away(crowd) == ["Low"]
    crowd.check()


def test_who_had_to_leave_comes_back_bit_for_bit(crowd):
    start(crowd, "c", 15, priority=Priority.Critical)
    assert away(crowd) == ["Low"]
    assert refused(crowd.swap_in, "Low") is errors.OutOfBlocksError
    crowd.deallocate("c")
    crowd.swap_in("Low")
    crowd.swap_in("Low")  # Once more changes nothing.
    assert [tokens_of(crowd.get_handle(p.name)) for p in (Priority.Low, Priority.High)] == [
        [40] * 6,
        [42] * 6,
    ]
    crowd.check()


def test_a_row_too_is_made_free_by_who_is_less_urgent():
    manager = make(preemption_policy=fj.LruEvictionPolicy())
    for i in range(5):
        start(manager, i, 1, priority=Priority.Low if i == 2 else Priority.Normal)
    assert manager.can_allocate(manager.new_request("c", 3, priority=Priority.Normal))
    start(manager, "c", 3, priority=Priority.Normal)
    assert away(manager) == [2]
    assert refused(manager.swap_in, 2) is errors.OutOfRowsError


def test_nobody_leaves_for_whom_the_tiers_have_no_room():
    room = TierConfig(host_budget_bytes=BLOCK_BYTES)
    manager = make(num_blocks=4, preemption_policy=fj.LruEvictionPolicy(), tiers=room)
    start(manager, "a", 6, priority=Priority.Low)
    start(manager, "b", 6, priority=Priority.Low)
    before = whole(manager)
    assert not manager.can_allocate(manager.new_request("c", 3))
    assert refused(start, manager, "c", 3) is errors.OutOfBlocksError
    assert refused(manager.swap_out, "a") is errors.OutOfHostMemoryError
    assert whole(manager) == before


def test_what_is_swapped_out_cannot_be_used_and_says_so():
    manager = make()
    handle = keep(manager, "a")
    manager.swap_out("a")
    manager.swap_out("a")  # Once more changes nothing.
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


def test_a_pin_outlasts_every_shortage():
    manager = make(num_blocks=4)
    handle = compute(manager, "a", PROMPT[:6])
    manager.commit(handle, retention=Retention(is_pinned=True))
    manager.deallocate("a")
    assert refused(manager.allocate_blocks, 3) is errors.OutOfBlocksError
    assert len(manager.allocate_blocks(2)) == 2 and found(manager, PROMPT) == 6


def test_what_one_tenant_asks_tells_nothing_of_another():
    """All that a request can see is the same, whatever another salt has cached."""
    seen = []
    for other in ([], [PROMPT], [PROMPT, PROMPT[:3]]):
        manager = make()
        for i, prompt in enumerate(other):
            keep(manager, i, prompt, "other")
            manager.deallocate(i)
        request = manager.new_request("a", prompt_token_ids=PROMPT, cache_salt="own")
        can = manager.can_allocate(request)
        handle = manager.allocate(request)
        seen.append((can, handle.num_cached_tokens, tokens_of(handle), handle.stats()))
    assert seen[0] == seen[1] == seen[2]


def commit_pinned(manager):
    """A request of twelve tokens, of which the first six are to stay."""
    handle = compute(manager, "a", PROMPT[:6])
    manager.commit(handle, retention=Retention(is_pinned=True))
    manager.extend(handle, 6)
    write_tokens(manager, handle, [*range(30, 36)], begin=6)
    manager.commit(handle, [*range(30, 36)])


def unpin(manager):
    manager.commit(compute(manager, "b"), retention=Retention())
    manager.deallocate("b")


def test_what_has_gone_while_its_request_was_away_is_kept_again_as_its_commit_said():
    manager = make()
    commit_pinned(manager)
    manager.swap_out("a")
    unpin(manager)
    manager.free_blocks(manager.allocate_blocks(12))
    assert manager.stats().cached_blocks == 0
    manager.swap_in("a")
    manager.deallocate("a")
    stats = manager.stats()
    assert (stats.cached_blocks, stats.evictable_blocks) == (4, 2), "what it said of the first two"
    manager.check()


def test_what_is_still_cached_when_a_request_comes_back_is_kept_as_its_last_commit_said():
    manager = make()
    commit_pinned(manager)
    manager.swap_out("a")
    unpin(manager)
    manager.swap_in("a")
    manager.deallocate("a")
    stats = manager.stats()
    assert (stats.cached_blocks, stats.evictable_blocks) == (4, 4)
    manager.check()


@pytest.mark.parametrize("is_away", [False, True], ids=["resident", "swapped out"])
def test_a_request_that_moves_is_kept_there_too_as_its_commit_said(is_away):
    manager, other = make(), make()
    commit_pinned(manager)
    if is_away:
        manager.swap_out("a")
    manager.move_to("a", other)
    if is_away:
        other.swap_in("a")
    other.deallocate("a")
    assert (other.stats().cached_blocks, other.stats().evictable_blocks) == (4, 2)
    other.check()


def test_what_was_said_of_tokens_that_were_cut_does_not_hold_for_others_in_their_place():
    manager = make()
    commit_pinned(manager)
    handle = manager.get_handle("a")

    def cut(state, seq_ids):
        return fj.truncate(state, seq_ids, np.asarray([3], np.int32))

    manager.run(cut, [handle], extends=True)
    manager.extend(handle, 6)
    write_tokens(manager, handle, [*range(50, 56)], begin=3)
    manager.commit(handle, [*range(50, 56)])
    manager.move_to("a", other := make())
    other.deallocate("a")
    assert (other.stats().cached_blocks, other.stats().evictable_blocks) == (3, 2)
