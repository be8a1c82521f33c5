"""The block policy that ranks by the priority in a prefix's retention."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock
from ferrum_jax.policies.blocks.recency import BlockOrder, take_first
from ferrum_jax.types import Priority


class PriorityBlockPolicy(BlockEvictionPolicy):
    """Evicts the lowest `Retention.priority` first, and the least recently used among equals.

    The priority is read when a block is inserted or touched. Pins and times to live are enforced
    by the prefix cache, with every policy.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._priorities: dict[CachedBlock, Priority] = {}
        self._orders: dict[Priority, BlockOrder] = {
            priority: collections.OrderedDict() for priority in sorted(Priority)
        }

    @property
    def name(self) -> str:
        """Returns "priority"."""
        return "priority"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Adds blocks as the most recently used of their priority."""
        for block in blocks:
            priority = block.retention.priority
            self._priorities[block] = priority
            self._orders[priority][block] = None

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Makes blocks the most recently used of their present priority."""
        self.remove(blocks)
        self.insert(blocks)

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks."""
        for block in blocks:
            del self._orders[self._priorities.pop(block)][block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Removes and returns the least recently used block of the lowest priority that has one."""
        for order in self._orders.values():
            block = take_first(order, can_evict)
            if block is not None:
                del self._priorities[block]
                return block
        return None
