"""The numbers of blocks on the host, where the blocks of all pools have different ones."""

import bisect
import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.types import NULL_BLOCK, BlockId


class BlockIds:
    """Converts between a block's id in its pool, and its id on the host.

    The host's ids of a pool follow those that the pools before it may grow to: with one pool both
    are the same.

    Args:
      max_blocks: Blocks that each pool may grow to.
      pools: Index of each layer group's pool.

    Attributes:
      firsts: The host's id of each pool's first block.
    """

    def __init__(self, max_blocks: PerPool, pools: Sequence[int]):
        self.firsts = (0, *itertools.accumulate(max_blocks[:-1]))
        of_groups = [[self.firsts[pool]] for pool in pools]
        self._of_groups = np.asarray(of_groups, np.int32)  # i32[G, 1]

    def split(self, host_ids: Iterable[BlockId]) -> list[list[BlockId]]:
        """Returns the ids in each pool of some blocks, given the host's ones."""
        if len(self.firsts) == 1:
            return [list(host_ids)]
        parts: list[list[BlockId]] = [[] for _ in self.firsts]
        for block_id in host_ids:
            pool = bisect.bisect_right(self.firsts, block_id) - 1
            parts[pool].append(block_id - self.firsts[pool])
        return parts

    def count(self, host_ids: Iterable[BlockId]) -> PerPool:
        """Returns how many of some blocks each pool has."""
        return PerPool(map(len, self.split(host_ids)))

    def in_pools(self, host_ids: np.ndarray) -> np.ndarray:
        """Returns the ids in their pools of blocks of each group: i32[G, P]."""
        if len(self.firsts) == 1:
            return host_ids
        return np.where(host_ids == NULL_BLOCK, NULL_BLOCK, host_ids - self._of_groups)

    def on_host(self, ids_in_pools: np.ndarray) -> np.ndarray:
        """Returns the host's ids of blocks of each group, i32[G, P]; see `in_pools`."""
        if len(self.firsts) == 1:
            return ids_in_pools
        return np.where(ids_in_pools == NULL_BLOCK, NULL_BLOCK, ids_in_pools + self._of_groups)
