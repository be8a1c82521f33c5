"""The programs that a manager's cache runs: operations on tables and pools that it alone holds.

Since nobody else holds them, every one changes its tables, or its pool, in place.
"""

import functools

import jax
import jax.numpy as jnp

from ferrum_jax.ops import blocks, storage
from ferrum_jax.ops import tables as rows_of
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.state import BlockPool, PageTables

allocate_rows = jax.jit(rows_of.allocate_rows, donate_argnames="tables")
extend_rows = jax.jit(
    rows_of.extend_rows, static_argnames="max_new_tokens", donate_argnames="tables"
)
set_formats = jax.jit(rows_of.set_formats, donate_argnames="tables")
take_blocks = jax.jit(blocks.take_blocks, static_argnames="max_blocks", donate_argnames="tables")
retain_blocks = jax.jit(blocks.retain_blocks, donate_argnames="tables")
zero_blocks = jax.jit(storage.zero_blocks, donate_argnames="pool")


@functools.partial(jax.jit, donate_argnames="tables")
def free_rows(tables: PageTables, seq_ids: jax.Array) -> tuple[PageTables, jax.Array]:
    """Empties rows; also returns the blocks that are free thereby, others N."""
    held = rows_of.held_blocks(tables, index_or_end(seq_ids, tables.max_seqs)).ravel()
    tables = rows_of.free_rows(tables, seq_ids)
    return tables, _free_among(tables, held)


@functools.partial(jax.jit, donate_argnames="tables")
def release_blocks(tables: PageTables, block_ids: jax.Array) -> tuple[PageTables, jax.Array]:
    """Lets blocks go; also returns those that are free thereby, others N."""
    tables = blocks.release_blocks(tables, block_ids)
    return tables, _free_among(tables, block_ids)


@functools.partial(jax.jit, donate_argnames="tables")
def attach_row(
    tables: PageTables, seq_id: jax.Array, block_ids: jax.Array, num_tokens: jax.Array
) -> tuple[PageTables, jax.Array, jax.Array]:
    """Starts a row with live blocks; also returns the first new one, and whether all fitted."""
    num_shared = jnp.sum(block_ids < tables.num_blocks, dtype=jnp.int32)
    tables, _ = rows_of.adopt_blocks(tables, seq_id, jnp.zeros_like(seq_id), block_ids)
    num_new = num_tokens - num_shared * tables.block_size
    capacity = tables.max_blocks_per_seq * tables.block_size
    tables, ok = rows_of.extend_rows(tables, seq_id[None], num_new[None], capacity)
    return tables, tables.block_ids[seq_id, num_shared], ok


@functools.partial(jax.jit, donate_argnames="tables")
def adopt_blocks(
    tables: PageTables, seq_id: jax.Array, first: jax.Array, block_ids: jax.Array
) -> tuple[PageTables, jax.Array]:
    """Puts live blocks into a row; also returns those that are free thereby, others N."""
    tables, replaced = rows_of.adopt_blocks(tables, seq_id, first, block_ids)
    return tables, _free_among(tables, replaced)


@functools.partial(jax.jit, donate_argnames="pool")
def copy_tokens(
    pool: BlockPool, source: jax.Array, target: jax.Array, num_tokens: jax.Array
) -> BlockPool:
    """Copies a block's first tokens to another block, whose other tokens stay."""
    none = jnp.full_like(target, pool.num_blocks)
    targets, counts = jnp.stack([target, none]), jnp.stack([num_tokens, num_tokens])
    copies = rows_of.BlockCopies(jnp.stack([source, source]), targets, targets, counts)
    return storage.apply_copies(pool, copies)


@jax.jit
def are_held(tables: PageTables) -> jax.Array:
    """Returns which blocks are held: bool[N]."""
    return tables.ref_counts > 0


@jax.jit
def freed_since(tables: PageTables, were_held: jax.Array) -> jax.Array:
    """Returns which blocks are free that were held before: bool[N]."""
    return were_held & (tables.ref_counts == 0)


@jax.jit
def one_row(block_ids: jax.Array, seq_id: jax.Array) -> jax.Array:
    """Returns one row of a table: i32[M]."""
    return block_ids[seq_id]


def _free_among(tables: PageTables, block_ids: jax.Array) -> jax.Array:
    is_free = read(tables.ref_counts, block_ids, 1) == 0
    return jnp.where(is_free, block_ids, tables.num_blocks)
