"""Delays signals such as Ctrl-C while a change is made that must not stop half-way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGALRM") if hasattr(signal, n)]
"""Signals whose Python handlers may raise: Ctrl-C, a supervisor's request to end, time limits."""


class DelayedInterrupts:
    """Holds back the signal handlers of the main thread for a while.

    A handler written in Python may raise between any two operations. Inside `delayed()` it is
    called when the block ends instead. In other threads, where no handler runs, and inside
    another `delayed()` nothing is done.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._arrived: list[tuple[int, FrameType | None]] = []

    def delayed(self) -> contextlib.AbstractContextManager[None]:
        """Delays handlers until the block ends; then calls those whose signal has arrived."""
        is_outermost = not self._handlers and _is_in_main_thread()
        return _Around(self._hold, self._release) if is_outermost else contextlib.nullcontext()

    def allowed(self) -> contextlib.AbstractContextManager[None]:
        """Lets handlers run at once inside a `delayed()` block: a part of it that may stop."""
        is_held = bool(self._handlers) and _is_in_main_thread()
        return _Around(self._release, self._hold) if is_held else contextlib.nullcontext()

    def _hold(self) -> None:
        try:
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        """Puts the handlers back, and calls those whose signal has arrived: each, if one raises."""
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
            self._release()
            raise

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))


class _Around(contextlib.AbstractContextManager[None]):
    """Calls a function as a block begins, and another one as it ends.

    A generator would not do: where a handler raises as its end is about to run, that end runs when
    the exception is collected, long after the blocks around it.
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
"""Those of this process: signal handlers are the process's too."""
