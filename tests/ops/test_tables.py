"""Operations on rows: what each does, and refusals that `test_edges.py` seldom draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.ops import blocks as blocks_of
from ferrum_jax.ops.indexing import token_slots
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ
from tests.support.busy import busy_state
from tests.support.caches import filled, held_lens, num_free, same_bits, snapshot

NONE = NULL_SEQ
MOST, LEAST = 2**31 - 1, -(2**31)


def extend_by_any(state, seq_ids, num_tokens):
    """Extends without a bound of its own."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=MOST)


def full_state():
    """`busy_state` after row 3 took the 4 free blocks."""
    state, ok = fj.allocate(busy_state(), [3], [12])
    assert bool(ok) and num_free(state) == 0
    return state


REFUSALS = {
    "allocate: a sum beyond int32": (busy_state, fj.allocate, [3, 4], [MOST, MOST]),
    "extend: sums beyond int32": (busy_state, extend_by_any, [0, 1], [MOST - 7, MOST - 11]),
    "fork: a parent that this call makes": (busy_state, fj.fork, [0, 3], [3, 4]),
    "fork: a partial block to copy": (full_state, fj.fork, [0, NONE], [4, NONE]),
    "share: a source that is also a target": (busy_state, fj.share, [0, 1], [1, 2], [2, 2]),
    "share: a shared block to replace": (full_state, fj.share, [1, NONE], [0, NONE], [2, 0]),
    "truncate: a shared block to replace": (full_state, fj.truncate, [0, 1], [5, 3]),
}
"""Calls that must be refused. `test_edges.py` draws the other causes of refusal."""


def padded(ids):
    """Ids as an array of 1 or 4, so that few programs are compiled."""
    return np.asarray(ids + [NONE] * (4 - len(ids)) * (len(ids) > 1), np.int32)


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refused_call_changes_no_bit(transform, case):
    make, op, *args = REFUSALS[case]
    state = make()
    before = snapshot(state)
    state, ok = transform(op)(state, *map(padded, args))
    assert ok.shape == () and ok.dtype == jnp.bool_
    assert not bool(ok) and same_bits(state, before)


def test_allocate_takes_the_lowest_blocks_in_order(transform, spec):
    state, ok = transform(fj.allocate)(fj.init(spec), np.int32([3, NONE, 1]), np.int32([4, 9, 3]))
    assert bool(ok)
    want = np.full((5, 5), NULL_BLOCK)
    want[3, :2], want[1, 0] = [0, 1], 2
    np.testing.assert_array_equal(state.tables.block_ids, want)
    assert held_lens(state) == [0, 3, 0, 4, 0]
    assert num_free(state) == 9
    fj.check_state(state)


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


@pytest.mark.parametrize("max_new_tokens", [-10, -1, 0, 1, 15, 16, MOST, 2**40])
def test_extend_adds_at_most_what_was_announced(spec, max_new_tokens):
    state, ok = fj.extend(fj.init(spec), [0], [1], max_new_tokens=max_new_tokens)
    assert bool(ok) == (max_new_tokens >= 1)
    fj.check_state(state)


def test_free_releases_blocks_that_are_taken_again_in_order(transform, spec):
    state = transform(fj.free)(filled(spec, {0: 9, 1: 3}), np.int32([0, NONE]))
    assert held_lens(state) == [0, 3, 0, 0, 0] and num_free(state) == 11
    fj.check_state(state)
    state, _ = fj.allocate(state, [4], [9])
    assert np.asarray(state.tables.block_ids)[4].tolist() == [0, 1, 2, -1, -1]


def test_take_blocks_for_no_row_and_release_blocks(transform):
    take = jax.tree_util.Partial(blocks_of.take_blocks)
    state = busy_state()
    tables, ids, ok = transform(lambda tables, n: take(tables, n, 3))(state.tables, np.int32(2))
    assert bool(ok) and ids.tolist()[2] == 12
    pins = np.zeros(12, int)
    pins[np.asarray(ids)[:2]] = 1
    held = state.with_tables([tables])
    fj.check_state(held, pins)
    with pytest.raises(AssertionError, match="miscounted"):
        fj.check_state(held)
    tables = transform(blocks_of.release_blocks)(tables, ids)
    fj.check_state(state.with_tables([tables]))


@pytest.mark.parametrize("count", [-1, 4, 5, MOST, LEAST])
def test_take_blocks_is_all_or_nothing(count):
    state = busy_state()
    before = snapshot(state.tables)
    tables, ids, ok = blocks_of.take_blocks(state.tables, jnp.int32(count), 3)
    assert not bool(ok) and ids.tolist() == [12, 12, 12] and same_bits(tables, before)


def test_release_blocks_frees_a_block_named_several_times_once(transform):
    state = busy_state()
    shared = int(state.tables.block_ids[0, 0])
    free_block = int(state.tables.free_blocks[0])
    mentions = np.int32([shared, free_block, shared, 12, shared, free_block])
    tables = transform(blocks_of.release_blocks)(state.tables, mentions)
    assert int(tables.num_free) == 5 and int(tables.ref_counts[shared]) == 0
    stack = np.asarray(tables.free_blocks)[:5].tolist()
    assert sorted(set(stack)) == sorted(stack) and shared in stack


def test_token_slots_are_null_where_there_is_no_block():
    block_ids = jnp.asarray([[4, 0, NULL_BLOCK]], jnp.int32)
    positions = jnp.asarray([[0, 2, 3, 5, 6, 9, -1, -3, MOST]], jnp.int32)
    slots = token_slots(block_ids, positions, 12, 3, 3)
    assert slots.tolist() == [[12, 14, 0, 2, 36, 36, 36, 36, 36]]
