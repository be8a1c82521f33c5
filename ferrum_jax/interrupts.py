"""Delays signals such as Ctrl-C while a change is made that must not stop half-way."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGALRM", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
]
"""Signals whose Python handlers may raise: Ctrl-C, and what time limits and supervisors send."""


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


interrupts = DelayedInterrupts()
"""Those of this process: signal handlers are the process's too."""
