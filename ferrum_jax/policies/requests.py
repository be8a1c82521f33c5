"""The least-recently-used policy for preemption: which requests to swap out to make room."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_jax.checks import check_count
from ferrum_jax.interfaces import CacheEvictionPolicy, KvCacheHandle
from ferrum_jax.types import RequestId


class LruEvictionPolicy(CacheEvictionPolicy):
    """Selects the least recently used requests first.

    The time of use is the last recorded access, or the handle's `last_access` if none was
    recorded. Not thread-safe: call it under the manager's lock.

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
        """Selects the requests to evict, and discards the access times of all others.

        Args:
          required_memory: Bytes to free; 0 selects no request.
          active_caches: Every request that may be evicted, with its handle. Of two used at the
            same time, the one listed first is selected first. For a request that is not listed,
            the recorded access time is discarded; its handle's `last_access` counts again.

        Returns:
          Request ids, the least recently used first, and no more than are needed. A request
          without bytes is never selected. If all requests together hold too few bytes, all that
          hold any are returned: the caller compares their sum with `required_memory`.

        Raises:
          ValueError: `required_memory` is negative or not an integer.
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
        """Records that a request was used, in place of an earlier record.

        Args:
          request_id: The request's id.
          access_time: Time of the use, in seconds of `time.monotonic()`.
        """
        self._access_times[request_id] = access_time

    def forget(self, request_id: RequestId) -> None:
        """Discards the recorded access time of a request, if any.

        Args:
          request_id: The request's id.
        """
        self._access_times.pop(request_id, None)

    def name(self) -> str:
        """Returns "lru"."""
        return "lru"
