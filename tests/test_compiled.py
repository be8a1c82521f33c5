"""Compiled programs work in place: no operation copies a pool, alone or inside a model's loop.

Three witnesses each: the program text makes no array of a pool's size but by updating one, its
scratch memory is small, and the pool that comes out lies where the one that went in lay.
"""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.ops import blocks
from ferrum_jax.ops import tables as table_ops
from tests.support.caches import num_compilations, tiny_spec
from tests.support.compiled import (
    HEAD_DIM,
    HEADS,
    addresses,
    assert_in_place,
    decode_step,
    grouped_layers,
    grouped_scans,
    grouped_state,
    ids,
    new_state,
    scanned_layers,
)
from tests.support.layer_groups import one_pool_spec
from tests.support.pools import keys, values, with_arrays


def write_tokens(state):
    tokens = jnp.ones((3, HEADS, HEAD_DIM), jnp.float32)
    pool = fj.write(state.pool, ids(1)[0], ids(3, 9, -1), tokens, tokens)
    return state.with_pools([pool])


def write_one_token(state):
    """XLA treats a scatter of a single index differently."""
    token = jnp.ones((1, HEADS, HEAD_DIM), jnp.float32)
    return state.with_pools([fj.write(state.pool, 0, ids(3), token, token)])


def copy_two(state):
    return state.with_pools([fj.copy_blocks(state.pool, ids(0, 1), ids(7, 9))])


def grow_and_free(state):
    state, ok = fj.allocate(state, ids(2), ids(20))
    state, ok_too = fj.extend(state, ids(0, 2), ids(1, 9), max_new_tokens=9)
    return fj.free(state, ids(1)), ok & ok_too


def unrolled_layers(state):
    return decode_step(state, scanned=False)


def decode_loop(state):
    """Decodes until the rows are full."""

    def step(carry):
        state, _, steps = carry
        state, _, ok = decode_step(state, scanned=True)
        return state, ok, steps + 1

    start = (state, jnp.asarray(True), jnp.int32(0))
    return jax.lax.while_loop(lambda carry: carry[1], step, start)


def fork_or_free(state):
    """Chooses at run time, as a scheduler inside `jit` would."""
    return jax.lax.cond(
        state.tables.num_free > 3,
        lambda state: fj.fork(state, ids(0), ids(2))[0],
        lambda state: fj.free(state, ids(0)),
        state,
    )


PROGRAMS = {
    "write": write_tokens,
    "write one": write_one_token,
    "copy_blocks": copy_two,
    "allocate, extend, free": grow_and_free,
    "fork": lambda state: fj.fork(state, ids(0, 1), ids(2, 3)),
    "fork one": lambda state: fj.fork(state, ids(0), ids(2)),
    "share": lambda state: fj.share(state, ids(0), ids(1), ids(5)),
    "truncate": lambda state: fj.truncate(state, ids(0, 1), ids(9, 3)),
    "cond": fork_or_free,
    "scan over layers": scanned_layers,
    "unrolled layers": unrolled_layers,
    "while_loop": decode_loop,
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_updates_the_pool_in_place(dtype, name):
    assert_in_place(PROGRAMS[name], new_state(dtype))


@pytest.mark.parametrize("program", [grouped_layers, grouped_scans])
def test_a_decode_step_over_layer_groups_updates_their_pool_in_place(dtype, program):
    assert_in_place(program, grouped_state(dtype))


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn", "int8"])
def test_every_other_dtype_is_written_in_place(dtype):
    assert_in_place(write_tokens, new_state(dtype))


def made(change):
    """Makes a change of tables if they allow it."""
    return change.make(change.ok), change.ok


TABLE_PROGRAMS = {
    "allocate": lambda tables, ids: made(table_ops.allocate_rows(tables, ids, ids)),
    "extend": lambda tables, ids: made(table_ops.extend_rows(tables, ids, ids, 1)),
    "free": lambda tables, ids: table_ops.free_rows(tables, ids),
    "fork": lambda tables, ids: made(table_ops.fork_rows(tables, ids, ids)),
    "share": lambda tables, ids: made(table_ops.share_rows(tables, ids, ids, ids)),
    "truncate": lambda tables, ids: made(table_ops.truncate_rows(tables, ids, ids)),
    "take_blocks": lambda tables, ids: blocks.take_blocks(tables, ids[0], ids.size),
    "release_blocks": lambda tables, ids: blocks.release_blocks(tables, ids),
}


ONE_GROUP = tiny_spec(num_blocks=10_007, max_seqs=131, max_blocks_per_seq=17)
TWO_GROUPS = one_pool_spec(num_blocks=10_007, max_seqs=131, max_blocks_per_seq=17)
# Every pair of a program, a spec and a number of rows, in half of all combinations.
TABLE_CASES = [
    (name, spec, 1 if is_crossed == (spec is TWO_GROUPS) else 3)
    for name, is_crossed in zip(TABLE_PROGRAMS, itertools.cycle([False, True]), strict=False)
    for spec in (ONE_GROUP, TWO_GROUPS)
]


@pytest.mark.parametrize(
    ("name", "spec", "num_rows"),
    TABLE_CASES,
    ids=lambda x: f"{len(x.groups)} groups" if isinstance(x, fj.CacheSpec) else str(x),
)
def test_no_table_is_copied_so_the_cost_does_not_follow_the_pool(name, spec, num_rows):
    tables = fj.init(spec).tables
    program = jax.jit(TABLE_PROGRAMS[name], donate_argnums=0)
    compiled = program.lower(tables, jnp.zeros(num_rows, jnp.int32)).compile()
    copied = re.findall(r"s32\[(10007|131,17|262,17)\]\S* copy\(", compiled.as_text())
    assert not copied
    assert compiled.memory_analysis().temp_size_in_bytes < tables.ref_counts.nbytes / 2


@pytest.mark.parametrize("name", ["write", "fork"])
def test_replicas_under_vmap_update_their_pools_in_place(name):
    states = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), new_state("bfloat16"))
    assert_in_place(jax.vmap(PROGRAMS[name]), states)


def test_the_check_notices_a_copied_pool():
    def keep_both(state):
        return write_tokens(state), keys(state.pool)

    def choose(state):
        written = keys(write_tokens(state).pool)
        k = jnp.where(state.tables.num_free > 3, written, keys(state.pool))
        return state.with_pools([with_arrays(state.pool, k, values(state.pool))])

    for copying in (keep_both, choose):
        with pytest.raises(AssertionError):
            assert_in_place(copying, new_state("float32"))


OPERATIONS = {
    "write": lambda s: fj.write(s.pool, 0, [3], *np.ones((2, 1, HEADS, HEAD_DIM), np.float32)),
    "copy_blocks": lambda s: fj.copy_blocks(s.pool, [0], [5]),
    "fork": lambda s: fj.fork(s, [0], [2])[0].pool,
    "share": lambda s: fj.share(s, [0], [1], [5])[0].pool,
    "truncate": lambda s: fj.truncate(s, [0], [3])[0].pool,
    "fork, refused": lambda s: fj.fork(s, [3], [2])[0].pool,
    "share, refused": lambda s: fj.share(s, [0], [0], [5])[0].pool,
    "truncate, refused": lambda s: fj.truncate(s, [0], [30])[0].pool,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_that_writes_the_pool_consumes_it(dtype, name):
    state = new_state(dtype)
    before = addresses(state.pool)
    pool = OPERATIONS[name](state)
    assert addresses(pool) == before
    assert keys(state.pool).is_deleted() and values(state.pool).is_deleted()


def test_an_operation_on_tables_returns_the_same_pool():
    state = new_state("float32")
    for after in (
        fj.allocate(state, [2], [9])[0],
        fj.extend(state, [0], [9], max_new_tokens=9)[0],
        fj.free(state, [0]),
    ):
        assert keys(after.pool) is keys(state.pool) and values(after.pool) is values(state.pool)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))


def test_a_donated_decode_loop_compiles_once_whatever_the_rows_hold():
    step = jax.jit(scanned_layers, donate_argnums=0)
    state, _, _ = step(new_state("bfloat16"))
    place, before = addresses(state.pool), num_compilations()
    for _ in range(10):
        state, _, ok = step(state)
        assert bool(ok)
    assert num_compilations() == before and addresses(state.pool) == place
    fj.check_state(state)


def test_the_decode_loop_stops_when_a_row_is_full():
    state, ok, steps = jax.jit(decode_loop)(new_state("float32"))
    assert not bool(ok) and int(steps) == 8 * 8 - 11 + 1
    assert np.asarray(state.tables.held_lens).tolist() == [64, 61, 0, 0]
    fj.check_state(state)
