"""Reclaims blocks and rows when they run short.

Expired cached blocks are evicted first, then others as the block policy says. If there is a
request policy, less urgent requests are swapped out after that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.interfaces import CacheEvictionPolicy
from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.device.request_table import RequestTable
from ferrum_jax.manager.device.swapping import Swapping
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.refusals import out_of_room_error, shortage_error
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.manager.signals import RoomSignals
from ferrum_jax.records import AllocationRequest
from ferrum_jax.types import Priority, RequestId

_logger = logging.getLogger("ferrum_jax")


class Reclaimer:
    """Makes room by evicting cached blocks and preempting requests. Not thread-safe.

    Args:
      pool: The device's pool.
      requests: The device's live requests.
      prefixes: The device's prefix cache.
      swapping: Swaps requests out.
      policy: Chooses among less urgent requests; None if requests are never preempted.

    Attributes:
      preemption_count: Requests that were swapped out for a more urgent one.
    """

    def __init__(
        self,
        pool: DevicePool,
        requests: RequestTable,
        prefixes: Prefixes,
        swapping: Swapping,
        policy: CacheEvictionPolicy | None,
    ):
        self._pool, self._requests = pool, requests
        self._prefixes, self._swapping, self._policy = prefixes, swapping, policy
        self.preemption_count = 0

    @property
    def obtainable(self) -> PerPool:
        """Blocks that are available without preempting a request: growth and eviction counted."""
        return self._pool.counts.num_available + self._prefixes.num_idle_blocks

    @property
    def preempts(self) -> bool:
        """Whether requests may be swapped out for more urgent ones."""
        return self._policy is not None

    def room_signals(self) -> RoomSignals:
        """Returns the numbers of which one grows when waiting for room may end."""
        return RoomSignals(
            self.obtainable,
            self._pool.counts.num_free_rows,
            -self._swapping.host_bytes,
            self.preemption_count,
            int(self._pool.is_lost),
        )

    def victims_for_request(
        self, request: AllocationRequest, num_blocks: PerPool
    ) -> list[LiveRequest]:
        """Returns the requests to swap out so that a request gets a row and `num_blocks` blocks.

        Raises:
          OutOfRowsError: If no row is free, and none can be made free.
          OutOfBlocksError: If too few blocks can be made available.
        """
        victims = self._victims(num_blocks, request.priority, num_rows=1)
        if victims is None:
            raise shortage_error(request, num_blocks, self.obtainable, self._pool)
        return victims

    def require_blocks(
        self,
        asked: str,
        num_blocks: PerPool,
        priority: Priority,
        exclude: Collection[LiveRequest] = (),
        num_rows: int = 0,
    ) -> None:
        """Makes room for blocks, or changes nothing.

        Args:
          asked: Name of the call, for the error.
          num_blocks: Blocks that are to be available.
          priority: Priority of the call: only requests of a lower one are swapped out.
          exclude: Requests that are not swapped out, whatever their priority.
          num_rows: Rows that are to be free.

        Raises:
          OutOfBlocksError, OutOfRowsError: If too few blocks or rows can be made available.
          OutOfHostMemoryError: If a request to swap out cannot be stored.
        """
        victims = self._victims(num_blocks, priority, exclude, num_rows)
        if victims is None:
            raise out_of_room_error(asked, num_blocks, num_rows, self.obtainable, self._pool)
        self.make_room(num_blocks, victims)

    def reserve(self, requests: Sequence[LiveRequest], num_tokens: int) -> None:
        """Frees blocks for more tokens of each request, as far as there are any; no preemption."""
        num_tokens = min(num_tokens, self._pool.geometry.max_sequence_length)
        rows = [request.seq_id for request in requests]
        num_new = self._pool.queries.num_blocks_to_extend(rows, [num_tokens] * len(rows))
        num_new = num_new.at_most(self.obtainable)
        self.make_room(num_new)
        self._pool.sizes.reserve(num_new)

    def make_room(self, num_blocks: PerPool, victims: Sequence[LiveRequest] = ()) -> None:
        """Swaps requests out, then evicts cached blocks until `num_blocks` are available.

        Raises:
          OutOfHostMemoryError: If a request cannot be stored, on a disk that is full or broken.
            All of them stay, and so does what is cached.
        """
        self._swapping.swap_out(victims)
        self.preemption_count += len(victims)
        if not num_blocks.fits_in(self._pool.counts.num_available):
            self._prefixes.evict(num_blocks - self._pool.counts.num_available)

    def note_use(self, requests: Iterable[LiveRequest], now: float) -> None:
        """Records a use of requests, and tells the request policy."""
        policy = self._policy
        for request in requests:
            request.note_use(now)
            if policy is not None:
                name = request.request_id
                self._tell(lambda name=name: policy.record_access(name, now))

    def discard(self, request: LiveRequest) -> None:
        """Tells the request policy that a request has ended, or has moved away."""
        policy = self._policy
        if policy is not None:
            self._tell(lambda: policy.forget(request.request_id))

    def _victims(
        self,
        num_blocks: PerPool,
        priority: Priority,
        exclude: Collection[LiveRequest] = (),
        num_rows: int = 0,
    ) -> list[LiveRequest] | None:
        """Returns the requests to swap out for blocks and rows; None if that is not enough."""
        has_row = num_rows <= self._pool.counts.num_free_rows
        if has_row and num_blocks.fits_in(self.obtainable):
            return []
        if self._policy is None:
            return None
        candidates = {
            request.request_id: request
            for request in self._requests
            if request.is_resident
            and request.allocation.priority < priority
            and request not in exclude
        }
        chosen: list[LiveRequest] = []

        def shortage() -> PerPool:
            idle = self._prefixes.num_idle_without(chosen)
            own = self._pool.queries.num_freed_by([request.seq_id for request in chosen])
            return (num_blocks - self.obtainable - idle - own).at_least_zero()

        def is_enough() -> bool:
            has_rows = len(chosen) >= num_rows - self._pool.counts.num_free_rows
            return has_rows and not any(shortage())

        while not is_enough():
            named = self._ask(shortage(), candidates)
            if not named:
                return None
            for name in named:
                if not is_enough():
                    chosen.append(candidates.pop(name))
        return chosen if self._swapping.has_room_for(chosen) else None

    def _ask(
        self, shortage: PerPool, candidates: Mapping[RequestId, LiveRequest]
    ) -> list[RequestId]:
        """Returns the candidates that the policy names."""
        policy = self._policy
        assert policy is not None
        views = [(name, PagedKvCacheHandle(request)) for name, request in candidates.items()]
        one = self._pool.counts.in_first_pool(1)  # Where only a row is short.
        num_bytes = self._pool.bytes_of(shortage if any(shortage) else one)
        named = self._tell(
            lambda: list(dict.fromkeys(policy.select_eviction_candidates(num_bytes, views)))
        )
        return [name for name in named or () if name in candidates]

    def _tell(self, call: Callable[[], Any]) -> Any:
        """Calls the policy; an error is logged, and costs only its judgement."""
        try:
            return call()
        except Exception:
            _logger.exception("The eviction policy failed.")
            return None
