"""Prompts that begin alike, from allocation to deallocation, through the manager."""

import math

import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from tests.support.managers import make_manager, refused, start, tokens_of, write_tokens
from tests.support.parts import pool_of

PROMPT = [11, 12, 13, 14, 15, 16, 17, 18]  # Two full blocks of three, and two tokens.


def config():
    return fj.PrefixCacheConfig(
        max_prefixes=100,
        min_prefix_length=1,
        prefix_ttl_seconds=math.inf,
        enable_cross_request_sharing=True,
    )


@pytest.fixture
def make():
    return lambda **options: make_manager(
        enable_prefix_caching=True, prefix_cache_config=config(), **options
    )


def ask(manager, name, prompt, salt=None, **limits):
    """Allocates a request with a prompt."""
    request = manager.new_request(name, prompt_token_ids=prompt, cache_salt=salt, **limits)
    return manager.allocate(request)


def serve(manager, name, prompt, salt=None):
    """A request that computes what is not cached, commits it and is over."""
    handle = ask(manager, name, prompt, salt)
    skip = handle.num_cached_tokens
    assert tokens_of(handle)[:skip] == prompt[:skip]
    write_tokens(manager, handle, prompt[skip:], begin=skip)
    manager.commit(handle)
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


def test_a_later_write_of_one_request_is_not_seen_by_another(make):
    manager = make()
    serve(manager, "a", [*PROMPT, 19])
    handles = [ask(manager, name, [*PROMPT, 70 + i]) for i, name in enumerate("bc")]
    for i, handle in enumerate(handles):
        write_tokens(manager, handle, [70 + i], begin=8)
    assert [tokens_of(handle)[8] for handle in handles] == [70, 71]
    assert cached(manager, [*PROMPT, 19, 20]) == 9


def test_a_salt_outlasts_swapping(make):
    manager = make()
    handle = ask(manager, "a", PROMPT, "tenant-1")
    write_tokens(manager, handle, PROMPT)
    manager.commit(handle)
    manager.swap_out("a")
    manager.allocate_blocks(11)  # What was cached goes.
    assert cached(manager, PROMPT, "tenant-1") < 6
    manager.free_blocks(sorted(pool_of(manager).counts.taken))
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


def test_room_that_eviction_makes_is_counted_by_can_allocate(make):
    manager = make()
    for i in range(4):
        serve(manager, i, [10 * i + j + 1 for j in range(9)])
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


def test_without_a_preemption_policy_nobody_is_swapped_out(make):
    manager = make()
    start(manager, "a", 15, priority=fj.Priority.Low)
    start(manager, "b", 15, priority=fj.Priority.Low)
    urgent = manager.new_request("urgent", 15, priority=fj.Priority.High)
    assert not manager.can_allocate(urgent)
    assert refused(manager.allocate, urgent) is errors.OutOfBlocksError


def test_the_hit_rate_counts_tokens_that_need_not_be_computed(make):
    manager = make()
    serve(manager, "a", PROMPT)
    serve(manager, "b", PROMPT)
    start(manager, "c", 3)  # Without a prompt, it does not count.
    assert manager.stats().cache_hit_rate == 6 / 16


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
