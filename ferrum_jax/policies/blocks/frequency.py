"""Block policies that rank by the number of uses, with ageing: LFU and GDSF."""

from __future__ import annotations

import abc
import heapq
import itertools
from collections.abc import Callable, Sequence

from ferrum_jax.checks import check_count
from ferrum_jax.policies.blocks.policy import BlockEvictionPolicy, CachedBlock


class _AgedFrequencyPolicy(BlockEvictionPolicy):
    """Evicts the block of the lowest rank: `age + uses * worth`, with the age at its last use.

    The age is the rank of the block evicted last. So an unused block is overtaken in time.
    """

    def __init__(self, capacity: int):
        super().__init__(capacity)
        self._age = 0.0
        self._clock = itertools.count()
        self._uses: dict[CachedBlock, int] = {}
        # Rank of each block; the lowest is evicted first, of equal ones the older. Ranks only
        # grow, so the heap may hold an outdated one: it is corrected when it reaches the top.
        self._ranks: dict[CachedBlock, tuple[float, int]] = {}
        self._heap: list[tuple[tuple[float, int], CachedBlock]] = []

    @abc.abstractmethod
    def _worth(self, block: CachedBlock) -> float:
        """Returns the weight of one use of a block."""

    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Adds blocks with one use each."""
        self._uses.update(dict.fromkeys(blocks, 1))
        self._ranks.update(dict.fromkeys(blocks, (0.0, 0)))
        self._rank(blocks)
        for block in blocks:
            heapq.heappush(self._heap, (self._ranks[block], block))

    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Counts a use of each block, and ranks the block as used now."""
        uses = self._uses
        for block in blocks:
            uses[block] += 1
        self._rank(blocks)

    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks."""
        for block in blocks:
            del self._uses[block], self._ranks[block]
        if len(self._heap) > 2 * len(self._ranks):
            self._heap = [(rank, block) for block, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Removes and returns the block of the lowest rank that can be evicted, if any."""
        blocked: list[CachedBlock] = []
        victim = self._pop_least()
        while victim is not None and not can_evict(victim):
            blocked.append(victim)
            victim = self._pop_least()
        if victim is not None:
            self._age = self._ranks.pop(victim)[0]
            del self._uses[victim]
        # In use, or followed by a block that is: ranked as used now, or else they would be examined
        # at each eviction.
        for block in blocked:
            self._rank([block])
            heapq.heappush(self._heap, (self._ranks[block], block))
        return victim

    def _rank(self, blocks: Sequence[CachedBlock]) -> None:
        """Ranks blocks as used now, each at least as high as the deeper blocks before it."""
        highest, age, ranks, clock = 0.0, self._age, self._ranks, self._clock
        for block in blocks:
            highest = max(highest, ranks[block][0], age + self._uses[block] * self._worth(block))
            ranks[block] = highest, next(clock)

    def _pop_least(self) -> CachedBlock | None:
        """Pops the block of the lowest rank off the heap, if any."""
        while self._heap:
            rank, block = self._heap[0]
            current = self._ranks.get(block)
            if current == rank:
                return heapq.heappop(self._heap)[1]
            if current is None:
                heapq.heappop(self._heap)
            else:
                heapq.heapreplace(self._heap, (current, block))
        return None


class LfuBlockPolicy(_AgedFrequencyPolicy):
    """Evicts the least frequently used block, with dynamic ageing.

    Without ageing, blocks that were popular once would never be evicted.

    References:
      Arlitt, Cherkasova, Dilley, Friedrich, Jin: Evaluating content management techniques for
      Web proxy caches, 1999 (LFU-DA).
    """

    @property
    def name(self) -> str:
        """Returns "lfu"."""
        return "lfu"

    def _worth(self, block: CachedBlock) -> float:
        return 1.0


class GdsfBlockPolicy(_AgedFrequencyPolicy):
    """Evicts the block with the least work saved by its uses (greedy dual, size and frequency).

    All blocks have one size, so a use is weighted by the work of computing the block again. That
    work grows with depth, since each token attends to all tokens before it.

    Args:
      capacity: Maximum number of blocks in the pool.
      doubling_index: Logical index of the block that costs twice the work of the first one: where
        attention to earlier tokens costs as much as the rest of the model. For a model of 8
        billion parameters this is at about 25,000 tokens, 50 blocks of 512.

    Raises:
      ValueError: `doubling_index` is not a positive integer.

    References:
      Cherkasova: Improving WWW proxies performance with greedy-dual-size-frequency caching
      policy, HP Labs 1998.
    """

    def __init__(self, capacity: int, *, doubling_index: int = 50):
        super().__init__(capacity)
        check_count("doubling_index", doubling_index)
        self._doubling_index = doubling_index

    @property
    def name(self) -> str:
        """Returns "gdsf"."""
        return "gdsf"

    def _worth(self, block: CachedBlock) -> float:
        return 1.0 + block.logical_index / self._doubling_index
