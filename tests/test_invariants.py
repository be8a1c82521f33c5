"""`check_state` finds each kind of corruption, and nothing wrong in a sound cache."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from tests.support.caches import filled, tiny_spec


@pytest.fixture
def sound():
    """Row 0 holds blocks 0 to 2 (8 tokens), row 1 holds 0, 1 and a copy, 5; row 2 holds 3, 4."""
    state, ok = fj.fork(filled(tiny_spec(), {0: 8, 2: 6}), [0], [1])
    assert bool(ok)
    fj.check_state(state)
    return state


def changed(state, field, index, value):
    """The state with one number of its tables overwritten."""
    array = np.array(getattr(state.tables, field))
    array[index] = value
    tables = dataclasses.replace(state.tables, **{field: jnp.asarray(array)})
    return state.with_tables([tables])


@pytest.mark.parametrize(
    ("field", "index", "value", "found"),
    [
        ("num_free", (), 5, "both free and live"),
        ("num_free", (), 7, "both free and live"),
        ("num_free", (), -1, "num_free is -1"),
        ("num_free", (), 13, "num_free is 13"),
        ("free_blocks", 0, 12, "id outside the pool"),
        ("free_blocks", 0, -1, "id outside the pool"),
        ("free_blocks", 0, 10, "on the stack twice"),
        ("free_blocks", 0, 3, "both free and live"),
        ("ref_counts", 0, 3, r"blocks \[0\] are miscounted"),
        ("ref_counts", 0, 1, r"blocks \[0\] are miscounted"),
        ("ref_counts", 2, -1, r"blocks \[2\] are miscounted"),
        ("ref_counts", 2, 0, "both free and live"),
        ("ref_counts", 11, 1, "both free and live"),
        ("block_ids", (0, 1), -1, "holds an invalid block"),
        ("block_ids", (0, 1), 12, "holds an invalid block"),
        ("block_ids", (0, 1), 4, "miscounted"),
        ("block_ids", (0, 1), 0, "row 0 holds a block twice"),
        ("block_ids", (0, 4), 2, "outside num_blocks_held"),
        ("block_ids", (4, 0), 0, "outside num_blocks_held"),
        ("num_blocks_held", 0, 2, "outside num_blocks_held"),
        ("num_blocks_held", 0, 4, "holds an invalid block"),
        ("num_blocks_held", 0, 6, "out of range"),
        ("num_blocks_held", 4, -1, "out of range"),
        ("held_lens", 0, 10, "more tokens than room"),
        ("held_lens", 0, -1, "negative"),
        ("held_lens", 0, 0, "blocks but no token"),
        ("held_lens", 4, 1, "more tokens than room"),
    ],
)
def test_check_state_finds_one_wrong_number(sound, field, index, value, found):
    with pytest.raises(AssertionError, match=found):
        fj.check_state(changed(sound, field, index, value))


def test_check_state_finds_a_partly_filled_block_of_two_rows(sound):
    state = changed(sound, "held_lens", 0, 5)
    state = changed(state, "num_blocks_held", 0, 2)
    state = changed(state, "block_ids", (0, 2), -1)
    state = changed(state, "ref_counts", 2, 0)
    state = changed(state, "free_blocks", 6, 2)
    state = changed(state, "num_free", (), 7)
    with pytest.raises(AssertionError, match=r"rows \[0\] would append to a shared block"):
        fj.check_state(state)


def test_check_state_finds_a_shared_block_that_a_row_will_append_to(sound):
    with pytest.raises(AssertionError, match=r"rows \[0\] would append to a shared block"):
        fj.check_state(changed(sound, "held_lens", 0, 3))


def test_check_state_allows_room_beyond_the_length(sound):
    fj.check_state(changed(sound, "held_lens", 2, 2))


def test_pins_account_for_references_without_a_row(sound):
    pins = np.zeros(12, int)
    pins[3] = 2
    with pytest.raises(AssertionError, match=r"blocks \[3\] are miscounted"):
        fj.check_state(sound, pins)
    fj.check_state(changed(sound, "ref_counts", 3, 3), pins)


@pytest.mark.parametrize(("size", "name"), [(11, "num_blocks"), (12, "block_size")])
def test_check_state_finds_tables_of_another_pool(sound, size, name):
    other = fj.init(tiny_spec(num_blocks=size, block_size=3 if size == 11 else 4))
    with pytest.raises(AssertionError, match=name):
        fj.check_state(sound.with_pools(other.pools))


def test_check_state_says_what_to_do(sound):
    with pytest.raises(AssertionError, match="corrupt.*Please report"):
        fj.check_state(changed(sound, "held_lens", 0, -1))
