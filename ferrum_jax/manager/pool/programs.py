"""The compiled programs that change a manager's pools: they donate the state, and work in place.

Each change of the cache is one program, so that a program which fails before it runs has changed
nothing. A program also erases the blocks that it frees, if `scrub` (static) is set.

S sequences, G layer groups of all pools, M blocks per row, N blocks in a pool, R rows or P blocks
of one call.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.ops import blocks, replacing, storage
from ferrum_jax.ops import rows as row_ops
from ferrum_jax.ops import tables as table_ops
from ferrum_jax.ops.indexing import columns, index_or_end, read
from ferrum_jax.ops.migration import move_blocks as move
from ferrum_jax.state import BlockPool, CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK

# The ids are read before the new tables are kept: the old ones must stay until then.
take_blocks = jax.jit(blocks.take_blocks, static_argnames="max_blocks")

AllTables = tuple[PageTables, ...]
"""The page tables of each pool."""

PoolParts = tuple[BlockPool, PageTables]
"""A pool and its tables."""

PerPoolIds = tuple[jax.Array, ...]
"""Ids of blocks in each pool: i32[P], `NULL_BLOCK` for none."""


@functools.partial(jax.jit, static_argnames="max_new_tokens", donate_argnames="page_tables")
def extend_rows(
    page_tables: AllTables, seq_ids: jax.Array, num_tokens: jax.Array, max_new_tokens: int
) -> tuple[AllTables, jax.Array]:
    """Allocates room for `num_tokens` (i32[R]) more tokens in sequences (i32[R])."""
    changes = [table_ops.extend_rows(t, seq_ids, num_tokens, max_new_tokens) for t in page_tables]
    page_tables, _, ok = table_ops.make_all(changes)
    return page_tables, ok


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "scrub"), donate_argnames="state")
def extend_past_windows(
    state: CacheState,
    seq_ids: jax.Array,
    num_tokens: jax.Array,
    max_new_tokens: int,
    scrub: bool,
) -> tuple[CacheState, jax.Array]:
    """Like `extend_rows`, for a cache with sliding windows: blocks that they pass are erased."""
    changes = [
        table_ops.extend_rows(t, seq_ids, num_tokens, max_new_tokens) for t in state.page_tables
    ]
    page_tables, _, ok = table_ops.make_all(changes)
    pools = state.pools
    if scrub:
        before = zip(pools, state.page_tables, page_tables, strict=True)
        pools = tuple(_without_passed(*parts, seq_ids) for parts in before)
    return state.with_pools(pools).with_tables(page_tables), ok


@functools.partial(jax.jit, donate_argnames="page_tables")
def allocate_rows(
    page_tables: AllTables,
    seq_ids: jax.Array,
    token_formats: jax.Array,
    num_pruned: jax.Array,
    num_tokens: jax.Array,
    num_released: jax.Array | None,
) -> tuple[AllTables, jax.Array]:
    """Starts sequences (i32[R]) as `PoolCounts.rows_for` describes them.

    Args:
      page_tables: Current tables.
      seq_ids: i32[R]. The sequences.
      token_formats: i32[G * R]. Format of each row, group by group.
      num_pruned: i32[G * R]. Tokens that were dropped.
      num_tokens: i32[G * R]. Tokens of each row's blocks, released ones included.
      num_released: i32[G * R]. Leading blocks that are released; None without a window.
    """
    numbers = (_by_pool(page_tables, x) for x in (token_formats, num_pruned, num_tokens))
    released = _by_pool(page_tables, num_released)
    changes = []
    for tables, formats, pruned, lens, first in zip(page_tables, *numbers, released, strict=True):
        rows = row_ops.rows_of(tables, seq_ids)
        tables = row_ops.set_formats(tables, rows, formats, pruned)
        changes.append(table_ops.start_rows(tables, seq_ids, lens, first))
    page_tables, _, ok = table_ops.make_all(changes)
    return page_tables, ok


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def free_rows(state: CacheState, seq_ids: jax.Array, scrub: bool) -> CacheState:
    """Empties sequences (i32[R])."""

    def free(pool: BlockPool, tables: PageTables) -> PoolParts:
        held = row_ops.held_blocks(tables, row_ops.rows_of(tables, seq_ids)).ravel()
        return _changed(pool, table_ops.free_rows(tables, seq_ids), held, scrub)

    return _in_each_pool(state, free)


@functools.partial(jax.jit, donate_argnames="page_tables")
def retain_blocks(page_tables: AllTables, block_ids: PerPoolIds) -> AllTables:
    """Adds one reference to each of `block_ids`."""
    pairs = zip(page_tables, block_ids, strict=True)
    return tuple(blocks.retain_blocks(t, index_or_end(ids, t.num_blocks)) for t, ids in pairs)


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def release_blocks(state: CacheState, block_ids: PerPoolIds, scrub: bool) -> CacheState:
    """Releases one reference to each of `block_ids`."""

    def release(pool: BlockPool, tables: PageTables, ids: jax.Array) -> PoolParts:
        ids = index_or_end(ids, tables.num_blocks)
        return _changed(pool, blocks.release_blocks(tables, ids), ids, scrub)

    return _in_each_pool(state, release, block_ids)


@functools.partial(jax.jit, donate_argnames="state")
def attach_seq(
    state: CacheState,
    seq_id: jax.Array,
    block_ids: jax.Array,
    tails: jax.Array,
    numbers: jax.Array,
    num_released: jax.Array | None,
) -> tuple[CacheState, jax.Array]:
    """Starts a sequence with cached blocks and a copy of the first tokens of other blocks.

    Args:
      state: The cache.
      seq_id: i32[]. The sequence.
      block_ids: i32[G, P]. The cached blocks of each group; `NULL_BLOCK` where one is released, and
        behind the last one.
      tails: i32[G]. Blocks with the tokens that are copied behind them; `NULL_BLOCK` for none.
      numbers: i32[3]. Tokens of the sequence, more than these blocks hold; number of these blocks
        in each group, released ones included; tokens that are copied.
      num_released: i32[G]. Leading blocks that count as released; None without a window.

    Returns:
      `(state, ok)`, ok: bool[]. Whether enough blocks were free for the rest of the sequence.
    """
    num_tokens, num_shared, num_tail = numbers
    of_pools = [_by_pool(state.page_tables, x) for x in (block_ids, num_released)]
    changes = []
    for tables, ids, released in zip(state.page_tables, *of_pools, strict=True):
        rows = row_ops.rows_of(tables, seq_id[None])
        ids = index_or_end(ids, tables.num_blocks)
        tables = replacing.start_with_blocks(tables, rows, ids, num_shared, released)
        num_new = num_tokens - num_shared * tables.block_size
        capacity = tables.max_blocks_per_seq * tables.block_size
        changes.append(table_ops.extend_rows(tables, seq_id[None], num_new[None], capacity))
    page_tables, _, ok = table_ops.make_all(changes)

    def copy_tails(pool: BlockPool, tables: PageTables, sources: jax.Array) -> PoolParts:
        rows, size = row_ops.rows_of(tables, seq_id[None]), tables.num_blocks
        sources = index_or_end(sources, size)
        targets = jnp.where(sources < size, tables.block_ids[rows, num_shared], size)
        sources, targets = blocks.at_least_two(sources, targets, padding=size)
        counts = jnp.full_like(sources, num_tail)
        copies = table_ops.BlockCopies(sources, targets, targets, counts)
        return storage.apply_copies(pool, copies), tables

    state = state.with_tables(page_tables)
    return _in_each_pool(state, copy_tails, _by_pool(page_tables, tails)), ok


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def commit_seq(
    state: CacheState,
    seq_id: jax.Array,
    first: jax.Array,
    adopted: jax.Array,
    added: PerPoolIds,
    scrub: bool,
) -> CacheState:
    """Replaces blocks of a sequence by cached ones, and retains further ones.

    Args:
      state: The cache.
      seq_id: i32[]. The sequence.
      first: i32[]. Logical index of the first block that is replaced.
      adopted: i32[G, P]. The cached blocks of each group; `NULL_BLOCK` where it keeps its own, or
        has none.
      added: Blocks that get one more reference.
      scrub: Whether the blocks that were replaced are erased (static).
    """

    def commit(
        pool: BlockPool, tables: PageTables, adopted: jax.Array, added: jax.Array
    ) -> PoolParts:
        rows = row_ops.rows_of(tables, seq_id[None])
        adopted, added = (index_or_end(ids, tables.num_blocks) for ids in (adopted, added))
        tables, replaced = replacing.adopt_blocks(tables, rows, first, adopted)
        return _changed(pool, blocks.retain_blocks(tables, added), replaced, scrub)

    return _in_each_pool(state, commit, _by_pool(state.page_tables, adopted), added)


@functools.partial(jax.jit, donate_argnames="state")
def share_seq(
    state: CacheState,
    seq_ids: tuple[jax.Array, jax.Array],
    num_tokens: jax.Array,
    first: jax.Array,
    adopted: jax.Array,
) -> CacheState:
    """Makes a sequence hold the first tokens of another one, and adopt cached blocks behind these.

    Args:
      state: The cache.
      seq_ids: `(source, target)`, each i32[].
      num_tokens: i32[]. Tokens that are shared.
      first: i32[]. Logical index of the first of the `adopted` blocks.
      adopted: i32[G, P]. Cached blocks of each group with the same tokens; `NULL_BLOCK` where it
        has none.
    """
    source, target = seq_ids
    numbers = source[None], target[None], num_tokens[None]
    changes = [table_ops.share_rows(tables, *numbers) for tables in state.page_tables]
    page_tables, copies, _ = table_ops.make_all(changes)

    def adopt(pool: BlockPool, tables: PageTables, copies: Any, adopted: jax.Array) -> PoolParts:
        rows = row_ops.rows_of(tables, target[None])
        adopted = index_or_end(adopted, tables.num_blocks)
        tables, _ = replacing.adopt_blocks(tables, rows, first, adopted)
        return storage.apply_copies(pool, copies), tables

    adopted_by_pool = _by_pool(page_tables, adopted)
    return _in_each_pool(state.with_tables(page_tables), adopt, copies, adopted_by_pool)


@functools.partial(jax.jit, donate_argnames="state")
def fork_seq(
    state: CacheState, source: jax.Array, seq_ids: jax.Array
) -> tuple[CacheState, jax.Array]:
    """Starts sequences (i32[R]) with the blocks of another one (i32[]), partial ones copied."""
    sources = jnp.broadcast_to(source, seq_ids.shape)
    changes = [table_ops.fork_rows(tables, sources, seq_ids) for tables in state.page_tables]
    page_tables, copies, ok = table_ops.make_all(changes)

    def copy_tails(pool: BlockPool, tables: PageTables, copies: Any) -> PoolParts:
        return storage.apply_copies(pool, copies), tables

    return _in_each_pool(state.with_tables(page_tables), copy_tails, copies), ok


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def move_blocks(
    state: CacheState, sources: PerPoolIds, targets: PerPoolIds, scrub: bool
) -> CacheState:
    """Moves live blocks to free ids; see `ops.migration.move_blocks`."""
    for i, (old, new) in enumerate(zip(sources, targets, strict=True)):
        if not old.size:
            continue
        moved, _ = move(state.part(i), old, new)
        old = index_or_end(old, moved.tables.num_blocks)
        pool, tables = _changed(moved.pool, moved.tables, old, scrub)
        state = state.with_part(i, moved.with_pools([pool]).with_tables([tables]))
    return state


@functools.partial(jax.jit, donate_argnames="state")
def erase_blocks(state: CacheState, block_ids: PerPoolIds) -> CacheState:
    """Zeroes those of `block_ids` that are free."""

    def erase(pool: BlockPool, tables: PageTables, ids: jax.Array) -> PoolParts:
        return _changed(pool, tables, index_or_end(ids, tables.num_blocks), True)

    return _in_each_pool(state, erase, block_ids)


@functools.partial(jax.jit, donate_argnames="state")
def erase_tails(state: CacheState, rows: tuple[jax.Array, ...]) -> CacheState:
    """Zeroes the slots past the last token of native rows.

    Args:
      state: The cache.
      rows: Rows of each pool's tables, i32[R], `NULL_SEQ` for none. The last block of each is not
        full, and no other row holds it.
    """
    return _in_each_pool(state, _without_tails, rows)


def _in_each_pool(
    state: CacheState, change: Callable[..., PoolParts], *of_pools: Sequence[Any]
) -> CacheState:
    """Changes each pool and its tables, given what each of `of_pools` has for the pool."""
    parts = zip(state.pools, state.page_tables, *of_pools, strict=True)
    pools, page_tables = zip(*(change(*part) for part in parts), strict=True)
    return CacheState(pools, page_tables, state.layers)


def _by_pool(page_tables: AllTables, of_groups: jax.Array | None) -> list[Any]:
    """Returns the part of each pool of an array with a row, or several, for each layer group."""
    if of_groups is None or len(page_tables) == 1:
        return [of_groups] * len(page_tables)
    num_groups = np.asarray([tables.num_groups for tables in page_tables])
    ends = np.cumsum(num_groups) * (of_groups.shape[0] // num_groups.sum())
    return jnp.split(of_groups, ends[:-1])


def _changed(pool: BlockPool, tables: PageTables, block_ids: jax.Array, scrub: bool) -> PoolParts:
    """Returns the pool with changed tables; those of `block_ids` that are free now are erased."""
    if scrub and block_ids.size:
        is_free = read(tables.ref_counts, block_ids, 1) == 0
        pool = storage.zero_blocks(pool, jnp.where(is_free, block_ids, tables.num_blocks))
    return pool, tables


def _without_tails(pool: BlockPool, tables: PageTables, rows: jax.Array) -> PoolParts:
    """Zeroes what `erase_tails` says in one pool."""
    if not rows.size:
        return pool, tables
    size, rows = tables.block_size, index_or_end(rows, tables.num_rows)
    num_tokens = read(tables.held_lens, rows, 0)
    last = tables.block_ids.at[rows, num_tokens // size].get(mode="fill", fill_value=NULL_BLOCK)
    block_ids = index_or_end(last, tables.num_blocks)
    is_kept = columns(size) < (num_tokens % size)[:, None]

    def erased(array: jax.Array) -> jax.Array:
        blocks = array.at[block_ids].get(mode="clip")
        blocks = jnp.where(is_kept[:, None, None, :, None], blocks, jnp.zeros_like(blocks))
        return array.at[block_ids].set(blocks, mode="drop")

    return jax.tree.map(erased, pool), tables


def _without_passed(
    pool: BlockPool, before: PageTables, tables: PageTables, seq_ids: jax.Array
) -> BlockPool:
    """Zeroes the blocks that the windows of sequences (i32[R]) have passed since `before`."""
    if not tables.has_windows:
        return pool
    rows = row_ops.rows_of(tables, seq_ids)
    held = row_ops.held_blocks(before, rows)
    ref_counts = read(before.ref_counts, held, 0)
    is_passed = columns(held.shape[1]) < read(tables.num_released, rows, 0)[:, None]
    passed = jnp.where(is_passed, held, tables.num_blocks)
    is_any = jnp.any(passed < tables.num_blocks)
    return lax.cond(is_any, _erase_passed, lambda pool, *_: pool, pool, passed, ref_counts)


def _erase_passed(pool: BlockPool, passed: jax.Array, ref_counts: jax.Array) -> BlockPool:
    """Zeroes those blocks (i32[R, M], N for none) that had no references but the released ones.

    They may have been taken again: the counts (i32[R, M]) are those from before.
    """
    num_released = jnp.zeros(pool.num_blocks, jnp.int32).at[passed].add(1, mode="drop")
    is_freed = read(num_released, passed, 0) == ref_counts
    return storage.zero_blocks(pool, jnp.where(is_freed, passed, pool.num_blocks).ravel())
