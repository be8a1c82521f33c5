"""The block policy of three queues, where most blocks pass through a small one only."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence

from ferrum_jax.checks import check_number
from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock
from ferrum_jax.policies.blocks.recency import take_first

_MAX_USES = 3  # More are not counted, so that a block once popular goes within three rounds.


class S3FifoBlockPolicy(BlockEvictionPolicy):
    """Static queues: a small one for what is new, the main one for what was found there.

    At the end of the small queue a block goes to the main queue if it was used meanwhile, or else
    it is evicted and leaves a ghost; one that returns while its ghost is remembered enters the
    main queue. At the end of the main queue a block that was used goes round again.

    A block that cannot go is put last in its queue, and met again a round later.

    Args:
      capacity: Blocks that the pool may have.
      small_fraction: Part of them in the small queue, from 0 to 1.

    Raises:
      ValueError: If the fraction is none.

    References:
      Yang, Zhang, Qiu, Yue, Rashmi: FIFO queues are all you need for cache eviction, SOSP 2023.
    """

    def __init__(self, capacity: int, *, small_fraction: float = 0.1):
        super().__init__(capacity)
        if not 0 <= check_number("small_fraction", small_fraction) <= 1:
            raise ValueError(f"small_fraction must be from 0 to 1, got {small_fraction}.")
        self._num_small = max(1, int(small_fraction * capacity))
        # Blocks, the first to go first, and how often each was used since it was queued.
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
            returns = self._ghosts.pop(block.prefix_key)
            (self._main if returns else self._small)[block] = 0

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Counts a use; nothing moves."""
        small, main = self._small, self._main
        for block in blocks:
            queue = small if block in small else main
            if queue[block] < _MAX_USES:
                queue[block] += 1

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Takes blocks out of their queues."""
        for block in blocks:
            del (self._small if block in self._small else self._main)[block]

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Takes the first unused block out of the queue that is too long, or else the other."""
        if len(self._small) < self._num_small:
            block = self._evict_main(can_evict)
            if block is not None:
                return block
        # The main queue comes last in any case: used blocks of the small one have joined it.
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
        def is_worn_out(block: CachedBlock) -> bool:
            if self._main[block]:
                self._main[block] -= 1
                return False
            return can_evict(block)

        for _ in range(_MAX_USES + 1):  # After so many rounds every count is 0.
            block = take_first(self._main, is_worn_out)
            if block is not None:
                return block
        return None
