"""The manager: requests come and go by name, on the pure operations of one device's cache."""

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ferrum_jax.checks import check_count
from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.errors import (
    DuplicateRequestError,
    FerrumError,
    InvalidHandleError,
    UnknownRequestError,
)
from ferrum_jax.interfaces import BlockAllocator, KvCacheHandle, KvCacheManager
from ferrum_jax.manager.admission import (
    out_of_blocks,
    refusal,
    require_length,
    require_taken,
)
from ferrum_jax.manager.device_cache import DeviceCache
from ferrum_jax.manager.handle import Entry, PagedKvCacheHandle
from ferrum_jax.policies.pressure import PressureMonitor
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats
from ferrum_jax.types import NULL_SEQ, BlockId, MemoryPressure, Priority, RequestId

_cache_numbers = itertools.count()


class PagedKvCacheManager(KvCacheManager, BlockAllocator):
    """Keeps the caches of many requests in the blocks of one pool.

    Methods are safe to call from several threads. `allocate`, `extend` and `deallocate` do not
    wait for the device. Every refusal raises a `FerrumError` and changes nothing.

    Args:
      config: The pool. Its first target device is used.
      geometry: The model, and the limits of a request.
      scrub_freed_blocks: Whether blocks that the manager frees are zeroed, so that no later
        request, nor a dump of memory, finds what an earlier one left.
      clock: Returns seconds that only grow; for tests.

    Example:
      >>> manager = PagedKvCacheManager(
      ...     CacheConfig(block_size=4, max_blocks=8, initial_blocks=8),
      ...     CacheGeometry(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                   max_seqs=2, max_sequence_length=16))
      >>> handle = manager.allocate(manager.new_request("chat-1", initial_tokens=5))
      >>> manager.extend(handle, 4)
      >>> handle.num_tokens(), manager.free_block_count()
      (9, 5)
      >>> manager.deallocate("chat-1")
    """

    def __init__(
        self,
        config: CacheConfig,
        geometry: CacheGeometry,
        *,
        scrub_freed_blocks: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._config, self._geometry, self._clock = config, geometry, clock
        device = config.target_devices[0]
        self._cache = DeviceCache(config, geometry, device, scrubs=scrub_freed_blocks)
        self._entries: dict[RequestId, Entry] = {}
        self._lock = threading.RLock()
        self._pressure = PressureMonitor(config.pressure_thresholds)
        self._num_allocated = self._num_refused = 0
        self._is_in_step = False

    # Requests.

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int = 0,
        max_sequence_length: int | None = None,
        priority: Priority = Priority.Normal,
    ) -> AllocationRequest:
        """Returns a request of this pool's geometry and device.

        Args:
          request_id: The caller's key.
          initial_tokens: Tokens to have room for at once.
          max_sequence_length: Tokens that it may grow to; the geometry's limit if absent.
          priority: How urgent it is.
        """
        geometry = self._geometry
        if max_sequence_length is None:
            max_sequence_length = geometry.max_sequence_length
        return AllocationRequest(
            request_id=request_id,
            initial_tokens=initial_tokens,
            max_sequence_length=max_sequence_length,
            num_layers=geometry.num_layers,
            num_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            device=self._cache.device,
            dtype=geometry.dtype,
            priority=priority,
        )

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Makes room for a new sequence; see `KvCacheManager.allocate`."""
        with self._changing():
            refusal = self._refusal_of(request)
            if refusal is not None:
                self._num_refused += 1
                raise refusal
            entry = Entry(
                request_id=request.request_id,
                cache_id=f"cache-{next(_cache_numbers)}",
                max_sequence_length=request.max_sequence_length,
                cache=self._cache,
                seq_id=self._cache.allocate(request.initial_tokens),
                lock=self._lock,
                last_access=self._clock(),
            )
            self._entries[request.request_id] = entry
            self._num_allocated += 1
            return PagedKvCacheHandle(entry)

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Says whether `allocate` would succeed now, growth of the pool counted."""
        with self._lock:
            return self._refusal_of(request) is None

    def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """Makes room for more tokens; see `KvCacheManager.extend`."""
        self.extend_all([handle], additional_tokens)

    def extend_all(self, handles: Sequence[KvCacheHandle], additional_tokens: int) -> None:
        """Makes room for more tokens in several sequences, or in none; one operation.

        Args:
          handles: Different sequences.
          additional_tokens: How many more for each.

        Raises:
          InvalidHandleError: If a request was deallocated, or is named twice.
          SequenceTooLongError: If one would pass its `max_sequence_length`.
          OutOfBlocksError: If too few blocks are free.
        """
        check_count("additional_tokens", additional_tokens, minimum=0)
        with self._changing():
            entries = [self._entry_of(handle) for handle in handles]
            if len({entry.seq_id for entry in entries}) < len(entries):
                raise InvalidHandleError("A request is named twice in one call. Name it once.")
            for entry in entries:
                require_length(entry, additional_tokens)
            seq_ids = [entry.seq_id for entry in entries]
            num_new = sum(self._cache.num_new_blocks(row, additional_tokens) for row in seq_ids)
            if num_new > self._cache.num_available:
                names = ", ".join(repr(entry.request_id) for entry in entries)
                asked = f"{additional_tokens} more tokens for {names}"
                raise out_of_blocks(asked, num_new, self._cache)
            if seq_ids and additional_tokens:
                self._cache.extend(seq_ids, [additional_tokens] * len(seq_ids))
            for entry in entries:
                entry.last_access = self._clock()

    def deallocate(self, request_id: RequestId) -> None:
        """Takes a sequence's room back; see `KvCacheManager.deallocate`."""
        with self._changing():
            self._drop([self._known(request_id)])

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        with self._lock:
            entry = self._entries.get(request_id)
            return None if entry is None else PagedKvCacheHandle(entry)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        with self._lock:
            return [(name, PagedKvCacheHandle(entry)) for name, entry in self._entries.items()]

    def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[KvCacheHandle | None],
        *args: Any,
        extends: bool = False,
    ) -> Any:
        """Lets a jitted step compute on the cache, in place.

        `step(state, seq_ids, *args)` returns `(state, output)`. It may donate the state, which
        the manager hands over and takes back; seq_ids is i32[len(handles)], where None became
        `NULL_SEQ`. It may write tokens, and `extend` or `truncate` these rows when `extends` is
        set; no other row is its business.

        Args:
          step: A function, jitted with `donate_argnums=0`.
          handles: Whose rows the step gets; None for a padded row.
          *args: Handed on.
          extends: Whether the step changes lengths. The manager then waits for the device.

        Returns:
          The step's output.

        Raises:
          InvalidHandleError: If a request was deallocated.
          TypeError: If the step does not return the state first.
        """
        with self._changing():
            entries = [None if handle is None else self._entry_of(handle) for handle in handles]
            rows = [NULL_SEQ if entry is None else entry.seq_id for entry in entries]
            self._is_in_step = True
            try:
                output = self._cache.run(step, np.asarray(rows, np.int32), *args)
            finally:
                self._is_in_step = False
            if extends:
                self._cache.read_counts()
            for entry in entries:
                if entry is not None:
                    entry.last_access = self._clock()
            return output

    # Blocks.

    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Takes blocks for no request; waits for the device, which knows their ids."""
        check_count("num_blocks", num_blocks, minimum=0)
        with self._changing():
            if num_blocks > self._cache.num_available:
                raise out_of_blocks("allocate_blocks", num_blocks, self._cache)
            return self._cache.take_blocks(num_blocks) if num_blocks else []

    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Gives blocks of `allocate_blocks` back; see `BlockAllocator.free_blocks`."""
        with self._changing():
            require_taken(blocks, self._cache)
            if len(blocks):
                self._cache.release_blocks(blocks)

    def free_block_count(self) -> int:
        """Returns how many blocks of the present pool are free; it may still grow."""
        with self._lock:
            return self._cache.num_free

    def total_block_count(self) -> int:
        """Returns how many blocks the pool has at present."""
        with self._lock:
            return self._cache.num_blocks

    def block_size(self) -> int:
        """Returns the tokens of one block."""
        return self._cache.block_size

    def defragment(self) -> None:
        """Moves requests' blocks to the low ids; those of `allocate_blocks` keep theirs."""
        with self._changing():
            self._cache.defragment()

    # The whole.

    def stats(self) -> CacheManagerStats:
        """Returns what is held at this moment, and what was done so far."""
        with self._lock:
            cache = self._cache
            return CacheManagerStats(
                total_memory_bytes=cache.num_blocks * cache.block_bytes,
                used_memory_bytes=cache.num_used * cache.block_bytes,
                active_caches=len(self._entries),
                total_blocks=cache.num_blocks,
                free_blocks=cache.num_free,
                cache_hit_rate=0.0,
                eviction_count=0,
                allocation_count=self._num_allocated,
                allocation_failures=self._num_refused,
                growth_count=cache.growth_count,
            )

    def gc(self) -> CacheGcStats:
        """Frees requests of which no handle is left; without pooling, shrinks the pool too.

        A caller who works by request id alone should keep the handles as well.
        """
        started = self._clock()
        with self._changing():
            used_before = self._cache.num_used
            dropped = [entry for entry in self._entries.values() if not entry.handles]
            self._drop(dropped)
            if not self._config.enable_pooling:
                self._cache.shrink()
            return CacheGcStats(
                memory_freed=(used_before - self._cache.num_used) * self._cache.block_bytes,
                caches_freed=len(dropped),
                gc_time_ms=round((self._clock() - started) * 1000),
            )

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets what is called with the new level on every change of pressure.

        The level is that of used blocks over `max_blocks`: room to grow is room.
        """
        with self._lock:
            self._pressure.set_callback(callback)

    def check(self) -> None:
        """Raises AssertionError unless all that the manager knows holds; waits for the device."""
        with self._lock:
            self._cache.check()
            for name, entry in self._entries.items():
                if not entry.is_live or entry.request_id != name:
                    raise AssertionError(f"Request {name!r} has an entry that is not its own.")
            rows = {entry.seq_id for entry in self._entries.values()}
            if len(rows) < len(self._entries):
                raise AssertionError("Two requests share a row.")
            held = set(np.flatnonzero(self._cache.num_blocks_held).tolist())
            if not held <= rows:
                raise AssertionError(f"Rows {sorted(held - rows)} hold blocks for no request.")

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock, then tells of a change of pressure outside it."""
        level = None
        try:
            with self._lock:
                if self._is_in_step:
                    raise RuntimeError(
                        "The manager is asked for a change inside a step that it runs, and the "
                        "step's state would undo it. Ask before or after run."
                    )
                try:
                    yield
                finally:
                    level = self._pressure.observe(self._cache.num_used, self._config.max_blocks)
        finally:
            self._pressure.notify(level)

    def _refusal_of(self, request: AllocationRequest) -> FerrumError | None:
        """Returns why a request cannot be allocated now, or None."""
        if request.request_id in self._entries:
            return DuplicateRequestError(
                f"Request {request.request_id!r} is live already. Deallocate it first, or use "
                "another id."
            )
        return refusal(request, self.new_request(request.request_id), self._cache)

    def _known(self, request_id: RequestId) -> Entry:
        if request_id not in self._entries:
            raise UnknownRequestError(
                f"Request {request_id!r} is not live; {len(self._entries)} others are. "
                "It was never allocated here, or is deallocated already."
            )
        return self._entries[request_id]

    def _entry_of(self, handle: KvCacheHandle) -> Entry:
        if not isinstance(handle, PagedKvCacheHandle):
            raise InvalidHandleError(
                f"{handle!r} is no handle of a PagedKvCacheManager. Use what allocate returned."
            )
        entry = handle.entry()
        if self._entries.get(entry.request_id) is not entry:
            raise InvalidHandleError(
                f"{handle!r} belongs to another manager. Use the one that allocated it."
            )
        return entry

    def _drop(self, entries: Sequence[Entry]) -> None:
        """Ends requests: the one place where a request's blocks are let go."""
        if entries:
            self._cache.free([entry.seq_id for entry in entries])
        for entry in entries:
            entry.is_live = False
            del self._entries[entry.request_id]
