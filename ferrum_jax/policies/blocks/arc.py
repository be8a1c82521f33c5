"""The block policy that balances recency against frequency by itself."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock
from ferrum_jax.policies.blocks.recency import BlockOrder, take_first


class ArcBlockPolicy(BlockEvictionPolicy):
    """Adaptive replacement: blocks used once and blocks used again, with a moving boundary.

    Both kinds leave ghosts. When a block comes back whose ghost is among those used once, more
    room is given to blocks used once, and the other way round.

    The paper evicts at each miss and then inserts; here a request evicts all that it needs first,
    so that the boundary moves a request later. If no block of the kind that should give way can
    go, one of the other kind does.

    References:
      Megiddo, Modha: ARC: a self-tuning, low overhead replacement cache, FAST 2003 (figure 4).
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._capacity = capacity
        self._target = 0.0  # Blocks that those used once should have.
        self._once: BlockOrder = collections.OrderedDict()
        self._again: BlockOrder = collections.OrderedDict()
        self._ghosts_once, self._ghosts_again = GhostList(capacity), GhostList(2 * capacity)

    @property
    def name(self) -> str:
        """Returns "arc"."""
        return "arc"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Puts blocks among those used once, or again if a ghost remembers them."""
        for block in blocks:
            returns = self._adapt(block.prefix_key)
            (self._again if returns else self._once)[block] = None
        self._bound_ghosts()

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Puts blocks among those used again, as the latest used."""
        once, again = self._once, self._again
        for block in blocks:
            if block in once:
                del once[block]
                again[block] = None
            else:
                again.move_to_end(block)

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Takes blocks out of their order."""
        for block in blocks:
            del (self._once if block in self._once else self._again)[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Takes the oldest block of the kind that has more room than it should have."""
        once, again = (self._once, self._ghosts_once), (self._again, self._ghosts_again)
        has_too_many = len(self._once) > self._target
        for order, ghosts in (once, again) if has_too_many else (again, once):
            block = take_first(order, can_evict)
            if block is not None:
                ghosts.add(block.prefix_key)
                return block
        return None

    def _adapt(self, prefix_key: int) -> bool:
        """Moves the boundary if a ghost returns, and says whether one does."""
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
        """Remembers as many blocks as the pool has of those used once, and twice that in all."""
        num_blocks = len(self._once) + len(self._again)
        while self._ghosts_once and len(self._once) + len(self._ghosts_once) > self._capacity:
            self._ghosts_once.forget_oldest()
        num_ghosts = len(self._ghosts_once) + len(self._ghosts_again)
        for _ in range(min(num_ghosts, num_blocks + num_ghosts - 2 * self._capacity)):
            (self._ghosts_again or self._ghosts_once).forget_oldest()
