"""Invariants of a cache between any two operations, as one check."""

import jax
import numpy as np

from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_BLOCK, IdsLike


def check_state(state: CacheState, pins: IdsLike | None = None) -> None:
    """Raises unless all invariants of the tables hold. Reads the device.

    - Each block is either free, and on the stack once, or live; never both.
    - A block's reference count is the number of rows that hold it, plus its pins.
    - A row lists its blocks first, then `NULL_BLOCK`. Its blocks are distinct and have room for its
      tokens. A row without blocks has no tokens.
    - A block that a row will append to is held by no other row.

    Args:
      state: The cache.
      pins: i32[N]. References that do not come from rows (blocks that were allocated by themselves,
        or are cached for later prompts); none if absent.

    Raises:
      AssertionError: An invariant is broken; the text says which one, and where.
    """
    tables = jax.device_get(state.tables)
    size, sizes = tables.num_blocks, np.asarray(tables.block_sizes)
    ids, held, lens = tables.block_ids, tables.num_blocks_held, tables.held_lens
    refs, num_free = tables.ref_counts, int(tables.num_free)
    pins = np.zeros(size, int) if pins is None else np.asarray(pins)

    _require(0 <= num_free <= size, f"num_free is {num_free} of {size} blocks")
    _require(state.pool.num_blocks == size, "pool and tables differ in num_blocks")
    _require(state.pool.block_sizes == tables.block_sizes, "pool and tables differ in block_sizes")
    _require(
        np.isin(tables.token_formats, state.pool.formats).all(), "a row is in an unknown format"
    )
    _require((tables.num_pruned >= 0).all(), "num_pruned is negative")
    block_sizes = sizes[tables.token_formats]
    stack = tables.free_blocks[:num_free]
    _require(((stack >= 0) & (stack < size)).all(), "the stack holds an id outside the pool")
    _require(np.unique(stack).size == num_free, "a block is on the stack twice")
    is_free = np.zeros(size, bool)
    is_free[stack] = True
    _require((is_free == (refs == 0)).all(), "a block is both free and live, or neither")

    mapped = np.arange(ids.shape[1]) < held[:, None]
    _require((held >= 0).all() and (held <= ids.shape[1]).all(), "num_blocks_held out of range")
    _require((ids[~mapped] == NULL_BLOCK).all(), "a block is listed beyond num_blocks_held")
    _require(((ids[mapped] >= 0) & (ids[mapped] < size)).all(), "a row holds an invalid block")
    _require((lens >= 0).all(), "a length is negative")
    _require((lens <= held * block_sizes).all(), "a row has more tokens than room")
    _require(((held > 0) <= (lens > 0)).all(), "a row holds blocks but no token")
    is_plain = (tables.token_formats == 0) & (tables.num_pruned == 0)
    _require((is_plain | (held > 0)).all(), "a free row is compressed")
    for row, row_ids in enumerate(ids):
        row_ids = row_ids[: held[row]]
        _require(np.unique(row_ids).size == row_ids.size, f"row {row} holds a block twice")
    mentions = np.bincount(ids[mapped], minlength=size)
    wrong = np.flatnonzero(mentions + pins != refs)
    _require(wrong.size == 0, f"references of blocks {wrong[:8].tolist()} are miscounted")

    appended = mapped & (np.arange(ids.shape[1]) >= (lens // block_sizes)[:, None])
    shared = np.flatnonzero((appended & (refs[ids] > 1)).any(1))
    _require(shared.size == 0, f"rows {shared[:8].tolist()} would append to a shared block")


def _require(is_true: object, broken: str) -> None:
    if not is_true:
        raise AssertionError(f"The cache is corrupt: {broken}. Please report this as a bug.")
