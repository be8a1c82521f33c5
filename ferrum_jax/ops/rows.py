"""Rows of page tables: which rows a sequence has, what they hold, and small changes of them.

S sequences, G layer groups, G * S rows, M blocks per row, N blocks in the pool, R rows named in a
call. An absent row is the number of rows, an absent block is N.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ferrum_jax.ops.indexing import blocks_for, columns, index_or_end, read
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ


def rows_of(tables: PageTables, seq_ids: jax.Array) -> jax.Array:
    """Returns the rows of sequences (i32[R]) in all groups, group by group: i32[G * R]."""
    seqs = index_or_end(seq_ids, tables.max_seqs)
    if tables.num_groups == 1:
        return seqs
    first = jnp.arange(tables.num_groups, dtype=jnp.int32)[:, None] * tables.max_seqs
    rows = jnp.where(seqs[None] < tables.max_seqs, first + seqs[None], tables.num_rows)
    return rows.reshape(-1)


def in_each_group(tables: PageTables, *of_seqs: jax.Array) -> tuple[jax.Array, ...]:
    """Repeats numbers of sequences (each [R]) for the rows of all groups: each [G * R]."""
    return tuple(jnp.tile(x, tables.num_groups) for x in of_seqs)


def are_unique_seqs(tables: PageTables, seq_ids: jax.Array) -> jax.Array:
    """Returns bool[]: whether each id (i32[R]) is a sequence named once, or is `NULL_SEQ`."""
    seqs = index_or_end(seq_ids, tables.max_seqs)
    mentions = jnp.zeros(tables.max_seqs, jnp.int32).at[seqs].add(1, mode="drop")
    return jnp.all((seq_ids == NULL_SEQ) | (read(mentions, seqs, 0) == 1))


def held_blocks(tables: PageTables, rows: jax.Array) -> jax.Array:
    """Returns the blocks of rows at their logical indices: i32[R, M], N where absent."""
    block_ids = read(tables.block_ids, rows, NULL_BLOCK)
    return jnp.where(block_ids == NULL_BLOCK, tables.num_blocks, block_ids)


def block_ends(tables: PageTables, rows: jax.Array) -> jax.Array:
    """Returns the logical index one past each row's last block: i32[R]."""
    held = read(tables.num_blocks_held, rows, 0)
    return held + read(tables.num_released, rows, 0) if tables.has_windows else held


def row_block_sizes(tables: PageTables, rows: jax.Array) -> jax.Array | int:
    """Returns the tokens per block of each row: i32[R], or an int if all formats have the same."""
    if len(set(tables.block_sizes)) == 1:
        return tables.block_size
    return jnp.asarray(tables.block_sizes, jnp.int32)[read(tables.token_formats, rows, 0)]


def is_uncompressed(tables: PageTables, rows: jax.Array) -> jax.Array:
    """Returns bool[R]: whether a row is native and none of its tokens was dropped."""
    return (read(tables.token_formats, rows, 0) == 0) & (read(tables.num_pruned, rows, 0) == 0)


def partial_block(
    tables: PageTables, held: jax.Array, held_lens: jax.Array, block_sizes: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each row's partly filled last block (N if none), its logical index and tokens."""
    index, num_tail = held_lens // block_sizes, held_lens % block_sizes
    row = jnp.arange(held.shape[0], dtype=jnp.int32)
    index = jnp.where(num_tail > 0, index, held.shape[1])
    block = held.at[row, index].get(mode="fill", fill_value=tables.num_blocks)
    return block, index, num_tail


def add_tokens(tables: PageTables, rows: jax.Array, num_tokens: jax.Array) -> PageTables:
    """Adds tokens (i32[R]) to the lengths of rows."""
    lens = tables.held_lens.at[rows].add(num_tokens, mode="drop")
    return dataclasses.replace(tables, held_lens=lens)


def add_blocks(tables: PageTables, rows: jax.Array, num_blocks: jax.Array) -> PageTables:
    """Adds blocks (i32[R]; negative to take away) to the numbers of blocks that rows hold."""
    held = tables.num_blocks_held.at[rows].add(num_blocks, mode="drop")
    return dataclasses.replace(tables, num_blocks_held=held)


def set_block(
    tables: PageTables, rows: jax.Array, logical: jax.Array, block_ids: jax.Array
) -> PageTables:
    """Sets the block (i32[R]) at one logical index (i32[R], M for none) of each row."""
    placed = tables.block_ids.at[rows, logical].set(block_ids, mode="drop")
    return dataclasses.replace(tables, block_ids=placed)


def share_blocks(
    tables: PageTables, rows: jax.Array, block_ids: jax.Array, first: jax.Array, end: jax.Array
) -> PageTables:
    """Makes rows reference `block_ids` (i32[R, M]) from logical index `first` to `end` (i32[R]).

    Below `first`, the rows then have no block.
    """
    logical = columns(tables.max_blocks_per_seq)
    is_shared = (logical >= first[:, None]) & (logical < end[:, None])
    added = jnp.where(is_shared, block_ids, tables.num_blocks)
    listed = jnp.where(is_shared, block_ids, NULL_BLOCK)
    logical = jnp.where(logical < end[:, None], logical, tables.max_blocks_per_seq)
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(listed, mode="drop"),
        ref_counts=tables.ref_counts.at[added].add(1, mode="drop"),
    )


def cut_rows(tables: PageTables, rows: jax.Array, held_lens: jax.Array) -> PageTables:
    """Records that rows hold `held_lens` (i32[R]) tokens, and no block beyond these.

    A row of no tokens is free, and native again.
    """
    end = blocks_for(held_lens, row_block_sizes(tables, rows))
    logical = columns(tables.max_blocks_per_seq)
    # Reading the blocks orders this write after other reads; without it XLA copies the table.
    is_cut = (logical >= end[:, None]) & (held_blocks(tables, rows) < tables.num_blocks)
    logical = jnp.where(is_cut, logical, tables.max_blocks_per_seq)
    zeros = jnp.zeros_like(rows)
    freed = jnp.where(held_lens == 0, rows, tables.num_rows)
    tables = set_formats(tables, freed, zeros, zeros)
    if tables.has_windows:
        num_released = jnp.where(held_lens == 0, 0, read(tables.num_released, rows, 0))
        tables, end = set_released(tables, rows, num_released), end - num_released
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(NULL_BLOCK, mode="drop"),
        held_lens=tables.held_lens.at[rows].set(held_lens, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[rows].set(end, mode="drop"),
    )


def set_released(tables: PageTables, rows: jax.Array, num_released: jax.Array) -> PageTables:
    """Records how many leading blocks rows have released (i32[R])."""
    released = tables.num_released.at[rows].set(num_released, mode="drop")
    return dataclasses.replace(tables, num_released=released)


def set_formats(
    tables: PageTables, rows: jax.Array, formats: jax.Array, num_pruned: jax.Array
) -> PageTables:
    """Records the format of rows, and how many of their tokens were dropped (each i32[R])."""
    return dataclasses.replace(
        tables,
        token_formats=tables.token_formats.at[rows].set(formats, mode="drop"),
        num_pruned=tables.num_pruned.at[rows].set(num_pruned, mode="drop"),
    )
