"""Allocation, reference counts and release of blocks, by a stack of free ids.

N blocks in the pool, R rows named in a call. Each function takes tables and returns tables; its
cost depends on the blocks that a call names, not on the size of the pool.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.ops.indexing import columns, read
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_SEQ


def take_blocks(
    tables: PageTables, num_blocks: jax.Array, max_blocks: int
) -> tuple[PageTables, jax.Array, jax.Array]:
    """Takes free blocks that no row holds, or changes nothing.

    Args:
      tables: Current tables.
      num_blocks: i32[]. Blocks to take.
      max_blocks: The most that `num_blocks` may be (static).

    Returns:
      `(tables, block_ids, ok)`: block_ids is i32[max_blocks], N beyond the blocks taken; ok is
      bool[], false if the number is out of range or too few blocks are free.
    """
    num_new = num_blocks[None]
    ok = jnp.all((num_new >= 0) & (num_new <= max_blocks)) & can_take(tables, num_new)
    taken, tables = pop_blocks(tables, jnp.where(ok, num_new, 0), max_blocks)
    return tables, taken[0], ok


def retain_blocks(tables: PageTables, block_ids: jax.Array) -> PageTables:
    """Adds one reference to each of `block_ids` (i32[P], N for none); these blocks are live."""
    (block_ids,) = at_least_two(block_ids, padding=tables.num_blocks)
    counts = tables.ref_counts.at[block_ids].add(1, mode="drop")
    return dataclasses.replace(tables, ref_counts=counts)


def release_blocks(
    tables: PageTables, block_ids: jax.Array, *, are_distinct: bool = False
) -> PageTables:
    """Drops one reference to each named block; a block without references becomes free.

    This is the only place where a reference is dropped and where a block is pushed on the stack of
    free blocks. (`ops.migration`, which moves references to other ids or resizes the pool,
    rebuilds the stack from the counts.) A block that is named several times is pushed once; a block
    that is free already is ignored.

    Args:
      tables: Current tables.
      block_ids: i32[P]. Blocks; N for none.
      are_distinct: Promises that no block is named twice (static); saves two of four scatters.
    """
    (block_ids,) = at_least_two(block_ids, padding=tables.num_blocks)
    size, order = tables.num_blocks, jnp.arange(block_ids.size, dtype=jnp.int32)
    is_held = read(tables.ref_counts, block_ids, 0) > 0
    block_ids = jnp.where(is_held, block_ids, size)
    counts = tables.ref_counts.at[block_ids].add(-1, mode="drop")
    pushed = jnp.where(read(counts, block_ids, 1) <= 0, block_ids, size)
    if not are_distinct:
        # If a block that is now free is named several times, the last mention pushes it. The counts
        # of such blocks are 0, and serve as scratch memory in which the last mention is found.
        marked = counts.at[pushed].min(-1 - order, mode="drop")
        pushed = jnp.where(read(marked, pushed, 0) == -1 - order, pushed, size)
        # Only the pushed blocks are named here, which orders this write after the reads: XLA would
        # copy all N counts otherwise.
        counts = marked.at[pushed].set(0, mode="drop")
    pushes = pushed < size
    num_free = tables.num_free + jnp.sum(pushes, dtype=jnp.int32)
    # The first block is pushed last, so that a row's blocks are taken again in their order.
    depth = jnp.where(pushes, num_free - jnp.cumsum(pushes, dtype=jnp.int32), size)
    return dataclasses.replace(
        tables,
        free_blocks=tables.free_blocks.at[depth].set(block_ids, mode="drop"),
        num_free=num_free,
        ref_counts=counts,
    )


def at_least_two(*batches: jax.Array, padding: int = NULL_SEQ) -> tuple[jax.Array, ...]:
    """Pads batches (each i32[R]) of a single row or block to two.

    XLA on CPU would turn a scatter with one index into a slice update, and copy the whole array
    for it.
    """
    missing = max(0, 2 - batches[0].size)
    return tuple(jnp.pad(ids, (0, missing), constant_values=padding) for ids in batches)


def can_take(tables: PageTables, num_new: jax.Array) -> jax.Array:
    """Returns bool[]: whether at least `sum(num_new)` blocks (i32[R]) are free."""
    return jnp.sum(num_new, dtype=jnp.int32) <= tables.num_free


def pop_blocks(
    tables: PageTables, num_new: jax.Array, max_new: int
) -> tuple[jax.Array, PageTables]:
    """Pops `num_new` (i32[R]) blocks per row; returns their ids (i32[R, max_new], N for none)."""
    # Slice the top of the stack first: XLA on CPU splits a read from a long array among threads,
    # however few elements are read, and to wait for these takes longer than the other operations.
    size = min(num_new.size * max_new, tables.num_blocks)
    start = jnp.maximum(tables.num_free - size, 0)
    top = lax.dynamic_slice_in_dim(tables.free_blocks, start, size)
    taken_before = jnp.cumsum(num_new) - num_new
    lane = columns(max_new)
    depth = tables.num_free - start - 1 - taken_before[:, None] - lane
    depth = jnp.where(lane < num_new[:, None], depth, size)
    taken = read(top, depth, tables.num_blocks)
    return taken, dataclasses.replace(
        tables,
        num_free=tables.num_free - jnp.sum(num_new, dtype=jnp.int32),
        ref_counts=tables.ref_counts.at[taken].set(1, mode="drop"),
    )
