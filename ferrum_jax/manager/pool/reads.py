"""The compiled programs that read a manager's pools, and change nothing.

S sequences, G layer groups of all pools, M blocks per row, N blocks in a pool.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.ops import rows as row_ops
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK


@jax.jit
def are_held(page_tables: tuple[PageTables, ...]) -> tuple[jax.Array, ...]:
    """Returns which blocks of each pool are held: bool[N]."""
    return tuple(tables.ref_counts > 0 for tables in page_tables)


@jax.jit
def freed_since(
    page_tables: tuple[PageTables, ...], were_held: tuple[jax.Array, ...]
) -> tuple[jax.Array, ...]:
    """Returns which of the blocks held before (bool[N]) are free now: bool[N] of each pool."""
    pairs = zip(page_tables, were_held, strict=True)
    return tuple(held & (tables.ref_counts == 0) for tables, held in pairs)


@jax.jit
def matches(
    page_tables: tuple[PageTables, ...], num_free: jax.Array, of_rows: dict[str, jax.Array]
) -> jax.Array:
    """Returns bool[]: whether tables match counts.

    Args:
      page_tables: The tables.
      num_free: i32[P]. Free blocks of each pool.
      of_rows: Counts of all rows, pool by pool, each named after a field of the tables.
    """
    same = [tables.num_free == num_free[i] for i, tables in enumerate(page_tables)]
    for name, counts in of_rows.items():
        found = jnp.concatenate([getattr(tables, name) for tables in page_tables])
        same.append(jnp.all(found == counts))
    return functools.reduce(jnp.logical_and, same)


@functools.partial(jax.jit, static_argnames="max_blocks")
def num_written(
    state: CacheState,
    row: jax.Array,
    num_known: jax.Array,
    num_tokens: jax.Array,
    max_blocks: int,
) -> jax.Array:
    """Returns how many of a row's first tokens are written, given that fresh blocks are zero.

    A token counts as written if a number of its keys or values in the first or last layer is not
    zero, or if its block is released.

    Args:
      state: The cache.
      row: i32[]. The row.
      num_known: i32[]. Leading tokens that are known to be written.
      num_tokens: i32[]. Leading tokens to look at.
      max_blocks: Upper bound on the blocks that hold the tokens between these two (static).

    Returns:
      i32[], from `num_known` to `num_tokens`.
    """
    pool, tables, size = state.pool, state.tables, state.tables.block_size
    first = num_known // size
    logical = first + jnp.arange(max_blocks, dtype=jnp.int32)
    row_blocks = read(tables.block_ids, row, NULL_BLOCK)
    block_ids = index_or_end(read(row_blocks, logical, NULL_BLOCK), tables.num_blocks)
    is_released = block_ids == tables.num_blocks  # Or behind the row's end, and not looked at.
    is_written = jnp.repeat(is_released[:, None], size, axis=1)
    for array in pool.arrays.values():
        for layer in {0, pool.num_layers - 1}:
            tokens = array.at[block_ids, layer].get(mode="clip")
            is_written |= jnp.any(tokens != 0, axis=(1, 3))
    positions = first * size + jnp.arange(max_blocks * size, dtype=jnp.int32)
    is_missing = ~is_written.ravel() & (positions >= num_known)
    return jnp.min(jnp.where(is_missing, positions, num_tokens), initial=num_tokens)


@jax.jit
def row_of_table(block_ids: jax.Array, row: jax.Array) -> jax.Array:
    """Returns a row (i32[]) of a table: i32[M]."""
    return block_ids[row]


@jax.jit
def rows_of_seq(page_tables: tuple[PageTables, ...], seq_id: jax.Array) -> jax.Array:
    """Returns the blocks of a sequence (i32[]) in each layer group, pool by pool: i32[G, M]."""
    rows = [t.block_ids[row_ops.rows_of(t, seq_id[None])] for t in page_tables]
    return jnp.concatenate(rows)


@functools.partial(jax.jit, static_argnames="windows")
def seq_blocks(
    block_ids: jax.Array, seq_id: jax.Array, windows: tuple[int | None, ...]
) -> jax.Array:
    """Returns the blocks of a sequence, group by group: i32[G * M].

    Args:
      block_ids: i32[G * S, M]. The table.
      seq_id: i32[]. The sequence.
      windows: Sliding window of each group (static).

    Returns:
      The blocks that it holds, then `NULL_BLOCK`.
    """
    if windows == (None,):
        return block_ids[seq_id]
    of_groups = block_ids.reshape(len(windows), -1, block_ids.shape[1])[:, seq_id].reshape(-1)
    is_held = of_groups != NULL_BLOCK
    place = jnp.where(is_held, jnp.cumsum(is_held, dtype=jnp.int32) - 1, of_groups.size)
    return jnp.full_like(of_groups, NULL_BLOCK).at[place].set(of_groups, mode="drop")


@functools.partial(jax.jit, static_argnames=("size", "windows"))
def part_of_seq(
    block_ids: jax.Array,
    seq_id: jax.Array,
    first: jax.Array,
    size: int,
    windows: tuple[int | None, ...],
) -> jax.Array:
    """Returns `size` of the blocks that `seq_blocks` lists, from number `first` on: i32[size]."""
    return lax.dynamic_slice_in_dim(seq_blocks(block_ids, seq_id, windows), first, size)
