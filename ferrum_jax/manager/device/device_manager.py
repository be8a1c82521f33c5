"""The manager of one device: wires its parts together, and does what needs several of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.config import CacheConfig
from ferrum_jax.errors import FerrumError, InvalidHandleError
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.device.access import Access
from ferrum_jax.manager.device.compression import Compression
from ferrum_jax.manager.device.forking import Forking
from ferrum_jax.manager.device.prefixes import Prefixes, first_length
from ferrum_jax.manager.device.reclaim import Reclaimer
from ferrum_jax.manager.device.request_table import RequestTable
from ferrum_jax.manager.device.step_sync import StepSync
from ferrum_jax.manager.device.swapping import Swapping, make_store
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.refusals import (
    require_acceptable,
    require_length,
    require_new,
    require_possible,
    require_shareable,
    require_taken,
)
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.policies.blocks import make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.tree import Match
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_SEQ, BlockId, Priority, RequestId

_logger = logging.getLogger("ferrum_jax")


class DeviceManager:
    """The parts of one device's cache, and the operations that need several of them.

    Callers check their arguments, and hold the lock: inside `access.reading()` for an operation
    that changes nothing, inside `access.changing()` for any other.

    Args:
      config: The pool. Its first target device is used.
      geometry: The model, and the limits of a request.
      options: How the manager works.

    Attributes:
      config: As given.
      geometry: As given.
      pool: The cache state, and what is counted of it.
      requests: The live requests.
      prefixes: The prefix cache.
      swapping: The store of requests that are swapped out.
      reclaimer: Makes room.
      compression: Compresses requests.
      access: The lock, and the listeners to changes.
      num_allocated: Requests that were started.
      num_refused: Requests that could not be started.
    """

    def __init__(self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions):
        self.config, self.geometry, self._clock = config, geometry, options.clock
        self.num_allocated = self.num_refused = 0
        self.pool = DevicePool(
            config,
            geometry,
            config.target_devices[0],
            scrub_freed_blocks=options.scrub_freed_blocks,
            mesh=options.mesh,
            axis_name=options.axis_name,
        )
        self.pool.enable(options.token_formats)
        lock = threading.RLock()
        self.requests = RequestTable(self.pool, lock)
        prefix_config = config.prefix_cache_config if config.enable_prefix_caching else None
        counts = self.pool.counts
        block_policy = make_block_policy(options.block_policy, max(counts.max_blocks))
        prefix_cache = PrefixCache(
            prefix_config, config.block_size, block_policy, counts.windows, counts.pools
        )
        self.prefixes = Prefixes(self.pool, prefix_cache, self._clock)
        store = make_store(self.pool, options.tiers)
        self.swapping = Swapping(self.pool, self.prefixes, store)
        self.reclaimer = Reclaimer(
            self.pool, self.requests, self.prefixes, self.swapping, options.preemption_policy
        )
        parts = self.pool, self.requests, self.prefixes, self.reclaimer
        self.compression, self._forking = Compression(*parts), Forking(*parts)
        self._sync = StepSync(self.pool, self.requests, self.prefixes)
        room_signals, thresholds = self.reclaimer.room_signals, config.pressure_thresholds
        self.access = Access(self.pool, self._sync, room_signals, lock, thresholds)

    def close(self) -> None:
        """Ends all requests, and closes the store; takes the lock."""
        self.access.close(self._end_all)

    def _end_all(self) -> None:
        requests = list(self.requests)
        rows = [request.seq_id for request in requests if request.is_resident]
        if rows and not self.pool.is_lost:
            try:
                self.pool.free(rows)
            except Exception:
                _logger.exception("The blocks of a closed manager were not erased.")
        self._end(requests)
        self.swapping.close()

    # Requests.

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        return [(request.request_id, PagedKvCacheHandle(request)) for request in self.requests]

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int | None,
        max_sequence_length: int | None,
        priority: Priority,
        prompt_token_ids: Sequence[int] | None,
        cache_salt: str | None,
    ) -> AllocationRequest:
        """Returns a request of the pool's geometry; see `PagedKvCacheManager.new_request`."""
        geometry = self.geometry
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
            device=self.pool.device,
            dtype=geometry.dtype,
            priority=priority,
            prompt_token_ids=prompt,
            cache_salt=cache_salt,
        )

    def start(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Starts a request, its cached prefix first; see `PagedKvCacheManager.allocate`."""
        match, lease = self._acquire(request)
        try:
            num_new = self._num_new_blocks(request, match)
            victims = self._victims_for(request, num_new)
            self.reclaimer.make_room(num_new, victims)
            seq_id, num_cached = self.prefixes.start_row(request, match, lease)
        except BaseException:
            self.prefixes.undo_acquire(lease)
            self.num_refused += 1
            raise
        self.num_allocated += 1
        live = self.requests.start(request, seq_id, lease, num_cached)
        self.note_use([live])
        return PagedKvCacheHandle(live)

    def fork(self, source: RequestLike, new_ids: Sequence[RequestId]) -> list[PagedKvCacheHandle]:
        """Starts requests with all tokens of another one; see `SharingFront.fork`."""
        request = self.requests.known(source).require_resident()
        self.num_refused += len(new_ids)
        forks = self._forking.fork(request, new_ids)
        self.num_refused -= len(new_ids)
        self.num_allocated += len(forks)
        self.note_use([request, *forks])
        return list(map(PagedKvCacheHandle, forks))

    def can_start(self, request: AllocationRequest) -> bool:
        """Returns whether `start` would succeed now."""
        if self.pool.is_lost:
            return False
        match, lease = self._acquire(request)
        try:
            self._victims_for(request, self._num_new_blocks(request, match))
        except FerrumError:
            return False
        else:
            return True
        finally:
            self.prefixes.undo_acquire(lease)

    def swap_in(self, request: LiveRequest) -> None:
        """Restores a request, if it is swapped out; see `ManagerFront.swap_in`."""
        if request.is_resident:
            return
        num_new = self.pool.counts.blocks_of(request.shape)
        victims = self.reclaimer.victims_for_request(request.allocation, num_new)
        needs_room = bool(victims) or not num_new.fits_in(self.pool.counts.num_free)
        # A file is checked before room is made: it may be corrupt.
        payloads = self.swapping.read(request, check=needs_room)
        self.reclaimer.make_room(num_new, victims)
        self.swapping.swap_in(request, payloads)
        self.note_use([request])

    def _victims_for(self, request: AllocationRequest, num_new: PerPool) -> list[LiveRequest]:
        """Returns the requests to swap out for a new one, or raises why it cannot start.

        Args:
          request: The request to start.
          num_new: Blocks that it takes beside its cached prefix, which is held.
        """
        require_new([request.request_id], self.requests)
        require_acceptable(request, self.pool)
        return self.reclaimer.victims_for_request(request, num_new)

    def _acquire(self, request: AllocationRequest) -> tuple[Match, Lease]:
        """Finds the cached prefix of a request's prompt, and holds it; see `Prefixes.acquire`."""
        match, lease = self.prefixes.acquire(request)
        if lease.num_blocks <= len(match.blocks):
            return match, lease
        if not self._num_new_blocks(request, match).fits_in(self.reclaimer.obtainable):
            self.prefixes.undo_acquire(lease)  # Once it is not held, the tail can be evicted.
            match, lease = self.prefixes.acquire(request, full_blocks_only=True)
        return match, lease

    def _num_new_blocks(self, request: AllocationRequest, match: Match) -> PerPool:
        counts = self.pool.counts
        num_found = len(match.blocks) * counts.block_size
        return counts.blocks_for(first_length(request, match) - num_found)

    def extend_all(self, handles: Sequence[RequestLike], additional_tokens: int) -> None:
        """Makes room for more tokens in several rows; see `ManagerFront.extend_all`."""
        requests = [self.requests.known(handle).require_resident() for handle in handles]
        rows = [request.seq_id for request in requests]
        if len(set(rows)) < len(rows):
            raise InvalidHandleError("A request is named twice in one call. Name it once.")
        for request in requests:
            require_length(request, additional_tokens)
        num_tokens = [additional_tokens] * len(rows)
        num_new = self.pool.queries.num_blocks_to_extend(rows, num_tokens)
        names = ", ".join(repr(request.request_id) for request in requests)
        priorities = [request.allocation.priority for request in requests]
        self.reclaimer.require_blocks(
            f"{additional_tokens} more tokens for {names}",
            num_new,
            max(priorities, default=Priority.Low),
            exclude=requests,
        )
        if rows and additional_tokens:
            self.pool.extend(rows, num_tokens, num_new)
            self.prefixes.note_passed(requests)
        self.note_use(requests)

    def free(self, requests: Sequence[LiveRequest]) -> None:
        """Ends requests and frees their rows: the one place where a request's row is freed."""
        rows = [request.seq_id for request in requests if request.is_resident]
        if rows:
            self.pool.free(rows)
        self._end(requests)

    def _end(self, requests: Sequence[LiveRequest]) -> None:
        """Ends requests after their rows were freed, or lost."""
        for request in requests:
            if request.is_resident:
                self.prefixes.release(request.lease)
            else:
                self.swapping.discard(request)
            self.requests.end(request)
            self.reclaimer.discard(request)

    def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[RequestLike | None],
        *args: Any,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Runs a step on the cache; see `ManagerFront.run`."""
        given = self.requests_of(handles)
        rows = [NULL_SEQ if request is None else request.seq_id for request in given]
        requests = [request for request in given if request is not None]
        if reserve_tokens:
            self.reclaimer.reserve(requests, reserve_tokens)
        self.access.is_in_step = True
        try:
            output = self.pool.steps.run(step, np.asarray(rows, np.int32), *args, extends=extends)
        finally:
            self.access.is_in_step = False
        for request in requests:  # Settling cuts it to the row's length, once that is known.
            longest = self.geometry.max_sequence_length
            request.known.note_step(longest if extends else request.num_tokens)
        self.note_use(requests)
        if extends:
            self._sync.settle(requests)
        return output

    def requests_of(self, handles: Sequence[RequestLike | None]) -> list[LiveRequest | None]:
        """Returns the requests of a step, which have rows; None for padding."""
        return [
            None if handle is None else self.requests.known(handle).require_resident()
            for handle in handles
        ]

    # Sharing and blocks.

    def reset_prefixes(self, salt: str | None) -> None:
        """Removes cached prefixes; see `ManagerFront.reset_prefixes`."""
        self.prefixes.reset(salt, self.requests, self.requests.residents())

    def share_prefix(self, source: RequestLike, target: RequestLike, shared_tokens: int) -> None:
        """Puts the first blocks of a request into another one; see `ManagerFront.share_prefix`."""
        giver = self.requests.known(source).require_resident()
        taker = self.requests.known(target).require_resident()
        requests = giver, taker
        require_shareable(giver, taker, shared_tokens)
        num_new = self.pool.queries.num_blocks_to_share(taker.seq_id, shared_tokens)
        priority = taker.allocation.priority
        self.reclaimer.require_blocks("share_prefix", num_new, priority, exclude=requests)
        self.prefixes.share(giver, taker, shared_tokens)
        self.note_use(requests)

    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Takes blocks for no request; waits for the device, which knows their ids."""
        taken = self.pool.counts.in_first_pool(num_blocks)
        require_possible("allocate_blocks", taken, self.pool)
        self.reclaimer.require_blocks("allocate_blocks", taken, Priority.Normal)
        return self.pool.take_blocks(num_blocks) if num_blocks else []

    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Frees blocks of `allocate_blocks`."""
        require_taken(blocks, self.pool)
        if blocks:
            self.pool.release_taken(blocks)

    def defragment(self) -> None:
        """Moves requests' blocks to the low ids."""
        self.prefixes.renumber(self.pool.defragment())

    # Reports and upkeep.

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        pool, prefixes = self.pool, self.prefixes.cache
        return CacheManagerStats(
            total_memory_bytes=pool.bytes_of(pool.counts.num_blocks),
            used_memory_bytes=pool.bytes_of(pool.counts.num_used),
            active_caches=len(self.requests),
            total_blocks=pool.counts.num_blocks.total,
            free_blocks=pool.counts.num_free.total,
            cache_hit_rate=self.prefixes.hit_rate,
            eviction_count=prefixes.num_evicted,
            allocation_count=self.num_allocated,
            allocation_failures=self.num_refused,
            growth_count=pool.sizes.growth_count,
            cached_blocks=prefixes.num_blocks,
            evictable_blocks=prefixes.num_idle_blocks.total,
            expiration_count=prefixes.num_expired,
            preemption_count=self.reclaimer.preemption_count,
            host_bytes=self.swapping.host_bytes,
            group_blocks=dict(zip(pool.group_names, pool.counts.blocks_of_groups, strict=True)),
        )

    def gc(self) -> CacheGcStats:
        """Frees requests without a handle, and expired prefixes; see `ManagerFront.gc`."""
        started = self._clock()
        used_before = self.pool.counts.num_used
        unheld = [request for request in self.requests if not request.handles]
        self.free(unheld)
        self.prefixes.expire()
        if not self.config.enable_pooling:
            if self.pool.sizes.can_shrink:
                self.defragment()
                self.pool.sizes.shrink()
        return CacheGcStats(
            memory_freed=self.pool.bytes_of(used_before - self.pool.counts.num_used),
            caches_freed=len(unheld),
            gc_time_ms=round((self._clock() - started) * 1000),
        )

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the device."""
        self.pool.device_state.require()
        self.pool.queries.check(self.prefixes.referenced_blocks())
        self.prefixes.check(self.requests.residents())
        self.requests.check()
        away = [request for request in self.requests if not request.is_resident]
        if not self.swapping.holds_just(away):
            raise AssertionError("What is swapped out is not what is stored.")

    def note_use(self, requests: Sequence[LiveRequest]) -> None:
        """Records a use of requests now."""
        self.reclaimer.note_use(requests, self._clock())
