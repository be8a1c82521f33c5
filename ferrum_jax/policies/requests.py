"""Whose cache goes when room is short: the one that was used longest ago."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_jax.checks import check_count
from ferrum_jax.interfaces import CacheEvictionPolicy, KvCacheHandle
from ferrum_jax.types import RequestId


class LruEvictionPolicy(CacheEvictionPolicy):
    """Evicts the least recently used request first.

    A request counts by its last recorded access, or by its handle's `last_access` when none
    was recorded. It is not thread-safe: call it under the manager's lock.

    Example:
      >>> policy = LruEvictionPolicy()
      >>> policy.record_access("chat-1", access_time=12.5)
      >>> policy.select_eviction_candidates(required_memory=0, active_caches=[])
      []
    """

    def __init__(self) -> None:
        self._access_times: dict[RequestId, float] = {}

    def select_eviction_candidates(
        self, required_memory: int, active_caches: Sequence[tuple[RequestId, KvCacheHandle]]
    ) -> list[RequestId]:
        """Names the requests to evict, and forgets those that are no longer active.

        Args:
          required_memory: Bytes to free; 0 names nobody.
          active_caches: Every request that may be evicted, with its handle. Of two used at the
            same time, the one listed first goes first. What was recorded of any other request
            is dropped; if it is live after all, its handle's `last_access` counts again.

        Returns:
          Request ids, the longest unused first, and no more than are needed. One that holds no
          bytes is never named. If all together hold too little, all that hold any are named:
          the caller sees that their sum falls short, and decides.

        Raises:
          ValueError: If `required_memory` is negative.
        """
        check_count("required_memory", required_memory, minimum=0)
        known, self._access_times = self._access_times, {}
        candidates: list[tuple[float, int, RequestId]] = []
        for request_id, handle in active_caches:
            if request_id in known:
                self._access_times[request_id] = known[request_id]
            stats = handle.stats()
            candidates.append(
                (known.get(request_id, stats.last_access), stats.memory_bytes, request_id)
            )
        candidates.sort(key=lambda candidate: candidate[0])  # Stable: ties keep their order.

        chosen: list[RequestId] = []
        freed_bytes = 0
        for _, memory_bytes, request_id in candidates:
            if freed_bytes >= required_memory:
                break
            if memory_bytes > 0:
                chosen.append(request_id)
                freed_bytes += memory_bytes
        return chosen

    def record_access(self, request_id: RequestId, access_time: float) -> None:
        """Notes that a request was used; the note replaces an earlier one.

        Args:
          request_id: The caller's key.
          access_time: When, in seconds of `time.monotonic()`.
        """
        self._access_times[request_id] = access_time

    def forget(self, request_id: RequestId) -> None:
        """Drops what was noted of a request, if anything.

        Args:
          request_id: The caller's key.
        """
        self._access_times.pop(request_id, None)

    def name(self) -> str:
        """Returns "lru"."""
        return "lru"
