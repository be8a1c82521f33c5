"""Delays signals such as Ctrl-C while a change is made that must not stop half-way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
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

    @contextlib.contextmanager
    def delayed(self) -> Iterator[None]:
        """Delays handlers until the block ends; then calls those whose signal has arrived."""
        if self._handlers or threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            self._hold()
            yield
        finally:
            self._release()

    @contextlib.contextmanager
    def allowed(self) -> Iterator[None]:
        """Lets handlers run at once inside a `delayed()` block: a part of it that may stop."""
        if not self._handlers or threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            self._release()
            yield
        finally:
            self._hold()

    def _hold(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[number] = handler
                signal.signal(number, self._note)

    def _release(self) -> None:
        handlers, self._handlers = self._handlers, {}
        for number, handler in handlers.items():
            signal.signal(number, handler)
        arrived, self._arrived = self._arrived, []
        for number, frame in arrived:
            handlers[number](number, frame)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._arrived.append((number, frame))


interrupts = DelayedInterrupts()
"""Those of this process: signal handlers are the process's too."""
