"""The layer groups of which a prefix cache holds blocks, and what their windows need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.layers import first_needed_block
from ferrum_jax.prefix.tree import Match, TreeBlock
from ferrum_jax.types import NULL_BLOCK, BlockId


class LayerGroups:
    """Layer groups that a prefix cache has blocks of, pool by pool.

    A boundary at token n is a position where a request may continue cached tokens. A full group
    needs all blocks before it; a window group needs those that tokens from position n on can see.

    Args:
      block_size: Tokens per block.
      windows: Sliding window of each group, in tokens; None for a full group.
      pools: Index of each group's pool.

    Attributes:
      block_size: As given.
      windows: As given.
      windowed: Window of each window group, in tokens and at least 2, by the group's index.
      widest: The largest of these; 0 if there are none.
      num_full: Number of full groups in each pool.
      none: 0 for each pool.
      none_released: 0 for each group.
      num_evicted: Number of groups in each pool in which eviction of a whole block is meant to free
        one: the full groups, or all groups if none is full.
      is_single: Whether there is one group, and it is full.
      lead: Index of the first full group, or 0. Its block ids are `CachedBlock.block_id`.
    """

    def __init__(self, block_size: int, windows: Sequence[int | None], pools: Sequence[int]):
        self.block_size, self.windows = block_size, tuple(windows)
        # A window of 1 keeps the last token all the same: it is the latest query's own.
        self.windowed = {g: max(w, 2) for g, w in enumerate(windows) if w is not None}
        self.widest = max(self.windowed.values(), default=0)
        self._pools, self.none = tuple(pools), PerPool([0] * (1 + max(pools)))
        full = [group for group, window in enumerate(windows) if window is None]
        self.num_full = self._count(full)
        self.num_evicted = self.num_full if full else self._count(self.windowed)
        self.is_single = self.windows == (None,)
        self.lead = full[0] if full else 0
        self.none_released = (0,) * len(windows)

    def num_released(self, num_tokens: int) -> tuple[int, ...]:
        """Returns how many leading blocks each group does not need at a boundary."""
        return tuple(first_needed_block(num_tokens, w, self.block_size) for w in self.windows)

    def first_window(self, num_released: Sequence[int]) -> int:
        """Returns the logical index of the first block that any window group holds.

        Args:
          num_released: Leading blocks that each group does not hold.
        """
        return min([num_released[group] for group in self.windowed], default=0)

    def first_held(self, row_blocks: Sequence[Sequence[BlockId]]) -> int:
        """Returns the logical index of the first block that any window group of a row holds."""
        return self.first_window([_num_null(row) for row in row_blocks]) if self.windowed else 0

    def num_window_ids(self, block: TreeBlock) -> PerPool:
        """Returns in how many window groups of each pool the block has an id."""
        return self._count(g for g in self.windowed if block.block_ids[g] != NULL_BLOCK)

    def num_ids(self, block_ids: Sequence[BlockId]) -> PerPool:
        """Returns how many ids each pool has, given a block's id in each group."""
        if self.is_single:
            return self.num_full
        return self._count(g for g, block_id in enumerate(block_ids) if block_id != NULL_BLOCK)

    def without_windows(self, block: TreeBlock) -> list[BlockId]:
        """Returns the ids of a block, with `NULL_BLOCK` for each window group."""
        pairs = zip(block.block_ids, self.windows, strict=True)
        return [block_id if window is None else NULL_BLOCK for block_id, window in pairs]

    def usable(self, match: Match) -> tuple[int, int | None]:
        """Finds the longest boundary of a match at which no window group lacks a block.

        Args:
          match: A match that begins at the root.

        Returns:
          `(num_tokens, group)`: the boundary, and the index of a group that lacks a block at the
          match's end; None if that is the boundary.
        """
        blocks = match.blocks if match.tail is None else [*match.blocks, match.tail]
        num_tokens, limited_by = match.num_tokens, None
        while num_tokens:
            missing = ((self._last_missing(g, blocks, num_tokens), g) for g in self.windowed)
            index, group = max(missing, default=(-1, 0))
            if index < 0:
                break
            limited_by = group if limited_by is None else limited_by
            # Each boundary between the missing block's beginning and here needs that block.
            num_tokens = index * self.block_size
        return num_tokens, limited_by

    def usable_part(self, match: Match) -> Match:
        """Returns a match up to its longest usable boundary."""
        num_tokens, _ = self.usable(match)
        num_full, num_tail = divmod(num_tokens, self.block_size)
        tail = match.tail if num_tail else None
        blocks, num_released = match.blocks[:num_full], self.num_released(num_tokens)
        return Match(match.start, match.node, num_tokens, blocks, tail, num_released)

    def _count(self, groups: Iterable[int]) -> PerPool:
        """Returns how many of some groups are in each pool."""
        counts = list(self.none)
        for group in groups:
            counts[self._pools[group]] += 1
        return PerPool(counts)

    def _last_missing(self, group: int, blocks: Sequence[TreeBlock], num_tokens: int) -> int:
        """Returns the index of the last block that a group needs and lacks; -1 if none."""
        first = first_needed_block(num_tokens, self.windowed[group], self.block_size)
        for index in range((num_tokens - 1) // self.block_size, first - 1, -1):
            if blocks[index].block_ids[group] == NULL_BLOCK:
                return index
        return -1


def _num_null(row: Sequence[BlockId]) -> int:
    """Returns how many leading blocks a row has released."""
    return next((i for i, block_id in enumerate(row) if block_id != NULL_BLOCK), len(row))
