"""Who holds which block: what each operation does, and each cause for which it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.ops import blocks as blocks_of
from ferrum_jax.ops.indexing import token_slots
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ
from tests.support.caches import (
    contents,
    filled,
    num_compilations,
    num_free,
    same_bits,
    seq_lens,
    snapshot,
    tiny_spec,
)

NONE = NULL_SEQ
MOST, LEAST = 2**31 - 1, -(2**31)


def extend_by_any(state, seq_ids, num_tokens):
    """Extends without a bound of its own."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=MOST)


def extend_by_four(state, seq_ids, num_tokens):
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=4)


def busy_state():
    """Rows 0 and 2 share two full blocks of 8 tokens, row 1 holds 12 tokens; 4 blocks are free."""
    state, ok = fj.fork(filled(tiny_spec(), {0: 8, 1: 12}), [0], [2])
    assert bool(ok) and num_free(state) == 4
    return state


def full_state():
    """`busy_state` after row 3 took the 4 free blocks."""
    state, ok = fj.allocate(busy_state(), [3], [12])
    assert bool(ok) and num_free(state) == 0
    return state


REFUSALS = {
    "allocate: too few blocks": (fj.allocate, [3, 4], [9, 6]),
    "allocate: more than a row holds": (fj.allocate, [3, 4], [1, 16]),
    "allocate: a sum beyond int32": (fj.allocate, [3, 4], [MOST, MOST]),
    "allocate: a negative length": (fj.allocate, [3, 4], [1, -1]),
    "allocate: a row in use": (fj.allocate, [3, 0], [1, 1]),
    "allocate: a row in use, no tokens": (fj.allocate, [3, 0], [1, 0]),
    "allocate: a row named twice": (fj.allocate, [3, 3], [1, 1]),
    "allocate: a row named twice, no tokens": (fj.allocate, [3, 3], [1, 0]),
    "allocate: a row past the end": (fj.allocate, [3, 5], [1, 1]),
    "allocate: a row past the end, no tokens": (fj.allocate, [3, 5], [1, 0]),
    "allocate: a negative row": (fj.allocate, [3, -2], [1, 1]),
    "extend: too few blocks": (extend_by_any, [0, 3], [2, 13]),
    "extend: more than a row holds": (extend_by_any, [0, 1], [1, 4]),
    "extend: sums beyond int32": (extend_by_any, [0, 1], [MOST - 7, MOST - 11]),
    "extend: more than announced": (extend_by_four, [0, 3], [1, 5]),
    "extend: a negative count": (extend_by_any, [0, 1], [1, -1]),
    "extend: a row named twice": (extend_by_any, [0, 0], [1, 1]),
    "extend: a row past the end": (extend_by_any, [0, 5], [1, 1]),
    "extend: a negative row": (extend_by_any, [0, -2], [1, 1]),
    "fork: an empty parent": (fj.fork, [0, 4], [3, 4]),
    "fork: a parent past the end": (fj.fork, [0, 5], [3, 4]),
    "fork: no parent": (fj.fork, [0, NONE], [3, 4]),
    "fork: a parent that this call makes": (fj.fork, [0, 3], [3, 4]),
    "fork: a child in use": (fj.fork, [0, 0], [3, 1]),
    "fork: a row onto itself": (fj.fork, [0, 1], [3, 1]),
    "fork: a child named twice": (fj.fork, [0, 1], [3, 3]),
    "fork: a child past the end": (fj.fork, [0, 0], [3, 5]),
    "fork: a negative child": (fj.fork, [0, 0], [3, -2]),
    "share: a source past the end": (fj.share, [0, 5], [1, 2], [2, 0]),
    "share: no source": (fj.share, [0, NONE], [1, 2], [2, 0]),
    "share: a row with itself": (fj.share, [0, 2], [1, 2], [2, 2]),
    "share: a source that is also a target": (fj.share, [0, 1], [1, 2], [2, 2]),
    "share: a target named twice": (fj.share, [0, 0], [1, 1], [2, 2]),
    "share: a target past the end": (fj.share, [0, 0], [1, 5], [2, 0]),
    "share: a negative target": (fj.share, [0, 0], [1, -2], [2, 0]),
    "share: more than the source holds": (fj.share, [0, 0], [2, 1], [2, 9]),
    "share: more than the target holds": (fj.share, [1, 1], [0, 2], [2, 9]),
    "share: a negative length": (fj.share, [0, 0], [1, 2], [2, -1]),
    "truncate: longer than the row": (fj.truncate, [0, 1], [2, 13]),
    "truncate: a negative length": (fj.truncate, [0, 1], [2, -1]),
    "truncate: a row named twice": (fj.truncate, [1, 1], [2, 2]),
    "truncate: a row past the end": (fj.truncate, [0, 5], [2, 0]),
    "truncate: a negative row": (fj.truncate, [0, -2], [2, 0]),
}
"""Calls on `busy_state` that must be refused, though their first row alone would do."""

REFUSALS_WHEN_FULL = {
    "allocate: one token": (fj.allocate, [NONE, 4], [0, 1]),
    "extend: one block more": (extend_by_any, [0, 1], [1, 1]),
    "fork: a partial block to copy": (fj.fork, [1, 0], [4, 4]),
    "fork: one copy of two": (fj.fork, [0, NONE], [4, NONE]),
    "share: a shared block to replace": (fj.share, [1, NONE], [0, NONE], [2, 0]),
    "truncate: a shared block to replace": (fj.truncate, [0, 1], [5, 3]),
}
"""Calls on `full_state` that must be refused, since they need a block."""


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_call_changes_no_bit(transform, case):
    op, *args = REFUSALS[case]
    assert_refused(transform(op), busy_state(), args)


@pytest.mark.parametrize("case", REFUSALS_WHEN_FULL)
def test_a_call_that_finds_no_block_changes_no_bit(transform, case):
    op, *args = REFUSALS_WHEN_FULL[case]
    assert_refused(transform(op), full_state(), args)


def assert_refused(op, state, args):
    before = snapshot(state)
    state, ok = op(state, *(np.asarray(arg, np.int32) for arg in args))
    assert ok.shape == () and ok.dtype == jnp.bool_
    assert not bool(ok)
    assert same_bits(state, before)


def test_allocate_takes_the_lowest_blocks_in_order(transform, spec):
    state, ok = transform(fj.allocate)(fj.init(spec), np.int32([3, NONE, 1]), np.int32([4, 9, 3]))
    assert bool(ok)
    want = np.full((5, 5), NULL_BLOCK)
    want[3, :2], want[1, 0] = [0, 1], 2
    np.testing.assert_array_equal(state.tables.block_ids, want)
    assert seq_lens(state) == [0, 3, 0, 4, 0]
    assert num_free(state) == 9
    fj.check_state(state)


def test_allocate_can_take_every_block_and_every_column(transform, spec):
    state, ok = transform(fj.allocate)(fj.init(spec), np.int32([0, 1, 2]), np.int32([15, 15, 6]))
    assert bool(ok) and num_free(state) == 0
    assert sorted(np.asarray(state.tables.block_ids).ravel())[-12:] == list(range(12))
    fj.check_state(state)


def test_allocate_of_no_tokens_leaves_the_row_free(transform, spec):
    before = fj.init(spec)
    state, ok = transform(fj.allocate)(before, np.int32([0, 1]), np.int32([0, 0]))
    assert bool(ok) and same_bits(state, snapshot(before))


def test_padding_and_empty_batches_do_nothing():
    state = busy_state()
    before = snapshot(state)
    for rows in ([], [NONE, NONE]):
        counts = [-7] * len(rows)  # What stands beside padding has no meaning.
        for op in (fj.allocate, extend_by_any, fj.fork, fj.truncate):
            args = (counts, rows) if op is fj.fork else (rows, counts)
            state, ok = op(state, *args)
            assert bool(ok) and same_bits(state, before), op
        state, ok = fj.share(state, counts, rows, counts)
        assert bool(ok) and same_bits(state, before)
        assert same_bits(fj.free(state, rows), before)


def test_one_count_serves_every_row(spec):
    state, ok = fj.allocate(fj.init(spec), [0, 1], 4)
    state, ok_too = fj.extend(state, [0, 1], 2, max_new_tokens=2)
    assert bool(ok & ok_too) and seq_lens(state) == [6, 6, 0, 0, 0]


def test_extend_uses_the_room_of_the_last_block_first(transform, spec):
    state = filled(spec, {0: 4, 1: 3})
    extend = transform(extend_by_four)
    state, ok = extend(state, np.int32([0, 1]), np.int32([2, 0]))
    assert bool(ok) and num_free(state) == 9
    state, ok = extend(state, np.int32([0, 1]), np.int32([1, 4]))
    assert bool(ok) and num_free(state) == 6
    assert seq_lens(state) == [7, 7, 0, 0, 0]
    assert np.asarray(state.tables.block_ids)[:2].tolist() == [[0, 1, 3, -1, -1], [2, 4, 5, -1, -1]]
    fj.check_state(state)


def test_extend_fills_a_row_to_its_last_slot_and_no_further(spec):
    state = filled(spec, {0: 14})
    state, ok = extend_by_any(state, [0], [1])
    assert bool(ok) and seq_lens(state)[0] == 15
    state, ok = extend_by_any(state, [0], [1])
    assert not bool(ok) and seq_lens(state)[0] == 15


def test_extend_starts_a_free_row(spec):
    state, ok = extend_by_four(fj.init(spec), [2], [4])
    assert bool(ok) and seq_lens(state) == [0, 0, 4, 0, 0]
    fj.check_state(state)


@pytest.mark.parametrize("max_new_tokens", [-10, -1, 0, 1, 15, 16, MOST, 2**40])
def test_extend_adds_at_most_what_was_announced(spec, max_new_tokens):
    state, ok = fj.extend(fj.init(spec), [0], [1], max_new_tokens=max_new_tokens)
    assert bool(ok) == (max_new_tokens >= 1)
    fj.check_state(state)


def test_free_gives_blocks_back_to_be_taken_again_in_order(transform, spec):
    state = transform(fj.free)(filled(spec, {0: 9, 1: 3}), np.int32([0, NONE]))
    assert seq_lens(state) == [0, 3, 0, 0, 0] and num_free(state) == 11
    fj.check_state(state)
    state, _ = fj.allocate(state, [4], [9])
    assert np.asarray(state.tables.block_ids)[4].tolist() == [0, 1, 2, -1, -1]


@pytest.mark.parametrize("rows", [[0, 0, 0], [0, 4, NONE], [5, 0, MOST], [-2, LEAST, 0]], ids=str)
def test_free_ignores_rows_that_are_free_repeated_or_out_of_range(transform, rows):
    state = transform(fj.free)(busy_state(), np.int32(rows))
    fj.check_state(state)
    assert seq_lens(state) == [0, 12, 8, 0, 0] and num_free(state) == 5


def test_freeing_twice_changes_nothing():
    state = fj.free(busy_state(), [0, 1])
    before = snapshot(state)
    assert same_bits(fj.free(state, [0, 1]), before)


def test_a_shared_block_is_free_only_when_its_last_holder_lets_go(transform):
    free = transform(fj.free)
    state = free(busy_state(), np.int32([0, NONE]))
    assert num_free(state) == 5 and contents(state, 2) == list(range(100, 108))
    state = free(state, np.int32([2, 1]))
    assert num_free(state) == 12
    fj.check_state(state)


def test_all_holders_may_let_go_in_one_call(transform):
    state = transform(fj.free)(busy_state(), np.int32([2, 0, 1]))
    fj.check_state(state)
    assert num_free(state) == 12 and not np.asarray(state.tables.ref_counts).any()


def test_fork_shares_full_blocks_and_takes_one_for_the_tail(transform, spec):
    state, ok = transform(fj.fork)(filled(spec, {0: 8, 1: 6}), np.int32([0, 1]), np.int32([4, 2]))
    ids = np.asarray(state.tables.block_ids)
    assert bool(ok) and num_free(state) == 6
    assert ids[4].tolist() == [0, 1, 5, -1, -1]
    assert ids[2].tolist() == ids[1].tolist() == [3, 4, -1, -1, -1]
    assert seq_lens(state) == [8, 6, 6, 0, 8]
    fj.check_state(state)


def test_one_parent_may_have_several_children(transform, spec):
    state, ok = transform(fj.fork)(filled(spec, {1: 4}), np.int32([1, 1, 1]), np.int32([0, 4, 2]))
    assert bool(ok) and num_free(state) == 12 - 1 - 4
    assert int(state.tables.ref_counts[0]) == 4
    fj.check_state(state)
    assert [contents(state, row) for row in (0, 2, 4)] == [[200, 201, 202, 203]] * 3


def test_fork_of_full_blocks_needs_no_free_block(spec):
    state = filled(spec, {0: 15, 1: 15, 2: 6})
    state, ok = fj.fork(state, [0, 2], [3, 4])
    assert bool(ok) and num_free(state) == 0
    fj.check_state(state)


def test_share_gives_the_replaced_blocks_back(transform, spec):
    state = filled(spec, {0: 9, 1: 9})
    state, ok = transform(fj.share)(state, np.int32([0]), np.int32([1]), np.int32([6]))
    assert bool(ok) and num_free(state) == 8 and seq_lens(state)[:2] == [9, 9]
    assert np.asarray(state.tables.block_ids)[1].tolist() == [0, 1, 5, -1, -1]
    fj.check_state(state)


def test_share_of_blocks_that_are_shared_already_changes_no_reference(transform):
    state = busy_state()
    before = snapshot(state.tables)
    state, ok = transform(fj.share)(state, np.int32([0]), np.int32([2]), np.int32([6]))
    assert bool(ok)
    fj.check_state(state)
    assert same_bits(state.tables, before)


def test_share_of_nothing_changes_nothing(transform):
    state = busy_state()
    before = snapshot(state)
    state, ok = transform(fj.share)(state, np.int32([0, 3]), np.int32([1, 4]), np.int32([0, 0]))
    assert bool(ok) and same_bits(state, before)


def test_one_source_may_serve_several_targets(transform, spec):
    state = filled(spec, {0: 6, 1: 7, 2: 8})
    state, ok = transform(fj.share)(state, np.int32([0, 0]), np.int32([1, 2]), np.int32([6, 4]))
    assert bool(ok) and int(state.tables.ref_counts[0]) == 3
    fj.check_state(state)
    assert contents(state, 1) == [*range(100, 106), 206]
    assert contents(state, 2) == [*range(100, 104), *range(304, 308)]


def test_truncate_keeps_only_the_blocks_that_it_needs(transform, spec):
    state = filled(spec, {0: 15, 1: 7, 2: 3})
    state, ok = transform(fj.truncate)(state, np.int32([0, 1, 2]), np.int32([6, 7, 0]))
    assert bool(ok) and seq_lens(state) == [6, 7, 0, 0, 0] and num_free(state) == 7
    assert np.asarray(state.tables.block_ids)[0].tolist() == [0, 1, -1, -1, -1]
    fj.check_state(state)


def test_truncate_into_a_shared_block_replaces_it(transform):
    state, ok = transform(fj.truncate)(busy_state(), np.int32([0, 2]), np.int32([5, 4]))
    ids = np.asarray(state.tables.block_ids)
    assert bool(ok) and ids[0, 0] == ids[2, 0] and ids[0, 1] != ids[2, 1]
    fj.check_state(state)
    assert contents(state, 0) == contents(state, 2) + [104] == list(range(100, 105))


def test_truncate_to_a_full_shared_block_needs_no_free_block():
    state, ok = fj.truncate(full_state(), [0, 2], [3, 6])
    assert bool(ok)
    fj.check_state(state)


def test_blocks_can_be_held_by_no_row(transform):
    take = jax.tree_util.Partial(blocks_of.take_blocks)
    state = busy_state()
    tables, ids, ok = transform(lambda tables, n: take(tables, n, 3))(state.tables, np.int32(2))
    assert bool(ok) and ids.tolist()[2] == 12
    pins = np.zeros(12, int)
    pins[np.asarray(ids)[:2]] = 1
    held = fj.CacheState(pool=state.pool, tables=tables)
    fj.check_state(held, pins)
    with pytest.raises(AssertionError, match="miscounted"):
        fj.check_state(held)
    tables = transform(blocks_of.release_blocks)(tables, ids)
    fj.check_state(fj.CacheState(pool=state.pool, tables=tables))


@pytest.mark.parametrize("count", [-1, 4, 5, MOST, LEAST])
def test_blocks_for_no_row_are_refused_all_or_none(count):
    state = busy_state()
    before = snapshot(state.tables)
    tables, ids, ok = blocks_of.take_blocks(state.tables, jnp.int32(count), 3)
    assert not bool(ok) and ids.tolist() == [12, 12, 12] and same_bits(tables, before)


def test_releasing_a_block_too_often_frees_it_once(transform):
    state = busy_state()
    shared = int(state.tables.block_ids[0, 0])
    free_block = int(state.tables.free_blocks[0])
    mentions = np.int32([shared, free_block, shared, 12, shared, free_block])
    tables = transform(blocks_of.release_blocks)(state.tables, mentions)
    assert int(tables.num_free) == 5 and int(tables.ref_counts[shared]) == 0
    stack = np.asarray(tables.free_blocks)[:5].tolist()
    assert sorted(set(stack)) == sorted(stack) and shared in stack


def test_other_ids_lengths_and_contents_do_not_recompile():
    def program(state, rows, counts):
        state, _ = fj.allocate(state, rows, counts)
        state, _ = fj.extend(state, rows, counts, max_new_tokens=4)
        state, _ = fj.fork(state, rows, np.roll(rows, 1))
        state, _ = fj.share(state, rows, np.roll(rows, 1), counts)
        state, _ = fj.truncate(state, rows, counts)
        fj.gather(state, counts[0], rows[0])
        return fj.free(state, rows[:1])

    state = program(fj.init(tiny_spec()), np.int32([0, NONE, NONE]), np.int32([1, 0, 0]))
    before = num_compilations()
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rows = rng.integers(-2, 7, 3).astype(np.int32)
        state = program(state, rows, rng.integers(-1, 9, 3).astype(np.int32))
    assert num_compilations() == before


def test_token_slots_are_null_where_there_is_no_block():
    block_ids = jnp.asarray([[4, 0, NULL_BLOCK]], jnp.int32)
    positions = jnp.asarray([[0, 2, 3, 5, 6, 9, -1, -3, MOST]], jnp.int32)
    slots = token_slots(block_ids, positions, 12, 3)
    assert slots.tolist() == [[12, 14, 0, 2, 36, 36, 36, 36, 36]]
