"""Operations on page tables, of which the operations on a cache are made.

Each takes tables. One that can fail returns a `Change`: whether it can be made, and the function
that makes it, once all pools have agreed. The cost follows the rows and blocks named, not the
pool's size.

S sequences, G layer groups, G * S rows, M blocks per row, N blocks in the pool, R sequences named
in a call.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.ops.blocks import at_least_two, can_take, pop_blocks, release_blocks
from ferrum_jax.ops.indexing import blocks_for, columns, read
from ferrum_jax.ops.rows import (
    add_blocks,
    add_tokens,
    are_unique_seqs,
    block_ends,
    cut_rows,
    held_blocks,
    in_each_group,
    is_uncompressed,
    partial_block,
    row_block_sizes,
    rows_of,
    set_block,
    set_formats,
    set_released,
    share_blocks,
)
from ferrum_jax.ops.windows import can_take_with_passed, first_needed, release_passed
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_SEQ


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCopies:
    """Copies between blocks of the pool that changed tables require.

    The first `num_tokens` tokens of `targets` come from `sources`, the rest from `backgrounds`.

    Attributes:
      sources: i32[R]. Block ids; N (the size of the pool) for no copy.
      backgrounds: i32[R]. Block ids.
      targets: i32[R]. Block ids; N for no copy.
      num_tokens: i32[R]. Tokens that come from `sources`.
    """

    sources: jax.Array
    backgrounds: jax.Array
    targets: jax.Array
    num_tokens: jax.Array


class Change(NamedTuple):
    """A change of one pool's tables, which is made only if all pools can make theirs.

    Attributes:
      ok: bool[]. Whether these tables allow the change.
      make: Takes the `ok` of all pools, folds it into the indices, so that all scatters are dropped
        if it is false, and returns the tables and the copies that they require.
    """

    ok: jax.Array
    make: Callable[[jax.Array], tuple[PageTables, BlockCopies | None]]


def make_all(
    changes: Sequence[Change],
) -> tuple[tuple[PageTables, ...], tuple[BlockCopies | None, ...], jax.Array]:
    """Makes a change of each pool, or none of them; returns tables, copies and ok (bool[])."""
    ok = functools.reduce(jnp.logical_and, (change.ok for change in changes))
    changed, copies = zip(*(change.make(ok) for change in changes), strict=True)
    return changed, copies, ok


def allocate_rows(tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array) -> Change:
    """Allocates blocks for `num_tokens` (i32[R]) in free sequences; see `ops.allocate`."""
    (num_tokens,) = in_each_group(tables, num_tokens)
    return start_rows(tables, seq_ids, num_tokens)


def start_rows(
    tables: PageTables,
    seq_ids: jax.Array,
    num_tokens: jax.Array,
    num_released: jax.Array | None = None,
) -> Change:
    """Allocates blocks for free sequences.

    Args:
      tables: Current tables.
      seq_ids: i32[R]. The sequences.
      num_tokens: i32[G * R]. Tokens of each row, group by group.
      num_released: i32[G * R]. Leading blocks that the rows count as released already; fewer than
        the tokens need. None for none.
    """
    is_unique, rows = are_unique_seqs(tables, seq_ids), rows_of(tables, seq_ids)
    (is_named,) = in_each_group(tables, seq_ids != NULL_SEQ)
    num_needed = blocks_for(num_tokens, row_block_sizes(tables, rows))
    fits = (num_tokens >= 0) & (num_needed <= tables.max_blocks_per_seq)
    num_new = num_needed if num_released is None else num_needed - num_released
    num_new = jnp.where(is_named, num_new, 0)
    is_free = read(tables.num_blocks_held, rows, 0) == 0
    ok = is_unique & jnp.all(~is_named | (fits & is_free)) & can_take(tables, num_new)

    def make(ok: jax.Array) -> tuple[PageTables, None]:
        changed, taken = tables, jnp.where(ok, num_new, 0)
        ends = jnp.zeros_like(rows)
        if num_released is not None:
            ends = num_released
            changed = set_released(changed, jnp.where(ok, rows, tables.num_rows), ends)
        changed = _append_blocks(changed, rows, ends, taken, tables.max_blocks_per_seq)
        changed = add_blocks(changed, rows, taken)
        return add_tokens(changed, rows, jnp.where(ok & is_named, num_tokens, 0)), None

    return Change(ok, make)


def extend_rows(
    tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array, max_new_tokens: int
) -> Change:
    """Allocates room for `num_tokens` (i32[R]) more tokens in sequences; see `ops.extend`."""
    is_unique, rows = are_unique_seqs(tables, seq_ids), rows_of(tables, seq_ids)
    is_named, num_tokens = in_each_group(tables, seq_ids != NULL_SEQ, num_tokens)
    lens, block_sizes = read(tables.held_lens, rows, 0), row_block_sizes(tables, rows)
    capacity = tables.max_blocks_per_seq * block_sizes
    max_new_tokens = min(max_new_tokens, tables.max_blocks_per_seq * max(tables.block_sizes))
    fits = (num_tokens >= 0) & (num_tokens <= max_new_tokens) & (num_tokens <= capacity - lens)
    new_tokens = jnp.where(is_named & fits, num_tokens, 0)
    ends = block_ends(tables, rows)
    num_new = jnp.maximum(blocks_for(lens + new_tokens, block_sizes) - ends, 0)
    max_new = max(0, ceil_div(max_new_tokens, tables.block_size))
    num_passed, width = jnp.zeros_like(rows), max(1, max_new)
    ok = is_unique & jnp.all(~is_named | fits)
    if tables.has_windows:
        num_passed = first_needed(tables, lens) - read(tables.num_released, rows, 0)
        num_passed = jnp.where(new_tokens > 0, jnp.maximum(num_passed, 0), 0)
        ok &= can_take_with_passed(tables, num_new, rows, num_passed, width)
    else:
        ok &= can_take(tables, num_new)

    def make(ok: jax.Array) -> tuple[PageTables, None]:
        changed, taken = tables, jnp.where(ok, num_new, 0)
        released = jnp.where(ok, num_passed, 0)
        if tables.has_windows:
            changed = release_passed(tables, rows, released, width)
        changed = _append_blocks(changed, rows, ends, taken, max_new)
        changed = add_blocks(changed, rows, taken - released)
        return add_tokens(changed, rows, jnp.where(ok, new_tokens, 0)), None

    return Change(ok, make)


def free_rows(tables: PageTables, seq_ids: jax.Array) -> PageTables:
    """Frees sequences; one that is free, repeated or out of range is ignored."""
    is_alone = seq_ids.size == 1
    (seq_ids,) = at_least_two(seq_ids)
    rows = rows_of(tables, seq_ids)
    order = jnp.arange(rows.size, dtype=jnp.int32)
    first = jnp.full(tables.num_rows, rows.size, jnp.int32).at[rows].min(order, mode="drop")
    rows = jnp.where(read(first, rows, -1) == order, rows, tables.num_rows)
    held = held_blocks(tables, rows).ravel()
    # The blocks of a single sequence are distinct.
    tables = release_blocks(tables, held, are_distinct=is_alone)
    return cut_rows(tables, rows, jnp.zeros_like(rows))


def truncate_rows(tables: PageTables, seq_ids: jax.Array, seq_lens: jax.Array) -> Change:
    """Cuts sequences to `seq_lens` (i32[R]); replaces a last block that another row holds too.

    Lengths include dropped tokens. A cut takes as many tokens off the row as off the sequence. At
    most as many are from beyond the new end, so that all tokens that stay are from before it.
    """
    seq_ids, seq_lens = at_least_two(seq_ids, seq_lens)
    is_unique, rows = are_unique_seqs(tables, seq_ids), rows_of(tables, seq_ids)
    is_named, seq_lens = in_each_group(tables, seq_ids != NULL_SEQ, seq_lens)
    is_freed = seq_lens == 0
    new_lens = jnp.where(is_freed, 0, seq_lens - read(tables.num_pruned, rows, 0))
    fits = (seq_lens >= 0) & (is_freed | (new_lens > 0))
    fits &= new_lens <= read(tables.held_lens, rows, 0)
    if tables.has_windows:
        fits &= is_freed | _holds_needed(tables, rows, new_lens)
    new_lens = jnp.where(is_named & fits, new_lens, 0)
    block_sizes = row_block_sizes(tables, rows)
    num_kept = blocks_for(new_lens, block_sizes)

    held = held_blocks(tables, rows)
    last, last_index, num_tail = partial_block(tables, held, new_lens, block_sizes)
    is_shared = read(tables.ref_counts, last, 0) > 1
    ok = is_unique & jnp.all(~is_named | fits) & can_take(tables, is_shared)

    def make(ok: jax.Array) -> tuple[PageTables, BlockCopies]:
        cut, replaced = jnp.where(ok, rows, tables.num_rows), is_shared & ok
        logical = columns(tables.max_blocks_per_seq)
        released = logical >= num_kept[:, None]
        released |= replaced[:, None] & (logical == last_index[:, None])
        released = jnp.where(released & ok, held, tables.num_blocks)
        taken, changed = pop_blocks(tables, replaced.astype(jnp.int32), 1)
        placed = jnp.where(replaced, last_index, logical.size)
        changed = set_block(changed, cut, placed, taken[:, 0])
        changed = cut_rows(release_blocks(changed, released.ravel()), cut, new_lens)
        copied = jnp.where(replaced, last, tables.num_blocks)
        return changed, BlockCopies(copied, copied, taken[:, 0], num_tail)

    return Change(ok, make)


def fork_rows(tables: PageTables, parents: jax.Array, children: jax.Array) -> Change:
    """Shares the parents' full blocks with free rows; copies a partly filled last block."""
    parents, children = at_least_two(parents, children)
    is_unique = are_unique_seqs(tables, children)
    sources, rows = rows_of(tables, parents), rows_of(tables, children)
    (is_named,) = in_each_group(tables, children != NULL_SEQ)
    has_tokens = read(tables.num_blocks_held, sources, 0) > 0
    is_free = read(tables.num_blocks_held, rows, 0) == 0

    lens = jnp.where(is_named, read(tables.held_lens, sources, 0), 0)
    parent_blocks, block_sizes = held_blocks(tables, sources), row_block_sizes(tables, sources)
    last, last_index, num_tail = partial_block(tables, parent_blocks, lens, block_sizes)
    num_new = (num_tail > 0).astype(jnp.int32)
    ok = is_unique & jnp.all(~is_named | (has_tokens & is_free)) & can_take(tables, num_new)

    def make(ok: jax.Array) -> tuple[PageTables, BlockCopies]:
        started, taking = jnp.where(ok, rows, tables.num_rows), jnp.where(ok, num_new, 0)
        num_full = jnp.where(ok, lens // block_sizes, 0)
        num_released = read(tables.num_released, sources, 0)
        taken, changed = pop_blocks(tables, taking, 1)
        changed = share_blocks(changed, started, parent_blocks, num_released, num_full)
        placed = jnp.where(taking > 0, last_index, tables.max_blocks_per_seq)
        changed = set_block(changed, started, placed, taken[:, 0])
        copied = jnp.where(taking > 0, last, tables.num_blocks)
        formats = read(tables.token_formats, sources, 0), read(tables.num_pruned, sources, 0)
        changed = set_formats(changed, started, *formats)
        if tables.has_windows:
            changed = set_released(changed, started, num_released)
        changed = cut_rows(changed, started, lens)
        return changed, BlockCopies(copied, copied, taken[:, 0], num_tail)

    return Change(ok, make)


def share_rows(
    tables: PageTables, sources: jax.Array, targets: jax.Array, num_tokens: jax.Array
) -> Change:
    """Replaces the first `num_tokens` (i32[R]) of targets by those of the sources."""
    sources, targets, num_tokens = at_least_two(sources, targets, num_tokens)
    is_unique = are_unique_seqs(tables, targets)
    from_rows, rows = rows_of(tables, sources), rows_of(tables, targets)
    is_named, num_tokens = in_each_group(tables, targets != NULL_SEQ, num_tokens)
    is_target = jnp.zeros(tables.num_rows, jnp.bool_).at[rows].set(True, mode="drop")
    within = jnp.minimum(read(tables.held_lens, from_rows, -1), read(tables.held_lens, rows, -1))
    fits = (num_tokens >= 0) & (num_tokens <= within) & ~read(is_target, from_rows, True)
    fits &= is_uncompressed(tables, from_rows) & is_uncompressed(tables, rows)
    if tables.has_windows:
        fits &= (num_tokens == 0) | _holds_needed(tables, from_rows, num_tokens)
    lens = jnp.where(is_named & fits, num_tokens, 0)

    source_blocks, own_blocks = held_blocks(tables, from_rows), held_blocks(tables, rows)
    size = tables.block_size
    source_last, last_index, num_tail = partial_block(tables, source_blocks, lens, size)
    own_last, _, _ = partial_block(tables, own_blocks, lens, size)
    is_shared = read(tables.ref_counts, own_last, 0) > 1
    ok = is_unique & jnp.all(~is_named | fits) & can_take(tables, is_shared)

    def make(ok: jax.Array) -> tuple[PageTables, BlockCopies]:
        shared, replaced = jnp.where(ok, rows, tables.num_rows), is_shared & ok
        num_full = jnp.where(ok, lens // size, 0)
        logical = columns(tables.max_blocks_per_seq)
        released = logical < num_full[:, None]
        released |= replaced[:, None] & (logical == last_index[:, None])
        released = jnp.where(released, own_blocks, tables.num_blocks)
        taken, changed = pop_blocks(tables, replaced.astype(jnp.int32), 1)
        num_released = read(tables.num_released, rows, 0)
        if tables.has_windows:
            kept = num_released
            passed = jnp.where(lens > 0, read(tables.num_released, from_rows, 0), 0)
            num_released = jnp.maximum(kept, passed)
            changed = set_released(changed, shared, num_released)
            changed = add_blocks(changed, shared, kept - num_released)
        changed = share_blocks(changed, shared, source_blocks, num_released, num_full)
        placed = jnp.where(replaced, last_index, logical.size)
        changed = set_block(changed, shared, placed, taken[:, 0])
        changed = release_blocks(changed, released.ravel())
        target = jnp.where(replaced, taken[:, 0], own_last)
        target = jnp.where(ok, target, tables.num_blocks)
        return changed, BlockCopies(source_last, own_last, target, num_tail)

    return Change(ok, make)


def _holds_needed(tables: PageTables, rows: jax.Array, seq_lens: jax.Array) -> jax.Array:
    """Returns bool[G * R]: whether rows hold what tokens from `seq_lens` on can see."""
    return read(tables.num_released, rows, 0) <= first_needed(tables, seq_lens)


def _append_blocks(
    tables: PageTables, rows: jax.Array, ends: jax.Array, num_new: jax.Array, max_new: int
) -> PageTables:
    """Puts `num_new` (i32[R], each at most `max_new`) free blocks behind the `ends` of rows.

    `ends` (i32[R]) are logical indices; the caller counts the blocks in `num_blocks_held`.
    """
    taken, tables = pop_blocks(tables, num_new, max_new)
    lane = columns(max_new)
    logical = jnp.where(lane < num_new[:, None], ends[:, None] + lane, tables.max_blocks_per_seq)
    placed = tables.block_ids.at[rows[:, None], logical].set(taken, mode="drop")
    return dataclasses.replace(tables, block_ids=placed)
