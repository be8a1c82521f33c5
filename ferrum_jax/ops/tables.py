"""Operations on page tables, of which the operations on a cache are made.

Each takes and returns tables. One that can fail also returns `ok`, folded into the indices: if it
is false, all scatters are dropped. The cost follows the rows and blocks named, not the pool's size.

S rows, M blocks per row, N blocks in the pool, R rows named in a call.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.ops.blocks import at_least_two, can_take, pop_blocks, release_blocks, retain_blocks
from ferrum_jax.ops.indexing import blocks_for, columns, index_or_end, read
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ, TokenFormat


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


def allocate_rows(
    tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array
) -> tuple[PageTables, jax.Array]:
    """Allocates blocks for `num_tokens` (i32[R]) in free rows; see `ops.allocate`."""
    is_named = seq_ids != NULL_SEQ
    rows = index_or_end(seq_ids, tables.max_seqs)
    num_new = jnp.where(is_named, blocks_for(num_tokens, row_block_sizes(tables, rows)), 0)
    fits = (num_tokens >= 0) & (num_new <= tables.max_blocks_per_seq)
    is_free = read(tables.num_blocks_held, rows, 0) == 0
    ok = jnp.all(_is_unique_row(tables, seq_ids) & (~is_named | (fits & is_free)))
    ok &= can_take(tables, num_new)
    tables = _append_blocks(tables, rows, jnp.where(ok, num_new, 0), tables.max_blocks_per_seq)
    return _add_tokens(tables, rows, jnp.where(ok & is_named, num_tokens, 0)), ok


def extend_rows(
    tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array, max_new_tokens: int
) -> tuple[PageTables, jax.Array]:
    """Allocates room for `num_tokens` (i32[R]) more tokens in rows; see `ops.extend`."""
    is_named = seq_ids != NULL_SEQ
    rows = index_or_end(seq_ids, tables.max_seqs)
    lens, held = read(tables.held_lens, rows, 0), read(tables.num_blocks_held, rows, 0)
    block_sizes = row_block_sizes(tables, rows)
    capacity = tables.max_blocks_per_seq * block_sizes
    max_new_tokens = min(max_new_tokens, tables.max_blocks_per_seq * max(tables.block_sizes))
    fits = (num_tokens >= 0) & (num_tokens <= max_new_tokens) & (num_tokens <= capacity - lens)
    new_tokens = jnp.where(is_named & fits, num_tokens, 0)
    num_new = jnp.maximum(blocks_for(lens + new_tokens, block_sizes) - held, 0)
    max_new = max(0, ceil_div(max_new_tokens, tables.block_size))
    ok = jnp.all(_is_unique_row(tables, seq_ids) & (~is_named | fits))
    ok &= can_take(tables, num_new)
    tables = _append_blocks(tables, rows, jnp.where(ok, num_new, 0), max_new)
    return _add_tokens(tables, rows, jnp.where(ok, new_tokens, 0)), ok


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
    row = index_or_end(seq_id, tables.max_seqs)
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
    row = jnp.where(ok, row, tables.max_seqs)

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


def free_rows(tables: PageTables, seq_ids: jax.Array) -> PageTables:
    """Frees rows; a row that is free, repeated or out of range is ignored."""
    is_alone = seq_ids.size == 1
    (seq_ids,) = at_least_two(seq_ids)
    rows = index_or_end(seq_ids, tables.max_seqs)
    order = jnp.arange(rows.size, dtype=jnp.int32)
    first = jnp.full(tables.max_seqs, rows.size, jnp.int32).at[rows].min(order, mode="drop")
    rows = jnp.where(read(first, rows, -1) == order, rows, tables.max_seqs)
    held = held_blocks(tables, rows).ravel()
    # The blocks of a single row are distinct.
    tables = release_blocks(tables, held, are_distinct=is_alone)
    return _cut_rows(tables, rows, jnp.zeros_like(rows))


def truncate_rows(
    tables: PageTables, seq_ids: jax.Array, seq_lens: jax.Array
) -> tuple[PageTables, jax.Array, BlockCopies]:
    """Cuts sequences to `seq_lens` (i32[R]); replaces a last block that another row holds too.

    Lengths include dropped tokens. A cut takes as many tokens off the row as off the sequence. At
    most as many are from beyond the new end, so that all tokens that stay are from before it.
    """
    seq_ids, seq_lens = at_least_two(seq_ids, seq_lens)
    is_named = seq_ids != NULL_SEQ
    rows = index_or_end(seq_ids, tables.max_seqs)
    is_freed = seq_lens == 0
    new_lens = jnp.where(is_freed, 0, seq_lens - read(tables.num_pruned, rows, 0))
    fits = (seq_lens >= 0) & (is_freed | (new_lens > 0))
    fits &= new_lens <= read(tables.held_lens, rows, 0)
    ok = jnp.all(_is_unique_row(tables, seq_ids) & (~is_named | fits))
    new_lens = jnp.where(is_named & fits, new_lens, 0)
    block_sizes = row_block_sizes(tables, rows)
    num_kept = blocks_for(new_lens, block_sizes)

    held = held_blocks(tables, rows)
    last, last_index, num_tail = _partial_block(tables, held, new_lens, block_sizes)
    is_shared = read(tables.ref_counts, last, 0) > 1
    ok &= can_take(tables, is_shared)
    rows = jnp.where(ok, rows, tables.max_seqs)
    is_shared &= ok

    logical = columns(tables.max_blocks_per_seq)
    released = logical >= num_kept[:, None]
    released |= is_shared[:, None] & (logical == last_index[:, None])
    released = jnp.where(released & ok, held, tables.num_blocks)
    taken, tables = pop_blocks(tables, is_shared.astype(jnp.int32), 1)
    tables = _set_block(tables, rows, jnp.where(is_shared, last_index, logical.size), taken[:, 0])
    tables = _cut_rows(release_blocks(tables, released.ravel()), rows, new_lens)
    copied = jnp.where(is_shared, last, tables.num_blocks)
    return tables, ok, BlockCopies(copied, copied, taken[:, 0], num_tail)


def fork_rows(
    tables: PageTables, parents: jax.Array, children: jax.Array
) -> tuple[PageTables, jax.Array, BlockCopies]:
    """Shares the parents' full blocks with free rows; copies a partly filled last block."""
    parents, children = at_least_two(parents, children)
    is_named = children != NULL_SEQ
    sources = index_or_end(parents, tables.max_seqs)
    rows = index_or_end(children, tables.max_seqs)
    has_tokens = read(tables.num_blocks_held, sources, 0) > 0
    is_free = read(tables.num_blocks_held, rows, 0) == 0
    ok = jnp.all(_is_unique_row(tables, children) & (~is_named | (has_tokens & is_free)))

    lens = jnp.where(is_named, read(tables.held_lens, sources, 0), 0)
    parent_blocks, block_sizes = held_blocks(tables, sources), row_block_sizes(tables, sources)
    last, last_index, num_tail = _partial_block(tables, parent_blocks, lens, block_sizes)
    num_new = (num_tail > 0).astype(jnp.int32)
    ok &= can_take(tables, num_new)
    rows, num_new = jnp.where(ok, rows, tables.max_seqs), jnp.where(ok, num_new, 0)
    num_full = jnp.where(ok, lens // block_sizes, 0)

    taken, tables = pop_blocks(tables, num_new, 1)
    tables = _share_blocks(tables, rows, parent_blocks, num_full)
    last_index = jnp.where(num_new > 0, last_index, tables.max_blocks_per_seq)
    tables = _set_block(tables, rows, last_index, taken[:, 0])
    copied = jnp.where(num_new > 0, last, tables.num_blocks)
    formats = read(tables.token_formats, sources, 0), read(tables.num_pruned, sources, 0)
    tables = _cut_rows(set_formats(tables, rows, *formats), rows, lens)
    return tables, ok, BlockCopies(copied, copied, taken[:, 0], num_tail)


def share_rows(
    tables: PageTables, sources: jax.Array, targets: jax.Array, num_tokens: jax.Array
) -> tuple[PageTables, jax.Array, BlockCopies]:
    """Replaces the first `num_tokens` (i32[R]) of targets by those of the sources."""
    sources, targets, num_tokens = at_least_two(sources, targets, num_tokens)
    is_named = targets != NULL_SEQ
    from_rows = index_or_end(sources, tables.max_seqs)
    rows = index_or_end(targets, tables.max_seqs)
    is_target = jnp.zeros(tables.max_seqs, jnp.bool_).at[rows].set(True, mode="drop")
    within = jnp.minimum(read(tables.held_lens, from_rows, -1), read(tables.held_lens, rows, -1))
    fits = (num_tokens >= 0) & (num_tokens <= within) & ~read(is_target, from_rows, True)
    fits &= _is_uncompressed(tables, from_rows) & _is_uncompressed(tables, rows)
    ok = jnp.all(_is_unique_row(tables, targets) & (~is_named | fits))
    lens = jnp.where(is_named & fits, num_tokens, 0)

    source_blocks, own_blocks = held_blocks(tables, from_rows), held_blocks(tables, rows)
    size = tables.block_size
    source_last, last_index, num_tail = _partial_block(tables, source_blocks, lens, size)
    own_last, _, _ = _partial_block(tables, own_blocks, lens, size)
    is_shared = read(tables.ref_counts, own_last, 0) > 1
    ok &= can_take(tables, is_shared)
    rows, is_shared = jnp.where(ok, rows, tables.max_seqs), is_shared & ok
    num_full = jnp.where(ok, lens // size, 0)

    logical = columns(tables.max_blocks_per_seq)
    released = logical < num_full[:, None]
    released |= is_shared[:, None] & (logical == last_index[:, None])
    released = jnp.where(released, own_blocks, tables.num_blocks)
    taken, tables = pop_blocks(tables, is_shared.astype(jnp.int32), 1)
    tables = _share_blocks(tables, rows, source_blocks, num_full)
    tables = _set_block(tables, rows, jnp.where(is_shared, last_index, logical.size), taken[:, 0])
    tables = release_blocks(tables, released.ravel())
    target = jnp.where(is_shared, taken[:, 0], own_last)
    target = jnp.where(ok, target, tables.num_blocks)
    return tables, ok, BlockCopies(source_last, own_last, target, num_tail)


def adopt_blocks(
    tables: PageTables, seq_id: jax.Array, first: jax.Array, block_ids: jax.Array
) -> tuple[PageTables, jax.Array]:
    """Makes a row share live blocks, from a logical index on, in place of its own blocks there.

    The row's length grows only by blocks beyond its last one, which count as full.

    Args:
      tables: Current tables.
      seq_id: i32[]. The row; it holds at least `first` blocks.
      first: i32[]. Logical index of the first of these blocks.
      block_ids: i32[P]. Live blocks, then N.

    Returns:
      `(tables, replaced)`, replaced: i32[P], the blocks that the row held there, N for none.
    """
    (block_ids,) = at_least_two(block_ids, padding=tables.num_blocks)
    is_adopted = block_ids < tables.num_blocks
    logical = first + jnp.arange(block_ids.size, dtype=jnp.int32)
    logical = jnp.where(is_adopted, logical, tables.max_blocks_per_seq)
    replaced = tables.block_ids.at[seq_id, logical].get(mode="fill", fill_value=NULL_BLOCK)
    replaced = jnp.where(replaced == NULL_BLOCK, tables.num_blocks, replaced)
    tables = retain_blocks(tables, block_ids)
    end = first + jnp.sum(is_adopted, dtype=jnp.int32)
    held = jnp.maximum(tables.num_blocks_held[seq_id], end)
    lens = jnp.maximum(tables.held_lens[seq_id], end * tables.block_size)
    rows = jnp.stack([seq_id, jnp.full_like(seq_id, tables.max_seqs)])  # Two: see at_least_two.
    tables = dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[0], logical].set(block_ids, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[rows].set(held, mode="drop"),
        held_lens=tables.held_lens.at[rows].set(lens, mode="drop"),
    )
    return release_blocks(tables, replaced, are_distinct=True), replaced


def _is_unique_row(tables: PageTables, seq_ids: jax.Array) -> jax.Array:
    """Returns bool[R]: whether an id is a row that is named once, or is `NULL_SEQ`."""
    rows = index_or_end(seq_ids, tables.max_seqs)
    mentions = jnp.zeros(tables.max_seqs, jnp.int32).at[rows].add(1, mode="drop")
    return (seq_ids == NULL_SEQ) | (read(mentions, rows, 0) == 1)


def _append_blocks(
    tables: PageTables, rows: jax.Array, num_new: jax.Array, max_new: int
) -> PageTables:
    """Appends `num_new` (i32[R], each at most `max_new`) free blocks to rows."""
    taken, tables = pop_blocks(tables, num_new, max_new)
    held = read(tables.num_blocks_held, rows, 0)
    lane = columns(max_new)
    is_new = lane < num_new[:, None]
    logical = jnp.where(is_new, held[:, None] + lane, tables.max_blocks_per_seq)
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(taken, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[rows].add(num_new, mode="drop"),
    )


def _add_tokens(tables: PageTables, rows: jax.Array, num_tokens: jax.Array) -> PageTables:
    lens = tables.held_lens.at[rows].add(num_tokens, mode="drop")
    return dataclasses.replace(tables, held_lens=lens)


def _set_block(
    tables: PageTables, rows: jax.Array, logical: jax.Array, block_ids: jax.Array
) -> PageTables:
    """Sets the block (i32[R]) at one logical index (i32[R], M for none) of each row."""
    placed = tables.block_ids.at[rows, logical].set(block_ids, mode="drop")
    return dataclasses.replace(tables, block_ids=placed)


def _share_blocks(
    tables: PageTables, rows: jax.Array, block_ids: jax.Array, num_blocks: jax.Array
) -> PageTables:
    """Makes rows reference the first `num_blocks` (i32[R]) of `block_ids` (i32[R, M]) too."""
    logical = columns(tables.max_blocks_per_seq)
    is_shared = logical < num_blocks[:, None]
    added = jnp.where(is_shared, block_ids, tables.num_blocks)
    logical = jnp.where(is_shared, logical, tables.max_blocks_per_seq)
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(added, mode="drop"),
        ref_counts=tables.ref_counts.at[added].add(1, mode="drop"),
    )


def _cut_rows(tables: PageTables, rows: jax.Array, held_lens: jax.Array) -> PageTables:
    """Records that rows hold `held_lens` (i32[R]) tokens, and no block beyond these.

    A row of no tokens is free, and native again.
    """
    num_kept = blocks_for(held_lens, row_block_sizes(tables, rows))
    logical = columns(tables.max_blocks_per_seq)
    # Reading the blocks orders this write after other reads; without it XLA copies the table.
    is_cut = (logical >= num_kept[:, None]) & (held_blocks(tables, rows) < tables.num_blocks)
    logical = jnp.where(is_cut, logical, tables.max_blocks_per_seq)
    zeros = jnp.zeros_like(rows)
    tables = set_formats(tables, jnp.where(held_lens == 0, rows, tables.max_seqs), zeros, zeros)
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(NULL_BLOCK, mode="drop"),
        held_lens=tables.held_lens.at[rows].set(held_lens, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[rows].set(num_kept, mode="drop"),
    )


def set_formats(
    tables: PageTables, rows: jax.Array, formats: jax.Array, num_pruned: jax.Array
) -> PageTables:
    """Records the format of rows, and how many of their tokens were dropped (each i32[R])."""
    return dataclasses.replace(
        tables,
        token_formats=tables.token_formats.at[rows].set(formats, mode="drop"),
        num_pruned=tables.num_pruned.at[rows].set(num_pruned, mode="drop"),
    )


def row_block_sizes(tables: PageTables, rows: jax.Array) -> jax.Array | int:
    """Returns the tokens per block of each row: i32[R], or an int if all formats have the same."""
    if len(set(tables.block_sizes)) == 1:
        return tables.block_size
    return jnp.asarray(tables.block_sizes, jnp.int32)[read(tables.token_formats, rows, 0)]


def _is_uncompressed(tables: PageTables, rows: jax.Array) -> jax.Array:
    """Returns bool[R]: whether a row is native and none of its tokens was dropped."""
    return (read(tables.token_formats, rows, 0) == 0) & (read(tables.num_pruned, rows, 0) == 0)


def held_blocks(tables: PageTables, rows: jax.Array) -> jax.Array:
    """Returns the blocks of rows: i32[R, M], N where absent."""
    block_ids = read(tables.block_ids, rows, NULL_BLOCK)
    return jnp.where(block_ids == NULL_BLOCK, tables.num_blocks, block_ids)


def _partial_block(
    tables: PageTables, held: jax.Array, held_lens: jax.Array, block_sizes: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each row's partly filled last block (N if none), its logical index and tokens."""
    index, num_tail = held_lens // block_sizes, held_lens % block_sizes
    row = jnp.arange(held.shape[0], dtype=jnp.int32)
    index = jnp.where(num_tail > 0, index, held.shape[1])
    block = held.at[row, index].get(mode="fill", fill_value=tables.num_blocks)
    return block, index, num_tail
