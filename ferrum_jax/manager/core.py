"""What all methods of a manager stand on: its parts, its lock, and what it says about itself."""

from __future__ import annotations

import contextlib
import itertools
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Self

import jax

import ferrum_jax.manager.kinship as kinship
from ferrum_jax.checks import check_callable, check_items, check_key
from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.errors import InvalidHandleError, UncountedTokensError, UnknownRequestError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.admission import out_of_blocks, require_open, shortage
from ferrum_jax.manager.handle import Entry, PagedKvCacheHandle, check_entries, require_handle
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.prefixes import Prefixes
from ferrum_jax.manager.room import Room
from ferrum_jax.manager.stalls import Stalls
from ferrum_jax.manager.swapping import Swapping, make_store
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.policies.pressure import PressureMonitor
from ferrum_jax.policies.registry import make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats
from ferrum_jax.types import MemoryPressure, Priority, RequestId

_logger = logging.getLogger("ferrum_jax")
_NOT_LIVE = "It was never allocated here, or is deallocated already."


class ManagerCore(Uncopied):
    """The parts of a manager, and the whole of them.

    Attributes:
      num_blocks_in_use: Blocks that requests, or callers by themselves, hold between two changes.
      num_room_changes: Changes so far that may have made room.
      stalls: What the event loops that wait for room here know of each other.
    """

    def __init__(self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions):
        self._config, self._geometry, self._clock = config, geometry, options.clock
        self._cache = DevicePool(
            config,
            geometry,
            config.target_devices[0],
            scrub_freed_blocks=options.scrub_freed_blocks,
            mesh=options.mesh,
            axis_name=options.axis_name,
        )
        self._cache.enable(options.token_formats)
        prefix_config = config.prefix_cache_config if config.enable_prefix_caching else None
        block_policy = make_block_policy(options.block_policy, config.max_blocks)
        prefixes = PrefixCache(prefix_config, config.block_size, block_policy)
        self._prefixes = Prefixes(self._cache, prefixes, self._clock)
        self._swapping = Swapping(
            self._cache, self._prefixes, make_store(self._cache, options.tiers)
        )
        self._entries: dict[RequestId, Entry] = {}
        policy = options.preemption_policy
        self._room = Room(self._cache, self._prefixes, self._swapping, policy, self._entries)
        self._lock = threading.RLock()
        self._pressure = PressureMonitor(config.pressure_thresholds)
        self._room_listeners: dict[int, Callable[[], None]] = {}
        self._listener_numbers = itertools.count()
        self._num_allocated = self._num_refused = 0
        self._is_in_step = self._is_closed = False
        self._is_followed = True  # Whether all requests are adapted to what steps have left.
        self.num_blocks_in_use = self.num_room_changes = 0
        self.stalls = Stalls()

    def close(self) -> None:
        """Ends all requests, deletes the files of the disk tier, and gives its directory back.

        Another manager may use the directory from then on. Whatever needs this one's cache raises
        RuntimeError; closing it again does nothing. A `with` closes it at its end, lost or not.
        """
        try:
            with self._lock, interrupts.delayed():
                if self._is_closed:
                    return
                self._require_no_step()
                entries = list(self._entries.values())
                rows = [entry.seq_id for entry in entries if entry.is_resident]
                if rows and not self._cache.is_lost:
                    try:
                        self._cache.free(rows)
                    except Exception:
                        _logger.exception("The blocks of a closed manager were not erased.")
                self._end(entries)
                self._swapping.close()
                self._is_closed = True
        finally:  # Whoever waits for room is to hear that there will be none.
            self._notify_room()

    def __enter__(self) -> Self:
        """Returns the manager itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompts that were looked up so far."""
        return self._prefixes.num_prompt_tokens

    def holds(self, request_id: RequestId) -> bool:
        """Says whether a request is live here, without waiting for other threads."""
        check_key("request_id", request_id)
        return request_id in self._entries

    @contextlib.contextmanager
    def keeping(self, request_ids: Iterable[RequestId]) -> Iterator[bool]:
        """Lets no other thread change anything, and yields whether all requests are live here."""
        request_ids = check_items("request_ids", request_ids)
        with self._looking():
            yield all(map(self.holds, request_ids))

    @property
    def is_lost(self) -> bool:
        """Whether a step has consumed the cache, so that changes raise CacheLostError."""
        return self._cache.is_lost

    @property
    def preempts(self) -> bool:
        """Whether room is made by swapping out less urgent requests, which copies their bytes."""
        return self._room.preempts

    def stats(self) -> CacheManagerStats:
        """Returns what is held at this moment, and what was done so far."""
        with self._looking():
            cache, prefixes = self._cache, self._prefixes.cache
            return CacheManagerStats(
                total_memory_bytes=cache.counts.num_blocks * cache.block_bytes,
                used_memory_bytes=cache.counts.num_used * cache.block_bytes,
                active_caches=len(self._entries),
                total_blocks=cache.counts.num_blocks,
                free_blocks=cache.counts.num_free,
                cache_hit_rate=self._prefixes.hit_rate,
                eviction_count=prefixes.num_evicted,
                allocation_count=self._num_allocated,
                allocation_failures=self._num_refused,
                growth_count=cache.growth_count,
                cached_blocks=prefixes.num_blocks,
                evictable_blocks=prefixes.num_idle_blocks,
                expiration_count=prefixes.num_expired,
                preemption_count=self._room.preemption_count,
                host_bytes=self._swapping.host_bytes,
            )

    def gc(self) -> CacheGcStats:
        """Frees requests of which no handle is left, and prefixes that have expired.

        Without pooling, it shrinks the pool too. A caller who works by request id alone should
        keep the handles as well.
        """
        started = self._clock()
        with self._changing():
            used_before = self._cache.counts.num_used
            dropped = [entry for entry in self._entries.values() if not entry.handles]
            self._drop(dropped)
            self._prefixes.expire()
            if not self._config.enable_pooling:
                if self._cache.shrunk_size() < self._cache.counts.num_blocks:
                    self._prefixes.renumber(self._cache.defragment())
                    self._cache.shrink()
            return CacheGcStats(
                memory_freed=(used_before - self._cache.counts.num_used) * self._cache.block_bytes,
                caches_freed=len(dropped),
                gc_time_ms=round((self._clock() - started) * 1000),
            )

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets what is called with the new level on every change of pressure.

        The level is that of blocks in use over `max_blocks`: room to grow is room, and so are
        cached blocks that nobody uses.
        """
        with self._looking():
            self._pressure.set_callback(callback)

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function that is called after each change which may have made room.

        Args:
          callback: Called outside the manager's lock, by the thread that made the change. What
            it raises is logged.

        Returns:
          What takes the function out again.
        """
        check_callable("callback", callback)
        with self._looking():
            number = next(self._listener_numbers)
            self._room_listeners[number] = callback

        def remove() -> None:
            self._room_listeners.pop(number, None)

        return remove

    def check(self) -> None:
        """Raises AssertionError unless all that the manager knows holds; waits for the device.

        It costs about what the tables hold, so that a service can afford it now and then.
        """
        with self._looking():
            self._cache.device_state.require()
            self._cache.queries.check(self._prefixes.kept_blocks())
            resident = self._residents()
            self._prefixes.check(resident)
            check_entries(self._entries, self._cache, self._lock)
            away = [entry for entry in self._entries.values() if not entry.is_resident]
            if not self._swapping.holds_just(away):
                raise AssertionError("What is swapped out is not what is stored.")

    @contextlib.contextmanager
    def _looking(self) -> Iterator[None]:
        """Holds the lock of a manager that is not closed.

        If the device fails meanwhile, what it holds is lost unless it can still be read.
        """
        has_news = False
        try:
            with self._lock:
                require_open(self._is_closed)
                was_lost = self.is_lost
                is_settled = self._cache.device_state.is_settled and self._is_followed
                has_news = not (is_settled or was_lost)
                self.num_room_changes += has_news
                try:
                    if has_news:  # It failed, or a signal came before it was done.
                        self._settle(self._residents())
                    yield
                except jax.errors.JaxRuntimeError:
                    self._cache.device_state.note_failure()
                    raise
                finally:
                    has_news |= self.is_lost and not was_lost
        finally:
            if has_news:
                self._notify_room()

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Holds the lock, then tells of changed pressure and of more room outside it.

        Signal handlers wait until the change is complete.
        """
        level, has_more = None, False
        try:
            with self._looking(), interrupts.delayed():
                self._require_no_step()
                before = self._hopes()
                try:
                    self._cache.device_state.require()
                    if not self._cache.device_state.confirm_counts():
                        self._settle(self._residents())
                        raise self._cache.device_state.uncounted_error()
                    yield
                finally:
                    has_more = any(map(operator.gt, self._hopes(), before))
                    self.num_room_changes += has_more
                    if not self.is_lost:  # Else nobody knows what is in use.
                        max_blocks = self._config.max_blocks
                        self.num_blocks_in_use = max_blocks - self._room.num_blocks
                        level = self._pressure.observe(self.num_blocks_in_use, max_blocks)
        finally:
            try:
                self._pressure.notify(level)
            finally:
                if has_more:
                    self._notify_room()

    def _require_no_step(self) -> None:
        """Raises RuntimeError inside a step of this manager."""
        if self._is_in_step:
            raise RuntimeError(
                "The manager is asked for a change inside a step that it runs, and the step's "
                "state would undo it. Ask before or after run."
            )

    def _residents(self) -> list[Entry]:
        """Returns the requests that have a row."""
        return [entry for entry in self._entries.values() if entry.is_resident]

    def _settle(self, entries: Sequence[Entry]) -> None:
        """Adapts all that is counted to what a step has left on the device; waits for it.

        Args:
          entries: The requests whose rows may have changed.

        Raises:
          CacheLostError: If the device cannot tell.
          UncountedTokensError: If the step has filled rows of no request; these are empty again.
        """
        self._cache.device_state.wait()
        with interrupts.delayed():
            # Where settling was not completed before, nobody knows any more.
            were_empty = [e for e in entries if not (self._is_followed and e.num_tokens)]
            self._is_followed = False
            self._cache.settling.settle()
            strays = self._cache.settling.free_stray_rows()
            self._prefixes.follow(entries, self._residents(), were_empty)
            for entry in [entry for entry in entries if not entry.shape.is_compressed]:
                entry.compression = None  # It was cut to nothing, perhaps.
            self._is_followed = True
        if strays:
            raise UncountedTokensError(
                f"A step has filled rows {strays}, which belong to no request; they are empty "
                "again. Allocate a request for each, with initial_tokens=0, and pass its handle."
            )

    def _hopes(self) -> tuple[int, ...]:
        """Returns numbers of which one grows when somebody who waits should look again.

        They are what can be had, what the tiers have left for a preemption, how many requests were
        preempted, and whether the cache is lost: calls that wait end with an error then.
        """
        room = self._room.num_blocks, self._cache.counts.num_free_rows
        return *room, -self._swapping.host_bytes, self._room.preemption_count, int(self.is_lost)

    def _notify_room(self) -> None:
        for callback in list(self._room_listeners.values()):
            try:
                callback()
            except Exception:
                _logger.exception("A room listener failed.")

    def _known(self, request_id: RequestId) -> Entry:
        if not self.holds(request_id):
            is_handle = isinstance(request_id, KvCacheHandle)
            raise UnknownRequestError(
                f"Request {request_id!r} is not live here; others that are: {len(self._entries)}. "
                + ("Pass its request_id, not the handle." if is_handle else _NOT_LIVE)
            )
        return self._entries[request_id]

    def _entry_of(self, handle: KvCacheHandle) -> Entry:
        """Returns the entry of a handle whose blocks are about to be used."""
        entry = require_handle(handle).entry()
        if self._entries.get(entry.request_id) is not entry:
            raise InvalidHandleError(
                f"{handle!r} belongs to another manager. Use the one that allocated it."
            )
        return entry

    def _victims_for(self, request: AllocationRequest, num_blocks: int) -> list[Entry]:
        """Returns who has to be swapped out for a request's row, or raises why it cannot be."""
        victims = self._room.victims(num_blocks, request.priority, num_rows=1)
        if victims is None:
            raise shortage(request, num_blocks, self._room.num_blocks, self._cache)
        return victims

    def _make_room(
        self, asked: str, num_blocks: int, priority: Priority, but: Sequence[Entry] = ()
    ) -> None:
        """Makes room for so many blocks, or raises OutOfBlocksError and changes nothing."""
        victims = self._room.victims(num_blocks, priority, but)
        if victims is None:
            raise out_of_blocks(asked, num_blocks, self._room.num_blocks, self._cache)
        self._room.make(num_blocks, victims)

    def _resident(self, request_id: RequestId) -> Entry:
        return PagedKvCacheHandle(self._known(request_id)).entry()

    def _note_use(self, entries: Iterable[Entry]) -> None:
        now = self._clock()
        for entry in entries:
            entry.last_access = now
            self._room.note_use(entry)

    def _drop(self, entries: Sequence[Entry]) -> None:
        """Ends requests: the one place where a request's blocks are let go."""
        rows = [entry.seq_id for entry in entries if entry.is_resident]
        if rows:
            self._cache.free(rows)
        self._end(entries)

    def _end(self, entries: Sequence[Entry]) -> None:
        """Ends requests whose rows are free, or lost."""
        for entry in entries:
            if entry.is_resident:
                self._prefixes.release(entry)
            else:
                self._swapping.forget(entry)
            kinship.unlink(entry)
            entry.is_live = False
            self._room.forget(entry)
            del self._entries[entry.request_id]
