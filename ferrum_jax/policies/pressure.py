"""When the pool's pressure changes, and who is told."""

from __future__ import annotations

import logging
from collections.abc import Callable

from ferrum_jax.checks import check_callable
from ferrum_jax.config import MemoryPressureThresholds
from ferrum_jax.types import MemoryPressure

_logger = logging.getLogger("ferrum_jax")


class PressureMonitor:
    """Notices each change of level, and tells one callback.

    `observe` belongs under the manager's lock, `notify` outside it, so that a callback may use
    the manager. Two threads may then deliver their levels in either order; `level` is the truth.

    Example:
      >>> monitor = PressureMonitor(MemoryPressureThresholds())
      >>> monitor.set_callback(lambda level: print(level.name))
      >>> monitor.notify(monitor.observe(used=7, total=10))
      Medium
      >>> monitor.notify(monitor.observe(used=7, total=10))
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
        """Sets what `notify` calls from now on; it is not called for the present level.

        Args:
          callback: Takes the new level; None for nobody.

        Raises:
          ValueError: If the callback cannot be called.
        """
        if callback is not None:
            check_callable("callback", callback)
        self._callback = callback

    def observe(self, used: int, total: int) -> MemoryPressure | None:
        """Takes note of how full the pool is. Calls nobody.

        Args:
          used: Blocks, or bytes, in use.
          total: All that there are, in the same unit.

        Returns:
          The new level if it is another one than before, else None.

        Raises:
          ValueError: Unless 0 <= used <= total.
        """
        level = self._thresholds.level(used, total)
        if level == self._level:
            return None
        self._level = level
        return level

    def notify(self, level: MemoryPressure | None) -> None:
        """Tells the callback of a new level. What it raises is logged, never passed on.

        Args:
          level: What `observe` returned; None tells nobody.
        """
        callback = self._callback
        if level is None or callback is None:
            return
        try:
            callback(level)
        except Exception:
            _logger.exception("The pressure callback failed at level %s.", level.name)
