"""Prefix caching: refusals of `commit` and `share_prefix`, and resets.

The random programs of `random_operations.py` test what is found, shared, cached and evicted.
"""

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


def test_run_frees_a_row_that_a_step_forks_to_without_a_request():
    manager = make()
    parent = compute(manager, "a")

    def step(state, seq_ids):
        return fj.fork(state, seq_ids, np.asarray([4], np.int32))

    with pytest.raises(errors.UncountedTokensError, match=r"rows \[4\].*initial_tokens=0"):
        manager.run(step, [parent], extends=True)
    manager.check()
    assert tokens_of(parent) == PROMPT and manager.free_block_count() == 9


def test_commit_refuses_more_tokens_than_are_written_or_held():
    manager = make()
    handle = ask(manager, "a")
    write_tokens(manager, handle, PROMPT[:4])
    before = whole(manager)
    for num_tokens in (6, 7, 8):
        with pytest.raises(ValueError, match="Run the step first|at most the 7 tokens"):
            manager.commit(handle, num_tokens=num_tokens)
    with pytest.raises(ValueError, match="8 tokens .* holds 7"):
        manager.commit(handle, [1])
    assert whole(manager) == before
    assert manager.commit(handle, num_tokens=3) == 3
    assert manager.commit(handle, num_tokens=0) == 3, "cached blocks stay cached"


def test_commit_caches_nothing_before_a_step_has_run():
    for scrubs in (True, False):
        manager = make(scrub_freed_blocks=scrubs)
        handle = ask(manager, "a")
        assert manager.commit(handle) == 0 and found(manager) == 0
        with pytest.raises(ValueError, match="the first 0 are"):
            manager.commit(handle, num_tokens=3)
        write_tokens(manager, handle, PROMPT)
        manager.extend(handle, 2)
        assert manager.commit(handle, [1, 2]) == 6, "no step has written the last two"


def test_share_prefix_refuses_other_tokens_other_salts_and_itself():
    manager = make()
    for name, prompt, salt in (("a", PROMPT, None), ("b", OTHER[:3], None), ("c", PROMPT, "t")):
        ask(manager, name, prompt, salt)
    for target, error in (
        ("a", errors.PrefixMismatchError),
        ("b", errors.PrefixMismatchError),
        ("c", errors.PrefixMismatchError),
        ("unknown", errors.UnknownRequestError),
    ):
        assert refused(manager.share_prefix, "a", target, 3) is error
    with pytest.raises(ValueError, match="must not exceed the 3 tokens"):
        manager.share_prefix("a", "b", 4)
    manager.check()


# Steps that fork and share.


def run_fork(manager, parent, child):
    manager.run(lambda s, rows: fj.fork(s, rows[:1], rows[1:]), [parent, child], extends=True)
    manager.check()


@pytest.mark.parametrize("commits_first", [True, False])
def test_commit_of_a_fork_is_refused_unless_it_names_the_tokens_of_its_parent(commits_first):
    manager = make()
    parent, child = start(manager, "a", 7), start(manager, "b", 0)
    write_tokens(manager, parent, PROMPT)
    if commits_first:
        manager.commit(parent, PROMPT)
    run_fork(manager, parent, child)
    if not commits_first:
        manager.commit(parent, PROMPT)
    for _ in range(2):
        assert refused(manager.commit, child, [1, 2, 3]) is errors.PrefixMismatchError
        refused(manager.deallocate, "a")
    assert manager.commit(child, PROMPT) == 6 and found(manager) == 6
    manager.check()


def test_run_that_forks_to_another_salt_removes_the_blocks_from_the_cache():
    manager = make()
    parent, child = keep(manager, "a", salt="one"), start(manager, "b", 0, cache_salt="two")
    run_fork(manager, parent, child)
    assert not cached_prefixes(manager)
    assert found(manager, salt="one") == found(manager, salt="two") == 0
    manager.deallocate("a")
    assert tokens_of(child) == PROMPT
    manager.check()


def test_run_that_shares_removes_the_blocks_after_the_shared_ones_from_the_cache():
    manager = make()
    source, target = compute(manager, "a", OTHER), keep(manager, "b", [*PROMPT[:6], 18, 19, 20])
    manager.run(lambda s, rows: fj.share(s, rows[:1], rows[1:], 3), [source, target], extends=True)
    manager.check()
    assert cached_prefixes(manager).keys() == {(None, tuple(PROMPT[:3]))}
    assert tokens_of(target) == [*OTHER[:3], *PROMPT[3:6], 18, 19, 20]


# Requests that are swapped out or moved.


@pytest.mark.parametrize("way", ["swapped", "moved"])
def test_swap_in_and_move_to_keep_own_bytes_though_equal_tokens_are_cached(way):
    manager, other = make(), make()
    handle = ask(manager, "a", OTHER)
    write_tokens(manager, handle, [1, 2, 3, 4, 5, 6])  # Other bytes for the same tokens.
    manager.commit(handle)
    target = other if way == "moved" else manager
    if way == "swapped":
        manager.swap_out("a")
        manager.free_blocks(manager.allocate_blocks(12))  # Evicts its cached blocks.
    keep(target, "b", OTHER)
    if way == "swapped":
        manager.swap_in("a")
    else:
        manager.move_to("a", other)
    assert tokens_of(handle) == [1, 2, 3, 4, 5, 6]
    assert compute(target, "c", OTHER).num_cached_tokens == 5
    assert tokens_of(target.get_handle("c")) == OTHER
    target.check()


def commit_pinned(manager):
    """Request "a" of twelve tokens; the first six are committed as pinned."""
    handle = compute(manager, "a", PROMPT[:6])
    manager.commit(handle, retention=Retention(is_pinned=True))
    manager.extend(handle, 6)
    write_tokens(manager, handle, [*range(30, 36)], begin=6)
    manager.commit(handle, [*range(30, 36)])


@pytest.mark.parametrize(
    ("way", "num_evictable"),
    [("evicted", 2), ("cached", 4), ("moved", 2), ("swapped and moved", 2), ("truncated", 3)],
)
def test_retention_of_a_commit_holds_after_swap_in_and_move_to(way, num_evictable):
    manager = target = make()
    commit_pinned(manager)
    if way == "truncated":  # To three tokens: other tokens follow, without retention.
        handle = manager.get_handle("a")
        manager.run(lambda s, rows: fj.truncate(s, rows, np.int32([3])), [handle], extends=True)
        manager.extend(handle, 9)
        write_tokens(manager, handle, [*range(50, 59)], begin=3)
        manager.commit(handle, [*range(50, 59)])
    elif way != "moved":
        manager.swap_out("a")
    if way in ("evicted", "cached"):
        manager.commit(compute(manager, "b"), retention=Retention())  # Ends the pin.
        manager.deallocate("b")
    if way == "evicted":
        manager.free_blocks(manager.allocate_blocks(12))
        assert manager.stats().cached_blocks == 0
    if way in ("moved", "swapped and moved", "truncated"):
        target = make()
        manager.move_to("a", target)
    target.swap_in("a")
    target.deallocate("a")
    assert (target.stats().cached_blocks, target.stats().evictable_blocks) == (4, num_evictable)
    target.check()


# Resets.


def test_reset_prefixes_removes_idle_used_and_pinned_prefixes():
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


def test_async_commit_and_reset_prefixes():
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
