"""The compiled programs of a manager's pool: they donate the state, and change it in place.

Each change of the cache is one program, so that a program which fails before it runs has changed
nothing. A program also erases the blocks that it frees, if `scrub` (static) is set.

S rows, M blocks per row, N blocks in the pool, R rows or P blocks of one call.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
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


@functools.partial(jax.jit, static_argnames="max_new_tokens", donate_argnames="tables")
def extend_rows(
    tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array, max_new_tokens: int
) -> tuple[PageTables, jax.Array]:
    """Allocates room for `num_tokens` (i32[R]) more tokens in rows (i32[R])."""
    tables, ok, _ = _made(table_ops.extend_rows(tables, seq_ids, num_tokens, max_new_tokens))
    return tables, ok


@functools.partial(jax.jit, static_argnames=("max_new_tokens", "scrub"), donate_argnames="state")
def extend_past_windows(
    state: CacheState,
    seq_ids: jax.Array,
    num_tokens: jax.Array,
    max_new_tokens: int,
    scrub: bool,
) -> tuple[CacheState, jax.Array]:
    """Like `extend_rows`, for a cache with sliding windows: blocks that they pass are erased."""
    tables, pool = state.tables, state.pool
    rows = row_ops.rows_of(tables, seq_ids)
    held = row_ops.held_blocks(tables, rows)
    ref_counts = read(tables.ref_counts, held, 0)
    change = table_ops.extend_rows(tables, seq_ids, num_tokens, max_new_tokens)
    tables, ok, _ = _made(change)
    if scrub:
        is_passed = columns(held.shape[1]) < read(tables.num_released, rows, 0)[:, None]
        passed = jnp.where(is_passed, held, tables.num_blocks)
        is_any = jnp.any(passed < tables.num_blocks)
        pool = lax.cond(is_any, _erase_passed, lambda pool, *_: pool, pool, passed, ref_counts)
    return _with_parts(state, pool, tables), ok


@functools.partial(jax.jit, donate_argnames="tables")
def allocate_rows(
    tables: PageTables,
    seq_ids: jax.Array,
    token_formats: jax.Array,
    num_pruned: jax.Array,
    num_tokens: jax.Array,
    num_released: jax.Array | None,
) -> tuple[PageTables, jax.Array]:
    """Starts sequences (i32[R]) as `PoolCounts.rows_for` describes them.

    Args:
      tables: Current tables.
      seq_ids: i32[R]. The sequences.
      token_formats: i32[G * R]. Format of each row, group by group.
      num_pruned: i32[G * R]. Tokens that were dropped.
      num_tokens: i32[G * R]. Tokens of each row's blocks, released ones included.
      num_released: i32[G * R]. Leading blocks that are released; None without a window.
    """
    rows = row_ops.rows_of(tables, seq_ids)
    tables = row_ops.set_formats(tables, rows, token_formats, num_pruned)
    tables, ok, _ = _made(table_ops.start_rows(tables, seq_ids, num_tokens, num_released))
    return tables, ok


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def free_rows(state: CacheState, seq_ids: jax.Array, scrub: bool) -> CacheState:
    """Empties rows (i32[R])."""
    rows = row_ops.rows_of(state.tables, seq_ids)
    held = row_ops.held_blocks(state.tables, rows).ravel()
    return _changed(state, table_ops.free_rows(state.tables, seq_ids), held, scrub)


@functools.partial(jax.jit, donate_argnames="tables")
def retain_blocks(tables: PageTables, block_ids: jax.Array) -> PageTables:
    """Adds one reference to each of `block_ids` (i32[P], `NULL_BLOCK` for none)."""
    return blocks.retain_blocks(tables, index_or_end(block_ids, tables.num_blocks))


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def release_blocks(state: CacheState, block_ids: jax.Array, scrub: bool) -> CacheState:
    """Releases one reference to each of `block_ids` (i32[P], `NULL_BLOCK` for none)."""
    block_ids = index_or_end(block_ids, state.tables.num_blocks)
    tables = blocks.release_blocks(state.tables, block_ids)
    return _changed(state, tables, block_ids, scrub)


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
    tables, (num_tokens, num_shared, num_tail) = state.tables, numbers
    rows = row_ops.rows_of(tables, seq_id[None])
    block_ids, tails = (index_or_end(ids, tables.num_blocks) for ids in (block_ids, tails))
    tables = replacing.start_with_blocks(tables, rows, block_ids, num_shared, num_released)
    num_new = num_tokens - num_shared * tables.block_size
    capacity = tables.max_blocks_per_seq * tables.block_size
    change = table_ops.extend_rows(tables, seq_id[None], num_new[None], capacity)
    tables, ok, _ = _made(change)
    targets = tables.block_ids[rows, num_shared]
    targets = jnp.where(tails < tables.num_blocks, targets, tables.num_blocks)
    tails, targets = blocks.at_least_two(tails, targets, padding=tables.num_blocks)
    counts = jnp.full_like(tails, num_tail)
    copies = table_ops.BlockCopies(tails, targets, targets, counts)
    return _with_parts(state, storage.apply_copies(state.pool, copies), tables), ok


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def commit_seq(
    state: CacheState,
    seq_id: jax.Array,
    first: jax.Array,
    adopted: jax.Array,
    added: jax.Array,
    scrub: bool,
) -> CacheState:
    """Replaces blocks of a sequence by cached ones, and retains further ones.

    Args:
      state: The cache.
      seq_id: i32[]. The sequence.
      first: i32[]. Logical index of the first block that is replaced.
      adopted: i32[G, P]. The cached blocks of each group; `NULL_BLOCK` where it keeps its own, or
        has none.
      added: i32[G * P]. Blocks that get one more reference, `NULL_BLOCK` behind the last one.
      scrub: Whether the blocks that were replaced are erased (static).
    """
    rows = row_ops.rows_of(state.tables, seq_id[None])
    adopted, added = (index_or_end(ids, state.tables.num_blocks) for ids in (adopted, added))
    tables, replaced = replacing.adopt_blocks(state.tables, rows, first, adopted)
    return _changed(state, blocks.retain_blocks(tables, added), replaced, scrub)


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
      adopted: i32[G, P]. Cached blocks of each group with the same tokens; `NULL_BLOCK` where it has
        none.
    """
    source, target = seq_ids
    change = table_ops.share_rows(state.tables, source[None], target[None], num_tokens[None])
    tables, _, copies = _made(change)
    rows = row_ops.rows_of(tables, target[None])
    adopted = index_or_end(adopted, tables.num_blocks)
    tables, _ = replacing.adopt_blocks(tables, rows, first, adopted)
    return _with_parts(state, storage.apply_copies(state.pool, copies), tables)


@functools.partial(jax.jit, static_argnames="scrub", donate_argnames="state")
def move_blocks(
    state: CacheState, sources: jax.Array, targets: jax.Array, scrub: bool
) -> CacheState:
    """Moves live blocks to free ids, each i32[P]; see `ops.migration.move_blocks`."""
    moved, _ = move(state, sources, targets)
    return _changed(moved, moved.tables, index_or_end(sources, moved.tables.num_blocks), scrub)


@functools.partial(jax.jit, donate_argnames="state")
def erase_blocks(state: CacheState, block_ids: jax.Array) -> CacheState:
    """Zeroes those of `block_ids` (i32[P], `NULL_BLOCK` for none) that are free."""
    block_ids = index_or_end(block_ids, state.tables.num_blocks)
    return _changed(state, state.tables, block_ids, True)


@functools.partial(jax.jit, donate_argnames="state")
def erase_tails(state: CacheState, rows: jax.Array) -> CacheState:
    """Zeroes the slots past the last token of native rows (i32[R], `NULL_SEQ` for none).

    The last block of each row is not full, and no other row holds it.
    """
    pool, tables, size = state.pool, state.tables, state.tables.block_size
    rows = index_or_end(rows, tables.num_rows)
    num_tokens = read(tables.held_lens, rows, 0)
    last = tables.block_ids.at[rows, num_tokens // size].get(mode="fill", fill_value=NULL_BLOCK)
    block_ids = index_or_end(last, tables.num_blocks)
    is_kept = columns(size) < (num_tokens % size)[:, None]

    def erased(array: jax.Array) -> jax.Array:
        blocks = array.at[block_ids].get(mode="clip")
        blocks = jnp.where(is_kept[:, None, None, :, None], blocks, jnp.zeros_like(blocks))
        return array.at[block_ids].set(blocks, mode="drop")

    return _with_parts(state, jax.tree.map(erased, pool), tables)


@jax.jit
def are_held(tables: PageTables) -> jax.Array:
    """Returns which blocks are held: bool[N]."""
    return tables.ref_counts > 0


@jax.jit
def freed_since(tables: PageTables, were_held: jax.Array) -> jax.Array:
    """Returns which of the blocks held before (bool[N]) are free now: bool[N]."""
    return were_held & (tables.ref_counts == 0)


@jax.jit
def matches(tables: PageTables, counts: dict[str, jax.Array]) -> jax.Array:
    """Returns bool[]: whether tables match counts, each named after a field of the tables."""
    same = (jnp.all(getattr(tables, name) == count) for name, count in counts.items())
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
def rows_of_table(block_ids: jax.Array, rows: jax.Array) -> jax.Array:
    """Returns rows (i32[...]) of a table: i32[..., M]."""
    return block_ids[rows]


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


def _changed(
    state: CacheState, tables: PageTables, block_ids: jax.Array, scrub: bool
) -> CacheState:
    """Returns the state with new tables; those of `block_ids` that are free now are erased."""
    pool = state.pool
    if scrub:
        is_free = read(tables.ref_counts, block_ids, 1) == 0
        pool = storage.zero_blocks(pool, jnp.where(is_free, block_ids, tables.num_blocks))
    return _with_parts(state, pool, tables)


def _erase_passed(pool: BlockPool, passed: jax.Array, ref_counts: jax.Array) -> BlockPool:
    """Zeroes those blocks (i32[R, M], N for none) that had no references but the released ones.

    They may have been taken again: the counts (i32[R, M]) are those from before.
    """
    num_released = jnp.zeros(pool.num_blocks, jnp.int32).at[passed].add(1, mode="drop")
    is_freed = read(num_released, passed, 0) == ref_counts
    return storage.zero_blocks(pool, jnp.where(is_freed, passed, pool.num_blocks).ravel())


def _made(change: table_ops.Change) -> tuple[PageTables, jax.Array, Any]:
    """Returns changed tables (unchanged if they do not allow it), whether they allow it, copies."""
    tables, copies = change.make(change.ok)
    return tables, change.ok, copies


def _with_parts(state: CacheState, pool: BlockPool, tables: PageTables) -> CacheState:
    """Returns the state with another pool and other tables."""
    return state.with_pools([pool]).with_tables([tables])
