"""Delays signals such as Ctrl-C during a change that must not be interrupted."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, n)]
"""Signals with Python handlers that may raise: Ctrl-C, termination, time limits."""


class DelayedInterrupts:
    """Delays the signal handlers of the main thread.

    A handler written in Python may raise between any two operations. A signal that arrives inside
    a `delayed()` block calls its handler when the block ends. In other threads, which run no
    handlers, and inside another `delayed()` block, `delayed()` does nothing.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def delayed(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager that delays handlers until its block ends."""
        is_outermost = not self._handlers and _is_in_main_thread()
        return _Around(self._delay, self._restore) if is_outermost else contextlib.nullcontext()

    def allowed(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context manager for a part of a `delayed()` block that may be interrupted."""
        is_held = bool(self._handlers) and _is_in_main_thread()
        return _Around(self._restore, self._delay) if is_held else contextlib.nullcontext()

    def _delay(self) -> None:
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._record)
        except BaseException:
            self._restore()
            raise

    def _restore(self) -> None:
        """Restores handlers, and calls those of signals that arrived, even if one raises."""
        try:
            while self._handlers:
                number, handler = next(iter(self._handlers.items()))
                signal.signal(number, handler)
                del self._handlers[number]
            while self._arrived:
                number, frame = self._arrived.pop(0)
                handler: Any = signal.getsignal(number)
                handler(number, frame)
        except BaseException:
            self._restore()
            raise

    def _record(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))


class _Around(contextlib.AbstractContextManager[None]):
    """Context manager that calls `begin` on entry and `end` on exit.

    A generator does not serve: if a handler raises just before the code after its `yield` would
    run, that code runs when the exception is collected, long after the surrounding blocks have
    ended.
    """

    def __init__(self, begin: Callable[[], None], end: Callable[[], None]):
        self._begin, self._end = begin, end

    def __enter__(self) -> None:
        self._begin()

    def __exit__(self, *exception: object) -> None:
        self._end()


def _is_in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


interrupts = DelayedInterrupts()
"""The instance of this process, since signal handlers belong to the process."""
