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
from tests.support.managers import cached_prefixes, refused, tokens_of, whole, write_tokens
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
