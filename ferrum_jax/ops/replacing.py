"""Replaces the blocks of rows: by fewer for the same tokens, or by blocks that are cached.

M blocks per row, N blocks in the pool, R rows named in a call.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ferrum_jax.ops.blocks import at_least_two, can_take, pop_blocks, release_blocks, retain_blocks
from ferrum_jax.ops.indexing import blocks_for, index_or_end, read
from ferrum_jax.ops.rows import add_blocks, add_tokens, held_blocks, set_formats, set_released
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_BLOCK, TokenFormat


def rewrite_row(
    tables: PageTables,
    seq_id: jax.Array,
    num_tokens: jax.Array,
    token_format: TokenFormat,
    max_blocks: int,
) -> tuple[PageTables, jax.Array, jax.Array]:
    """Replaces a row's blocks by those for fewer tokens, or for another format.

    The row reuses the blocks that it alone references, and takes free blocks if these are too few.
    It releases its other blocks; their content stays unchanged for the other rows.

    Args:
      tables: Current tables.
      seq_id: i32[]. The row.
      num_tokens: i32[]. Tokens that stay in each layer and head; the others count as pruned.
      token_format: Format in which the row will be written (static).
      max_blocks: The most blocks that the row may then hold (static).

    Returns:
      `(tables, block_ids, ok)`: block_ids is i32[max_blocks], the row's blocks, then N; only N if
      not ok. ok is bool[], false if the row holds fewer tokens or too few blocks are free.
    """
    row = index_or_end(seq_id, tables.num_rows)
    lens, size = read(tables.held_lens, row, 0), tables.block_sizes[token_format]
    num_blocks = blocks_for(num_tokens, size)
    held = held_blocks(tables, row[None])[0]
    is_own = read(tables.ref_counts, held, 0) == 1
    place = jnp.cumsum(is_own, dtype=jnp.int32) - 1
    is_reused = is_own & (place < num_blocks)
    num_reused = jnp.sum(is_reused, dtype=jnp.int32)
    num_new = num_blocks - num_reused
    ok = (num_tokens > 0) & (num_tokens <= lens)
    ok &= num_blocks <= min(max_blocks, tables.max_blocks_per_seq)
    ok &= can_take(tables, num_new)
    row = jnp.where(ok, row, tables.num_rows)

    taken, tables = pop_blocks(tables, jnp.where(ok, num_new, 0)[None], max_blocks)
    lane = jnp.arange(max_blocks, dtype=jnp.int32)
    block_ids = jnp.full(max_blocks, tables.num_blocks, jnp.int32)
    block_ids = block_ids.at[jnp.where(is_reused & ok, place, max_blocks)].set(held, mode="drop")
    fresh_place = jnp.where(lane < num_new, num_reused + lane, max_blocks)
    block_ids = block_ids.at[fresh_place].set(taken[0], mode="drop")
    released = jnp.where(ok & ~is_reused, held, tables.num_blocks)
    tables = release_blocks(tables, released, are_distinct=True)

    new_row = jnp.full(tables.max_blocks_per_seq, NULL_BLOCK, jnp.int32)
    lane = jnp.where(lane < num_blocks, lane, new_row.size)
    new_row = new_row.at[lane].set(block_ids, mode="drop")
    num_pruned = read(tables.num_pruned, row, 0) + lens - num_tokens
    tables = set_formats(tables, row, jnp.full_like(row, token_format), num_pruned)
    tables = dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[row].set(new_row, mode="drop"),
        held_lens=tables.held_lens.at[row].set(num_tokens, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[row].set(num_blocks, mode="drop"),
    )
    return tables, block_ids, ok


def adopt_blocks(
    tables: PageTables, rows: jax.Array, first: jax.Array, block_ids: jax.Array
) -> tuple[PageTables, jax.Array]:
    """Makes rows share live blocks in place of their own ones; lengths and counts stay.

    Args:
      tables: Current tables.
      rows: i32[R]. The rows, R at least 1.
      first: i32[]. Logical index from which on blocks are replaced.
      block_ids: i32[R, P]. Live blocks; N where a row keeps its own, or has none.

    Returns:
      `(tables, replaced)`, replaced: i32[R * P], the blocks that rows held there, N for none.
    """
    num_rows, width = block_ids.shape
    rows = jnp.repeat(rows, width, total_repeat_length=num_rows * width)
    logical = jnp.tile(first + jnp.arange(width, dtype=jnp.int32), num_rows)
    rows, logical = at_least_two(rows, logical)
    (block_ids,) = at_least_two(block_ids.reshape(-1), padding=tables.num_blocks)
    logical = jnp.where(block_ids < tables.num_blocks, logical, tables.max_blocks_per_seq)
    replaced = tables.block_ids.at[rows, logical].get(mode="fill", fill_value=NULL_BLOCK)
    replaced = jnp.where(replaced == NULL_BLOCK, tables.num_blocks, replaced)
    tables = retain_blocks(tables, block_ids)
    placed = tables.block_ids.at[rows, logical].set(block_ids, mode="drop")
    tables = dataclasses.replace(tables, block_ids=placed)
    return release_blocks(tables, replaced, are_distinct=True), replaced


def start_with_blocks(
    tables: PageTables,
    rows: jax.Array,
    block_ids: jax.Array,
    num_blocks: jax.Array,
    num_released: jax.Array | None,
) -> PageTables:
    """Makes free rows begin with live blocks, which count as full.

    Args:
      tables: Current tables.
      rows: i32[R]. The rows, R at least 1.
      block_ids: i32[R, P]. The blocks at their logical indices; N where one is released, and behind
        the last one.
      num_blocks: i32[]. Number of these blocks in each row, released ones included.
      num_released: i32[R]. Leading blocks that count as released; None without a window.

    Returns:
      The tables.
    """
    tables, _ = adopt_blocks(tables, rows, jnp.zeros_like(num_blocks), block_ids)
    lens = jnp.full_like(rows, num_blocks * tables.block_size)
    held = jnp.sum(block_ids < tables.num_blocks, axis=1, dtype=jnp.int32)
    if num_released is not None:
        tables = set_released(tables, rows, num_released)
    (rows,) = at_least_two(rows, padding=tables.num_rows)
    held, lens = at_least_two(held, lens)
    return add_tokens(add_blocks(tables, rows, held), rows, lens)
