"""How room is made when blocks run short: who goes, and in which order.

First what has expired, then cached blocks as the block policy says, then, if there is a request
policy, the caches of less urgent requests, which are swapped out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from ferrum_jax.interfaces import CacheEvictionPolicy
from ferrum_jax.manager.handle import Entry, PagedKvCacheHandle
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.prefixes import Prefixes
from ferrum_jax.manager.swapping import Swapping
from ferrum_jax.types import Priority, RequestId

_logger = logging.getLogger("ferrum_jax")


class Room:
    """Finds blocks for those who ask. Not thread-safe.

    Args:
      blocks: Where blocks are.
      prefixes: Which of them are only cached.
      swapping: How a request is swapped out.
      policy: Chooses among less urgent requests; None if these are to stay.
      entries: All live requests.

    Attributes:
      preemption_count: Requests that were swapped out for a more urgent one.
    """

    def __init__(
        self,
        blocks: DevicePool,
        prefixes: Prefixes,
        swapping: Swapping,
        policy: CacheEvictionPolicy | None,
        entries: Mapping[RequestId, Entry],
    ):
        self._blocks, self._prefixes, self._swapping = blocks, prefixes, swapping
        self._policy, self._entries = policy, entries
        self.preemption_count = 0

    @property
    def num_blocks(self) -> int:
        """Blocks that can be had without swapping anybody out."""
        return self._blocks.counts.num_available + self._prefixes.num_idle_blocks

    @property
    def preempts(self) -> bool:
        """Whether anybody may be swapped out for somebody else."""
        return self._policy is not None

    def victims(
        self, num_blocks: int, priority: Priority, but: Collection[Entry] = (), num_rows: int = 0
    ) -> list[Entry] | None:
        """Returns who has to be swapped out for so much room; None if it cannot be had at all.

        Args:
          num_blocks: Blocks that are wanted.
          priority: How urgent; only who is less urgent is swapped out.
          but: Requests that stay whatever their priority.
          num_rows: Rows that are wanted.
        """
        if num_blocks <= self.num_blocks and num_rows <= self._blocks.counts.num_free_rows:
            return []
        return self._choose(num_blocks, priority, but, num_rows)

    def make(self, num_blocks: int, victims: Sequence[Entry]) -> None:
        """Makes room for so many blocks: swaps `victims` out, then lets cached blocks go.

        Raises:
          OutOfHostMemoryError: If one of them cannot be stored, on a disk that is full or broken.
            All of them stay, and so does what is cached.
        """
        self._swapping.swap_out(victims)
        self.preemption_count += len(victims)
        shortage = num_blocks - self._blocks.counts.num_available
        if shortage > 0:
            self._prefixes.evict(shortage)

    def note_use(self, entry: Entry) -> None:
        """Tells the request policy that a request was used."""
        policy = self._policy
        if policy is not None:
            self._tell(lambda: policy.record_access(entry.request_id, entry.last_access))

    def forget(self, entry: Entry) -> None:
        """Tells the request policy that a request is over."""
        policy = self._policy
        if policy is not None:
            self._tell(lambda: policy.forget(entry.request_id))

    def _choose(
        self, num_blocks: int, priority: Priority, but: Collection[Entry], num_rows: int
    ) -> list[Entry] | None:
        """Returns whom the policy would swap out for so much room; None if it is not enough."""
        if self._policy is None:
            return None
        candidates = {
            name: entry
            for name, entry in self._entries.items()
            if entry.is_resident and entry.request.priority < priority and entry not in but
        }
        chosen: list[Entry] = []

        def shortage() -> int:
            idle = self._prefixes.cache.forest.num_idle_without(e.lease.node for e in chosen)
            own = self._blocks.queries.num_freed_by([entry.seq_id for entry in chosen])
            return num_blocks - self.num_blocks - idle - own

        def is_enough() -> bool:
            return shortage() <= 0 and len(chosen) >= num_rows - self._blocks.counts.num_free_rows

        while not is_enough():
            named = self._ask(max(shortage(), 1), candidates)
            if not named:
                return None
            for name in named:
                if not is_enough():
                    chosen.append(candidates.pop(name))
        return chosen if self._swapping.has_room_for(chosen) else None

    def _ask(self, num_blocks: int, candidates: Mapping[RequestId, Entry]) -> list[RequestId]:
        """Returns whom of the candidates the policy names, if any."""
        policy = self._policy
        assert policy is not None
        views = [(name, PagedKvCacheHandle(entry)) for name, entry in candidates.items()]
        num_bytes = num_blocks * self._blocks.block_bytes
        named = self._tell(
            lambda: list(dict.fromkeys(policy.select_eviction_candidates(num_bytes, views)))
        )
        return [name for name in named or () if name in candidates]

    def _tell(self, call: Callable[[], Any]) -> Any:
        """Calls the policy; its failure is logged, and costs only its judgement."""
        try:
            return call()
        except Exception:
            _logger.exception("The eviction policy failed.")
            return None
