"""Who holds which block: the verbs on page tables, from which every cache operation is made.

Each takes tables and returns tables. What can fail also returns `ok`; when that is false the
tables are the input's, because `ok` is folded into the indices: every scatter then drops.
Cost depends on the rows and blocks that a call names, never on the size of the pool.

S rows, M blocks a row, N blocks in the pool, B tokens a block, R rows named in a call.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.ops.indexing import blocks_for, columns, index_or_end, read
from ferrum_jax.state import PageTables
from ferrum_jax.types import NULL_BLOCK, NULL_SEQ


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockCopies:
    """Bytes that must move in the pool for tables to tell the truth.

    The first `num_tokens` tokens of `targets` come from `sources`, the rest from `backgrounds`.

    Attributes:
      sources: i32[R]. Blocks; N (the size of the pool) for no copy.
      backgrounds: i32[R]. Blocks.
      targets: i32[R]. Blocks; N for no copy.
      num_tokens: i32[R].
    """

    sources: jax.Array
    backgrounds: jax.Array
    targets: jax.Array
    num_tokens: jax.Array


def allocate_rows(
    tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array
) -> tuple[PageTables, jax.Array]:
    """Gives free rows the blocks for `num_tokens` (i32[R]) each."""
    named = seq_ids != NULL_SEQ
    rows = index_or_end(seq_ids, tables.max_seqs)
    num_new = jnp.where(named, blocks_for(num_tokens, tables.block_size), 0)
    fits = (num_tokens >= 0) & (num_new <= tables.max_blocks_per_seq)
    is_free = read(tables.num_blocks_held, rows, 0) == 0
    ok = jnp.all(_is_named_once(tables, seq_ids) & (~named | (fits & is_free)))
    ok &= _can_take(tables, num_new)
    tables = _append_blocks(tables, rows, jnp.where(ok, num_new, 0), tables.max_blocks_per_seq)
    return _add_tokens(tables, rows, jnp.where(ok & named, num_tokens, 0)), ok


def extend_rows(
    tables: PageTables, seq_ids: jax.Array, num_tokens: jax.Array, max_new_tokens: int
) -> tuple[PageTables, jax.Array]:
    """Makes room for `num_tokens` (i32[R], each at most `max_new_tokens`) more tokens."""
    named = seq_ids != NULL_SEQ
    rows = index_or_end(seq_ids, tables.max_seqs)
    lens, held = read(tables.seq_lens, rows, 0), read(tables.num_blocks_held, rows, 0)
    capacity = tables.max_blocks_per_seq * tables.block_size
    max_new_tokens = min(max_new_tokens, capacity)
    fits = (num_tokens >= 0) & (num_tokens <= max_new_tokens) & (num_tokens <= capacity - lens)
    new_tokens = jnp.where(named & fits, num_tokens, 0)
    num_new = jnp.maximum(blocks_for(lens + new_tokens, tables.block_size) - held, 0)
    max_new = -(-max_new_tokens // tables.block_size)
    ok = jnp.all(_is_named_once(tables, seq_ids) & (~named | fits))
    ok &= _can_take(tables, num_new)
    tables = _append_blocks(tables, rows, jnp.where(ok, num_new, 0), max_new)
    return _add_tokens(tables, rows, jnp.where(ok, new_tokens, 0)), ok


def free_rows(tables: PageTables, seq_ids: jax.Array) -> PageTables:
    """Empties rows; a row that is free, repeated or out of range is ignored."""
    is_alone = seq_ids.size == 1
    (seq_ids,) = _at_least_two(seq_ids)
    rows = index_or_end(seq_ids, tables.max_seqs)
    order = jnp.arange(rows.size, dtype=jnp.int32)
    first = jnp.full(tables.max_seqs, rows.size, jnp.int32).at[rows].min(order, mode="drop")
    rows = jnp.where(read(first, rows, -1) == order, rows, tables.max_seqs)
    held = held_blocks(tables, rows).ravel()
    # A row's blocks are all different.
    tables = release_blocks(tables, held, are_distinct=is_alone)
    return _cut_rows(tables, rows, jnp.zeros_like(rows))


def truncate_rows(
    tables: PageTables, seq_ids: jax.Array, seq_lens: jax.Array
) -> tuple[PageTables, jax.Array, BlockCopies]:
    """Cuts rows to `seq_lens` (i32[R]); a last block that others hold too is replaced."""
    seq_ids, seq_lens = _at_least_two(seq_ids, seq_lens)
    named = seq_ids != NULL_SEQ
    rows = index_or_end(seq_ids, tables.max_seqs)
    shorter = (seq_lens >= 0) & (seq_lens <= read(tables.seq_lens, rows, 0))
    ok = jnp.all(_is_named_once(tables, seq_ids) & (~named | shorter))
    new_lens = jnp.where(named & shorter, seq_lens, 0)
    num_kept = blocks_for(new_lens, tables.block_size)

    held = held_blocks(tables, rows)
    last, last_index, num_tail = _partial_block(tables, held, new_lens)
    is_shared = read(tables.ref_counts, last, 0) > 1
    ok &= _can_take(tables, is_shared)
    rows = jnp.where(ok, rows, tables.max_seqs)
    is_shared &= ok

    logical = columns(tables.max_blocks_per_seq)
    dropped = logical >= num_kept[:, None]
    dropped |= is_shared[:, None] & (logical == last_index[:, None])
    dropped = jnp.where(dropped & ok, held, tables.num_blocks)
    taken, tables = _take(tables, is_shared.astype(jnp.int32), 1)
    tables = _place(tables, rows, jnp.where(is_shared, last_index, logical.size), taken[:, 0])
    tables = _cut_rows(release_blocks(tables, dropped.ravel()), rows, new_lens)
    copied = jnp.where(is_shared, last, tables.num_blocks)
    return tables, ok, BlockCopies(copied, copied, taken[:, 0], num_tail)


def fork_rows(
    tables: PageTables, parents: jax.Array, children: jax.Array
) -> tuple[PageTables, jax.Array, BlockCopies]:
    """Gives free rows the parents' tokens: full blocks shared, a partial last block copied."""
    parents, children = _at_least_two(parents, children)
    named = children != NULL_SEQ
    sources = index_or_end(parents, tables.max_seqs)
    rows = index_or_end(children, tables.max_seqs)
    has_tokens = read(tables.num_blocks_held, sources, 0) > 0
    is_free = read(tables.num_blocks_held, rows, 0) == 0
    ok = jnp.all(_is_named_once(tables, children) & (~named | (has_tokens & is_free)))

    lens = jnp.where(named, read(tables.seq_lens, sources, 0), 0)
    parent_blocks = held_blocks(tables, sources)
    last, last_index, num_tail = _partial_block(tables, parent_blocks, lens)
    num_new = (num_tail > 0).astype(jnp.int32)
    ok &= _can_take(tables, num_new)
    rows, num_new = jnp.where(ok, rows, tables.max_seqs), jnp.where(ok, num_new, 0)
    num_full = jnp.where(ok, lens // tables.block_size, 0)

    taken, tables = _take(tables, num_new, 1)
    tables = _share_blocks(tables, rows, parent_blocks, num_full)
    last_index = jnp.where(num_new > 0, last_index, tables.max_blocks_per_seq)
    tables = _place(tables, rows, last_index, taken[:, 0])
    copied = jnp.where(num_new > 0, last, tables.num_blocks)
    return _cut_rows(tables, rows, lens), ok, BlockCopies(copied, copied, taken[:, 0], num_tail)


def share_rows(
    tables: PageTables, sources: jax.Array, targets: jax.Array, num_tokens: jax.Array
) -> tuple[PageTables, jax.Array, BlockCopies]:
    """Lets targets hold the sources' first `num_tokens` (i32[R]) in place of their own."""
    sources, targets, num_tokens = _at_least_two(sources, targets, num_tokens)
    named = targets != NULL_SEQ
    from_rows = index_or_end(sources, tables.max_seqs)
    rows = index_or_end(targets, tables.max_seqs)
    is_target = jnp.zeros(tables.max_seqs, jnp.bool_).at[rows].set(True, mode="drop")
    within = jnp.minimum(read(tables.seq_lens, from_rows, -1), read(tables.seq_lens, rows, -1))
    fits = (num_tokens >= 0) & (num_tokens <= within) & ~read(is_target, from_rows, True)
    ok = jnp.all(_is_named_once(tables, targets) & (~named | fits))
    lens = jnp.where(named & fits, num_tokens, 0)

    source_blocks, own_blocks = held_blocks(tables, from_rows), held_blocks(tables, rows)
    source_last, last_index, num_tail = _partial_block(tables, source_blocks, lens)
    own_last, _, _ = _partial_block(tables, own_blocks, lens)
    is_shared = read(tables.ref_counts, own_last, 0) > 1
    ok &= _can_take(tables, is_shared)
    rows, is_shared = jnp.where(ok, rows, tables.max_seqs), is_shared & ok
    num_full = jnp.where(ok, lens // tables.block_size, 0)

    logical = columns(tables.max_blocks_per_seq)
    dropped = logical < num_full[:, None]
    dropped |= is_shared[:, None] & (logical == last_index[:, None])
    dropped = jnp.where(dropped, own_blocks, tables.num_blocks)
    taken, tables = _take(tables, is_shared.astype(jnp.int32), 1)
    tables = _share_blocks(tables, rows, source_blocks, num_full)
    tables = _place(tables, rows, jnp.where(is_shared, last_index, logical.size), taken[:, 0])
    tables = release_blocks(tables, dropped.ravel())
    target = jnp.where(is_shared, taken[:, 0], own_last)
    target = jnp.where(ok, target, tables.num_blocks)
    return tables, ok, BlockCopies(source_last, own_last, target, num_tail)


def take_blocks(
    tables: PageTables, num_blocks: jax.Array, max_blocks: int
) -> tuple[PageTables, jax.Array, jax.Array]:
    """Takes `num_blocks` (i32[], at most `max_blocks`) free blocks for no row.

    Returns:
      `(tables, block_ids, ok)`: block_ids is i32[max_blocks], N where nothing was taken.
    """
    num_new = num_blocks[None]
    ok = jnp.all((num_new >= 0) & (num_new <= max_blocks)) & _can_take(tables, num_new)
    taken, tables = _take(tables, jnp.where(ok, num_new, 0), max_blocks)
    return tables, taken[0], ok


def retain_blocks(tables: PageTables, block_ids: jax.Array) -> PageTables:
    """Adds one reference to each of `block_ids` (i32[P], N for none), which are live."""
    (block_ids,) = _at_least_two(block_ids, padding=tables.num_blocks)
    counts = tables.ref_counts.at[block_ids].add(1, mode="drop")
    return dataclasses.replace(tables, ref_counts=counts)


def adopt_blocks(
    tables: PageTables, seq_id: jax.Array, first: jax.Array, block_ids: jax.Array
) -> tuple[PageTables, jax.Array]:
    """Makes a row hold live blocks too, from a logical index on, in place of what it held there.

    The row's tokens stay as many as they were, but for those of blocks that it had not got: all
    of these are full.

    Args:
      tables: Current tables.
      seq_id: i32[]. The row; it holds at least `first` blocks.
      first: i32[]. Where the first one goes.
      block_ids: i32[P]. The blocks, N behind the last one.

    Returns:
      `(tables, replaced)`, replaced: i32[P], what the row held there, N for nothing.
    """
    (block_ids,) = _at_least_two(block_ids, padding=tables.num_blocks)
    is_adopted = block_ids < tables.num_blocks
    logical = first + jnp.arange(block_ids.size, dtype=jnp.int32)
    logical = jnp.where(is_adopted, logical, tables.max_blocks_per_seq)
    replaced = tables.block_ids.at[seq_id, logical].get(mode="fill", fill_value=NULL_BLOCK)
    replaced = jnp.where(replaced == NULL_BLOCK, tables.num_blocks, replaced)
    tables = retain_blocks(tables, block_ids)
    end = first + jnp.sum(is_adopted, dtype=jnp.int32)
    held = jnp.maximum(tables.num_blocks_held[seq_id], end)
    lens = jnp.maximum(tables.seq_lens[seq_id], end * tables.block_size)
    rows = jnp.stack([seq_id, jnp.full_like(seq_id, tables.max_seqs)])  # Two: see _at_least_two.
    tables = dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[0], logical].set(block_ids, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[rows].set(held, mode="drop"),
        seq_lens=tables.seq_lens.at[rows].set(lens, mode="drop"),
    )
    return release_blocks(tables, replaced, are_distinct=True), replaced


def release_blocks(
    tables: PageTables, block_ids: jax.Array, *, are_distinct: bool = False
) -> PageTables:
    """Drops one reference to each of `block_ids` (i32[P], N for none).

    The one place where a block is freed: at zero references it goes back on the stack, once,
    however many of its holders let go in this call. A block that is free already is ignored.
    `are_distinct` promises that no block is named twice, and saves two of four scatters.
    """
    (block_ids,) = _at_least_two(block_ids, padding=tables.num_blocks)
    size, order = tables.num_blocks, jnp.arange(block_ids.size, dtype=jnp.int32)
    is_held = read(tables.ref_counts, block_ids, 0) > 0
    block_ids = jnp.where(is_held, block_ids, size)
    counts = tables.ref_counts.at[block_ids].add(-1, mode="drop")
    pushed = jnp.where(read(counts, block_ids, 1) <= 0, block_ids, size)
    if not are_distinct:
        # Of several mentions of a block that is now free, the last one pushes it. The counts,
        # being settled at zero, serve as the scratch in which the mentions find that out.
        marked = counts.at[pushed].min(-1 - order, mode="drop")
        pushed = jnp.where(read(marked, pushed, 0) == -1 - order, pushed, size)
        # Naming only the pushed blocks here orders this write after the reads: it would copy all
        # N counts otherwise.
        counts = marked.at[pushed].set(0, mode="drop")
    pushes = pushed < size
    num_free = tables.num_free + jnp.sum(pushes, dtype=jnp.int32)
    # The first is pushed last, so that a row's blocks are taken again in their order.
    depth = jnp.where(pushes, num_free - jnp.cumsum(pushes, dtype=jnp.int32), size)
    return dataclasses.replace(
        tables,
        free_blocks=tables.free_blocks.at[depth].set(block_ids, mode="drop"),
        num_free=num_free,
        ref_counts=counts,
    )


def _at_least_two(*batches: jax.Array, padding: int = NULL_SEQ) -> tuple[jax.Array, ...]:
    """Pads batches of a single row or block.

    XLA on CPU would turn a scatter of one index into a slice update, and copy the whole array
    around it.
    """
    missing = max(0, 2 - batches[0].size)
    return tuple(jnp.pad(ids, (0, missing), constant_values=padding) for ids in batches)


def _is_named_once(tables: PageTables, seq_ids: jax.Array) -> jax.Array:
    """Returns bool[R]: the id is a row that no other names, or it is `NULL_SEQ`."""
    rows = index_or_end(seq_ids, tables.max_seqs)
    mentions = jnp.zeros(tables.max_seqs, jnp.int32).at[rows].add(1, mode="drop")
    return (seq_ids == NULL_SEQ) | (read(mentions, rows, 0) == 1)


def _can_take(tables: PageTables, num_new: jax.Array) -> jax.Array:
    """Returns bool[]: so many blocks (i32[R], none absurd) are free."""
    return jnp.sum(num_new, dtype=jnp.int32) <= tables.num_free


def _take(tables: PageTables, num_new: jax.Array, max_new: int) -> tuple[jax.Array, PageTables]:
    """Pops `num_new` (i32[R]) blocks for each row: i32[R, max_new], N where none."""
    # Cut the top off the stack first: XLA on CPU splits a read of a long array among threads,
    # however few its numbers, and waiting for them takes longer than all the rest.
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


def _append_blocks(
    tables: PageTables, rows: jax.Array, num_new: jax.Array, max_new: int
) -> PageTables:
    """Pops `num_new` (i32[R], each at most `max_new`) blocks onto the ends of rows."""
    taken, tables = _take(tables, num_new, max_new)
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
    lens = tables.seq_lens.at[rows].add(num_tokens, mode="drop")
    return dataclasses.replace(tables, seq_lens=lens)


def _place(
    tables: PageTables, rows: jax.Array, logical: jax.Array, block_ids: jax.Array
) -> PageTables:
    """Puts one block (i32[R]) at one logical index (i32[R], M for none) of each row."""
    placed = tables.block_ids.at[rows, logical].set(block_ids, mode="drop")
    return dataclasses.replace(tables, block_ids=placed)


def _share_blocks(
    tables: PageTables, rows: jax.Array, block_ids: jax.Array, num_blocks: jax.Array
) -> PageTables:
    """Makes rows hold the first `num_blocks` (i32[R]) of `block_ids` (i32[R, M]) too."""
    logical = columns(tables.max_blocks_per_seq)
    is_shared = logical < num_blocks[:, None]
    added = jnp.where(is_shared, block_ids, tables.num_blocks)
    logical = jnp.where(is_shared, logical, tables.max_blocks_per_seq)
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(added, mode="drop"),
        ref_counts=tables.ref_counts.at[added].add(1, mode="drop"),
    )


def _cut_rows(tables: PageTables, rows: jax.Array, seq_lens: jax.Array) -> PageTables:
    """Writes down that rows end at `seq_lens` (i32[R]) and hold no block beyond."""
    num_kept = blocks_for(seq_lens, tables.block_size)
    logical = columns(tables.max_blocks_per_seq)
    # Looking at what is there orders this write after other reads: it would copy the table else.
    is_cut = (logical >= num_kept[:, None]) & (held_blocks(tables, rows) < tables.num_blocks)
    logical = jnp.where(is_cut, logical, tables.max_blocks_per_seq)
    return dataclasses.replace(
        tables,
        block_ids=tables.block_ids.at[rows[:, None], logical].set(NULL_BLOCK, mode="drop"),
        seq_lens=tables.seq_lens.at[rows].set(seq_lens, mode="drop"),
        num_blocks_held=tables.num_blocks_held.at[rows].set(num_kept, mode="drop"),
    )


def held_blocks(tables: PageTables, rows: jax.Array) -> jax.Array:
    """Returns rows' blocks: i32[R, M], N where absent."""
    block_ids = read(tables.block_ids, rows, NULL_BLOCK)
    return jnp.where(block_ids == NULL_BLOCK, tables.num_blocks, block_ids)


def _partial_block(
    tables: PageTables, held: jax.Array, seq_lens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns each row's partly filled last block (N if none), its place, and its tokens."""
    num_tail = seq_lens % tables.block_size
    index = seq_lens // tables.block_size
    row = jnp.arange(held.shape[0], dtype=jnp.int32)
    index = jnp.where(num_tail > 0, index, held.shape[1])
    block = held.at[row, index].get(mode="fill", fill_value=tables.num_blocks)
    return block, index, num_tail
