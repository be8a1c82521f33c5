"""Interrupts (Ctrl-C) at any point of the manager's code where Python calls signal handlers."""

import contextlib
import dataclasses
import dis
import functools
import pathlib
import signal
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

import ferrum_jax
from tests.support.internals import are_interrupts_delayed

_PACKAGE = pathlib.Path(ferrum_jax.__file__).parent
_PLACES = tuple(str(_PACKAGE / name) for name in ("manager", "prefix", "interrupts.py"))
# Handlers are called when a function begins, after a call, and when a loop repeats.
_STOPS = {
    dis.opmap[name]
    for name in ("RESUME", "CALL", "CALL_KW", "CALL_FUNCTION_EX", "JUMP_BACKWARD")
    if name in dis.opmap
}


@dataclasses.dataclass
class Points:
    """The points that were passed.

    Attributes:
      num_points: Number of points passed so far.
      place: File, line and function of the signal; None if it was not sent.
    """

    num_points: int = 0
    place: tuple[str, int, str] | None = None


@contextlib.contextmanager
def interrupted_at(point: int, *, is_delayed: bool | None = None) -> Iterator[Points]:
    """Sends SIGINT at the `point`-th point inside, counted from 1.

    Args:
      point: Number of the point; 0 only counts the points.
      is_delayed: Count only points where handlers are delayed, or only others; None counts all.
    """
    points, last_opcodes = Points(), dict[FrameType, int]()

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if not _is_here(frame):
            return None
        frame.f_trace_opcodes = True
        if event == "return":
            last_opcodes.pop(frame, None)
        if event == "opcode":
            before = last_opcodes.get(frame)
            last_opcodes[frame] = _opcodes(frame.f_code)[frame.f_lasti]
            if before in _STOPS and is_delayed in (None, are_interrupts_delayed()):
                points.num_points += 1
                if points.num_points == point:
                    points.place = frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
                    signal.raise_signal(signal.SIGINT)
        return trace

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    tracer = sys.gettrace()
    sys.settrace(trace)
    try:
        yield points
    finally:
        sys.settrace(tracer)
        last_opcodes.clear()
        handler = signal.signal(signal.SIGINT, before)
        assert handler is signal.default_int_handler, "the handler was not restored"


def _is_here(frame: FrameType) -> bool:
    """Whether a frame is of the manager's code, or of a `with` in it."""
    if frame.f_code.co_filename == contextlib.__file__ and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(_PLACES)


@functools.cache
def _opcodes(code: CodeType) -> bytes:
    return code.co_code
