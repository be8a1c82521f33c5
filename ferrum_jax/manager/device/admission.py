"""Gives requests a row: new requests, and those that were swapped out."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_jax.errors import DuplicateRequestError, FerrumError
from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.device.reclaim import Reclaimer
from ferrum_jax.manager.device.swapping import Swapping
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.refusals import require_acceptable
from ferrum_jax.manager.requests import LiveRequest, RequestTable
from ferrum_jax.prefix.tree import Match
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import Priority, RequestId


class Admission:
    """Starts requests, and swaps them in, where there is room or room can be made.

    Not thread-safe.

    Args:
      pool: The device's pool.
      requests: The device's live requests.
      prefixes: The device's prefix cache.
      swapping: The store of requests that are swapped out.
      reclaimer: Makes room.

    Attributes:
      num_allocated: Requests that were started.
      num_refused: Requests that could not be started.
    """

    def __init__(
        self,
        pool: DevicePool,
        requests: RequestTable,
        prefixes: Prefixes,
        swapping: Swapping,
        reclaimer: Reclaimer,
    ):
        self._pool, self._requests, self._prefixes = pool, requests, prefixes
        self._swapping, self._reclaimer = swapping, reclaimer
        self.num_allocated = self.num_refused = 0

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int | None,
        max_sequence_length: int | None,
        priority: Priority,
        *,
        prompt_token_ids: Sequence[int] | None,
        cache_salt: str | None,
    ) -> AllocationRequest:
        """Returns a request of the pool's geometry; see `PagedKvCacheManager.new_request`."""
        geometry = self._pool.geometry
        if max_sequence_length is None:
            max_sequence_length = geometry.max_sequence_length
        prompt = None if prompt_token_ids is None else TokenIds(prompt_token_ids)
        return AllocationRequest(
            request_id=request_id,
            initial_tokens=len(prompt or ()) if initial_tokens is None else initial_tokens,
            max_sequence_length=max_sequence_length,
            num_layers=geometry.num_layers,
            num_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            device=self._pool.device,
            dtype=geometry.dtype,
            priority=priority,
            prompt_token_ids=prompt,
            cache_salt=cache_salt,
        )

    def start(self, request: AllocationRequest) -> LiveRequest:
        """Starts a request, with what is cached of its prompt; see `ManagerFront.allocate`."""
        match, lease = self._prefixes.acquire(request)
        try:
            victims = self._victims_for(request, match)
            self._reclaimer.make_room(self._num_new_blocks(request, match), victims)
            seq_id, num_cached = self._prefixes.start_row(request, match)
        except BaseException:
            self._prefixes.undo_acquire(lease)
            self.num_refused += 1
            raise
        self.num_allocated += 1
        return self._requests.start(request, seq_id, lease, num_cached)

    def can_start(self, request: AllocationRequest) -> bool:
        """Returns whether `start` would succeed now."""
        match, lease = self._prefixes.acquire(request)
        try:
            self._victims_for(request, match)
        except FerrumError:
            return False
        else:
            return True
        finally:
            self._prefixes.undo_acquire(lease)

    def swap_in(self, request: LiveRequest) -> None:
        """Restores a request that is swapped out; see `ManagerFront.swap_in`."""
        shape = request.shape
        num_new = self._pool.counts.blocks_for(shape.num_tokens, shape.token_format)
        victims = self._reclaimer.victims_for_request(request.allocation, num_new)
        needs_room = bool(victims) or num_new > self._pool.counts.num_free
        # A file is checked before room is made: it may be corrupt.
        payload = self._swapping.read(request, check=needs_room)
        self._reclaimer.make_room(num_new, victims)
        self._swapping.swap_in(request, payload)

    def _victims_for(self, request: AllocationRequest, match: Match) -> list[LiveRequest]:
        """Returns the requests to swap out for a new one, or raises why it cannot start.

        Args:
          request: The request to start.
          match: The cached prefix of its prompt, which is held.
        """
        if request.request_id in self._requests:
            raise DuplicateRequestError(
                f"Request {request.request_id!r} is live already. Deallocate it first, or use "
                "another id."
            )
        require_acceptable(request, self._pool)
        return self._reclaimer.victims_for_request(request, self._num_new_blocks(request, match))

    def _num_new_blocks(self, request: AllocationRequest, match: Match) -> int:
        return self._pool.counts.blocks_for(request.initial_tokens) - len(match.blocks)
