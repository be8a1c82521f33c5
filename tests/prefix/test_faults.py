"""Faults that shared blocks make possible, each in the situation that shows it.

Tokens that were not computed are never found; a block that is released on several paths is freed
once; freed blocks are blank.
"""

import functools

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from tests.support.internals import pool_of, row_blocks
from tests.support.managers import (
    MAX_TOKENS,
    cached_prefixes,
    make_manager,
    refused,
    start,
    tokens_of,
    whole,
    write_tokens,
)
from tests.support.pools import keys
from tests.support.prefix_managers import CONFIG, PROMPT, ask, compute, found, keep, make


def cut(manager, handle, length):
    """Truncates a request in a step."""
    ok = manager.run(
        lambda state, rows: fj.truncate(state, rows, np.int32([length])), [handle], extends=True
    )
    assert bool(ok)


def is_blank(manager, block_ids) -> bool:
    k = np.asarray(manager.run(lambda state, _: (state, keys(state.pool)), []))
    return not k[block_ids].any()


# Tokens that were not computed.


def test_swap_in_does_not_cache_a_prompt_that_was_not_computed():
    manager = make()
    ask(manager, "a")
    manager.swap_out("a")
    manager.swap_in("a")
    assert not cached_prefixes(manager) and found(manager) == 0


def test_share_prefix_does_not_cache_a_prompt_that_was_not_computed():
    manager = make()
    keep(manager, "a", PROMPT[:3])
    ask(manager, "b", [*PROMPT[:3], 1, 2, 3, 4])
    manager.share_prefix("a", "b", 3)
    assert list(cached_prefixes(manager)) == [(None, tuple(PROMPT[:3]))]
    assert found(manager, [*PROMPT[:3], 1, 2, 3, 4]) == 3


def test_share_prefix_from_a_prompt_that_was_not_computed_does_not_count_as_computed():
    manager = make()
    ask(manager, "a")
    ask(manager, "b", [*PROMPT[:3], 1, 1, 1])
    manager.share_prefix("a", "b", 3)
    for name in "ab":
        manager.swap_out(name)
        manager.swap_in(name)
    assert not cached_prefixes(manager)


def test_swap_in_caches_committed_tokens_only():
    manager = make()
    handle = start(manager, "a", 9)
    write_tokens(manager, handle, [*PROMPT, 18, 19])
    manager.commit(handle, PROMPT[:3])
    manager.swap_out("a")
    assert len(manager.allocate_blocks(12)) == 12, "what was cached goes"
    manager.free_blocks(sorted(pool_of(manager).counts.taken))
    manager.swap_in("a")
    assert list(cached_prefixes(manager)) == [(None, tuple(PROMPT[:3]))]
    assert tokens_of(handle) == [*PROMPT, 18, 19]


def test_commit_before_caching_is_enabled_does_not_cover_tokens_written_later():
    manager = make_manager()
    handle = start(manager, "a", 6)
    write_tokens(manager, handle, PROMPT[:2])
    assert manager.commit(handle, PROMPT[:6]) == 0
    manager.enable_prefix_caching(CONFIG)
    assert manager.commit(handle) == 0, "two tokens are written, and a block has three"
    write_tokens(manager, handle, PROMPT[2:6], begin=2)
    assert manager.commit(handle) == 6 and found(manager) == 6


def test_commit_does_not_cover_tokens_cut_off_by_a_step_and_extended_again():
    manager = make()
    handle = compute(manager, "a")
    cut(manager, handle, 4)
    manager.extend(handle, 2)
    assert tokens_of(handle) == [*PROMPT[:4], 0, 0]
    manager.run(lambda state, _: (state, None), [handle])  # A step that writes nothing of it.
    assert manager.commit(handle, [1, 2]) == 3, "two of the tokens that it holds were never written"


# Tokens that must not be found again.


@pytest.mark.parametrize(
    ("how", "num_tokens"),
    [
        ("share_prefix", 7),
        ("share_prefix", 2),
        ("fork in a step", 7),
        ("fork in a step", 2),
        ("share in a step", 7),
    ],
)
def test_reset_prefixes_excludes_requests_that_share_with_an_earlier_one(how, num_tokens):
    manager = make()
    old = compute(manager, "a", PROMPT[:num_tokens])
    manager.reset_prefixes()
    new = start(manager, "b", 0 if how == "fork in a step" else num_tokens)
    if how == "share_prefix":
        manager.share_prefix("a", "b", num_tokens)
    elif how == "fork in a step":
        manager.run(lambda s, rows: fj.fork(s, rows[:1], rows[1:]), [old, new], extends=True)
    else:
        share = functools.partial(fj.share, num_tokens=num_tokens)
        manager.run(lambda s, rows: share(s, rows[:1], rows[1:]), [old, new], extends=True)
    manager.deallocate("a")
    manager.extend(new, 2)
    write_tokens(manager, new, [20, 21], begin=num_tokens)
    assert manager.commit(new, [*PROMPT[:num_tokens], 20, 21]) == 0
    assert not cached_prefixes(manager)


def test_a_forks_tokens_stay_known_after_its_cached_blocks_are_evicted():
    manager = make()
    parent, child = keep(manager, "a", PROMPT[:6]), start(manager, "b")
    manager.run(lambda s, rows: fj.fork(s, rows[:1], rows[1:]), [parent, child], extends=True)
    manager.deallocate("a")
    manager.swap_out("b")
    assert len(manager.allocate_blocks(12)) == 12, "what was cached goes"
    manager.free_blocks(sorted(pool_of(manager).counts.taken))
    manager.swap_in("b")
    assert refused(manager.commit, child, [1, 2, 3]) is errors.PrefixMismatchError
    assert manager.commit(child, PROMPT[:6]) == 6 and tokens_of(child) == PROMPT[:6]


# References.


def test_share_prefix_holds_cached_blocks_as_cached():
    """Else they would count as blocks that can go, and would not come free."""
    manager = make(num_blocks=5)
    source, target = ask(manager, "a", PROMPT[:6]), start(manager, "b", 6)
    write_tokens(manager, source, PROMPT[:6])
    manager.commit(source)
    manager.share_prefix("a", "b", 6)
    manager.deallocate("a")
    assert manager.stats().evictable_blocks == 0
    assert not manager.can_allocate(manager.new_request("c", 15))
    assert refused(start, manager, "c", 15) is errors.OutOfBlocksError
    assert found(manager, [*PROMPT[:6], 0]) == 6 and tokens_of(target) == PROMPT[:6]
    manager.deallocate("b")
    assert manager.stats().evictable_blocks == 2
    manager.check()


def test_commit_caches_blocks_once_they_have_one_holder():
    manager = make()
    source, target = start(manager, "a", 6), start(manager, "b", 6)
    write_tokens(manager, source, PROMPT[:6])
    manager.share_prefix("a", "b", 6)
    assert manager.commit(source, PROMPT[:6]) == manager.commit(target, PROMPT[:6]) == 0
    manager.deallocate("a")
    assert manager.commit(target) == 6
    assert found(manager) == 6
    manager.check()


def test_commit_refuses_other_tokens_for_shared_blocks():
    manager = make()
    source, target = start(manager, "a", 6), start(manager, "b", 6)
    write_tokens(manager, source, [1, 2, 3])
    manager.share_prefix("a", "b", 3)
    assert manager.commit(source, [1, 2, 3]) == 0
    assert refused(manager.commit, target, [4, 5, 6]) is errors.PrefixMismatchError
    manager.check()
    manager.deallocate("b")
    assert manager.commit(source) == 3
    start(manager, "c", 3)
    manager.share_prefix("a", "c", 3)
    before = whole(manager)
    other = manager.get_handle("c")
    assert refused(manager.commit, other, [4, 5, 6]) is errors.PrefixMismatchError
    assert refused(manager.commit, other, [1, 4]) is errors.PrefixMismatchError
    assert whole(manager) == before
    assert manager.commit(other, [1, 2, 3]) == 3


def test_share_prefix_keeps_cached_blocks_of_the_target():
    manager = make()
    source = start(manager, "a", 9)
    write_tokens(manager, source, [*PROMPT, 18, 19])
    target = keep(manager, "b", PROMPT[:6], initial_tokens=9)
    cached = target.block_table().physical_blocks[:2]
    manager.share_prefix("a", "b", 7)
    assert tokens_of(target) == [*PROMPT, 0, 0]
    assert target.block_table().physical_blocks[:2] == cached
    assert manager.stats().evictable_blocks == 0
    manager.check()


def test_a_block_released_on_every_path_is_freed_once():
    manager = make()
    handles = [keep(manager, name) for name in "abc"]
    manager.share_prefix("a", "b", 7)
    cut(manager, handles[1], 4)
    manager.swap_out("c")
    manager.deallocate("a")
    manager.check()
    for name in "bc":
        manager.deallocate(name)
    assert manager.stats().cached_blocks == manager.stats().evictable_blocks == 2
    assert len(set(manager.allocate_blocks(12))) == 12, "every block, once"
    manager.check()


# Blank blocks.


def test_truncate_in_a_step_blanks_the_blocks_that_it_frees():
    manager = make()
    handle = compute(manager, "a")
    last = handle.block_table().physical_blocks[1:]
    cut(manager, handle, 3)
    assert is_blank(manager, list(last))
    assert tokens_of(start(manager, "b", MAX_TOKENS)) == [0] * MAX_TOKENS


def test_share_prefix_blanks_the_blocks_that_it_replaces():
    manager = make()
    source, target = compute(manager, "a"), compute(manager, "b")
    replaced = target.block_table().physical_blocks[:2]
    manager.share_prefix("a", "b", 6)
    assert target.block_table().physical_blocks[:2] == source.block_table().physical_blocks[:2]
    assert is_blank(manager, list(replaced))


def test_defragment_blanks_the_old_places_of_blocks():
    manager = make()
    ids = manager.allocate_blocks(3)
    handle = compute(manager, "a")
    was = handle.block_table().physical_blocks
    manager.free_blocks(ids)
    manager.defragment()
    moved = set(was) - set(handle.block_table().physical_blocks)
    assert moved and is_blank(manager, sorted(moved)) and tokens_of(handle) == PROMPT


def test_allocate_copies_only_matching_tokens_of_a_block():
    manager = make()
    keep(manager, "a", [1, 2, 3, 4, 5, 6])
    handle = ask(manager, "b", [1, 2, 3, 4, 9, 9])
    assert handle.num_cached_tokens == 4 and tokens_of(handle) == [1, 2, 3, 4, 0, 0]
    k = np.asarray(manager.run(lambda state, _: (state, keys(state.pool)), []))
    assert not k[row_blocks(manager)["b"][1]][:, :, 1:].any(), "the rest of the block is blank"
