"""A small cache in use, its oracle, and whether the two agree."""

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from tests.support.caches import filled, payload, tiny_spec
from tests.support.oracle import OracleCache
from tests.support.pools import keys, values

SPEC = tiny_spec()
LENGTHS = {0: 8, 1: 12}


def busy_state():
    """Rows 0 and 2 share two full blocks of 8 tokens, row 1 holds 12 tokens; 4 blocks are free."""
    state, ok = fj.fork(filled(SPEC, LENGTHS), [0], [2])
    assert bool(ok)
    return state


def busy_oracle():
    """What `busy_state` holds."""
    oracle = OracleCache(num_blocks=[12], block_size=3, max_seqs=5, max_blocks_per_seq=5)
    assert oracle.allocate(list(LENGTHS), list(LENGTHS.values())) is None
    for row, length in LENGTHS.items():
        for position in range(length):
            oracle.write(row, position, 100 * (row + 1) + position)
    assert oracle.fork([0], [2]) is None
    return oracle


def vectors_of(state, row):
    """The keys and values that a row holds, [2, tokens, layers, heads, head_dim], on the host."""
    ids, length = np.asarray(state.tables.block_ids)[row], int(state.tables.held_lens[row])
    position = np.arange(length)
    pools = (np.asarray(keys(state.pool)), np.asarray(values(state.pool)))
    return np.stack([x[ids[position // 3], :, :, position % 3] for x in pools])


def assert_agrees(state, oracle):
    """The state is what the oracle says: lengths, blocks and every token that was written."""
    fj.check_state(state)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.tables)} == {jnp.dtype(jnp.int32)}
    assert np.asarray(state.tables.held_lens).tolist() == oracle.seq_lens
    assert [int(state.tables.num_free)] == oracle.num_free
    oracle.check_blocks(0, np.asarray(state.tables.block_ids).tolist())
    for row, expected in enumerate(oracle.rows):
        got = vectors_of(state, row)
        for layer in range(SPEC.num_layers):
            is_known = [i for i, token in enumerate(expected.tokens) if token is not None]
            want = payload(state.pool, layer, [expected.tokens[i] for i in is_known])
            np.testing.assert_array_equal(got[:, is_known, layer], np.stack(want))


def extend(state, seq_ids, num_tokens):
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=7)


ROW_OPERATIONS = {
    "allocate": (fj.allocate, OracleCache.allocate, ([3, 4], [6, 5])),
    "extend": (extend, lambda oracle, *args: oracle.extend(*args, 7), ([1, 3], [3, 4])),
    "free": (lambda *args: (fj.free(*args), True), OracleCache.free, ([0, 1],)),
    "fork": (fj.fork, OracleCache.fork, ([0, 1], [3, 4])),
    "share": (fj.share, OracleCache.share, ([0, 0], [1, 2], [5, 8])),
    "truncate": (fj.truncate, OracleCache.truncate, ([0, 1], [5, 6])),
}
"""Of each operation: itself, what the oracle does, and arguments with which it succeeds."""
