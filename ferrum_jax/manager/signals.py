"""What a manager tells others of its pool: levels of pressure, and room to try for."""

from __future__ import annotations

import itertools
import logging
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.checks import check_callable
from ferrum_jax.config import MemoryPressureThresholds
from ferrum_jax.types import MemoryPressure

_logger = logging.getLogger("ferrum_jax")


class RoomSignals(NamedTuple):
    """Numbers of which one grows when a call that waits for room should try again.

    Attributes:
      obtainable: Blocks that are available, growth and eviction counted.
      num_free_rows: Rows that are free.
      store_room: Room that the tiers have for a preemption: minus the bytes stored.
      num_preempted: Requests preempted so far: a call that waits to extend one of them must fail.
      is_lost: 1 once the cache is lost: calls that wait end with an error then.
    """

    obtainable: PerPool
    num_free_rows: int
    store_room: int
    num_preempted: int
    is_lost: int

    def has_grown(self, before: RoomSignals) -> bool:
        """Returns whether one of the numbers is larger than before, in any pool."""
        others = any(map(operator.gt, self[1:], before[1:]))
        return others or not self.obtainable.fits_in(before.obtainable)


class RoomListeners:
    """Functions that are called after changes that may have made room."""

    def __init__(self) -> None:
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._numbers = itertools.count()

    def add(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function, and returns one that removes it again."""
        number = next(self._numbers)
        self._callbacks[number] = callback

        def remove() -> None:
            self._callbacks.pop(number, None)

        return remove

    def notify(self) -> None:
        """Calls all functions; what they raise is logged."""
        for callback in list(self._callbacks.values()):
            try:
                callback()
            except Exception:
                _logger.exception("A room listener failed.")


class PressureMonitor:
    """Observes the level of pressure, and tells one callback of each change.

    `observe` is called with the manager's lock held, `notify` without it, so that a callback may
    use the manager. Two threads may then deliver their levels in either order; `level` is the
    latest.

    Example:
      >>> monitor = PressureMonitor(MemoryPressureThresholds())
      >>> monitor.set_callback(lambda level: print(level.name))
      >>> monitor.notify(monitor.observe([7], [10]))
      Medium
      >>> monitor.notify(monitor.observe([7], [10]))
    """

    def __init__(self, thresholds: MemoryPressureThresholds) -> None:
        self._thresholds = thresholds
        self._level = MemoryPressure.Low
        self._callback: Callable[[MemoryPressure], None] | None = None

    @property
    def level(self) -> MemoryPressure:
        """The level last observed; Low at first."""
        return self._level

    def set_callback(self, callback: Callable[[MemoryPressure], None] | None) -> None:
        """Sets the function that `notify` calls; it is not called for the present level.

        Args:
          callback: Called with the new level; None for no function.

        Raises:
          ValueError: If the callback cannot be called.
        """
        if callback is not None:
            check_callable("callback", callback)
        self._callback = callback

    def observe(self, used: Sequence[int], total: Sequence[int]) -> MemoryPressure | None:
        """Records how full the pools are: the level is that of the fullest; calls no function.

        Args:
          used: Blocks of each pool in use.
          total: Blocks that each pool can have.

        Returns:
          The new level if it differs from the one before, else None.

        Raises:
          ValueError: Unless 0 <= used <= total in each pool.
        """
        level = max(map(self._thresholds.level, used, total))
        if level == self._level:
            return None
        self._level = level
        return level

    def notify(self, level: MemoryPressure | None) -> None:
        """Calls the callback with a new level. What it raises is logged, never passed on.

        Args:
          level: What `observe` returned; for None, nothing is called.
        """
        callback = self._callback
        if level is None or callback is None:
            return
        try:
            callback(level)
        except Exception:
            _logger.exception("The pressure callback failed at level %s.", level.name)
