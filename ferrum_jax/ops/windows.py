"""Blocks that a sliding window has passed: which they are, and how rows release them.

A window of W tokens: a query at position p sees the positions from p - W + 1 to p.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.ops.blocks import at_least_two, release_blocks
from ferrum_jax.ops.indexing import blocks_for, columns, read
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_BLOCK

_LARGEST = np.iinfo(np.int32).max


def first_needed(tables: PageTables, seq_lens: jax.Array) -> jax.Array:
    """Returns the first logical block that tokens from a position on can see.

    The block of the last token counts as needed, so that a row with tokens has a block.

    Args:
      tables: Current tables.
      seq_lens: i32[G * R]. Position of the next token in each row, group by group.

    Returns:
      i32[G * R]. 0 in groups without a window.
    """
    windows = [_LARGEST if window is None else max(window, 2) for window in tables.windows]
    of_rows = np.repeat(np.asarray(windows, np.int32), seq_lens.size // tables.num_groups)
    return jnp.maximum(seq_lens + 1 - of_rows, 0) // tables.block_size


def can_take_with_passed(
    tables: PageTables, num_new: jax.Array, rows: jax.Array, num_passed: jax.Array, width: int
) -> jax.Array:
    """Returns bool[]: whether `sum(num_new)` blocks are free, or are once rows release some.

    A passed block that another row holds too is not free then.

    Args:
      tables: Current tables.
      num_new: i32[G * R]. Blocks to take.
      rows: i32[G * R]. Rows, group by group.
      num_passed: i32[G * R]. Leading blocks of each row that its window has passed.
      width: Blocks of a row that are counted at a time (static).
    """
    rows, num_passed = _in_window_groups(tables, rows), _in_window_groups(tables, num_passed)
    num_lacking = jnp.sum(num_new, dtype=jnp.int32) - tables.num_free

    def count(i: jax.Array, total: jax.Array) -> jax.Array:
        block_ids = _leading_blocks(tables, rows, i * width, num_passed, width)[1]
        is_own = read(tables.ref_counts, block_ids, 0) == 1
        return total + jnp.sum(is_own, dtype=jnp.int32)

    # Nothing is counted while enough are free.
    num_turns = jnp.where(num_lacking > 0, blocks_for(jnp.max(num_passed), width), 0)
    return num_lacking <= lax.fori_loop(0, num_turns, count, jnp.int32(0))


def release_passed(
    tables: PageTables, rows: jax.Array, num_passed: jax.Array, width: int
) -> PageTables:
    """Releases the first `num_passed` blocks of rows (each i32[G * R]), `width` of each at a time.

    The caller counts them off `num_blocks_held`.
    """
    num_passed = _in_window_groups(tables, num_passed)
    (rows,) = at_least_two(_in_window_groups(tables, rows), padding=tables.num_rows)
    (num_passed,) = at_least_two(num_passed, padding=0)

    def release(i: jax.Array, tables: PageTables) -> PageTables:
        logical, block_ids = _leading_blocks(tables, rows, i * width, num_passed, width)
        # Orders this write after the read; without it XLA copies the table.
        logical = jnp.where(block_ids < tables.num_blocks, logical, tables.max_blocks_per_seq)
        emptied = tables.block_ids.at[rows[:, None], logical].set(NULL_BLOCK, mode="drop")
        tables = dataclasses.replace(tables, block_ids=emptied)
        return release_blocks(tables, block_ids.reshape(-1))

    tables = lax.fori_loop(0, blocks_for(jnp.max(num_passed), width), release, tables)
    released = tables.num_released.at[rows].add(num_passed, mode="drop")
    return dataclasses.replace(tables, num_released=released)


def _in_window_groups(tables: PageTables, of_rows: jax.Array) -> jax.Array:
    """Selects the numbers (i32[G * R], group by group) of rows in groups with a window."""
    groups = [g for g, window in enumerate(tables.windows) if window is not None]
    return of_rows.reshape(tables.num_groups, -1)[np.asarray(groups)].reshape(-1)


def _leading_blocks(
    tables: PageTables, rows: jax.Array, start: jax.Array, num_passed: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
    """Returns logical indices and ids of passed blocks from number `start` on: i32[R, width].

    Absent ones are M and N.
    """
    lane = start + columns(width)
    logical = read(tables.num_released, rows, 0)[:, None] + lane
    logical = jnp.where(lane < num_passed[:, None], logical, tables.max_blocks_per_seq)
    block_ids = tables.block_ids.at[rows[:, None], logical].get(
        mode="fill", fill_value=tables.num_blocks, wrap_negative_indices=False
    )
    return logical, block_ids
