"""Prefix caching over layer groups: what a second request finds, and what each call leaves of it.

Random lives compare every group with the tokens that it should hold; the other tests are readable
examples. A block has 3 tokens; layer 0 keeps all tokens and layer 1 a window of 4 if not said.
"""

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.report import Stop
from ferrum_jax.types import NULL_BLOCK
from tests.support.grouped_managers import (
    GROUPS,
    PAYLOAD,
    WIDE,
    fill,
    first_needed,
    grow,
    make_large,
)
from tests.support.grouped_prefixes import (
    FULL_AND_WINDOW,
    MIXED,
    WINDOWS,
    RandomLife,
    ask,
    make,
    released,
    require_cached_contents,
    require_contents,
)
from tests.support.internals import cached_blocks, device_of, devices_of, pool_of, row_blocks
from tests.support.manager_pictures import picture
from tests.support.managers import write_tokens
from tests.support.multi_device import CPU, make_multi
from tests.support.prefix_managers import CONFIG, found
from tests.support.prepared_managers import fork_step

PROMPT = list(range(11, 24))  # Four full blocks, and a token.


def checked(manager) -> None:
    """Checks counts and bytes; free blocks are blank."""
    picture(manager)
    require_cached_contents(manager)


def num_obtainable(manager) -> int:
    """Blocks that are free or idle."""
    return manager.free_block_count() + manager.stats().evictable_blocks


@pytest.mark.parametrize("windows", [FULL_AND_WINDOW, WINDOWS, MIXED], ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_lives_hold_the_right_tokens_in_every_group(windows, seed):
    RandomLife(windows, seed, max_blocks=12 * len(windows)).run(60)


@pytest.mark.parametrize(
    ("windows", "seed"), [(FULL_AND_WINDOW, 1), (FULL_AND_WINDOW, 3), (MIXED, 4)]
)
def test_random_lives_hold_the_right_tokens_in_two_pools(windows, seed):
    life = RandomLife(windows, seed, max_blocks=12, payloads=(PAYLOAD, WIDE))
    assert pool_of(life.manager).counts.num_groups == (
        (1, 1) if windows == FULL_AND_WINDOW else (2, 1)
    )
    life.run(60)
    assert life.num_hits


# Hits.


@pytest.mark.parametrize("windows", [FULL_AND_WINDOW, WINDOWS], ids=str)
def test_a_second_request_continues_each_chunk_as_without_a_cache(windows):
    for end in range(1, len(PROMPT) + 1):
        manager, plain = make(windows), make(windows)
        ask(manager, "a", PROMPT, chunk=6)
        manager.deallocate("a")
        assert num_obtainable(manager) == 24
        checked(manager)
        prompt = [*PROMPT[:end], 98, 99]
        second, alone = ask(manager, "b", prompt), ask(plain, "b", prompt)
        num_full = end // 3 * 3
        assert second.num_cached_tokens >= min(num_full, 12) - 3
        assert alone.num_cached_tokens == 0
        for layer in range(2):
            gone = 3 * max(released(manager, second)[layer], released(plain, alone)[layer])
            for have, want in zip(second.kv_cache(layer), alone.kv_cache(layer), strict=True):
                np.testing.assert_array_equal(have[gone:], want[gone:])
        require_contents(manager, second, prompt)
        checked(manager)


def test_a_block_that_a_window_passes_stays_cached_and_is_idle():
    manager = make(FULL_AND_WINDOW)
    handle = ask(manager, "a", PROMPT[:6])
    assert (manager.stats().evictable_blocks, manager.free_block_count()) == (0, 20)
    grow(manager, handle, PROMPT[6:9])  # Token 6 sees token 3 and those after it.
    manager.commit(handle, PROMPT[6:9])
    assert released(manager, handle) == [0, 1]
    assert (manager.stats().evictable_blocks, manager.free_block_count()) == (1, 18)
    assert manager.stats().cached_blocks == 6
    checked(manager)
    for end in (3, 6, 9):
        assert found(manager, [*PROMPT[:end], 99]) == end
    manager.deallocate("a")
    assert (manager.stats().evictable_blocks, manager.free_block_count()) == (6, 18)


def test_a_block_that_is_committed_after_its_window_has_passed_it_is_no_boundary():
    manager = make(FULL_AND_WINDOW)
    request = manager.new_request("a", prompt_token_ids=PROMPT[:1])
    handle = manager.allocate(request)
    write_tokens(manager, handle, PROMPT[:1])
    for token in PROMPT[1:12]:
        grow(manager, handle, [token])
    manager.commit(handle, PROMPT[1:12])
    assert released(manager, handle) == [0, 2]
    assert found(manager, [*PROMPT[:12], 99]) == 12
    told = manager.explain_lookup([*PROMPT[:6], 99])
    assert (told.stop, told.group_name, told.num_cached_tokens) == (Stop.WINDOW, "group1", 0)
    assert "lacks blocks that the next token can see (group 'group1')" in str(told)
    ask(manager, "b", PROMPT[:6])
    assert found(manager, [*PROMPT[:6], 99]) == 6, "the second request has filled the gaps"
    checked(manager)


def longest_usable(manager, tokens, window=4) -> int:
    """The longest boundary before which every block that the next token sees is cached."""
    ends = {name: block for (_, name), (_, block) in cached_blocks(manager).items()}
    usable = 0
    for end in range(3, len(tokens), 3):
        path = [ends.get(tuple(tokens[:n])) for n in range(3, end + 1, 3)]
        seen = path[first_needed(end, window) :]
        if None not in path and all(b is not None and NULL_BLOCK not in b.block_ids for b in seen):
            usable = end
    return usable


def test_a_hit_falls_back_to_an_earlier_boundary_when_window_blocks_are_evicted():
    manager = make(FULL_AND_WINDOW)
    for name, prompt in (("b", [*PROMPT[:6], 70, 71, 72]), ("a", PROMPT[:12])):
        ask(manager, name, prompt)
        manager.deallocate(name)
    lengths = []
    while manager.stats().cached_blocks:
        lengths.append(found(manager, [*PROMPT[:12], 99]))
        assert lengths[-1] == longest_usable(manager, [*PROMPT[:12], 99])
        manager.free_blocks(manager.allocate_blocks(manager.free_block_count() + 1))
        checked(manager)
    assert lengths == sorted(lengths, reverse=True) and {12, 6} <= set(lengths)
    assert manager.free_block_count() == 24


def test_a_hit_ends_before_a_block_that_has_no_room_beside_its_copy():
    manager = make(FULL_AND_WINDOW, max_blocks=10, initial_blocks=10)
    ask(manager, "a", PROMPT[:6])
    manager.deallocate("a")
    taken = manager.allocate_blocks(3)
    prompt = [*PROMPT[:5], 97, 98, 99]
    assert found(manager, prompt) == 5 and manager.free_block_count() == 3
    request = manager.new_request("b", prompt_token_ids=prompt)
    assert manager.can_allocate(request)
    second = manager.allocate(request)  # 4 new blocks: the tail's are evicted.
    assert second.num_cached_tokens == 3
    checked(manager)
    manager.deallocate("b")
    manager.free_blocks(taken)
    assert num_obtainable(manager) == 10


# Calls that leave the prefix cache as it is, or change it.


def test_a_request_that_is_swapped_out_shares_the_same_blocks_again():
    manager = make(FULL_AND_WINDOW)
    ask(manager, "a", PROMPT)
    second = ask(manager, "b", [*PROMPT[:12], 99])
    rows, num_free = row_blocks(manager), manager.free_block_count()
    manager.swap_out("b")
    checked(manager)
    manager.swap_in("b")
    checked(manager)
    assert row_blocks(manager)["b"][:4] == rows["a"][:4] == rows["b"][:4]
    assert manager.free_block_count() == num_free
    require_contents(manager, second, [*PROMPT[:12], 99])


def test_a_request_that_is_swapped_in_keeps_its_bytes_though_another_has_filled_a_gap():
    manager = make(FULL_AND_WINDOW)
    handle = ask(manager, "a", PROMPT[:6])
    before = [np.asarray(x) for layer in range(2) for x in handle.kv_cache(layer)]
    manager.swap_out("a")
    cache = device_of(manager).prefixes.cache
    block = cache.forest.subtree_of(cache.key_of(None))[0]
    device_of(manager).prefixes._release_blocks(cache.forest.strip(block))
    other = manager.allocate(manager.new_request("b", prompt_token_ids=PROMPT[:7]))
    assert other.num_cached_tokens == 3
    write_tokens(manager, other, [50, 51, 52, 53], 3)  # Not the numbers that "a" has computed.
    manager.commit(other)
    manager.swap_in("a")
    after = [np.asarray(x) for layer in range(2) for x in handle.kv_cache(layer)]
    for have, want in zip(after, before, strict=True):
        np.testing.assert_array_equal(have, want)
    manager.check()


def test_a_defragmented_cache_is_found_as_before():
    manager = make(FULL_AND_WINDOW)
    ask(manager, "x", [1] * 9)
    ask(manager, "a", PROMPT)
    manager.deallocate("x")
    manager.reset_prefixes()
    second = ask(manager, "b", PROMPT)
    manager.deallocate("a")
    manager.defragment()
    checked(manager)
    assert max(row_blocks(manager)["b"]) < 10
    assert found(manager, PROMPT) == 12
    require_contents(manager, second, PROMPT)
    manager.deallocate("b")
    assert num_obtainable(manager) == 24


def test_a_fork_holds_the_cached_blocks_of_its_parent():
    manager = make(FULL_AND_WINDOW)
    parent = ask(manager, "a", PROMPT)
    child = manager.allocate(manager.new_request("b", 0))
    manager.run(fork_step, [parent, child], extends=True)
    checked(manager)
    idle = manager.stats().evictable_blocks
    manager.deallocate("a")
    assert manager.stats().evictable_blocks == idle
    grow(manager, child, [99])
    require_contents(manager, child, [*PROMPT, 99])
    checked(manager)
    manager.deallocate("b")
    assert num_obtainable(manager) == 24


def test_a_reset_frees_idle_blocks_and_leaves_a_request_its_own():
    manager = make(FULL_AND_WINDOW)
    handle = ask(manager, "a", PROMPT, cache_salt="one")
    ask(manager, "b", PROMPT, cache_salt="two")
    manager.reset_prefixes("one")
    checked(manager)
    assert found(manager, PROMPT, "one") == 0 and found(manager, PROMPT, "two") == 12
    require_contents(manager, handle, PROMPT)
    manager.reset_prefixes()
    assert manager.stats().cached_blocks == 0
    checked(manager)


def test_a_pin_keeps_what_the_boundary_after_it_needs():
    manager = make(FULL_AND_WINDOW)
    handle = ask(manager, "a", PROMPT[:12])
    manager.commit(handle, retention=Retention(is_pinned=True))
    manager.deallocate("a")
    assert manager.stats().evictable_blocks == 3 and manager.free_block_count() == 16
    manager.free_blocks(manager.allocate_blocks(19))
    assert found(manager, [*PROMPT[:12], 99]) == 12
    assert refused_by_room(manager, 20)
    checked(manager)


def refused_by_room(manager, num_blocks: int) -> bool:
    try:
        manager.allocate_blocks(num_blocks)
    except errors.OutOfBlocksError:
        return True
    return False


def test_expired_prefixes_are_freed_in_every_group():
    manager = make(FULL_AND_WINDOW)
    handle = ask(manager, "a", PROMPT[:12])
    manager.commit(handle, retention=Retention(ttl_seconds=5.0))
    manager.deallocate("a")
    device_of(manager).prefixes._clock.now += 10
    manager.gc()
    assert manager.stats().cached_blocks == 0 and manager.free_block_count() == 24
    assert manager.stats().expiration_count == 8


def test_share_prefix_takes_cached_blocks_of_every_group():
    manager = make(FULL_AND_WINDOW)
    ask(manager, "a", PROMPT[:8])
    target = manager.allocate(manager.new_request("b", 12))
    write_tokens(manager, target, [*PROMPT[:8], 60, 61, 62, 63])
    manager.share_prefix("a", "b", 8)
    checked(manager)
    assert row_blocks(manager)["b"][:2] == row_blocks(manager)["a"][:2]
    require_contents(manager, target, [*PROMPT[:8], 60, 61, 62, 63])
    manager.deallocate("a")
    assert manager.stats().evictable_blocks == 1, "the target holds all but block 0 of the window"
    checked(manager)
    manager.deallocate("b")
    assert num_obtainable(manager) == 24


def test_a_step_that_truncates_leaves_what_is_still_held():
    manager = make(FULL_AND_WINDOW)
    handle = ask(manager, "a", PROMPT[:12], chunk=12)
    manager.run(
        lambda s, rows: fj.truncate(s, rows, np.asarray([7], np.int32)), [handle], extends=True
    )
    checked(manager)
    require_contents(manager, handle, PROMPT[:7])
    assert found(manager, [*PROMPT[:12], 99]) == 12 and manager.stats().evictable_blocks == 4


def test_compression_takes_the_blocks_that_windows_hold_out_of_the_cache():
    manager = make_large(enable_prefix_caching=True, prefix_cache_config=CONFIG)
    prompt = list(range(40, 70))
    handle = manager.allocate(manager.new_request("a", prompt_token_ids=prompt[:28]))
    fill(manager, handle, 0, 28)
    manager.commit(handle)
    manager.extend(handle, 2)
    fill(manager, handle, 28, 30)
    manager.commit(handle, prompt[28:])
    other = manager.allocate(manager.new_request("b", prompt_token_ids=prompt))
    assert other.num_cached_tokens == 28
    window = [np.asarray(x) for x in handle.kv_cache(2)]
    manager.compress_cache("a", 0.5)
    manager.check()
    for have, want in zip(handle.kv_cache(2), window, strict=True):
        np.testing.assert_array_equal(have, want)
    assert found(manager, prompt) == 4 * ((28 + 1 - 6) // 4), "the window holds block 5 and 6"
    for name in "ab":
        manager.deallocate(name)
        manager.check()
    assert num_obtainable(manager) == 40


def test_compression_overwrites_cached_blocks_where_there_is_no_room_beside_them():
    manager = make_large(
        enable_prefix_caching=True, prefix_cache_config=CONFIG, max_blocks=23, initial_blocks=23
    )
    handle = manager.allocate(manager.new_request("a", prompt_token_ids=list(range(40, 68))))
    fill(manager, handle, 0, 28)
    manager.commit(handle)
    taken = manager.allocate_blocks(2)
    assert num_obtainable(manager) == 0
    manager.compress_cache("a", 0.5)
    manager.check()
    manager.free_blocks(taken)
    manager.deallocate("a")
    manager.check()
    assert num_obtainable(manager) == 23


def test_a_request_that_moves_takes_its_bytes_and_caches_them_there():
    groups = {"groups": GROUPS}
    manager = make_multi(
        2, geometry=groups, max_blocks=16, enable_prefix_caching=True, prefix_cache_config=CONFIG
    )
    parts = devices_of(manager)
    source, target = parts[CPU[0]], parts[CPU[1]]
    handle = ask(source, "a", PROMPT)
    manager.move_cache("a", CPU[1])
    for part in (source, target):
        part.check()
    assert source.stats().evictable_blocks == 8 and target.stats().cached_blocks == 5
    assert found(source, [*PROMPT[:12], 99]) == found(target, [*PROMPT[:12], 99]) == 12
    require_contents(target, handle, PROMPT)
