"""Adopting and retaining shared blocks keeps every invariant of the tables."""

import numpy as np

import ferrum_jax as fj
from ferrum_jax.ops.blocks import release_blocks, retain_blocks
from ferrum_jax.ops.replacing import adopt_blocks, start_with_blocks
from tests.support.caches import same_bits, snapshot, tiny_spec

SPEC = tiny_spec(
    num_layers=1, head_dim=1, num_blocks=8, block_size=2, max_seqs=3, max_blocks_per_seq=4
)


def i32(*numbers):
    return np.asarray(numbers, np.int32)


def filled(*lengths):
    """Rows of these lengths, from row 0 on."""
    rows = np.arange(len(lengths), dtype=np.int32)
    state, ok = fj.allocate(fj.init(SPEC), rows, np.asarray(lengths, np.int32))
    assert ok
    return state


def pins(*block_ids):
    return np.bincount(block_ids, minlength=SPEC.num_blocks)


def checked(state, tables, pinned=()):
    state = state.with_tables([tables])
    fj.check_state(state, pins(*pinned))
    return state


def test_a_retained_block_outlives_its_row(transform):
    state = filled(4)
    tables = transform(retain_blocks)(state.tables, i32(1, 8))
    state = fj.free(checked(state, tables, [1]), [0])
    fj.check_state(state, pins(1))
    assert int(state.tables.num_free) == 7
    tables = transform(release_blocks)(state.tables, i32(1))
    assert int(checked(state, tables).tables.num_free) == 8


def test_a_free_row_begins_with_live_blocks_and_their_tokens(transform):
    state, cached = filled(4), i32(0, 1, 8, 8)[None]
    tables = transform(start_with_blocks)(state.tables, i32(1), cached, i32(2)[0], None)
    state = checked(state, tables)
    assert state.tables.block_ids[1].tolist() == [0, 1, -1, -1]
    assert (int(state.tables.held_lens[1]), int(state.tables.num_free)) == (4, 6)


def test_a_row_that_adopts_blocks_releases_its_own_copies(transform):
    state = filled(6, 5)
    tables, replaced = transform(adopt_blocks)(state.tables, i32(1), i32(1)[0], i32(1)[None])
    state = checked(state, tables)
    assert state.tables.block_ids[1].tolist() == [3, 1, 5, -1]
    assert int(state.tables.held_lens[1]) == 5, "its own tokens stay as many"
    assert (int(replaced[0]), int(state.tables.num_free)) == (4, 3)


def test_adopting_nothing_or_blocks_that_are_held_already_changes_nothing(transform):
    for length, adopted in ((4, i32(0, 1)), (3, i32(8))):
        state = filled(length)
        args = i32(0), i32(0)[0], adopted[None]
        tables, replaced = transform(adopt_blocks)(state.tables, *args)
        assert same_bits(tables, snapshot(state.tables))
    assert (np.asarray(replaced) == 8).all()
