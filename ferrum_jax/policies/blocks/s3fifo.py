"""S3-FIFO, a block policy of a small queue, a main queue and ghosts."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from ferrum_jax.checks import check_number
from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock
from ferrum_jax.policies.blocks.recency import take_first

_MAX_USES = 3  # Further uses are not counted: an unused block is evicted within three rounds.


class S3FifoBlockPolicy(BlockEvictionPolicy):
    """Two FIFO queues: a small one for new blocks, the main one for blocks that were used again.

    At the head of the small queue a block moves to the main queue if it was used meanwhile;
    otherwise it is evicted and leaves a ghost. A block that is cached again while its ghost is
    remembered enters the main queue. At the head of the main queue a block that was used moves to
    the tail.

    A block that cannot be evicted moves to the tail of its queue.

    Args:
      capacity: Maximum number of blocks in the pool.
      small_fraction: Share of the blocks in the small queue, from 0 to 1.

    Raises:
      ValueError: The fraction is not from 0 to 1.

    References:
      Yang, Zhang, Qiu, Yue, Rashmi: FIFO queues are all you need for cache eviction, SOSP 2023.
    """

    def __init__(self, capacity: int, *, small_fraction: float = 0.1):
        super().__init__(capacity)
        if not 0 <= check_number("small_fraction", small_fraction) <= 1:
            raise ValueError(f"small_fraction must be from 0 to 1, got {small_fraction}.")
        self._num_small = max(1, int(small_fraction * capacity))
        # Blocks in the order of eviction, and the uses of each since it was queued.
        self._small: collections.OrderedDict[CachedBlock, int] = collections.OrderedDict()
        self._main: collections.OrderedDict[CachedBlock, int] = collections.OrderedDict()
        self._ghosts = GhostList(max(1, capacity - self._num_small))

    @property
    def name(self) -> str:
        """Returns "s3fifo"."""
        return "s3fifo"

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Queues blocks: those with a ghost in the main queue, the others in the small one."""
        for block in blocks:
            is_return = self._ghosts.pop(block.prefix_key)
            (self._main if is_return else self._small)[block] = 0

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Counts a use of each block; the queues stay as they are."""
        small, main = self._small, self._main
        for block in blocks:
            queue = small if block in small else main
            if queue[block] < _MAX_USES:
                queue[block] += 1

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks from their queues."""
        for block in blocks:
            del (self._small if block in self._small else self._main)[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Removes and returns the first unused block that can be evicted, first of the long queue.

        Args:
          can_evict: Returns whether a block can be evicted.

        Returns:
          The block, or None if none can be evicted.
        """
        if len(self._small) < self._num_small:
            block = self._evict_main(can_evict)
            if block is not None:
                return block
        # The main queue again: used blocks of the small one have moved to it.
        return self._evict_small(can_evict) or self._evict_main(can_evict)

    def _evict_small(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        for _ in range(len(self._small)):
            block, num_uses = next(iter(self._small.items()))
            if num_uses:
                del self._small[block]
                self._main[block] = 0
            elif can_evict(block):
                del self._small[block]
                self._ghosts.add(block.prefix_key)
                return block
            else:
                self._small.move_to_end(block)
        return None

    def _evict_main(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        def can_evict_unused(block: CachedBlock) -> bool:
            if self._main[block]:
                self._main[block] -= 1
                return False
            return can_evict(block)

        for _ in range(_MAX_USES + 1):  # After `_MAX_USES` rounds every count is 0.
            block = take_first(self._main, can_evict_unused)
            if block is not None:
                return block
        return None
