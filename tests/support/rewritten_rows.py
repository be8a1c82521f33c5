"""Rows to be rewritten in fewer blocks, and ways to rewrite them."""

import dataclasses

import jax
import numpy as np

from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.compression.rewrite import Rewrite, compress_rows, reference_queries
from ferrum_jax.types import TokenFormat
from tests.support.compressed import empty_state, poisoned, put_row, random_kv, with_rows, write_kv

NATIVE, INT8, INT8_INT4, INT4 = TokenFormat
WINDOW = CompressionMethod(scorer="window", num_sinks=2, num_recent=3)
KEYS = CompressionMethod(scorer="key_difference", num_sinks=1, num_recent=2)
FITTED = dataclasses.replace(KEYS, fit_steps=20)


def how(source, target, method=None):
    """A row of at most 8 blocks before and after: few programs serve all tests."""
    return Rewrite(
        source=source, target=target, max_source_blocks=8, max_target_blocks=8, method=method
    )


TO_INT8, TO_INT4 = how(NATIVE, INT8), how(INT8, INT4)
PRUNE, PRUNE_KEYS = how(NATIVE, NATIVE, WINDOW), how(NATIVE, NATIVE, KEYS)
PRUNE_TO_INT4 = how(NATIVE, INT4, WINDOW)


def new_state(rows, *, is_random=True):
    """Native rows, `{row: tokens}`, in a pool that is NaN elsewhere."""
    state = poisoned(empty_state())
    state, ok = with_rows(state, {row: (NATIVE, count) for row, count in rows.items()})
    assert ok
    for row, count in rows.items():
        if is_random:
            state = write_kv(state, row, random_kv(state.pool, count, seed=row))
        else:
            state = put_row(state, row, range(1, count + 1))
    return state


def queries_of(state, seed=3):
    """f32[L, Hq, Q, D] as a model has them, two query heads for each KV head."""
    pool = state.pool
    shape = pool.num_layers, 2 * pool.num_kv_heads, 3, pool.head_dim
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compress(state, row, num_kept, rewrite):
    queries = reference_queries(queries_of(state), state.pool.num_kv_heads)
    state, ok, loss = compress_rows(state, [(0, row)], num_kept, [queries], rewrite)
    return state, bool(ok), jax.tree.map(np.asarray, loss)


def block_ids_of(state, row):
    held = int(state.tables.num_blocks_held[row])
    return np.asarray(state.tables.block_ids)[row, :held]


def bytes_of(state, block_ids):
    return [np.array(x)[block_ids].tobytes() for x in state.pool.arrays.values()]
