"""The lock of one device's manager, and what is done around each use and each change."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import jax

from ferrum_jax.config import MemoryPressureThresholds
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.device.step_sync import StepSync
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.refusals import require_open
from ferrum_jax.manager.signals import PressureMonitor, RoomListeners, RoomSignals


class Access:
    """Lets one thread at a time use a device's parts, and tells others of what has changed.

    Args:
      pool: The device's pool.
      sync: Adapts the device's parts after a step.
      room_signals: Returns what calls that wait for room look at.
      lock: The lock that guards all of these.
      thresholds: Shares of the pool at which the level of pressure changes.

    Attributes:
      pressure: The level of pressure, and its callback.
      listeners: Functions that are called after changes that may have made room.
      is_in_step: Whether a step runs, which would undo changes made meanwhile: these are refused.
      is_closed: Whether `close` has been called.
      blocks_in_use: Blocks that requests, or callers of `allocate_blocks`, held after the last
        change.
      num_room_changes: Changes so far that may have made room.
    """

    def __init__(
        self,
        pool: DevicePool,
        sync: StepSync,
        room_signals: Callable[[], RoomSignals],
        lock: threading.RLock,
        thresholds: MemoryPressureThresholds,
    ):
        self._pool, self._sync, self._room_signals, self._lock = pool, sync, room_signals, lock
        self.is_in_step = self.is_closed = False
        self.pressure, self.listeners = PressureMonitor(thresholds), RoomListeners()
        self.blocks_in_use, self.num_room_changes = pool.counts.none, 0

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Holds the lock of a manager that is not closed.

        If the device fails meanwhile, its cache is lost unless it can still be read.
        """
        has_news = False
        try:
            with self._lock:
                require_open(self.is_closed)
                was_lost = self._pool.is_lost
                has_news = not (self._sync.is_settled or was_lost)
                self.num_room_changes += has_news
                try:
                    if has_news:  # A call failed, or a signal came, before settling was complete.
                        self._sync.settle()
                    yield
                except jax.errors.JaxRuntimeError:
                    self._pool.device_state.note_failure()
                    raise
                finally:
                    has_news |= self._pool.is_lost and not was_lost
        finally:
            if has_news:
                self.listeners.notify()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Holds the lock for a change, then tells of pressure and room without it.

        Signal handlers wait until the change is complete.
        """
        level, has_more = None, False
        try:
            with self.reading(), interrupts.delayed():
                self._require_no_step()
                before = self._room_signals()
                try:
                    self._pool.device_state.require()
                    if not self._pool.device_state.confirm_counts():
                        self._sync.settle()
                        raise self._pool.device_state.uncounted_error()
                    yield
                finally:
                    after = self._room_signals()
                    has_more = after.has_grown(before)
                    self.num_room_changes += has_more
                    if not after.is_lost:  # Otherwise what is in use is not known.
                        max_blocks = self._pool.counts.max_blocks
                        self.blocks_in_use = max_blocks - after.obtainable
                        level = self.pressure.observe(self.blocks_in_use, max_blocks)
        finally:
            try:
                self.pressure.notify(level)
            finally:
                if has_more:
                    self.listeners.notify()

    def close(self, end: Callable[[], None]) -> None:
        """Closes the manager, and wakes calls that wait for room, so that they fail.

        Args:
          end: Ends everything; called once, with the lock held, lost cache or not.
        """
        try:
            with self._lock, interrupts.delayed():
                if not self.is_closed:
                    self._require_no_step()
                    end()
                    self.is_closed = True
        finally:
            self.listeners.notify()

    def _require_no_step(self) -> None:
        """Raises RuntimeError inside a step of this manager."""
        if self.is_in_step:
            raise RuntimeError(
                "The manager is asked for a change inside a step that it runs, and the step's "
                "state would undo it. Ask before or after run."
            )
