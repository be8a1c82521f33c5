"""The manager of one device: wires the device's parts together, and does each operation on them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import CacheConfig, CacheGeometry, PrefixCacheConfig
from ferrum_jax.errors import InvalidHandleError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.device.access import Access
from ferrum_jax.manager.device.admission import Admission
from ferrum_jax.manager.device.compression import Compression
from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.device.reclaim import Reclaimer
from ferrum_jax.manager.device.step_sync import StepSync
from ferrum_jax.manager.device.swapping import Swapping, make_store
from ferrum_jax.manager.handle import PagedKvCacheHandle, require_handle
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.refusals import (
    require_length,
    require_possible,
    require_shareable,
    require_taken,
)
from ferrum_jax.manager.requests import LiveRequest, RequestTable
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.policies.registry import make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats, CompressionStats
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_SEQ, BlockId, Priority, RequestId

_logger = logging.getLogger("ferrum_jax")


class DeviceManager:
    """All operations on one device's cache; callers check their arguments. Thread-safe.

    Each operation holds the device's lock: see `Access`.

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
      admission: Starts requests, and swaps them in.
      compression: Compresses requests.
      access: The lock, and the listeners to changes.
    """

    def __init__(self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions):
        self.config, self.geometry, self._clock = config, geometry, options.clock
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
        block_policy = make_block_policy(options.block_policy, config.max_blocks)
        prefix_cache = PrefixCache(prefix_config, config.block_size, block_policy)
        self.prefixes = Prefixes(self.pool, prefix_cache, self._clock)
        store = make_store(self.pool, options.tiers)
        self.swapping = Swapping(self.pool, self.prefixes, store)
        self.reclaimer = Reclaimer(
            self.pool, self.requests, self.prefixes, self.swapping, options.preemption_policy
        )
        self.admission = Admission(
            self.pool, self.requests, self.prefixes, self.swapping, self.reclaimer
        )
        self.compression = Compression(self.pool, self.requests, self.prefixes, self.reclaimer)
        self._sync = StepSync(self.pool, self.requests, self.prefixes)
        room_signals, thresholds = self.reclaimer.room_signals, config.pressure_thresholds
        self.access = Access(self.pool, self._sync, room_signals, lock, thresholds)

    def close(self) -> None:
        """Ends all requests, and closes the store; see `ManagerFront.close`."""
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

    @property
    def is_lost(self) -> bool:
        """Whether a step has consumed the cache, so that changes raise CacheLostError."""
        return self.pool.is_lost

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function to call after changes that may have made room; returns its remover."""
        with self.access.reading():
            return self.access.listeners.add(callback)

    # Requests.

    def holds(self, request_id: RequestId) -> bool:
        """Returns whether a request is live here, without waiting for other threads."""
        return request_id in self.requests

    @contextlib.contextmanager
    def keeping(self, request_ids: Sequence[RequestId]) -> Iterator[bool]:
        """Keeps other threads from changes, and yields whether all requests are live here."""
        with self.access.reading():
            yield all(map(self.holds, request_ids))

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        with self.access.reading():
            request = self.requests.get(request_id)
            return None if request is None else PagedKvCacheHandle(request)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        with self.access.reading():
            return [(r.request_id, PagedKvCacheHandle(r)) for r in self.requests]

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Starts a request; see `ManagerFront.allocate`."""
        with self.access.changing():
            live = self.admission.start(request)
            self.note_use([live])
            return PagedKvCacheHandle(live)

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Returns whether `allocate` would succeed now; see `ManagerFront.can_allocate`."""
        with self.access.reading():
            return not self.pool.is_lost and self.admission.can_start(request)

    def extend_all(self, handles: Sequence[KvCacheHandle], additional_tokens: int) -> None:
        """Makes room for more tokens in several rows; see `ManagerFront.extend_all`."""
        with self.access.changing():
            requests = [self._request_of(handle) for handle in handles]
            rows = [request.seq_id for request in requests]
            if len(set(rows)) < len(rows):
                raise InvalidHandleError("A request is named twice in one call. Name it once.")
            for request in requests:
                require_length(request, additional_tokens)
            num_new = sum(self.pool.counts.num_new_blocks(row, additional_tokens) for row in rows)
            names = ", ".join(repr(request.request_id) for request in requests)
            priorities = [request.allocation.priority for request in requests]
            self.reclaimer.require_blocks(
                f"{additional_tokens} more tokens for {names}",
                num_new,
                max(priorities, default=Priority.Low),
                exclude=requests,
            )
            if rows and additional_tokens:
                self.pool.extend(rows, [additional_tokens] * len(rows))
            self.note_use(requests)

    def deallocate(self, request_id: RequestId) -> None:
        """Ends a request and frees its blocks; see `ManagerFront.deallocate`."""
        with self.access.changing():
            self._free([self.requests.known(request_id)])

    def _free(self, requests: Sequence[LiveRequest]) -> None:
        """Ends requests and frees their rows: the one place where a request's row is freed."""
        rows = [request.seq_id for request in requests if request.is_resident]
        if rows:
            self.pool.free(rows)
        self._end(requests)

    def _end(self, requests: Sequence[LiveRequest]) -> None:
        """Ends requests whose rows are free, or lost."""
        for request in requests:
            if request.is_resident:
                self.prefixes.release(request.lease)
            else:
                self.swapping.discard(request)
            self.requests.end(request)
            self.reclaimer.forget(request)

    def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[KvCacheHandle | None],
        *args: Any,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Runs a step on the cache; see `ManagerFront.run`."""
        with self.access.changing():
            given = [None if handle is None else self._request_of(handle) for handle in handles]
            rows = [NULL_SEQ if request is None else request.seq_id for request in given]
            requests = [request for request in given if request is not None]
            if reserve_tokens:
                self.reclaimer.reserve(requests, reserve_tokens)
            self.access.is_in_step = True
            try:
                output = self.pool.steps.run(
                    step, np.asarray(rows, np.int32), *args, extends=extends
                )
            finally:
                self.access.is_in_step = False
            for request in requests:  # Settling cuts it to the row's length, once that is known.
                longest = self.geometry.max_sequence_length
                request.known.note_step(longest if extends else request.num_tokens)
            self.note_use(requests)
            if extends:
                self._sync.settle(requests)
            return output

    # Prefix caching, sharing and swapping.

    def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Enables prefix caching, or replaces its configuration."""
        with self.access.changing():
            self.prefixes.configure(config)

    def commit(
        self,
        handle: KvCacheHandle,
        token_ids: Sequence[int],
        num_tokens: int | None,
        retention: Retention | None,
    ) -> int:
        """Caches the full blocks of what was computed; see `ManagerFront.commit`."""
        with self.access.changing():
            request = self._request_of(handle)
            num_cached = self.prefixes.commit(request, token_ids, num_tokens, retention)
            self.note_use([request])
            return num_cached

    def reset_prefixes(self, salt: str | None) -> None:
        """Removes cached prefixes; see `ManagerFront.reset_prefixes`."""
        with self.access.changing():
            self.prefixes.reset(salt, self.requests, self.requests.residents())

    def explain_lookup(self, tokens: TokenIds, cache_salt: str | None) -> LookupReport:
        """Returns what `allocate` would find cached of a prompt now, and why not more."""
        with self.access.reading():
            return self.prefixes.explain(tokens, cache_salt)

    def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Puts the first blocks of a request into another one; see `ManagerFront.share_prefix`."""
        with self.access.changing():
            giver = self.requests.known(source).require_resident()
            taker = self.requests.known(target).require_resident()
            requests = giver, taker
            require_shareable(giver, taker, shared_tokens)
            num_new = self.pool.queries.num_blocks_to_share(taker.seq_id, shared_tokens)
            priority = taker.allocation.priority
            self.reclaimer.require_blocks("share_prefix", num_new, priority, exclude=requests)
            self.prefixes.share(giver, taker, shared_tokens)
            self.note_use(requests)

    def swap_out(self, request_id: RequestId) -> None:
        """Moves a request's bytes to the store; see `ManagerFront.swap_out`."""
        with self.access.changing():
            request = self.requests.known(request_id)
            if request.is_resident:
                self.swapping.swap_out([request])

    def swap_in(self, request_id: RequestId) -> None:
        """Moves a request's bytes back to the device; see `ManagerFront.swap_in`."""
        with self.access.changing():
            request = self.requests.known(request_id)
            if not request.is_resident:
                self.admission.swap_in(request)
                self.note_use([request])

    def compress_cache(
        self,
        request_id: RequestId,
        ratio: float,
        method: CompressionMethod,
        queries: jax.Array | None,
    ) -> None:
        """Compresses a request; see `ManagerFront.compress_cache`."""
        with self.access.changing():
            request = self.requests.known(request_id).require_resident()
            self.compression.compress(request, ratio, method, queries)
            self.note_use([request])

    # Blocks.

    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Takes blocks for no request; waits for the device, which knows their ids."""
        with self.access.changing():
            require_possible("allocate_blocks", num_blocks, self.pool)
            self.reclaimer.require_blocks("allocate_blocks", num_blocks, Priority.Normal)
            return self.pool.take_blocks(num_blocks) if num_blocks else []

    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Frees blocks of `allocate_blocks`."""
        with self.access.changing():
            require_taken(blocks, self.pool)
            if blocks:
                self.pool.release_taken(blocks)

    def block_counts(self) -> tuple[int, int]:
        """Returns the numbers of free blocks and of all blocks in the present pool."""
        with self.access.reading():
            return self.pool.counts.num_free, self.pool.counts.num_blocks

    def defragment(self) -> None:
        """Moves requests' blocks to the low ids."""
        with self.access.changing():
            self.prefixes.renumber(self.pool.defragment())

    # Reports and upkeep.

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        with self.access.reading():
            pool, prefixes = self.pool, self.prefixes.cache
            return CacheManagerStats(
                total_memory_bytes=pool.counts.num_blocks * pool.block_bytes,
                used_memory_bytes=pool.counts.num_used * pool.block_bytes,
                active_caches=len(self.requests),
                total_blocks=pool.counts.num_blocks,
                free_blocks=pool.counts.num_free,
                cache_hit_rate=self.prefixes.hit_rate,
                eviction_count=prefixes.num_evicted,
                allocation_count=self.admission.num_allocated,
                allocation_failures=self.admission.num_refused,
                growth_count=pool.growth_count,
                cached_blocks=prefixes.num_blocks,
                evictable_blocks=prefixes.num_idle_blocks,
                expiration_count=prefixes.num_expired,
                preemption_count=self.reclaimer.preemption_count,
                host_bytes=self.swapping.host_bytes,
            )

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved, of the requests that are on the device."""
        with self.access.reading():
            return self.compression.stats()

    def gc(self) -> CacheGcStats:
        """Frees requests without a handle, and expired prefixes; see `ManagerFront.gc`."""
        started = self._clock()
        with self.access.changing():
            used_before = self.pool.counts.num_used
            dropped = [request for request in self.requests if not request.handles]
            self._free(dropped)
            self.prefixes.expire()
            if not self.config.enable_pooling:
                if self.pool.shrunk_size() < self.pool.counts.num_blocks:
                    self.prefixes.renumber(self.pool.defragment())
                    self.pool.shrink()
            return CacheGcStats(
                memory_freed=(used_before - self.pool.counts.num_used) * self.pool.block_bytes,
                caches_freed=len(dropped),
                gc_time_ms=round((self._clock() - started) * 1000),
            )

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the device."""
        with self.access.reading():
            self.pool.device_state.require()
            self.pool.queries.check(self.prefixes.referenced_blocks())
            self.prefixes.check(self.requests.residents())
            self.requests.check()
            away = [request for request in self.requests if not request.is_resident]
            if not self.swapping.holds_just(away):
                raise AssertionError("What is swapped out is not what is stored.")

    def _request_of(self, handle: KvCacheHandle) -> LiveRequest:
        """Returns the request of a handle whose blocks are about to be used."""
        request = require_handle(handle).live_request()
        if self.requests.get(request.request_id) is not request:
            raise InvalidHandleError(
                f"{handle!r} belongs to another manager. Use the one that allocated it."
            )
        return request

    def note_use(self, requests: Sequence[LiveRequest]) -> None:
        """Records a use of requests now; inside `changing`."""
        self.reclaimer.note_use(requests, self._clock())
