"""Every operation over the whole range of its integer arguments, edges above all.

Ids and counts of every integer dtype, from the host and from the device, near zero and near the
ends of what the dtype has: the operation does what a dull oracle says of the same numbers, or
refuses them, and no number is ever taken for another.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.batch import PagedBatch
from tests.support.busy import (
    ROW_OPERATIONS,
    SPEC,
    assert_agrees,
    busy_oracle,
    busy_state,
    vectors_of,
)
from tests.support.caches import payload, same_bits, snapshot
from tests.support.integers import DTYPES, LEAST, MOST, edges
from tests.support.oracle import NO_BLOCKS, OUTCOMES
from tests.support.pools import keys, values

ROUNDS = 36
KINDS = ("usual", "alias", "edge")
"""What a number is replaced by: one from -1 to a little too much; one with the same lowest 32 bits,
where the dtype has more; or an edge."""


def changed(rng, dtype, numbers, kind, most=15):
    """The numbers, some of them replaced by others of the dtype: see `KINDS`."""
    info = np.iinfo(dtype)

    def replaced(n):
        choices = range(max(-1, info.min), most + 1) if kind == "usual" else edges(dtype)
        if kind == "alias":
            aliases = [n + wrap for wrap in (2**32, -(2**32)) if info.min <= n + wrap <= info.max]
            choices = aliases or choices
        return choices[int(rng.integers(len(choices)))]

    return [replaced(n) if rng.random() < 0.4 else n for n in numbers]


def rounds(seed, num_rounds):
    """Yields a generator, how numbers are replaced, their dtype, and whether to trace a program.

    A program is compiled for int64; called directly, an operation converts any dtype first.
    """
    rng = np.random.default_rng(seed)
    for i in range(num_rounds):
        yield rng, KINDS[i // 2 % 3], "int64" if i % 2 else DTYPES[i // 2 % 8], bool(i % 2)


@pytest.fixture(scope="module")
def busy():
    """The leaves of `busy_state`, which outlive operations that donate, and its oracle."""
    leaves, structure = jax.tree.flatten(busy_state())
    return [np.array(leaf) for leaf in leaves], structure, busy_oracle()


def fresh(busy):
    leaves, structure, oracle = busy
    return structure.unflatten([jnp.array(leaf) for leaf in leaves]), copy.deepcopy(oracle)


@pytest.mark.parametrize("name", ROW_OPERATIONS)
def test_an_operation_does_what_the_oracle_says_or_changes_no_bit(busy, name):
    """In a pool with free blocks and in a full one; `test_tables.py` has more in a full one."""
    op, predict, good = ROW_OPERATIONS[name]
    outcomes = set()
    with jax.enable_x64(True):
        jitted = jax.jit(op)
        for rng, kind, dtype, is_traced in rounds(0, 6 * ROUNDS):
            args = [changed(rng, dtype, numbers, kind) for numbers in good]
            state, oracle = fresh(busy)
            if rng.random() < 0.3:
                state, _ = fj.allocate(state, [3], [12])
                assert oracle.allocate([3], [12]) is None and oracle.num_free == [0]
            before = snapshot(state)
            arrays = [jnp.asarray(arg, dtype) for arg in args]
            state, ok = (jitted if is_traced else op)(state, *arrays)
            cause = predict(oracle, *args)
            assert bool(ok) == (cause is None), (args, cause)
            assert cause is None or same_bits(state, before)
            assert_agrees(state, oracle)
            outcomes.add((name, cause))
    wanted = {(op, cause) for op, cause in OUTCOMES if op == name and cause != NO_BLOCKS}
    assert outcomes >= wanted, wanted - outcomes


@pytest.mark.parametrize("name", ROW_OPERATIONS)
def test_an_operation_on_rows_takes_no_number_of_the_host_for_another(busy, name):
    op, predict, good = ROW_OPERATIONS[name]
    for rng, kind, dtype, is_array in rounds(1, 18):
        args = [changed(rng, dtype, numbers, kind) for numbers in good]
        given = [np.asarray(arg, dtype) for arg in args] if is_array else args
        state, oracle = fresh(busy)
        if all(LEAST <= n <= MOST for arg in args for n in arg):
            state, ok = op(state, *given)
            assert bool(ok) == (predict(oracle, *args) is None), args
        else:
            with pytest.raises(ValueError, match="must be integers within int32"):
                op(state, *given)
        assert_agrees(state, oracle)


def test_write_takes_no_number_for_another(busy):
    _, structure, _ = busy
    with jax.enable_x64(True):
        jitted = jax.jit(fj.write)
        for rng, kind, dtype, is_traced in rounds(2, ROUNDS):
            state, _ = fresh(busy)
            (layer,) = changed(rng, dtype, [1], kind, 2)
            slots = changed(rng, dtype, [7, 30, 11], kind, 36)
            slots = [36 if n in slots[:i] else n for i, n in enumerate(slots)]
            k, v = payload(state.pool, 0, [7, 8, 9])
            want = np.array(keys(state.pool)), np.array(values(state.pool))
            for i, slot in enumerate(slots):
                if 0 <= slot < 36 and 0 <= layer < SPEC.num_layers:
                    for array, tokens in zip(want, (k, v), strict=True):
                        array[slot // 3, layer, :, slot % 3] = tokens[i]
            write = jitted if is_traced else fj.write
            pool = write(state.pool, jnp.asarray(layer, dtype), jnp.asarray(slots, dtype), k, v)
            assert same_bits(pool, want)


def test_gather_takes_no_number_for_another(busy):
    state, _ = fresh(busy)
    rows = {row: vectors_of(state, row) for row in range(SPEC.max_seqs)}
    with jax.enable_x64(True):
        jitted = jax.jit(fj.gather)
        for rng, kind, dtype, is_traced in rounds(3, ROUNDS):
            (layer,) = changed(rng, dtype, [1], kind, 2)
            (row,) = changed(rng, dtype, [0], kind, 5)
            got = (jitted if is_traced else fj.gather)(
                state, jnp.asarray(layer, dtype), jnp.asarray(row, dtype)
            )
            want = np.zeros((2, 15, 1, 2), np.float32)
            if row in rows and 0 <= layer < SPEC.num_layers:
                want[:, : rows[row].shape[1]] = rows[row][:, :, layer]
            np.testing.assert_array_equal(np.stack(got), want)


def test_copy_blocks_takes_no_number_for_another(busy):
    with jax.enable_x64(True):
        jitted = jax.jit(fj.copy_blocks)
        for rng, kind, dtype, is_traced in rounds(4, ROUNDS):
            state, _ = fresh(busy)
            sources = changed(rng, dtype, [0, 3, 5], kind, 12)
            targets = changed(rng, dtype, [4, 10, 0], kind, 12)
            targets = [n if n not in targets[:i] else 12 for i, n in enumerate(targets)]
            want = snapshot(state.pool)
            for leaf, old in zip(want, snapshot(state.pool), strict=True):
                for source, target in zip(sources, targets, strict=True):
                    if 0 <= source < 12 and 0 <= target < 12:
                        leaf[target] = old[source]
            copy_blocks = jitted if is_traced else fj.copy_blocks
            pool = copy_blocks(state.pool, jnp.asarray(sources, dtype), jnp.asarray(targets, dtype))
            assert same_bits(pool, want)


def test_a_batch_takes_no_number_for_another(busy):
    state, oracle = fresh(busy)
    table = np.asarray(state.tables.block_ids)

    def places(state, seq_ids, q_lens, seq_lens):
        batch = PagedBatch.of(state, seq_ids, q_lens, num_tokens=4, seq_lens=seq_lens)
        last = batch.last(jnp.broadcast_to(jnp.arange(4, dtype=jnp.int32), (3, 4)))
        return batch.positions, batch.slots(), last

    with jax.enable_x64(True):
        jitted = jax.jit(places)
        for rng, kind, dtype, is_traced in rounds(5, ROUNDS):
            args = [changed(rng, dtype, x, kind) for x in ([0, 2, 1], [2, 1, 4], [8, 5, 12])]
            arrays = [jnp.asarray(arg, dtype) for arg in args]
            got = (jitted if is_traced else places)(state, *arrays)
            positions, slots, last = np.full((3, 4), -1), np.full((3, 4), 36), np.zeros(3, int)
            for i, (row, q_len, seq_len) in enumerate(zip(*args, strict=True)):
                length = oracle.seq_lens[row] if 0 <= row < 5 else 0
                end = min(max(seq_len, 0), length)
                num_new = min(q_len, end) if 0 <= q_len <= 4 else 0
                for t, p in enumerate(range(end - num_new, end)):
                    positions[i, t], slots[i, t] = p, table[row, p // 3] * 3 + p % 3
                last[i] = max(num_new - 1, 0)
            for have, want in zip(got, (positions, slots, last), strict=True):
                np.testing.assert_array_equal(have, want, err_msg=str(args))
