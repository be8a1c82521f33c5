"""Adaptive replacement (ARC), a block policy that balances recency against frequency."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock
from ferrum_jax.policies.blocks.recency import BlockOrder, take_first


class ArcBlockPolicy(BlockEvictionPolicy):
    """Adaptive replacement: one list of blocks used once, one of blocks used again.

    Evicted blocks of both lists leave ghosts. When a block with a ghost is cached again, the
    target size of the list that the ghost came from grows.

    The paper evicts at each miss and then inserts; here a request first evicts as many blocks as
    it needs, so the target moves one request later. If no block of the list that is too long can
    be evicted, one of the other list is.

    References:
      Megiddo, Modha: ARC: a self-tuning, low overhead replacement cache, FAST 2003 (figure 4).
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._capacity = capacity
        self._target = 0.0  # Wanted number of blocks used once.
        self._once: BlockOrder = collections.OrderedDict()
        self._again: BlockOrder = collections.OrderedDict()
        self._ghosts_once, self._ghosts_again = GhostList(capacity), GhostList(2 * capacity)

    @property
    def name(self) -> str:
        """Returns "arc"."""
        return "arc"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Adds blocks to those used once, and those with a ghost to those used again."""
        for block in blocks:
            is_return = self._adapt(block.prefix_key)
            (self._again if is_return else self._once)[block] = None
        self._bound_ghosts()

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Makes blocks the most recently used of those used again."""
        once, again = self._once, self._again
        for block in blocks:
            if block in once:
                del once[block]
                again[block] = None
            else:
                again.move_to_end(block)

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks from their lists."""
        for block in blocks:
            del (self._once if block in self._once else self._again)[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Removes and returns the oldest block that can be evicted, first of the long list."""
        once, again = (self._once, self._ghosts_once), (self._again, self._ghosts_again)
        has_too_many = len(self._once) > self._target
        for order, ghosts in (once, again) if has_too_many else (again, once):
            block = take_first(order, can_evict)
            if block is not None:
                ghosts.add(block.prefix_key)
                return block
        return None

    def _adapt(self, prefix_key: int) -> bool:
        """Moves the target if a ghost has this key, and returns whether one has."""
        num_once, num_again = len(self._ghosts_once), len(self._ghosts_again)
        if self._ghosts_once.pop(prefix_key):
            step = max(1.0, num_again / num_once)
            self._target = min(self._target + step, self._capacity)
            return True
        if self._ghosts_again.pop(prefix_key):
            step = max(1.0, num_once / num_again)
            self._target = max(self._target - step, 0.0)
            return True
        return False

    def _bound_ghosts(self) -> None:
        """Discards ghosts: blocks and ghosts used once stay within the capacity, all within 2x."""
        num_blocks = len(self._once) + len(self._again)
        while self._ghosts_once and len(self._once) + len(self._ghosts_once) > self._capacity:
            self._ghosts_once.discard_oldest()
        num_ghosts = len(self._ghosts_once) + len(self._ghosts_again)
        for _ in range(min(num_ghosts, num_blocks + num_ghosts - 2 * self._capacity)):
            (self._ghosts_again or self._ghosts_once).discard_oldest()
