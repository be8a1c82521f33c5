"""Ctrl-C at any line of the code that changes a manager."""

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ferrum_jax
from ferrum_jax.interrupts import interrupts

_PACKAGE = pathlib.Path(ferrum_jax.__file__).parent
_PLACES = tuple(str(_PACKAGE / name) for name in ("manager", "prefix", "interrupts.py"))


@dataclasses.dataclass
class Lines:
    """The lines that run.

    Attributes:
      num_lines: How many have run so far that count.
      has_happened: Whether the signal has come.
    """

    num_lines: int = 0
    has_happened: bool = False


@contextlib.contextmanager
def interrupted_at(line: int, *, is_delayed: bool | None = None) -> Iterator[Lines]:
    """Sends SIGINT before the `line`-th line that runs inside, the first one being 1.

    Args:
      line: Which line; 0 for none, which counts them.
      is_delayed: Count only lines where handlers are held back, or only the others; all if absent.
    """
    lines = Lines()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(_PLACES):
            return None
        if event == "line" and is_delayed in (None, bool(interrupts._handlers)):
            lines.num_lines += 1
            if lines.num_lines == line:
                lines.has_happened = True
                signal.raise_signal(signal.SIGINT)
        return trace

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield lines
    finally:
        sys.settrace(tracer)
        handler = signal.signal(signal.SIGINT, before)
        assert handler is signal.default_int_handler, "the handler has not been put back"
