"""A sliding window releases the blocks that it has passed; what it still needs stays exact.

The windows see 4 tokens in blocks of 3, beside layers that keep all tokens. A row of 14 tokens
has 5 blocks; the query at position 14 sees the tokens from position 11 on, in blocks 3 and 4.
"""

import numpy as np
import pytest

import ferrum_jax as fj
from tests.support.caches import contents, filled, put, same_bits, snapshot, tiny_spec
from tests.support.layer_groups import (
    LARGE,
    SMALL,
    blocks_of,
    group_contents,
    num_free,
    one_pool_spec,
    places_of,
    two_pools_spec,
)

SPEC = one_pool_spec()


def extend(state, *num_tokens, max_new_tokens=7):
    """Extends rows 0, 1, ... by these numbers of tokens."""
    rows = list(range(len(num_tokens)))
    return fj.extend(state, rows, list(num_tokens), max_new_tokens=max_new_tokens)


def extended(state, *num_tokens):
    state, ok = extend(state, *num_tokens)
    assert bool(ok)
    fj.check_state(state)
    return state


def assert_refused(op, state, *args, **options):
    """The call is refused and changes no bit; returns the state."""
    before = snapshot(state)
    state, ok = op(state, *args, **options)
    assert not bool(ok) and same_bits(state, before)
    return state


def window_spec(window, **changes):
    """A single group with a window."""
    return tiny_spec(groups=(fj.LayerGroup("local", (0, 1), SMALL, window),), **changes)


def numbers_of_blocks(state, row, spec=SPEC):
    return {name: len(blocks) for name, blocks in blocks_of(spec, state, row).items()}


def test_a_long_prompt_releases_everything_that_is_passed_with_the_next_token(transform):
    state = filled(SPEC, {0: 14})
    assert numbers_of_blocks(state, 0) == {"local": 5, "full": 5} and num_free(state) == [10]
    one_more = transform(lambda state: extend(state, 1))
    state, ok = one_more(state)
    assert bool(ok)
    fj.check_state(state)
    assert numbers_of_blocks(state, 0) == {"local": 2, "full": 5} and num_free(state) == [13]
    state = put(state, {(0, 14): 114})
    tokens = [*range(100, 115)]
    assert group_contents(SPEC, state, 0) == {"local": [0] * 9 + tokens[9:], "full": tokens}


def test_a_long_row_is_released_at_once_whatever_is_announced():
    """Many more blocks are passed than `max_new_tokens` needs."""
    spec = window_spec(4, num_blocks=40, max_blocks_per_seq=40)
    state, ok = extend(filled(spec, {0: 110}), 1, max_new_tokens=1)
    assert bool(ok) and num_free(state) == [38]
    fj.check_state(state)
    assert contents(state, 0)[105:110] == [*range(205, 210)] and not any(contents(state, 0)[:105])


def test_an_extend_by_nothing_releases_nothing():
    state = filled(SPEC, {0: 14, 1: 2})
    before = snapshot(state)
    state, ok = extend(state, 0, 0)
    assert bool(ok) and same_bits(state, before)


def test_a_refused_extend_releases_nothing():
    state = filled(SPEC, {0: 14})
    assert_refused(extend, state, 1, 8)


def test_an_extend_fits_if_it_takes_the_blocks_that_its_row_releases():
    spec = one_pool_spec(num_blocks=10)
    state = filled(spec, {0: 15})
    assert num_free(state) == [0]
    state = put(extended(state, 1), {(0, 15): 115})
    assert numbers_of_blocks(state, 0, spec) == {"local": 2, "full": 6} and num_free(state) == [2]
    tokens = [*range(100, 116)]
    assert group_contents(spec, state, 0) == {"local": [0] * 12 + tokens[12:], "full": tokens}


def test_an_extend_does_not_take_a_released_block_that_another_row_holds():
    spec = one_pool_spec(num_blocks=10)
    state, ok = fj.fork(filled(spec, {0: 15}), [0], [1])
    assert bool(ok) and num_free(state) == [0]
    state = assert_refused(extend, state, 1)
    state = fj.free(state, [1])
    assert numbers_of_blocks(extended(state, 1), 0, spec) == {"local": 2, "full": 6}


def test_two_forks_release_the_blocks_that_they_share_together():
    state, ok = fj.fork(filled(SPEC, {0: 14}), [0], [1])
    assert bool(ok) and num_free(state) == [8]
    state = extended(state, 1, 1)
    assert num_free(state) == [11], "the three blocks that the window has passed are free"
    local = [blocks_of(SPEC, state, row)["local"] for row in (0, 1)]
    assert local[0][0] == local[1][0] and local[0][1] != local[1][1]


def test_one_fork_after_the_other_releases_the_blocks_that_they_share():
    state, ok = fj.fork(filled(SPEC, {0: 14}), [0], [1])
    assert bool(ok)
    state = extended(state, 1)
    assert num_free(state) == [8], "row 1 still holds them"
    state = extended(state, 0, 1)
    assert num_free(state) == [11]


def test_blocks_that_two_rows_release_together_are_room_only_for_the_next_call():
    spec = one_pool_spec(num_blocks=12)
    state, ok = fj.fork(filled(spec, {0: 14}), [0], [1])
    assert bool(ok) and num_free(state) == [0]
    state = assert_refused(extend, state, 2, 2)
    state = extended(state, 1, 1)
    assert num_free(state) == [3]
    assert_refused(extend, state, 1, 1)
    assert num_free(extended(state, 1)) == [1]


def test_a_fork_in_a_window_and_its_parent_both_go_on():
    state = put(extended(filled(SPEC, {0: 13}), 1), {(0, 13): 113})
    state, ok = fj.fork(state, [0], [1])
    assert bool(ok)
    for length in range(14, 17):
        state = extended(state, 1, 1)
        state = put(state, {(0, length): 300 + length, (1, length): 400 + length})
    for row, first in ((0, 300), (1, 400)):
        tokens = [*range(100, 114), *range(first + 14, first + 17)]
        assert group_contents(SPEC, state, row) == {"local": [0] * 12 + tokens[12:], "full": tokens}


def test_a_cut_behind_the_window_is_refused():
    state = extended(filled(SPEC, {0: 15}), 3)
    for length in (1, 9, 14):
        state = assert_refused(fj.truncate, state, [0], [length])
    state, ok = fj.truncate(state, [0], [15])
    assert bool(ok), "tokens that were speculated can be cut off"
    fj.check_state(state)
    tokens = [*range(100, 115)]
    assert group_contents(SPEC, state, 0) == {"local": [0] * 12 + tokens[12:], "full": tokens}
    state, ok = fj.truncate(state, [0], [0])
    assert bool(ok) and num_free(state) == [20]
    fj.check_state(state)


def test_a_refused_cut_of_one_row_leaves_the_others_as_they_are():
    state = extended(filled(SPEC, {0: 15, 1: 5}), 1)
    state = assert_refused(fj.truncate, state, [1, 0], [2, 14])
    state, ok = fj.truncate(state, [1, 0], [2, 15])
    assert bool(ok)
    fj.check_state(state)


def test_a_row_shares_the_blocks_that_the_source_still_holds():
    state = put(extended(filled(SPEC, {0: 10, 1: 14}), 1), {(0, 10): 110})
    state, ok = fj.share(state, [0], [1], [11])
    assert bool(ok)
    fj.check_state(state)
    tokens = [*range(100, 111), *range(211, 214)]
    assert group_contents(SPEC, state, 1) == {"local": [0] * 6 + tokens[6:], "full": tokens}
    source, target = blocks_of(SPEC, state, 0), blocks_of(SPEC, state, 1)
    assert source["local"][0] == target["local"][0] and source["full"][:3] == target["full"][:3]


def test_a_row_does_not_share_from_where_the_source_has_released_a_needed_token():
    state = extended(filled(SPEC, {0: 15, 1: 15}), 1)
    for length in (5, 14):
        state = assert_refused(fj.share, state, [0], [1], [length])
    state, ok = fj.share(state, [0], [1], [15])
    assert bool(ok)
    fj.check_state(state)
    assert blocks_of(SPEC, state, 1)["local"] == blocks_of(SPEC, state, 0)["local"][:1]


def test_a_row_whose_window_has_passed_what_it_shares_keeps_its_window():
    state = put(extended(filled(SPEC, {0: 8, 1: 15}), 0, 1), {(1, 15): 215})
    before = blocks_of(SPEC, state, 1)
    state, ok = fj.share(state, [0], [1], [8])
    assert bool(ok)
    fj.check_state(state)
    after = blocks_of(SPEC, state, 1)
    assert after["local"] == before["local"] and after["full"][2:] == before["full"][2:]
    assert after["full"][:2] == blocks_of(SPEC, state, 0)["full"][:2]
    tokens = [*range(100, 108), *range(208, 216)]
    assert group_contents(SPEC, state, 1) == {"local": [0] * 12 + tokens[12:], "full": tokens}


@pytest.mark.parametrize("window", [1, 2, 3, 7])
def test_decoding_holds_what_the_window_sees_and_no_more(window):
    spec = window_spec(window, max_blocks_per_seq=8)
    state = fj.init(spec)
    for length in range(1, 25):
        state = put(extended(state, 1), {(0, length - 1): length})
        seen = max(0, length - max(window, 2))  # The first position seen by the newest token.
        num_passed = seen // spec.block_size
        first = num_passed * spec.block_size
        assert contents(state, 0) == [0] * first + [*range(first + 1, length + 1)]
        assert num_free(state) == [spec.num_blocks - -(-length // spec.block_size) + num_passed]


def test_an_operation_that_fails_in_one_pool_changes_nothing_in_another():
    """Layers of another size have a pool of their own, which is full first."""
    groups = (
        fj.LayerGroup("local", (0,), SMALL, sliding_window=4),
        fj.LayerGroup("large", (1,), LARGE, num_blocks=6),
    )
    spec = tiny_spec(groups=groups, max_blocks_per_seq=7)
    state = filled(spec, {0: 14})
    assert num_free(state) == [7, 1]
    state = assert_refused(fj.allocate, state, [1], [4])
    state = assert_refused(extend, state, 5)
    state, ok = fj.allocate(state, [1], [3])
    assert bool(ok) and num_free(state) == [6, 0]
    state = assert_refused(fj.fork, state, [0], [2])
    state, ok = fj.fork(state, [1], [2])
    assert bool(ok) and num_free(state) == [6, 0]
    state = assert_refused(fj.truncate, state, [2], [1])
    state = assert_refused(fj.share, state, [0], [2], [1])
    fj.check_state(state)


def test_groups_of_equal_geometry_share_a_pool():
    spec = two_pools_spec()
    state = fj.init(spec)
    assert [pool.num_blocks for pool in state.pools] == [12, 16]
    assert [tables.windows for tables in state.page_tables] == [(2, 7), (None,)]
    assert [pool.num_layers for pool in state.pools] == [1, 2]
    assert [place.group.name for place in places_of(spec)] == ["short", "long", "large"]
    assert np.asarray(state.page_tables[0].block_ids).shape == (10, 6)
