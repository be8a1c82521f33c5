"""Prompts that begin alike, through the manager: what is shared, for whom, and for how long."""

import logging
import math

import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.policies.recency import LruBlockPolicy
from ferrum_jax.prefix import forest as forests
from ferrum_jax.prefix.report import Stop
from ferrum_jax.prefix.tree import Node
from ferrum_jax.tokens import TokenIds
from tests.managers import Clock, make_manager, refused, start, tokens_of, write_tokens

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]  # Two full blocks of three, and two tokens.


def config(**fields):
    defaults = {
        "max_prefixes": 100,
        "min_prefix_length": 1,
        "prefix_ttl_seconds": math.inf,
        "enable_cross_request_sharing": True,
    }
    return fj.PrefixCacheConfig(**{**defaults, **fields})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(clock):
    def make(options=None, **fields):
        return make_manager(
            enable_prefix_caching=True,
            prefix_cache_config=config(**fields),
            clock=clock,
            **(options or {}),
        )

    return make


def ask(manager, name, prompt, salt=None, **limits):
    """Allocates a request with a prompt."""
    request = manager.new_request(name, prompt_token_ids=prompt, cache_salt=salt, **limits)
    return manager.allocate(request)


def serve(manager, name, prompt, salt=None, retention=None):
    """A request that computes what is not cached, commits it and is over."""
    handle = ask(manager, name, prompt, salt)
    skip = handle.num_cached_tokens
    assert tokens_of(handle)[:skip] == prompt[:skip]
    write_tokens(manager, handle, prompt[skip:], begin=skip)
    manager.commit(handle, retention=retention)
    assert tokens_of(handle) == prompt
    manager.check()
    manager.deallocate(name)
    return skip


def cached(manager, prompt, salt=None):
    return manager.explain_lookup(prompt, salt).num_cached_tokens


def test_full_blocks_are_shared_and_matching_tokens_of_the_next_are_copied(make):
    manager = make()
    serve(manager, "a", [*PROMPT, 19])
    handle = ask(manager, "b", [*PROMPT, 77, 78])
    assert handle.num_cached_tokens == 8
    assert tokens_of(handle) == [*PROMPT, 0, 0], "nothing behind what matches"
    assert manager.stats().free_blocks == 12 - 3 - 2, "three cached, two of its own"
    manager.check()


def test_the_last_token_of_a_prompt_is_always_left_to_compute(make):
    manager = make()
    serve(manager, "a", PROMPT[:6])
    assert ask(manager, "b", PROMPT[:6]).num_cached_tokens == 5
    assert ask(manager, "c", PROMPT[:1]).num_cached_tokens == 0


def test_nothing_is_cached_before_it_is_committed(make):
    manager = make()
    handle = ask(manager, "a", PROMPT)
    write_tokens(manager, handle, PROMPT)
    assert cached(manager, PROMPT) == 0
    assert manager.commit(handle) == 6
    assert cached(manager, PROMPT) == 6


def test_generated_tokens_are_kept_too(make):
    manager = make()
    handle = ask(manager, "a", PROMPT)
    write_tokens(manager, handle, PROMPT)
    assert manager.commit(handle) == 6
    manager.extend(handle, 4)
    write_tokens(manager, handle, [31, 32, 33, 34], begin=8)
    assert manager.commit(handle, [31]) == 9
    assert manager.commit(handle, [32, 33, 34]) == 12
    manager.deallocate("a")
    assert cached(manager, [*PROMPT, 31, 32, 33, 34, 35]) == 12


def test_more_tokens_than_a_request_holds_cannot_be_committed(make):
    manager = make()
    handle = ask(manager, "a", PROMPT)
    with pytest.raises(ValueError, match="9 tokens .* holds 8"):
        manager.commit(handle, [1])
    manager.check()


def test_equal_content_computed_twice_at_once_ends_as_one_copy(make):
    manager = make()
    handles = [ask(manager, name, PROMPT) for name in "ab"]
    for handle in handles:
        write_tokens(manager, handle, PROMPT)
    assert manager.stats().free_blocks == 6
    assert [manager.commit(handle) for handle in handles] == [6, 6]
    assert manager.stats().free_blocks == 8
    first, second = (handle.block_table().physical_blocks for handle in handles)
    assert first[:2] == second[:2] and first[2] != second[2]
    assert [tokens_of(handle) for handle in handles] == [PROMPT, PROMPT]
    manager.check()


def test_a_later_write_of_one_request_is_not_seen_by_another(make):
    manager = make()
    serve(manager, "a", [*PROMPT, 19])
    handles = [ask(manager, name, [*PROMPT, 70 + i]) for i, name in enumerate("bc")]
    for i, handle in enumerate(handles):
        write_tokens(manager, handle, [70 + i], begin=8)
    assert [tokens_of(handle)[8] for handle in handles] == [70, 71]
    assert cached(manager, [*PROMPT, 19, 20]) == 9


# Whose.


def test_salts_share_nothing_with_each_other(make):
    manager = make()
    serve(manager, "a", PROMPT, "tenant-1")
    assert cached(manager, PROMPT, "tenant-1") == 6
    assert cached(manager, PROMPT, "tenant-2") == cached(manager, PROMPT) == 0
    assert serve(manager, "b", PROMPT, "tenant-2") == 0
    assert manager.stats().cached_blocks == 4


def test_a_salt_outlasts_swapping(make):
    manager = make()
    handle = ask(manager, "a", PROMPT, "tenant-1")
    write_tokens(manager, handle, PROMPT)
    manager.commit(handle)
    manager.swap_out("a")
    manager.allocate_blocks(11)  # What was cached goes.
    assert cached(manager, PROMPT, "tenant-1") < 6
    manager.free_blocks(sorted(manager._cache.taken))
    manager.swap_in("a")
    assert tokens_of(handle) == PROMPT
    assert cached(manager, PROMPT, "tenant-1") == 6
    assert cached(manager, PROMPT) == cached(manager, PROMPT, "tenant-2") == 0
    manager.check()


def test_requests_of_different_salts_cannot_be_made_to_share(make):
    manager = make()
    for name, salt in (("a", "tenant-1"), ("b", "tenant-2")):
        write_tokens(manager, ask(manager, name, PROMPT, salt), PROMPT)
    assert refused(manager.share_prefix, "a", "b", 3) is errors.PrefixMismatchError
    manager.check()


def test_without_cross_request_sharing_only_salted_requests_share(make):
    manager = make(enable_cross_request_sharing=False)
    assert [serve(manager, i, PROMPT) for i in range(2)] == [0, 0]
    assert [serve(manager, i, PROMPT, "session") for i in range(2)] == [0, 6]
    assert manager.explain_lookup(PROMPT).stop is Stop.NOT_SHARED


def test_prompts_of_equal_hashes_are_told_apart(make, monkeypatch):
    monkeypatch.setattr(forests, "hash", lambda _: 7, raising=False)
    monkeypatch.setattr(TokenIds, "__hash__", lambda self: 7)
    manager = make()
    serve(manager, "a", PROMPT)
    other = [token + 1 for token in PROMPT]
    assert serve(manager, "b", other) == 0
    assert (cached(manager, PROMPT), cached(manager, other)) == (6, 6)


# How long, and how many.


def test_what_is_too_short_is_neither_kept_nor_found(make):
    manager = make(min_prefix_length=6)
    serve(manager, "a", PROMPT[:5])
    assert manager.stats().cached_blocks == 0
    serve(manager, "b", PROMPT)
    assert cached(manager, PROMPT[:5] + [9, 9]) == 0
    assert manager.explain_lookup(PROMPT[:5] + [9, 9]).stop is Stop.BELOW_MINIMUM
    assert cached(manager, PROMPT) == 6


def test_a_prefix_expires_when_nobody_has_used_it_for_its_time_to_live(make, clock):
    manager = make(prefix_ttl_seconds=10)
    serve(manager, "a", PROMPT)
    clock.now += 9
    assert serve(manager, "b", PROMPT) == 6, "and is used now"
    clock.now += 9
    assert cached(manager, PROMPT) == 6
    clock.now += 2
    report = manager.explain_lookup(PROMPT)
    assert (report.num_cached_tokens, report.stop, report.seconds_ago) == (0, Stop.EXPIRED, 1)
    assert manager.gc().memory_freed == 2 * manager._cache.block_bytes
    assert (manager.stats().cached_blocks, manager.stats().expiration_count) == (0, 2)
    assert manager.explain_lookup(PROMPT).stop is Stop.EXPIRED, "that is remembered"


def test_what_a_live_request_uses_does_not_expire(make, clock):
    manager = make(prefix_ttl_seconds=10)
    handle = ask(manager, "a", PROMPT)
    write_tokens(manager, handle, PROMPT)
    manager.commit(handle)
    clock.now += 1000
    manager.gc()
    assert cached(manager, PROMPT) == 6
    manager.deallocate("a")
    assert cached(manager, PROMPT) == 6, "its time counts from here"


def test_no_more_prefixes_are_kept_than_may_be(make):
    manager = make(max_prefixes=2)
    prompts = [[10 * i + j for j in range(6)] for i in range(3)]
    for i, prompt in enumerate(prompts):
        serve(manager, i, prompt)
    assert [cached(manager, [*prompt, 0]) for prompt in prompts] == [0, 6, 6]
    assert manager.stats().cached_blocks == 4


def test_a_pinned_prefix_stays_until_a_commit_says_otherwise(make, clock):
    manager = make(prefix_ttl_seconds=10)
    serve(manager, "a", PROMPT[:6], retention=Retention(is_pinned=True))
    clock.now += 1000
    manager.gc()
    assert refused(manager.allocate_blocks, 11) is errors.OutOfBlocksError
    assert serve(manager, "b", PROMPT[:6]) == 5, "other requests do not unpin it"
    assert manager.stats().evictable_blocks == 0
    serve(manager, "c", PROMPT[:6], retention=Retention())
    assert manager.stats().evictable_blocks == 2
    assert len(manager.allocate_blocks(12)) == 12
    manager.check()


def test_a_prefix_may_have_its_own_time_to_live(make, clock):
    manager = make(prefix_ttl_seconds=10)
    serve(manager, "a", PROMPT, retention=Retention(ttl_seconds=100))
    clock.now += 99
    assert cached(manager, PROMPT) == 6
    clock.now += 2
    assert cached(manager, PROMPT) == 0


# When room is short.


def test_expired_prefixes_go_first_then_the_longest_unused(make, clock):
    manager = make({"block_policy": "lru"}, prefix_ttl_seconds=50)
    first, second, third = ([10 * i + j for j in range(6)] for i in range(1, 4))
    serve(manager, "a", first, retention=Retention(ttl_seconds=5))
    serve(manager, "b", second)
    serve(manager, "c", third)
    serve(manager, "d", first)  # Used last, but it expires soon.
    clock.now += 20
    manager.allocate_blocks(9)
    assert [cached(manager, [*p, 0]) for p in (first, second, third)] == [0, 3, 6]
    stats = manager.stats()
    assert (stats.expiration_count, stats.eviction_count) == (2, 1)


def test_nothing_in_use_is_evicted(make):
    manager = make()
    serve(manager, "a", PROMPT)
    handle = ask(manager, "b", PROMPT)
    assert refused(manager.allocate_blocks, 10) is errors.OutOfBlocksError
    manager.allocate_blocks(9)
    assert tokens_of(handle)[:6] == PROMPT[:6]
    assert manager.stats().eviction_count == 0
    manager.check()


def test_room_that_eviction_makes_is_counted_by_can_allocate(make):
    manager = make()
    for i in range(4):
        serve(manager, i, [10 * i + j for j in range(9)])
    assert manager.free_block_count() == 0
    request = manager.new_request("big", 15)
    assert manager.can_allocate(request)
    assert manager.allocate(request).num_tokens() == 15
    assert manager.stats().eviction_count == 5


def test_a_reused_block_holds_nothing_of_its_last_owner(make):
    manager = make()
    for i in range(4):
        serve(manager, i, [10 * i + j + 1 for j in range(9)])
    assert tokens_of(start(manager, "new", 15)) == [0] * 15


def test_an_urgent_request_has_less_urgent_ones_swapped_out(make):
    manager = make({"preemption_policy": fj.LruEvictionPolicy()})
    low = ask(manager, "low", PROMPT, priority=fj.Priority.Low)
    write_tokens(manager, low, PROMPT)
    normal = [start(manager, i, 15) for i in range(1)]
    urgent = manager.new_request("urgent", 15, priority=fj.Priority.High)
    assert manager.can_allocate(urgent)
    manager.allocate(urgent)
    assert manager.stats().preemption_count == 1
    assert (low.is_valid(), low.num_tokens(), low.key_cache(0)) == (True, 8, None)
    assert refused(manager.extend, low, 1) is errors.SwappedOutError
    assert normal[0].key_cache(0) is not None
    manager.deallocate("urgent")
    manager.swap_in("low")
    assert tokens_of(low) == PROMPT
    manager.check()


def test_without_a_preemption_policy_nobody_is_swapped_out(make):
    manager = make()
    start(manager, "a", 15, priority=fj.Priority.Low)
    start(manager, "b", 15, priority=fj.Priority.Low)
    urgent = manager.new_request("urgent", 15, priority=fj.Priority.High)
    assert not manager.can_allocate(urgent)
    assert refused(manager.allocate, urgent) is errors.OutOfBlocksError


def test_a_block_policy_that_fails_costs_only_its_judgement(make, caplog):
    def fail(*_):
        raise RuntimeError("The policy is broken.")

    methods = ("insert", "touch", "remove", "evict")
    broken = type("Broken", (LruBlockPolicy,), dict.fromkeys(methods, fail))
    manager = make({"block_policy": broken})
    with caplog.at_level(logging.CRITICAL, logger="ferrum_jax"):
        for i in range(5):
            serve(manager, i, [10 * i + j for j in range(9)])
        assert len(manager.allocate_blocks(12)) == 12
    manager.check()


# What is said about it.


def test_the_hit_rate_counts_tokens_that_need_not_be_computed(make):
    manager = make()
    serve(manager, "a", PROMPT)
    serve(manager, "b", PROMPT)
    start(manager, "c", 3)  # Without a prompt, it does not count.
    assert manager.stats().cache_hit_rate == 6 / 16


def test_a_lookup_is_explained(make):
    manager = make()
    assert make_manager().explain_lookup(PROMPT).stop is Stop.OFF
    assert manager.explain_lookup(PROMPT).stop is Stop.NEVER_SEEN
    serve(manager, "a", PROMPT)
    assert manager.explain_lookup(PROMPT).stop is Stop.PARTIAL_TAIL
    assert manager.explain_lookup(PROMPT[:7]).stop is Stop.COMPLETE
    other = manager.explain_lookup(PROMPT, "tenant")
    assert (other.num_matched_tokens, other.stop) == (0, Stop.OTHER_SALT)
    parted = manager.explain_lookup([*PROMPT[:4], 9, 9, 9, 9])
    assert (parted.num_cached_tokens, parted.stop) == (4, Stop.NEVER_SEEN)
    manager.allocate_blocks(12)
    gone = manager.explain_lookup(PROMPT)
    assert (gone.num_cached_tokens, gone.stop, gone.seconds_ago) == (0, Stop.EVICTED, 0)
    assert str(gone) == (
        "0 of 8 tokens are reused: at token 0, the next block was cached, and has been "
        "evicted 0 s ago."
    )


def test_a_walk_meets_as_many_nodes_however_many_siblings_there_are(make, monkeypatch):
    visited = []
    is_expired = Node.is_expired
    monkeypatch.setattr(
        Node, "is_expired", lambda node, now: visited.append(node) or is_expired(node, now)
    )
    counts = []
    for num_siblings in (10, 200):
        manager = make({"max_blocks": 1000, "initial_blocks": 1000, "geometry": {}})
        cache = manager._prefixes.cache
        for i in range(num_siblings):
            tokens = TokenIds([1, 2, 100 + i])
            lease = cache.acquire(cache.lookup(tokens, None, 0.0), None)
            cache.commit(lease, tokens, [i], 0.0)
            cache.release(lease, 0.0)
        visited.clear()
        cache.lookup(TokenIds([1, 2, 105, 7]), None, 0.0)
        cache.lookup(TokenIds([1, 2, 99, 7]), None, 0.0)
        counts.append(len(visited))
    assert counts[0] == counts[1]


def test_prefix_caching_can_begin_later(make):
    manager = make_manager()
    handle = ask(manager, "a", PROMPT)
    write_tokens(manager, handle, PROMPT)
    assert manager.commit(handle) == 0
    manager.enable_prefix_caching(config())
    assert manager.commit(handle) == 6
    assert ask(manager, "b", PROMPT).num_cached_tokens == 6
    manager.check()


def test_a_prefix_is_shared_by_hand(make):
    manager = make()
    for name, prompt in (("a", PROMPT), ("b", [*PROMPT[:7], 70, 71])):
        write_tokens(manager, ask(manager, name, prompt), prompt)
    manager.share_prefix("a", "b", 7)
    manager.check()
    assert manager.free_block_count() == 12 - 3 - 1
    assert tokens_of(manager.get_handle("b")) == [*PROMPT[:7], 70, 71]
    manager.deallocate("a")
    manager.check()
    assert tokens_of(manager.get_handle("b")) == [*PROMPT[:7], 70, 71]
    manager.deallocate("b")
    assert manager.free_block_count() == 12


def test_what_differs_cannot_be_shared_by_hand(make):
    manager = make()
    for name, prompt in (("a", PROMPT), ("b", [1, 2, 3])):
        ask(manager, name, prompt)
    assert refused(manager.share_prefix, "a", "b", 3) is errors.PrefixMismatchError
    assert refused(manager.share_prefix, "a", "a", 3) is errors.PrefixMismatchError
    assert refused(manager.share_prefix, "a", "c", 3) is errors.UnknownRequestError
    with pytest.raises(ValueError, match="must not exceed the 3 tokens"):
        manager.share_prefix("a", "b", 4)


def test_moving_blocks_keeps_what_is_cached(make):
    manager = make()
    serve(manager, "a", PROMPT)
    blocks = manager.allocate_blocks(3)
    serve(manager, "b", [token + 50 for token in PROMPT])
    manager.free_blocks(blocks)
    manager.defragment()
    manager.check()
    assert serve(manager, "c", PROMPT) == 6
    assert serve(manager, "d", [token + 50 for token in PROMPT]) == 6
