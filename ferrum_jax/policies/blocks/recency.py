"""Block policies that go by when a block was used."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import TypeAlias, TypeVar

from ferrum_jax.checks import check_number
from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock

_Value = TypeVar("_Value")

BlockOrder: TypeAlias = collections.OrderedDict[CachedBlock, None]
"""Blocks in the order in which they may go."""


def take_first(
    order: collections.OrderedDict[CachedBlock, _Value], can_evict: Callable[[CachedBlock], bool]
) -> CachedBlock | None:
    """Takes the first block that can go out of an order.

    A block that cannot go counts as used now, since it is in use or leads to one that is: so it
    is met once, not at each eviction.

    Args:
      order: Blocks, the first to go first. Those that cannot go are put last.
      can_evict: Says whether a block can go.

    Returns:
      The block, or None if none can go.
    """
    for _ in range(len(order)):
        block = next(iter(order))
        if can_evict(block):
            del order[block]
            return block
        order.move_to_end(block)
    return None


class LruBlockPolicy(BlockEvictionPolicy):
    """Evicts the block that was used longest ago.

    A block that cannot go counts as used now.

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
        """Puts blocks last in the order."""
        self._order.update(dict.fromkeys(blocks))

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Puts blocks last in the order."""
        move_to_end = self._order.move_to_end
        for block in blocks:
            move_to_end(block)

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Takes blocks out of the order."""
        for block in blocks:
            del self._order[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Takes the first block that can go out of the order."""
        return take_first(self._order, can_evict)


class SegmentedLruBlockPolicy(BlockEvictionPolicy):
    """LRU in two segments: blocks that were used once go before those that were found again.

    A new block is on probation. When it is found again it is protected, and so is one that comes
    back while its ghost is remembered. The protected segment has a bound: its oldest blocks go
    back on probation. So a scan of prompts that never return passes through probation only.

    Args:
      capacity: Blocks that the pool may have. As many ghosts are remembered.
      protected_fraction: Part of the blocks that may be protected, from 0 to 1.

    Raises:
      ValueError: If the fraction is none.

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
        """Puts blocks on probation, and those with a ghost under protection."""
        for block in blocks:
            returns = self._ghosts.pop(block.prefix_key)
            (self._protected if returns else self._probation)[block] = None
        self._bound_protected()

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Puts blocks under protection, as the latest used."""
        probation, protected = self._probation, self._protected
        for block in blocks:
            if block in probation:
                del probation[block]
                protected[block] = None
            else:
                protected.move_to_end(block)
        self._bound_protected()

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Takes blocks out of their segments."""
        for block in blocks:
            del (self._probation if block in self._probation else self._protected)[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Takes the oldest block on probation that can go, or else the oldest protected one."""
        block = take_first(self._probation, can_evict) or take_first(self._protected, can_evict)
        if block is not None:
            self._ghosts.add(block.prefix_key)
        return block

    def _bound_protected(self) -> None:
        while len(self._protected) > self._max_protected:
            block, _ = self._protected.popitem(last=False)
            self._probation[block] = None
