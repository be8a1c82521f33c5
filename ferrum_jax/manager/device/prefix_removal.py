"""Releases what requests hold of the prefix cache, and removes what is cached."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.ghosts import Reason
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.types import BlockId


class PrefixRemoval:
    """The part of a device's prefix caching that releases and removes blocks. Not thread-safe.

    Args:
      pool: The device's pool.
      cache: The record of cached blocks.
      clock: Returns seconds that only grow.

    Attributes:
      cache: As given.
    """

    def __init__(self, pool: DevicePool, cache: PrefixCache, clock: Callable[[], float]):
        self.cache, self._pool, self._clock = cache, pool, clock
        self._unreleased: list[BlockId] = []  # The cache has removed these, and the pool has not.

    @property
    def num_idle_blocks(self) -> PerPool:
        """Cached blocks that no request uses: they are released on demand."""
        num_idle = self.cache.num_idle_blocks
        return num_idle + self._num_unreleased() if self._unreleased else num_idle

    def referenced_blocks(self) -> list[BlockId]:
        """Returns every block to which the prefix cache has a reference."""
        return [*self.cache.block_ids(), *self._unreleased]

    def num_idle_without(self, requests: Iterable[LiveRequest]) -> PerPool:
        """Returns how many more cached blocks no request would use if these ended."""
        return self.cache.num_idle_without(request.lease for request in requests)

    def truncate_lease(self, lease: Lease, num_tokens: int) -> None:
        """Releases the blocks that a lease covers past a row's first `num_tokens`."""
        self.cache.truncate_lease(lease, num_tokens // self._pool.counts.block_size, self._clock())

    def release(self, lease: Lease) -> None:
        """Ends a lease: its row is freed at once, or no longer holds the blocks."""
        self.cache.release(lease, self._clock())

    def num_lone_blocks(self, request: LiveRequest) -> int:
        """Returns how many of a request's last cached blocks are held by no other."""
        path = request.lease.node.path()
        return sum(len(node.blocks) for node in path if node.num_users == 1)

    def uncache_for_rewrite(
        self, request: LiveRequest, num_blocks: int, residents: Iterable[LiveRequest]
    ) -> None:
        """Removes blocks of a request that is compressed next from the prefix cache.

        Those that its groups with a sliding window hold are removed too: they stay as they are.

        Args:
          request: The request.
          num_blocks: Number of its last cached blocks to remove, so that they are overwritten.
          residents: All requests that have a row.
        """
        lease = request.lease
        first = lease.num_blocks - num_blocks
        if self._pool.counts.has_windows:
            first = min(first, lease.first_window)
        if first < lease.num_blocks:
            self.uncache([lease.blocks[first]], residents, Reason.EVICTED)

    def uncache(
        self, blocks: Sequence[TreeBlock], requests: Iterable[LiveRequest], reason: Reason
    ) -> None:
        """Removes blocks and all that follow them from the prefix cache, in use or not.

        The requests keep them as blocks of their own; blocks that no request holds are freed.

        Args:
          blocks: Cached blocks.
          requests: All requests that have a row.
          reason: Why they are removed.
        """
        removed = list(
            dict.fromkeys(b for first in blocks for b in self.cache.with_followers(first))
        )
        removed.sort(key=lambda block: block.logical_index, reverse=True)
        are_removed, left = set(removed), {}
        for request in requests:
            covered = request.lease.blocks
            num_left = next((i for i, b in enumerate(covered) if b in are_removed), len(covered))
            if num_left < len(covered):
                left[request] = num_left
        if removed:
            rows = {request.seq_id: num_left for request, num_left in left.items()}
            self._pool.uncache(rows, [i for block in removed for i in block.held_ids])
        for request, num_left in left.items():
            self.cache.cover(request.lease, request.lease.node, num_left)
        self.cache.discard(removed, reason, self._clock())

    def evict(self, num_blocks: PerPool) -> None:
        """Evicts cached blocks until `num_blocks` more are free, or no more can be evicted."""
        num_blocks -= self._num_unreleased()
        self._release_blocks(self.cache.evict(num_blocks, self._clock()))

    def expire(self) -> None:
        """Evicts cached blocks after their time to live."""
        self._release_blocks(self.cache.expire(self._clock()))

    def reset(
        self, salt: Hashable | None, requests: Iterable[LiveRequest], residents: list[LiveRequest]
    ) -> None:
        """Removes cached prefixes, though requests use them; live requests cache no more.

        Args:
          salt: The salt under which they are cached; None for every salt, and for none.
          requests: All live requests.
          residents: Those of them that have a row.
        """
        forest = self.cache.forest
        keys = [key for key in forest.keys() if salt in (None, key.salt)]
        blocks = [block for key in keys for block in forest.subtree_of(key)]
        firsts = [block for block in blocks if not block.logical_index]
        self.uncache(firsts, residents, Reason.RESET)
        for request in requests:
            if salt in (None, request.allocation.cache_salt):
                request.known.forbid_caching()
                request.discard_blocks_away()

    def set_version(self, version: Hashable, requests: Iterable[LiveRequest]) -> None:
        """Sets the version of the weights, if it is another one; live requests cache no more.

        Args:
          version: The version.
          requests: All live requests.
        """
        if version != self.cache.forest.version:
            self.cache.set_version(version)
            for request in requests:
                request.known.forbid_caching()

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Replaces the ids of blocks that have moved in the pool by their new ones."""
        self.cache.renumber(new_ids)
        self._unreleased = [new_ids.get(block_id, block_id) for block_id in self._unreleased]

    def _num_unreleased(self) -> PerPool:
        return self._pool.counts.ids.count(self._unreleased)

    def _release_blocks(self, block_ids: Sequence[BlockId]) -> None:
        """Releases the cache's references to blocks that it has removed."""
        self._unreleased += block_ids
        if self._unreleased:
            self._pool.release_cached(self._unreleased)  # Where that fails, it is done next time.
            self._unreleased = []
