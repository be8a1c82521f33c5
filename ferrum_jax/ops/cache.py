"""The verbs on a whole cache: each takes a state and returns the next one.

Batches of rows are padded with `NULL_SEQ`, which is ignored. What can fail returns `ok` as data
and changes nothing when it is false. Nothing here reads the device, and no call recompiles for
other ids, lengths or contents. A program is compiled for each number of rows R that arrays on the
device have; ids and counts that the host has (NumPy arrays, lists) are padded to a power of two
first, so that R rows take at most `2 + log2(R)` programs.

Ids, counts and lengths may be of any integer dtype, on the host or on the device. Each operation
raises AssertionError if their shapes do not fit, ValueError if they are not integers or, on the
host, do not fit in an int32 (on the device they then count as out of range), and ValueError if
the state was consumed before.

Operations that only change tables leave the given state usable; outside `jit` they copy the
tables (8 bytes a block). Those that also write the pool (`fork`, `share`, `truncate`) donate
the state. Under an outer `jax.jit` neither applies: donate the state there, and every operation
works in place.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import check_integer, check_live
from ferrum_jax.ops.arguments import Ids, as_rows
from ferrum_jax.ops.buckets import bucket_for, pad_host_ids
from ferrum_jax.ops.storage import apply_copies
from ferrum_jax.ops.tables import (
    allocate_rows,
    extend_rows,
    fork_rows,
    free_rows,
    share_rows,
    truncate_rows,
)
from ferrum_jax.state import CacheState, PageTables


def allocate(
    state: CacheState, seq_ids: ArrayLike, num_tokens: ArrayLike
) -> tuple[CacheState, jax.Array]:
    """Gives free rows the blocks for their first tokens, or changes nothing.

    Args:
      state: The cache.
      seq_ids: i32[R]. Free rows, no two alike; `NULL_SEQ` is ignored.
      num_tokens: i32[R] or i32[]. Tokens that each row is to hold; 0 leaves its row free.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the state as it was, when a row is in use, named
      twice or out of range, a length is negative or more than a row can hold, or too few
      blocks are free.

    Example:
      >>> import ferrum_jax as fj
      >>> spec = fj.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                     num_blocks=4, block_size=4, max_seqs=2, max_blocks_per_seq=4)
      >>> state, ok = fj.allocate(fj.init(spec), [0, 1], [5, 3])
      >>> bool(ok), state.tables.block_ids.tolist()
      (True, [[0, 1, -1, -1], [2, -1, -1, -1]])
    """
    check_live("state", state.tables)
    seq_ids, num_tokens = _as_batch(seq_ids=seq_ids, num_tokens=num_tokens)
    tables, ok = _allocate(state.tables, seq_ids, num_tokens)
    return dataclasses.replace(state, tables=tables), ok


def extend(
    state: CacheState, seq_ids: ArrayLike, num_tokens: ArrayLike, *, max_new_tokens: int
) -> tuple[CacheState, jax.Array]:
    """Makes room for more tokens at the end of rows, or changes nothing.

    Args:
      state: The cache.
      seq_ids: i32[R]. Rows, no two alike; `NULL_SEQ` is ignored. A free row starts at length 0.
      num_tokens: i32[R] or i32[]. Tokens to add to each row.
      max_new_tokens: The most that any row may add (static): the work is R times the blocks
        that these need. A program is compiled for each power of two of these blocks.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the state as it was, when a row is named twice or
      out of range, a count is negative or above `max_new_tokens`, a row would grow beyond its
      M blocks, or too few blocks are free.
    """
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    check_live("state", state.tables)
    seq_ids, num_tokens = _as_batch(seq_ids=seq_ids, num_tokens=num_tokens)
    tables = state.tables
    limit = min(max_new_tokens, tables.max_blocks_per_seq * max(tables.block_sizes))
    limit = max(limit, -1)  # Which refuses every count.
    max_new = bucket_for(ceil_div(limit, tables.block_size))
    tables, ok = _extend(tables, seq_ids, num_tokens, np.int32(limit), max_new)
    return dataclasses.replace(state, tables=tables), ok


def free(state: CacheState, seq_ids: ArrayLike) -> CacheState:
    """Empties rows; a block that nobody holds any more goes back to the free ones.

    Args:
      state: The cache.
      seq_ids: i32[R]. Rows. One that is free already, named before or out of range is ignored.

    Returns:
      The state without these rows. It cannot fail, and freeing twice changes nothing.
    """
    check_live("state", state.tables)
    (seq_ids,) = _as_batch(seq_ids=seq_ids)
    return dataclasses.replace(state, tables=_free(state.tables, seq_ids))


def fork(
    state: CacheState, parents: ArrayLike, children: ArrayLike
) -> tuple[CacheState, jax.Array]:
    """Starts rows with the tokens of others, or changes nothing; donates the state.

    Full blocks are shared. A partly filled last block is copied at once, so that no later
    append meets a block of two owners.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      parents: i32[R], or i32[] for all children. Rows that hold tokens; one may have several
        children.
      children: i32[R]. Free rows, no two alike. A pair whose child is `NULL_SEQ` is ignored.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, when a parent holds nothing, a
      child is in use, named twice or out of range, or too few blocks are free.
    """
    check_live("state", state)
    children, parents = _as_batch(children=children, parents=parents)
    return _fork(state, parents, children)


def share(
    state: CacheState, sources: ArrayLike, targets: ArrayLike, num_tokens: ArrayLike
) -> tuple[CacheState, jax.Array]:
    """Lets rows hold the first tokens of others in place of their own; donates the state.

    For rows that begin with the same tokens: full blocks are shared, the rest of `num_tokens`
    is copied, and blocks so replaced are free unless somebody else holds them.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      sources: i32[R], or i32[] for all targets. Rows to share from.
      targets: i32[R]. Rows to change, no two alike, none of them also a source. A pair whose
        target is `NULL_SEQ` is ignored.
      num_tokens: i32[R] or i32[]. Tokens to share, at most either row's length.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, when a row is out of range, a
      target is named twice or also a source, a length is above either row's, or a block is
      needed for a copy and none is free.
    """
    check_live("state", state)
    targets, sources, num_tokens = _as_batch(
        targets=targets, sources=sources, num_tokens=num_tokens
    )
    return _share(state, sources, targets, num_tokens)


def truncate(
    state: CacheState, seq_ids: ArrayLike, seq_lens: ArrayLike
) -> tuple[CacheState, jax.Array]:
    """Cuts rows back, as when speculated tokens are refused; donates the state.

    Blocks beyond the new length are let go. A last block that becomes partly filled while
    others hold it too is copied at once, as in `fork`; that may need a free block.

    Tokens that compression dropped count as part of a row's length: what was appended since is cut
    off as anywhere. A cut further back takes the last of the tokens that were kept, one for each
    position; so the row goes on at its new end, and none of its tokens is from beyond it.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      seq_ids: i32[R]. Rows, no two alike; `NULL_SEQ` is ignored.
      seq_lens: i32[R] or i32[]. New lengths, at most the present ones, which are
        `seq_lens + num_pruned` of the tables; 0 frees the row.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, when a row is named twice or out
      of range, a length is negative, above the present one or so short that a pruned row would
      have no token left, or a block is needed for a copy and none is free.
    """
    check_live("state", state)
    seq_ids, seq_lens = _as_batch(seq_ids=seq_ids, seq_lens=seq_lens)
    return _truncate(state, seq_ids, seq_lens)


def _as_batch(**named: ArrayLike) -> tuple[Ids, ...]:
    """Returns what `as_rows` does, padded to a power of two if the host has all of it."""
    return pad_host_ids(*as_rows(**named))


_Result = tuple[CacheState, jax.Array]

_allocate = jax.jit(allocate_rows)
_free = jax.jit(free_rows)


@functools.partial(jax.jit, static_argnames="max_blocks")
def _extend(
    tables: PageTables,
    seq_ids: jax.Array,
    num_tokens: jax.Array,
    limit: jax.Array,
    max_blocks: int,
) -> tuple[PageTables, jax.Array]:
    """Extends rows by at most `limit` tokens each, which take at most `max_blocks` blocks."""
    refused = jnp.full_like(num_tokens, -1)
    num_tokens = jnp.where(num_tokens > limit, refused, num_tokens)
    return extend_rows(tables, seq_ids, num_tokens, max_blocks * tables.block_size)


@functools.partial(jax.jit, donate_argnames="state")
def _fork(state: CacheState, parents: jax.Array, children: jax.Array) -> _Result:
    tables, ok, copies = fork_rows(state.tables, parents, children)
    return CacheState(pool=apply_copies(state.pool, copies), tables=tables), ok


@functools.partial(jax.jit, donate_argnames="state")
def _share(
    state: CacheState, sources: jax.Array, targets: jax.Array, num_tokens: jax.Array
) -> _Result:
    tables, ok, copies = share_rows(state.tables, sources, targets, num_tokens)
    return CacheState(pool=apply_copies(state.pool, copies), tables=tables), ok


@functools.partial(jax.jit, donate_argnames="state")
def _truncate(state: CacheState, seq_ids: jax.Array, seq_lens: jax.Array) -> _Result:
    tables, ok, copies = truncate_rows(state.tables, seq_ids, seq_lens)
    return CacheState(pool=apply_copies(state.pool, copies), tables=tables), ok
