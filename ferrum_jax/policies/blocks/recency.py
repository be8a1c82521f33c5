"""Block policies that rank by the time of the last use: LRU and segmented LRU."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from ferrum_jax.checks import check_number
from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock

_Value = TypeVar("_Value")

BlockOrder: TypeAlias = collections.OrderedDict[CachedBlock, None]
"""Blocks in the order of eviction."""


def take_first(
    order: collections.OrderedDict[CachedBlock, _Value], can_evict: Callable[[CachedBlock], bool]
) -> CachedBlock | None:
    """Removes and returns the first block of an order that can be evicted.

    A block that cannot be evicted is moved to the end: it is in use, or precedes one that is. So
    it is examined once, not at each eviction.

    Args:
      order: Blocks in the order of eviction.
      can_evict: Returns whether a block can be evicted.

    Returns:
      The block, or None if none can be evicted.
    """
    for _ in range(len(order)):
        block = next(iter(order))
        if can_evict(block):
            del order[block]
            return block
        order.move_to_end(block)
    return None


class LruBlockPolicy(BlockEvictionPolicy):
    """Evicts the least recently used block. One that cannot be evicted counts as used now.

    Example:
      >>> from ferrum_jax.policies.blocks import Retention
      >>> policy = LruBlockPolicy(capacity=8)
      >>> first, second = (CachedBlock(i, i, i, Retention()) for i in range(2))
      >>> policy.insert([second, first])
      >>> policy.evict(lambda block: True) is second
      True
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._order: BlockOrder = collections.OrderedDict()

    @property
    def name(self) -> str:
        """Returns "lru"."""
        return "lru"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Adds blocks as the most recently used."""
        self._order.update(dict.fromkeys(blocks))

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Makes blocks the most recently used."""
        move_to_end = self._order.move_to_end
        for block in blocks:
            move_to_end(block)

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks."""
        for block in blocks:
            del self._order[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Removes and returns the least recently used block that can be evicted, if any."""
        return take_first(self._order, can_evict)


class SegmentedLruBlockPolicy(BlockEvictionPolicy):
    """Segmented LRU: blocks that were used once are evicted before those that were used again.

    A new block is in the probation segment. A block that is used again moves to the protected
    segment; so does one that is cached again while its ghost is remembered. The protected segment
    is bounded: its oldest blocks return to probation. So a scan of prompts that never return
    passes through probation only.

    Args:
      capacity: Maximum number of blocks in the pool, and of ghosts.
      protected_fraction: Share of the blocks that may be protected, from 0 to 1.

    Raises:
      ValueError: The fraction is not from 0 to 1.

    References:
      Karedla, Love, Wherry: Caching strategies to improve disk system performance, IEEE Computer
      27(3), 1994. The ghosts are those of 2Q: Johnson, Shasha, VLDB 1994.
    """

    def __init__(self, capacity: int, *, protected_fraction: float = 0.7):
        super().__init__(capacity)
        if not 0 <= check_number("protected_fraction", protected_fraction) <= 1:
            raise ValueError(f"protected_fraction must be from 0 to 1, got {protected_fraction}.")
        self._max_protected = int(protected_fraction * capacity)
        self._probation: BlockOrder = collections.OrderedDict()
        self._protected: BlockOrder = collections.OrderedDict()
        self._ghosts = GhostList(capacity)

    @property
    def name(self) -> str:
        """Returns "slru"."""
        return "slru"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Adds blocks to the probation segment, and those with a ghost to the protected one."""
        for block in blocks:
            is_return = self._ghosts.pop(block.prefix_key)
            (self._protected if is_return else self._probation)[block] = None
        self._bound_protected()

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Makes blocks the most recently used of the protected segment."""
        probation, protected = self._probation, self._protected
        for block in blocks:
            if block in probation:
                del probation[block]
                protected[block] = None
            else:
                protected.move_to_end(block)
        self._bound_protected()

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks from their segments."""
        for block in blocks:
            del (self._probation if block in self._probation else self._protected)[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Removes and returns the oldest block that can be evicted, of probation if it has one."""
        block = take_first(self._probation, can_evict) or take_first(self._protected, can_evict)
        if block is not None:
            self._ghosts.add(block.prefix_key)
        return block

    def _bound_protected(self) -> None:
        while len(self._protected) > self._max_protected:
            block, _ = self._protected.popitem(last=False)
            self._probation[block] = None
