"""Operations on the rows of a cache: each takes a state and returns the next one.

Batches of rows are padded with `NULL_SEQ`, which is ignored. An operation that can fail returns
`ok` as data, and changes nothing if it is false. No operation reads the device or recompiles for
other ids, lengths or contents. For arrays on the device a program is compiled per number of rows R;
ids and counts on the host (NumPy arrays, lists) are first padded to a power of two, so that up to R
rows take at most `2 + log2(R)` programs.

Ids, counts and lengths may have any integer dtype, on the host or on the device. Each operation
raises AssertionError if their shapes do not fit; ValueError if they are not integers or, on the
host, do not fit in int32 (on the device they then count as out of range); and ValueError if the
state was consumed by an earlier call.

Operations that only change tables leave the given state usable; outside `jit` they copy the
tables (8 bytes per block). Operations that also write the pool (`fork`, `share`, `truncate`) donate
the state. Under an outer `jax.jit` neither applies: donate the state there, and every operation
works in place.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.arithmetic import ceil_div, next_power_of_two
from ferrum_jax.checks import check_integer, check_live
from ferrum_jax.ops.arguments import as_padded_rows
from ferrum_jax.ops.storage import apply_copies
from ferrum_jax.ops.tables import (
    Change,
    allocate_rows,
    extend_rows,
    fork_rows,
    free_rows,
    make_all,
    share_rows,
    truncate_rows,
)
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import IdsLike


def allocate(
    state: CacheState, seq_ids: IdsLike, num_tokens: IdsLike
) -> tuple[CacheState, jax.Array]:
    """Allocates blocks for the first tokens of free rows, or changes nothing.

    Args:
      state: The cache.
      seq_ids: i32[R]. Free rows, all different; `NULL_SEQ` is ignored.
      num_tokens: i32[R] or i32[]. Tokens that each row will hold; a row of 0 tokens stays free.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the state unchanged, if a row is in use, named twice
      or out of range, a length is negative or more than a row can hold, or too few blocks are
      free.

    Example:
      >>> import ferrum_jax as fj
      >>> spec = fj.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                     num_blocks=4, block_size=4, max_seqs=2, max_blocks_per_seq=4)
      >>> state, ok = fj.allocate(fj.init(spec), [0, 1], [5, 3])
      >>> bool(ok), state.tables.block_ids.tolist()
      (True, [[0, 1, -1, -1], [2, -1, -1, -1]])
    """
    check_live("state", state.page_tables)
    seq_ids, num_tokens = as_padded_rows(seq_ids=seq_ids, num_tokens=num_tokens)
    page_tables, ok = _allocate(state.page_tables, seq_ids, num_tokens)
    return state.with_tables(page_tables), ok


def extend(
    state: CacheState, seq_ids: IdsLike, num_tokens: IdsLike, *, max_new_tokens: int
) -> tuple[CacheState, jax.Array]:
    """Allocates room for more tokens at the end of rows, or changes nothing.

    Args:
      state: The cache.
      seq_ids: i32[R]. Rows, all different; `NULL_SEQ` is ignored. A free row starts at length 0.
      num_tokens: i32[R] or i32[]. Tokens to add to each row.
      max_new_tokens: The most tokens that a row may add (static). The work is R times the blocks
        that these tokens need; a program is compiled for each power of two of these blocks.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the state unchanged, if a row is named twice or out
      of range, a count is negative or above `max_new_tokens`, a row would need more than M blocks,
      or too few blocks are free.
    """
    max_new_tokens = check_integer("max_new_tokens", max_new_tokens)
    check_live("state", state.page_tables)
    seq_ids, num_tokens = as_padded_rows(seq_ids=seq_ids, num_tokens=num_tokens)
    most = max(t.max_blocks_per_seq * max(t.block_sizes) for t in state.page_tables)
    limit = max(min(max_new_tokens, most), -1)  # -1 refuses any count.
    max_new = next_power_of_two(ceil_div(limit, state.page_tables[0].block_size))
    page_tables, ok = _extend(state.page_tables, seq_ids, num_tokens, np.int32(limit), max_new)
    return state.with_tables(page_tables), ok


def free(state: CacheState, seq_ids: IdsLike) -> CacheState:
    """Frees rows, and releases their blocks. It cannot fail.

    Args:
      state: The cache.
      seq_ids: i32[R]. Rows. A row that is free, named before or out of range is ignored, so that
        to free a row twice changes nothing.

    Returns:
      The state with these rows free.
    """
    check_live("state", state.page_tables)
    (seq_ids,) = as_padded_rows(seq_ids=seq_ids)
    return state.with_tables(_free(state.page_tables, seq_ids))


def fork(state: CacheState, parents: IdsLike, children: IdsLike) -> tuple[CacheState, jax.Array]:
    """Starts rows with the tokens of other rows, or changes nothing; donates the state.

    Full blocks are shared. A partly filled last block is copied at once, so that no row appends to
    a shared block.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      parents: i32[R], or i32[] for all children. Rows that hold tokens; a parent may have several
        children.
      children: i32[R]. Free rows, all different. A pair with child `NULL_SEQ` is ignored.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, if a parent holds no token, a child
      is in use, named twice or out of range, or too few blocks are free.
    """
    check_live("state", state)
    children, parents = as_padded_rows(children=children, parents=parents)
    return _fork(state, parents, children)


def share(
    state: CacheState, sources: IdsLike, targets: IdsLike, num_tokens: IdsLike
) -> tuple[CacheState, jax.Array]:
    """Replaces the first tokens of rows by those of other rows; donates the state.

    Meant for rows that begin with the same tokens: full blocks are shared, the rest of `num_tokens`
    is copied, and the blocks that are replaced are released.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      sources: i32[R], or i32[] for all targets. Rows to share from.
      targets: i32[R]. Rows to change, all different, none of them also a source. A pair with
        target `NULL_SEQ` is ignored.
      num_tokens: i32[R] or i32[]. Tokens to share, at most the length of either row.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, if a row is out of range or
      compressed, a target is named twice or also a source, a count is above the length of either
      row, or a copy needs a block and none is free.
    """
    check_live("state", state)
    targets, sources, num_tokens = as_padded_rows(
        targets=targets, sources=sources, num_tokens=num_tokens
    )
    return _share(state, sources, targets, num_tokens)


def truncate(
    state: CacheState, seq_ids: IdsLike, seq_lens: IdsLike
) -> tuple[CacheState, jax.Array]:
    """Shortens sequences, for example after rejected speculation; donates the state.

    Blocks beyond the new length are released. If the last block becomes partly filled while another
    row holds it, it is copied at once, as in `fork`; this may need a free block.

    Lengths are of sequences: tokens that compression dropped count. Tokens that were appended since
    are cut off as in any row. A cut further back drops one kept token per position, the last ones
    first, so that the row continues at its new end and holds no token from beyond it.

    Args:
      state: The cache. Called outside `jit`, this consumes it: use the one returned.
      seq_ids: i32[R]. Rows, all different; `NULL_SEQ` is ignored.
      seq_lens: i32[R] or i32[]. New lengths, at most `seq_lens` of the tables; 0 frees the row.

    Returns:
      `(state, ok)`, ok: bool[]. False, with the same content, if a row is named twice or out of
      range, a length is negative, above the present one or so short that a pruned row would keep
      no token, or a copy needs a block and none is free.
    """
    check_live("state", state)
    seq_ids, seq_lens = as_padded_rows(seq_ids=seq_ids, seq_lens=seq_lens)
    return _truncate(state, seq_ids, seq_lens)


@jax.jit
def _allocate(
    page_tables: tuple[PageTables, ...], seq_ids: jax.Array, num_tokens: jax.Array
) -> tuple[tuple[PageTables, ...], jax.Array]:
    """Allocates blocks for the first tokens of sequences (i32[R])."""
    changed, _, ok = make_all([allocate_rows(t, seq_ids, num_tokens) for t in page_tables])
    return changed, ok


@functools.partial(jax.jit, static_argnames="max_blocks")
def _extend(
    page_tables: tuple[PageTables, ...],
    seq_ids: jax.Array,
    num_tokens: jax.Array,
    limit: jax.Array,
    max_blocks: int,
) -> tuple[tuple[PageTables, ...], jax.Array]:
    """Extends sequences (i32[R]) by at most `limit` tokens, which need at most `max_blocks`."""
    refused = jnp.full_like(num_tokens, -1)
    num_tokens = jnp.where(num_tokens > limit, refused, num_tokens)
    changed, _, ok = make_all(
        [extend_rows(t, seq_ids, num_tokens, max_blocks * t.block_size) for t in page_tables]
    )
    return changed, ok


@jax.jit
def _free(page_tables: tuple[PageTables, ...], seq_ids: jax.Array) -> tuple[PageTables, ...]:
    """Frees sequences (i32[R])."""
    return tuple(free_rows(tables, seq_ids) for tables in page_tables)


def _with_copies(
    change_rows: Callable[..., Change],
) -> Callable[..., tuple[CacheState, jax.Array]]:
    """Returns the jitted operation on a state that `change_rows` is on tables."""

    def change(state: CacheState, *rows: jax.Array) -> tuple[CacheState, jax.Array]:
        page_tables, copies, ok = make_all([change_rows(t, *rows) for t in state.page_tables])
        pools = [apply_copies(*of_pool) for of_pool in zip(state.pools, copies, strict=True)]
        return state.with_pools(pools).with_tables(page_tables), ok

    change.__name__ = change_rows.__name__  # Names the program in profiles.
    return jax.jit(change, donate_argnames="state")


_fork = _with_copies(fork_rows)
_share = _with_copies(share_rows)
_truncate = _with_copies(truncate_rows)
