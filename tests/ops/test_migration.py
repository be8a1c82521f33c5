"""Moved blocks and a resized pool: every row reads as before, and the lowest block is next."""

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.ops.migration import move_blocks, plan_defragment, resize
from ferrum_jax.types import NULL_BLOCK
from tests.support.busy import assert_agrees, busy_oracle, busy_state
from tests.support.caches import same_bits, snapshot

NONE = NULL_BLOCK


def state_with_gaps():
    """`busy_state` and its oracle without row 1: blocks 0 to 2 and 7 are live."""
    oracle = busy_oracle()
    oracle.free([1])
    return fj.free(busy_state(), [1]), oracle


def assert_next_block(state, block_id):
    state, ok = fj.allocate(state, [4], [1])
    assert bool(ok) and int(state.tables.block_ids[4, 0]) == block_id


def test_move_blocks_gathers_live_blocks_with_the_planned_moves(transform):
    state, oracle = state_with_gaps()
    plan = plan_defragment(np.asarray(state.tables.ref_counts))
    assert [x.tolist() for x in plan] == [[7], [3]]
    state, ok = transform(move_blocks)(state, *plan)
    assert bool(ok) and np.flatnonzero(state.tables.ref_counts).tolist() == [0, 1, 2, 3]
    assert_agrees(state, oracle)
    assert_next_block(state, 4)


def test_move_blocks_moves_shared_blocks_for_each_row(transform):
    state, oracle = state_with_gaps()
    state, ok = transform(move_blocks)(state, np.int32([0, NONE, 1]), np.int32([11, NONE, 5]))
    assert bool(ok) and np.asarray(state.tables.block_ids)[[0, 2], :2].tolist() == [[11, 5]] * 2
    assert_agrees(state, oracle)
    assert_next_block(state, 0)


REFUSED = {
    "a source that is free": ([0, 8], [5, 6]),
    "a target that is live": ([0, 1], [5, 2]),
    "a source named twice": ([0, 0], [5, 6]),
    "a target named twice": ([0, 1], [5, 5]),
    "a source without a target": ([0, 1], [5, NONE]),
    "a target past the end": ([0, 1], [5, 12]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_move_blocks_that_is_refused_changes_no_bit(transform, case):
    state, _ = state_with_gaps()
    before = snapshot(state)
    state, ok = transform(move_blocks)(state, *(np.int32(ids) for ids in REFUSED[case]))
    assert not bool(ok) and same_bits(state, before)


@pytest.mark.parametrize("num_blocks", [8, 12, 20])
def test_resize_keeps_every_row(transform, num_blocks):
    state, oracle = state_with_gaps()
    oracle.num_blocks = [num_blocks]
    state = transform(lambda state: resize(state, num_blocks))(state)
    assert state.pool.num_blocks == state.tables.num_blocks == num_blocks
    assert_agrees(state, oracle)
    assert_next_block(state, 3)
