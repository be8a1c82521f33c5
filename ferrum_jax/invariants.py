"""Invariants of a cache between any two operations, as one check."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ferrum_jax.layers import LayerMap
from ferrum_jax.state import BlockPool, CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK, IdsLike


def check_state(state: CacheState, pins: IdsLike | Sequence[IdsLike] | None = None) -> None:
    """Raises unless all invariants of the tables hold. Reads the device.

    - Each block is either free, and on the stack once, or live; never both.
    - A block's reference count is the number of rows that hold it, plus its pins.
    - A row lists its blocks first, then `NULL_BLOCK`. Its blocks are distinct and have room for its
      tokens. A row without blocks has no tokens.
    - A row lists `NULL_BLOCK` for the blocks that its sliding window has passed and that it has
      released, and for no block that its next token can see.
    - A block that a row will append to is held by no other row.
    - A sequence has the same length in all layer groups.

    Args:
      state: The cache.
      pins: i32[N]. References that do not come from rows (blocks that were allocated by themselves,
        or are cached for later prompts); none if absent. A list of these if there are several
        pools.

    Raises:
      AssertionError: An invariant is broken; the text says which one, and where.
    """
    all_pins: Any = [None] * len(state.pools) if pins is None else pins
    if pins is not None and len(state.pools) == 1:
        all_pins = [pins]
    for parts in zip(state.pools, state.page_tables, all_pins, strict=True):
        _check_pool(*parts)
    _check_lengths(state.layers, jax.device_get(state.page_tables))


def _check_pool(pool: BlockPool, tables: PageTables, pins: IdsLike | None) -> None:
    """Raises AssertionError unless a pool and its tables hold together."""
    tables = jax.device_get(tables)
    _require(pool.num_blocks == tables.num_blocks, "pool and tables differ in num_blocks")
    _require(pool.block_sizes == tables.block_sizes, "pool and tables differ in block_sizes")
    _require(np.isin(tables.token_formats, pool.formats).all(), "a row is in an unknown format")
    _require((tables.num_pruned >= 0).all(), "num_pruned is negative")
    _check_stack(tables)
    mapped = _check_rows(tables)
    _check_references(tables, mapped, pins)


def _check_stack(tables: PageTables) -> None:
    """Raises AssertionError unless each block is either free or live."""
    size, num_free = tables.num_blocks, int(tables.num_free)
    _require(0 <= num_free <= size, f"num_free is {num_free} of {size} blocks")
    stack = tables.free_blocks[:num_free]
    _require(((stack >= 0) & (stack < size)).all(), "the stack holds an id outside the pool")
    _require(np.unique(stack).size == num_free, "a block is on the stack twice")
    is_free = np.zeros(size, bool)
    is_free[stack] = True
    is_unused = np.asarray(tables.ref_counts) == 0
    _require((is_free == is_unused).all(), "a block is both free and live, or neither")


def _check_rows(tables: PageTables) -> np.ndarray:
    """Returns which entries of the table are blocks, or raises AssertionError."""
    ids, held, lens = tables.block_ids, tables.num_blocks_held, tables.held_lens
    first, size = tables.num_released, tables.num_blocks
    block_sizes = np.asarray(tables.block_sizes)[tables.token_formats]
    logical = np.arange(ids.shape[1])
    ends = first + held
    mapped = (logical >= first[:, None]) & (logical < ends[:, None])
    in_range = (held >= 0) & (first >= 0) & (ends <= ids.shape[1])
    _require(in_range.all(), "num_blocks_held or num_released out of range")
    _require((ids[~mapped] == NULL_BLOCK).all(), "a block is listed outside num_blocks_held")
    _require(((ids[mapped] >= 0) & (ids[mapped] < size)).all(), "a row holds an invalid block")
    _require((lens >= 0).all(), "a length is negative")
    _require((lens <= ends * block_sizes).all(), "a row has more tokens than room")
    _require(((held > 0) <= (lens > 0)).all(), "a row holds blocks but no token")
    is_plain = (tables.token_formats == 0) & (tables.num_pruned == 0)
    _require((is_plain | (held > 0)).all(), "a free row is compressed")
    windows = [window if window is not None else np.inf for window in tables.windows]
    seen = lens + 1 - np.maximum(np.repeat(windows, tables.max_seqs), 2)
    needed = np.maximum(seen, 0) // tables.block_size
    _require((first <= needed).all(), "a row has released a block that its next token sees")
    for row, row_ids in enumerate(ids):
        row_ids = row_ids[mapped[row]]
        _require(np.unique(row_ids).size == row_ids.size, f"row {row} holds a block twice")
    return mapped


def _check_references(tables: PageTables, mapped: np.ndarray, pins: IdsLike | None) -> None:
    """Raises AssertionError unless references are counted, and no row appends to a shared block."""
    ids, refs, size = tables.block_ids, np.asarray(tables.ref_counts), tables.num_blocks
    pinned = np.zeros(size, int) if pins is None else np.asarray(pins)
    mentions = np.bincount(ids[mapped], minlength=size)
    wrong = np.flatnonzero(mentions + pinned != refs)
    _require(wrong.size == 0, f"references of blocks {wrong[:8].tolist()} are miscounted")
    block_sizes = np.asarray(tables.block_sizes)[tables.token_formats]
    appended = mapped & (np.arange(ids.shape[1]) >= (tables.held_lens // block_sizes)[:, None])
    shared = np.flatnonzero((appended & (refs[ids] > 1)).any(1))
    _require(shared.size == 0, f"rows {shared[:8].tolist()} would append to a shared block")


def _check_lengths(layers: LayerMap, page_tables: Sequence[PageTables]) -> None:
    """Raises AssertionError unless a sequence is equally long in all layer groups."""
    lens = [np.asarray(t.held_lens + t.num_pruned).reshape(t.num_groups, -1) for t in page_tables]
    for place in layers.places:
        same = np.array_equal(lens[place.pool][place.index], lens[0][0])
        _require(same, f"group {place.group.name!r} has other lengths than the first group")


def _require(is_true: object, broken: str) -> None:
    if not is_true:
        raise AssertionError(f"The cache is corrupt: {broken}. Please report this as a bug.")
