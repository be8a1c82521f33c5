"""Moves live blocks and resizes the pool: rare operations, which may copy the whole pool.

These move references to other block ids, and rebuild the stack of free blocks from the reference
counts; they drop no reference (`ops.blocks.release_blocks` does). A plan is data, computed on the
host and padded, so that plans of similar size share one program.
"""

import dataclasses
import functools
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.checks import check_live
from ferrum_jax.ops.arguments import as_padded_rows
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.ops.storage import copy_blocks
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK, IdsLike


def plan_defragment(
    ref_counts: np.ndarray, pinned: Collection[int] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """Plans the fewest moves after which live blocks have the lowest ids.

    Args:
      ref_counts: i32[N]. References of each block, on the host.
      pinned: Blocks that must not move.

    Returns:
      `(sources, targets)`, each i32[P], padded with `NULL_BLOCK` to a power of two; of length 0
      if no move is needed.

    Example:
      >>> plan_defragment(np.array([1, 0, 0, 1, 2]), pinned=[3])
      (array([4], dtype=int32), array([1], dtype=int32))
    """
    is_live = np.asarray(ref_counts) > 0
    is_pinned = np.zeros(is_live.size, bool)
    is_pinned[list(pinned)] = True
    movable = is_live & ~is_pinned
    homes = np.flatnonzero(~is_pinned)[: np.count_nonzero(movable)]
    is_home = np.zeros(is_live.size, bool)
    is_home[homes] = True
    return (
        pad_to_power_of_two(np.flatnonzero(movable & ~is_home), NULL_BLOCK),
        pad_to_power_of_two(np.flatnonzero(is_home & ~is_live), NULL_BLOCK),
    )


def move_blocks(
    state: CacheState, sources: IdsLike, targets: IdsLike
) -> tuple[CacheState, jax.Array]:
    """Moves live blocks to free ids, with all references to them; donates the state.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      sources: i32[P]. Live blocks, all different; `NULL_BLOCK` is ignored.
      targets: i32[P]. Free blocks, all different; `NULL_BLOCK` where the source is.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, if a source is not live, a target
      is not free, or a block is named twice. Otherwise all rows read as before, and the lowest
      free block is taken next.

    Raises:
      AssertionError: The shapes of `sources` and `targets` do not fit.
      ValueError: The state was consumed before.
      ValueError: An id is not an integer, or does not fit in an int32.
    """
    check_live("state", state)
    targets, sources = as_padded_rows(targets=targets, sources=sources)
    return _move_blocks(state, sources, targets)


@functools.partial(jax.jit, static_argnums=1)
def resize(state: CacheState, num_blocks: int) -> CacheState:
    """Returns the cache with a pool of another size; copies the pool.

    Args:
      state: The cache. If the pool shrinks, no block from `num_blocks` on may be live.
      num_blocks: Blocks of the new pool (static). This and all programs that take the cache are
        compiled for each size; use few sizes, for example by doubling.

    Returns:
      The cache; all rows read as before, and the lowest free block is taken next.
    """
    pool, tables = state.pool, state.tables
    kept = min(num_blocks, tables.num_blocks)

    def resized(array: jax.Array) -> jax.Array:
        added = jnp.zeros((num_blocks - kept, *array.shape[1:]), array.dtype)
        return jnp.concatenate([array[:kept], added])

    tables = _with_counts(tables, resized(tables.ref_counts))
    return state.with_pools([jax.tree.map(resized, pool)]).with_tables([tables])


def _with_counts(tables: PageTables, ref_counts: jax.Array) -> PageTables:
    """Returns tables with these counts (i32[N]) and their stack, the lowest free block on top."""
    size = ref_counts.size
    (from_the_end,) = jnp.nonzero(ref_counts[::-1] == 0, size=size, fill_value=size)
    num_free = jnp.sum(ref_counts == 0, dtype=jnp.int32)
    free_blocks = (size - 1 - from_the_end).astype(jnp.int32)
    return dataclasses.replace(
        tables, ref_counts=ref_counts, free_blocks=free_blocks, num_free=num_free
    )


@functools.partial(jax.jit, donate_argnames="state")
def _move_blocks(
    state: CacheState, sources: jax.Array, targets: jax.Array
) -> tuple[CacheState, jax.Array]:
    tables = state.tables
    size = tables.num_blocks
    is_padding = (sources == NULL_BLOCK) & (targets == NULL_BLOCK)
    sources, targets = index_or_end(sources, size), index_or_end(targets, size)
    counts = tables.ref_counts
    mentions = jnp.zeros(size, jnp.int32).at[sources].add(1, mode="drop")
    mentions = mentions.at[targets].add(1, mode="drop")
    can_move = (read(counts, sources, 0) > 0) & (read(counts, targets, 1) == 0)
    ok = jnp.all(is_padding | can_move) & jnp.all(mentions <= 1)
    sources, targets = jnp.where(ok, sources, size), jnp.where(ok, targets, size)

    new_ids = jnp.arange(size, dtype=jnp.int32).at[sources].set(targets, mode="drop")
    block_ids = read(new_ids, index_or_end(tables.block_ids, size), NULL_BLOCK)
    moved = counts.at[targets].set(read(counts, sources, 0), mode="drop")
    moved = moved.at[sources].set(0, mode="drop")
    rebuilt = _with_counts(tables, moved)
    # A select by `ok` is cheap for tables. For the pool, the copies are dropped instead.
    rebuilt = jax.tree.map(lambda new, old: jnp.where(ok, new, old), rebuilt, tables)
    rebuilt = dataclasses.replace(rebuilt, block_ids=block_ids)
    pool = copy_blocks(state.pool, sources, targets)
    return state.with_pools([pool]).with_tables([rebuilt]), ok
