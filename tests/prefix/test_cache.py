"""PrefixCache by itself: lookup, commit, expire and evict.

That these agree with a model in random lives is in `test_state_machine`; here are the rules that
the model leaves open, and one readable example of each verb.
"""

import pytest

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.policies.blocks import Retention, make_block_policy
from ferrum_jax.prefix import forest, report
from ferrum_jax.prefix.report import Stop
from tests.support.bad_policies import BadBlockPolicy, complaints
from tests.support.cached_prompts import HELLO, CachedPrompts

# Lookups.


def test_lookup_finds_what_was_committed_except_for_the_last_token():
    prompts = CachedPrompts()
    prompts.keep(HELLO)
    assert prompts.found([*HELLO, 9]) == 8
    assert prompts.found(HELLO) == 7, "one token is left to compute"
    assert prompts.found(HELLO[:4]) == 3
    assert prompts.found(HELLO[:1]) == prompts.found([]) == 0


def test_lookup_finds_tokens_up_to_the_first_that_differs():
    prompts = CachedPrompts()
    prompts.keep(HELLO)
    for position in range(8):
        prompt = [*HELLO, 9]
        prompt[position] = 77
        assert prompts.found(prompt) == position


def test_lookup_never_returns_another_prompts_block_even_if_all_hashes_collide(monkeypatch):
    for module in (forest, report):
        monkeypatch.setattr(module, "hash", lambda _: 7, raising=False)
    prompts = CachedPrompts(policy=make_block_policy("slru", 1000))
    prompts.keep(HELLO, "a")
    prompts.keep([5, 6, 7, 8])
    keys = {block.prefix_key for node in prompts.cache.forest.nodes() for block in node.blocks}
    assert keys == {7}, "every prefix has the same key"
    assert prompts.found([*HELLO, 9]) == 0 and prompts.found([*HELLO, 9], "a") == 8
    assert prompts.found([5, 6, 7, 8, 9]) == 4 and prompts.found([1, 2, 3, 5, 5]) == 0
    prompts.check()


# Retention.


def test_evict_removes_the_most_recently_used_prefix_last():
    prompts = CachedPrompts()
    for first in (10, 20, 30):
        prompts.keep([first] * 8)
    prompts.keep([10] * 8)
    assert prompts.cache.evict(PerPool([4]), prompts.now) == [3, 2, 5, 4]
    assert prompts.found([*[10] * 8, 0]) == 8


def test_expire_removes_a_prefix_that_was_unused_for_its_time_to_live():
    prompts = CachedPrompts(prefix_ttl_seconds=10.0)
    prompts.keep(HELLO)
    prompts.now = 9.9
    assert prompts.found([*HELLO, 9]) == 8
    prompts.keep(HELLO)  # Restarts the time to live.
    prompts.now = 19.8
    assert prompts.found([*HELLO, 9]) == 8
    prompts.now = 19.9
    assert prompts.found([*HELLO, 9]) == 0
    assert sorted(prompts.cache.expire(prompts.now)) == [0, 1] and prompts.cache.num_expired == 2


def test_lookup_ignores_a_run_whose_blocks_have_all_left():
    """What two prompts share inside a block is in no block once both have gone."""
    prompts = CachedPrompts(policy=BadBlockPolicy(1000, "newest"), prefix_ttl_seconds=10.0)
    prompts.keep([1, 2, 3, 3])
    prompts.now = 5.0
    prompts.keep([1, 2, 4, 4])
    prompts.cache.evict(PerPool([1]), prompts.now)  # The newer one.
    prompts.now = 10.0
    assert prompts.found([1, 2, 5, 5]) == prompts.why([1, 2, 5, 5]).num_cached_tokens == 0
    assert prompts.why([1, 2, 5, 5]).stop is Stop.EXPIRED


def test_commit_above_max_prefixes_evicts_the_oldest():
    prompts = CachedPrompts(max_prefixes=2)
    for first in (10, 20, 30):
        prompts.keep([first] * 8)
    assert prompts.cache.forest.num_prefixes == 2
    assert prompts.found([10] * 9) == 0
    assert prompts.found([20] * 9) == prompts.found([30] * 9) == 8
    prompts.keep([30] * 16)
    assert prompts.cache.forest.num_prefixes == 2, "a longer prefix replaces its beginning"
    assert prompts.found([20] * 9) == 8


def test_commit_caches_nothing_if_all_of_max_prefixes_are_in_use():
    prompts = CachedPrompts(max_prefixes=1)
    lease = prompts.hold([10] * 8)
    prompts.keep([20] * 8)
    assert prompts.found([20] * 9) == 0 and prompts.found([10] * 9) == 8
    prompts.end(lease)
    prompts.keep([20] * 8)
    assert prompts.found([20] * 9) == 8 and prompts.cache.forest.num_prefixes == 1


def test_commit_pins_a_prefix_until_another_commit_unpins_it():
    prompts = CachedPrompts(prefix_ttl_seconds=10.0)
    prompts.keep(HELLO, retention=Retention(is_pinned=True))
    prompts.now = 1000.0
    assert not prompts.cache.evict(PerPool([10]), prompts.now) and prompts.found([*HELLO, 9]) == 8
    prompts.keep(HELLO)
    assert not prompts.cache.evict(PerPool([10]), prompts.now), (
        "a commit without a retention changes nothing"
    )
    prompts.keep(HELLO, retention=Retention())
    prompts.now = 1009.0
    assert prompts.found([*HELLO, 9]) == 8
    prompts.now = 1010.0
    assert (
        prompts.found([*HELLO, 9]) == 0
        and len(prompts.cache.evict(PerPool([10]), prompts.now)) == 2
    )
    prompts.check()


def test_commit_with_a_ttl_replaces_the_common_one():
    prompts = CachedPrompts(prefix_ttl_seconds=10.0)
    prompts.keep([1] * 8, retention=Retention(ttl_seconds=100.0))
    prompts.keep([2] * 8, retention=Retention(ttl_seconds=1.0))
    prompts.keep([3] * 8)
    for now, want in ((0.9, [8, 8, 8]), (1.0, [8, 0, 8]), (10.0, [8, 0, 0]), (100.0, [0, 0, 0])):
        prompts.now = now
        assert [prompts.found([first] * 9) for first in (1, 2, 3)] == want


def test_commit_without_a_retention_gives_new_blocks_the_common_ttl():
    prompts = CachedPrompts(prefix_ttl_seconds=10.0)
    prompts.keep(HELLO, retention=Retention(ttl_seconds=100.0))
    prompts.keep([*HELLO, 1, 1, 1, 1])
    prompts.now = 50.0
    assert prompts.found([*HELLO, 1, 1, 1, 1, 0]) == 8


def test_commit_with_a_shorter_ttl_keeps_blocks_that_other_prefixes_continue():
    prompts = CachedPrompts(prefix_ttl_seconds=100.0)
    prompts.keep([*HELLO, 1, 1, 1, 1])
    prompts.keep([*HELLO, 2, 2, 2, 2], retention=Retention(ttl_seconds=1.0))
    prompts.now = 50.0
    assert prompts.found([*HELLO, 1, 1, 1, 1, 0]) == 12
    assert prompts.found([*HELLO, 2, 2, 2, 2, 0]) == 8


# Policies.


@pytest.mark.parametrize("mode", BadBlockPolicy.MODES)
def test_evict_removes_evictable_blocks_only_whatever_the_policy_answers(mode):
    prompts = CachedPrompts(policy=BadBlockPolicy(1000, mode))
    with complaints() as told:
        lease = prompts.hold(HELLO)
        prompts.keep([*HELLO, 1, 1, 1, 1])
        prompts.keep([2] * 4)
        assert sorted(prompts.cache.evict(PerPool([10]), prompts.now)) == [2, 3]
        prompts.end(lease)
        prompts.check()
    assert bool(told) == (mode not in ("newest", "oldest")), "a wrong answer is logged"


def test_evict_removes_no_block_of_another_cache_with_the_same_policy():
    policy = BadBlockPolicy(1000, "oldest")
    prompts, others = CachedPrompts(policy), CachedPrompts(policy)
    prompts.keep([1] * 4)
    others.keep([2] * 4)
    with complaints() as told:
        assert others.cache.evict(PerPool([1]), 0.0) == [0]
    assert told and others.cache.num_blocks == 0 and prompts.cache.num_blocks == 1
    prompts.check()
    others.check()


def test_outdated_blocks_are_evicted_first_once_their_request_has_ended():
    prompts = CachedPrompts()
    lease = prompts.hold([*HELLO, 1, 2, 3, 4])
    prompts.cache.set_version(1)
    prompts.keep([5, 6, 7, 8, 9, 10, 11, 12])
    assert len(prompts.cache.evict(PerPool([1]), prompts.now)) == 1  # No outdated block is idle.
    assert prompts.found([5, 6, 7, 8, 9]) == 4
    prompts.end(lease)  # Most recently used, as the policy sees it.
    assert prompts.cache.evict(PerPool([3]), prompts.now) and prompts.found([5, 6, 7, 8, 9]) == 4
    assert prompts.cache.num_blocks == 1
    prompts.check()
