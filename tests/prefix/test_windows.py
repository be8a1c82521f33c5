"""Prefixes of layer groups with sliding windows: where hits end, and what is evicted first.

Random lives are in `test_state_machine`; here are the order of eviction, a cache of window groups
alone, and one readable example of each rule. A block has 4 tokens, a window 6 if not said.
"""

import pytest

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.report import Stop
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK
from tests.support.cached_prompts import CachedPrompts

LONG = list(range(100, 124))  # Six blocks.


def prompts_of(*windows, **config) -> CachedPrompts:
    return CachedPrompts(windows=windows, **config)


def blocks_of(prompts: CachedPrompts, tokens) -> list[TreeBlock]:
    """The cached blocks of tokens, usable or not."""
    return prompts.cache.forest.find(
        prompts.cache.key_of(None), TokenIds(tokens), len(tokens), prompts.now
    ).blocks


def window_ids(prompts: CachedPrompts, tokens) -> list[bool]:
    """Whether the last group has each block of a cached prefix."""
    return [block.block_ids[-1] != NULL_BLOCK for block in blocks_of(prompts, tokens)]


# Lookups.


def test_lookup_needs_of_a_window_group_only_what_the_next_token_can_see():
    prompts = prompts_of(None, 6)
    prompts.keep(LONG)
    assert window_ids(prompts, LONG) == [False] * 4 + [True] * 2, "its row had released the rest"
    match = prompts.cache.lookup(TokenIds([*LONG, 9]), None, prompts.now)
    assert match.num_tokens == 24 and match.num_released == (0, 4)
    full, windowed = match.row_blocks
    assert NULL_BLOCK not in full and windowed[:4] == [NULL_BLOCK] * 4
    assert NULL_BLOCK not in windowed[4:]


def test_lookup_of_the_same_prompt_ends_inside_its_last_block():
    prompts = prompts_of(None, 6)
    prompts.keep(LONG)
    assert prompts.found(LONG) == 23
    assert prompts.found(LONG[:-1]) == 22, "the window begins with the first token of block 4"
    assert prompts.found(LONG[:20]) == 0, "token 19 would see block 3, which was released"


def test_lookup_falls_back_to_the_boundary_before_a_missing_block_and_not_to_zero():
    prompts = prompts_of(None, 6)
    for end in (8, 16, 24):
        prompts.keep(LONG[:end])
    assert prompts.found([*LONG, 9]) == 24
    *_, last = blocks_of(prompts, LONG)
    prompts.cache.forest.strip(last)
    assert prompts.found([*LONG, 9]) == 20, "blocks 3 and 4 are there"
    told = prompts.why([*LONG, 9])
    assert (told.stop, told.group, told.num_matched_tokens) == (Stop.WINDOW, 1, 24)
    assert told.num_cached_tokens == 20
    prompts.check()


def test_acquire_holds_the_block_in_which_a_hit_ends_until_its_tail_is_copied():
    prompts = prompts_of(None, 6)
    prompts.keep(LONG)
    match = prompts.cache.lookup(TokenIds(LONG), None, prompts.now)
    lease = prompts.cache.acquire(match)
    prompts.leases.append(lease)
    assert match.num_tokens == 23 and prompts.cache.evict(PerPool([100]), prompts.now) == []
    prompts.cache.cover(lease, lease.node, len(match.blocks))
    assert len(prompts.cache.evict(PerPool([100]), prompts.now)) == 2, "one in each group"
    prompts.check()


def test_lookup_with_a_window_of_whole_blocks_needs_no_block_before_it():
    prompts = prompts_of(None, 5)
    prompts.keep(LONG)
    assert window_ids(prompts, LONG) == [False] * 5 + [True], "token 24 sees tokens from 20 on"
    assert prompts.found([*LONG, 9]) == 24


def test_commit_fills_the_gaps_of_cached_blocks():
    prompts = prompts_of(None, 6)
    prompts.keep(LONG)
    assert prompts.found([*LONG[:16], 9]) == 0
    prompts.keep(LONG[:16])
    assert window_ids(prompts, LONG) == [False, False, True, True, True, True]
    assert prompts.found([*LONG[:16], 9]) == 16
    prompts.check()


def test_a_window_group_limits_a_hit_and_a_full_group_does_not():
    prompts = prompts_of(9, None, 3)
    prompts.keep(LONG)
    told = prompts.why(LONG[:16])
    assert told.stop is Stop.WINDOW and told.group in (0, 2) and told.num_cached_tokens == 0
    assert prompts.why([*LONG, 9]).group is None


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 24, 100])
def test_a_cache_of_one_window_group_continues_its_prefixes(window):
    prompts = prompts_of(window)
    for i in range(3):
        prompts.keep([*LONG, *[i] * 4])
        assert prompts.found([*LONG, *[i] * 4, 9]) == 28
    assert len(prompts.cache.evict(PerPool([1000]), prompts.now)) == prompts.cache.num_evicted
    assert prompts.cache.num_blocks == prompts.cache.num_idle_blocks.total == 0
    prompts.check()


# Eviction.


def test_evict_prefers_window_ids_that_no_boundary_needs():
    prompts = prompts_of(None, 6)
    prompts.keep([*range(8)])
    prompts.keep(LONG[:8])
    prompts.keep(LONG)  # Its row has passed the window at token 8.
    removed = prompts.cache.evict(PerPool([2]), prompts.now)
    assert (
        len(removed) == 2 and prompts.found([*range(8), 9]) == 8 and prompts.found([*LONG, 9]) == 24
    )
    assert window_ids(prompts, LONG) == [False] * 4 + [True] * 2
    prompts.cache.evict(PerPool([1]), prompts.now)
    assert prompts.found([*range(8), 9]) == 4, "then the least recently used block, with all ids"
    prompts.check()


def test_evict_keeps_the_window_where_prompts_part():
    prompts = prompts_of(None, 6)
    system = LONG[:8]
    prompts.keep(system)
    for i in range(2):
        prompts.keep([*system, *[i] * 16])
    prompts.cache.evict(PerPool([1]), prompts.now)
    assert prompts.found([*system, 9]) == 8
    prompts.check()


def test_evict_takes_no_window_ids_that_a_row_holds_and_all_others_in_the_end():
    prompts = prompts_of(None, 6)
    lease = prompts.hold(LONG)
    assert (
        prompts.cache.num_idle_blocks.total == 0
        and prompts.cache.evict(PerPool([100]), prompts.now) == []
    )
    prompts.cache.advance(lease, (0, 5))  # Position 26 sees tokens from 21 on.
    assert prompts.cache.num_idle_blocks.total == 1
    assert len(prompts.cache.evict(PerPool([100]), prompts.now)) == 1
    prompts.check()
    prompts.end(lease)
    assert len(prompts.cache.evict(PerPool([100]), prompts.now)) == 7
    prompts.check()


def test_a_pin_holds_the_window_at_the_end_of_its_prefix():
    prompts = prompts_of(None, 6)
    prompts.keep(LONG, retention=Retention(is_pinned=True))
    prompts.keep([*LONG, *range(8)])
    prompts.cache.evict(PerPool([100]), prompts.now)
    assert prompts.found([*LONG, 9]) == 24
    prompts.keep(LONG, retention=Retention())
    assert len(prompts.cache.evict(PerPool([100]), prompts.now)) == 8
    prompts.check()
