"""Prefix caching beside steps that fork, share and cut rows, commits of all kinds, and resets."""

import asyncio

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.manager import AsyncKvCacheManager
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.report import Stop
from tests.support.managers import cached_prefixes, refused, start, tokens_of, whole, write_tokens
from tests.support.prefix_managers import PROMPT, ask, compute, found, keep, make

OTHER = [21, 22, 23, 24, 25, 26]


def fork_in_a_step(manager, parent, child):
    def step(state, seq_ids):
        return fj.fork(state, seq_ids[:1], seq_ids[1:])

    assert bool(manager.run(step, [parent, child], extends=True))
    manager.check()


def share_in_a_step(manager, source, target, num_tokens):
    def step(state, seq_ids):
        return fj.share(state, seq_ids[:1], seq_ids[1:], num_tokens)

    assert bool(manager.run(step, [source, target], extends=True))
    manager.check()


# Forks and shares inside steps.


def test_blocks_that_a_fork_in_a_step_holds_are_not_evictable():
    manager = make(num_blocks=6)
    parent, child = keep(manager, "a", PROMPT[:6]), start(manager, "b", 0)
    fork_in_a_step(manager, parent, child)
    manager.deallocate("a")
    assert manager.stats().evictable_blocks == 0
    manager.check()
    assert not manager.can_allocate(manager.new_request("c", 15))
    assert refused(start, manager, "c", 15) is errors.OutOfBlocksError
    assert tokens_of(child) == PROMPT[:6]
    assert len(manager.allocate_blocks(4)) == 4


def test_a_fork_in_a_step_is_known_to_hold_its_parents_tokens():
    manager = make()
    parent, child = keep(manager, "a"), start(manager, "b", 0)
    fork_in_a_step(manager, parent, child)
    assert refused(manager.commit, child, [1, 2, 3]) is errors.PrefixMismatchError
    assert manager.commit(child, PROMPT) == 6
    manager.check()


def test_tokens_that_a_parent_commits_after_a_fork_are_known_of_its_child():
    manager = make()
    parent, child = start(manager, "a", 7), start(manager, "b", 0)
    write_tokens(manager, parent, PROMPT)
    fork_in_a_step(manager, parent, child)
    manager.commit(parent, PROMPT)
    before = whole(manager)
    assert refused(manager.commit, child, [1, 2, 3]) is errors.PrefixMismatchError
    assert whole(manager) == before
    manager.deallocate("a")
    assert refused(manager.commit, child, [1, 2, 3]) is errors.PrefixMismatchError
    assert manager.commit(child, PROMPT) == 6 and found(manager) == 6


def test_cached_blocks_that_a_step_gives_to_another_salt_are_cached_no_longer():
    manager = make()
    parent, child = keep(manager, "a", salt="one"), start(manager, "b", 0, cache_salt="two")
    fork_in_a_step(manager, parent, child)
    assert not cached_prefixes(manager)
    assert found(manager, salt="one") == found(manager, salt="two") == 0
    manager.deallocate("a")
    assert tokens_of(child) == PROMPT
    manager.check()


def test_blocks_behind_what_a_share_in_a_step_replaced_are_cached_no_longer():
    manager = make()
    source = compute(manager, "a", OTHER)
    target = keep(manager, "b", [*PROMPT[:6], 18, 19, 20])
    share_in_a_step(manager, source, target, 3)
    assert cached_prefixes(manager).keys() == {(None, tuple(PROMPT[:3]))}
    assert tokens_of(target) == [*OTHER[:3], *PROMPT[3:6], 18, 19, 20]
    manager.deallocate("b")
    assert len(manager.allocate_blocks(10)) == 10
    assert tokens_of(source) == OTHER


def test_a_row_that_a_step_fills_for_no_request_is_emptied_and_named():
    manager = make()
    parent = compute(manager, "a")

    def step(state, seq_ids):
        return fj.fork(state, seq_ids, np.asarray([4], np.int32))

    with pytest.raises(errors.UncountedTokensError, match=r"rows \[4\].*initial_tokens=0"):
        manager.run(step, [parent], extends=True)
    manager.check()
    assert tokens_of(parent) == PROMPT and manager.free_block_count() == 9


# Commits.


def test_commit_caches_what_is_written_and_no_more():
    manager = make()
    handle = ask(manager, "a")
    write_tokens(manager, handle, PROMPT[:4])
    assert manager.commit(handle) == 3
    manager.check()
    assert compute(manager, "b").num_cached_tokens == 3
    write_tokens(manager, handle, PROMPT[4:], begin=4)
    assert manager.commit(handle) == 6


def test_commit_refuses_a_claim_beyond_what_is_written():
    manager = make()
    handle = ask(manager, "a")
    write_tokens(manager, handle, PROMPT[:4])
    before = whole(manager)
    for num_tokens in (6, 7, 8):
        with pytest.raises(ValueError, match="Run the step first|at most the 7 tokens"):
            manager.commit(handle, num_tokens=num_tokens)
    assert whole(manager) == before
    assert manager.commit(handle, num_tokens=3) == 3
    assert manager.commit(handle, num_tokens=0) == 3, "what is cached stays so"


def test_commit_caches_nothing_before_a_step_has_run():
    for scrubs in (True, False):
        manager = make(scrub_freed_blocks=scrubs)
        handle = ask(manager, "a")
        assert manager.commit(handle) == 0 and found(manager) == 0
        with pytest.raises(ValueError, match="the first 0 are"):
            manager.commit(handle, num_tokens=3)
        write_tokens(manager, handle, PROMPT)
        manager.extend(handle, 2)
        assert manager.commit(handle, [1, 2]) == 6, "no step has had the last two"


def test_a_request_commits_what_share_prefix_gave_to_it_or_is_refused():
    manager = make()
    source, target = compute(manager, "a", OTHER), start(manager, "b", 6)
    manager.share_prefix("a", "b", 6)
    assert refused(manager.commit, target, [9] * 6) is errors.PrefixMismatchError
    manager.commit(source)
    manager.deallocate("a")
    assert refused(manager.commit, target, [9] * 6) is errors.PrefixMismatchError
    assert manager.commit(target, OTHER) == 6


# A request's own bytes.


@pytest.mark.parametrize("way", ["swapped", "moved"])
def test_a_request_comes_back_with_its_own_bytes_though_others_have_cached_its_tokens(way):
    manager, other = make(), make()
    target = other if way == "moved" else manager
    handle = ask(manager, "a", OTHER)
    write_tokens(manager, handle, [1, 2, 3, 4, 5, 6])  # As if the last bits had come out otherwise.
    manager.commit(handle)
    if way == "swapped":
        manager.swap_out("a")
        manager.free_blocks(manager.allocate_blocks(12))  # What was cached of it is evicted.
    keep(target, "b", OTHER)
    if way == "swapped":
        manager.swap_in("a")
    else:
        manager.move_to("a", other)
    assert tokens_of(handle) == [1, 2, 3, 4, 5, 6]
    target.check()
    assert compute(target, "c", OTHER).num_cached_tokens == 5
    assert tokens_of(target.get_handle("c")) == OTHER


def test_a_request_that_comes_back_shares_the_cached_blocks_that_were_its_own():
    manager = make()
    keep(manager, "a", OTHER)
    manager.swap_out("a")
    manager.swap_in("a")
    assert manager.stats().used_memory_bytes == 2 * manager.stats().total_memory_bytes // 12
    manager.check()


# Resets.


def test_reset_prefixes_drops_what_nobody_uses_what_is_used_and_what_is_pinned():
    manager = make()
    keep(manager, "idle", [1, 2, 3, 4])
    manager.deallocate("idle")
    used = keep(manager, "used")
    pinned = compute(manager, "pinned", OTHER)
    manager.commit(pinned, retention=Retention(is_pinned=True))
    manager.deallocate("pinned")
    keep(manager, "away", [31, 32, 33, 34])
    manager.swap_out("away")
    manager.reset_prefixes()
    manager.check()
    assert not cached_prefixes(manager) and manager.stats().cached_blocks == 0
    assert manager.free_block_count() == 9 and tokens_of(used) == PROMPT
    report = manager.explain_lookup(PROMPT)
    assert report.stop is Stop.RESET and "reset_prefixes" in str(report)
    manager.swap_in("away")
    assert manager.commit(used) == 0 and not cached_prefixes(manager)
    assert tokens_of(manager.get_handle("away")) == [31, 32, 33, 34]
    assert keep(manager, "new").num_cached_tokens == 0 and found(manager) == 6
    assert manager.commit(used) == 0 and tokens_of(used) == PROMPT
    manager.check()


def test_reset_prefixes_of_one_salt_leaves_the_others():
    manager = make()
    for salt in (None, "one", "two"):
        keep(manager, salt, salt=salt)
    manager.reset_prefixes("one")
    manager.check()
    assert [found(manager, salt=salt) for salt in (None, "one", "two")] == [6, 0, 6]
    manager.reset_prefixes("nobody's")
    assert len(cached_prefixes(manager)) == 4


def test_a_reset_ends_what_two_requests_share_of_a_cached_prefix():
    manager = make()
    first = keep(manager, "a")
    second = compute(manager, "b")
    manager.reset_prefixes()
    manager.check()
    manager.deallocate("a")
    assert not first.is_valid() and tokens_of(second) == PROMPT
    manager.check()
    assert len(manager.allocate_blocks(9)) == 9


def test_the_async_manager_commits_what_is_computed_and_resets():
    manager = make()

    async def serve():
        serving = AsyncKvCacheManager(manager)
        handle = ask(manager, "a")
        write_tokens(manager, handle, PROMPT)
        assert await serving.commit(handle, num_tokens=3) == 3
        await serving.reset_prefixes()
        assert await serving.commit(handle) == 0

    asyncio.run(serve())
    manager.check()
