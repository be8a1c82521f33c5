"""The call frame by which XLA passes arguments to a foreign function, as native code reads it.

XLA passes one address, that of a call frame, a structure that `xla/ffi/api/c_api.h` of jaxlib
defines. All its fields are read as 64-bit words. The frame has a table of functions.
"""

from numba import types

from ferrum_jax.foreign.compiling import POINTER, compiled, compiled_for
from ferrum_jax.foreign.memory import Pointer, call, int32s, int64s

# Version of the structures below. Later minor versions append fields, and XLA promises to support
# an older handler for a year; it refuses to register an unsupported one.
_MAJOR_VERSION, _MINOR_VERSION = 0, 3

# Fields of a call frame, of a buffer, and of the table of functions, as indices of words.
_EXTENSION, _FUNCTIONS, _CONTEXT, _NUM_ARGS, _ARGS, _NUM_RESULTS, _RESULTS = 1, 2, 3, 7, 9, 12, 14
_DATA, _SHAPE = 3, 5
_CREATE_ERROR, _DESTROY_ERROR, _SCHEDULE, _NUM_THREADS = 6, 8, 17, 18
_METADATA = 1  # An extension that asks the handler for its version.

INVALID_ARGUMENT, RESOURCE_EXHAUSTED = 3, 8
"""Codes of errors."""

NUM_CALL_WORDS = 6
"""Words of room that a call of one of XLA's functions takes."""


@compiled
def answers_metadata(frame: Pointer) -> bool:
    """Answers XLA's query for the handler's version; returns whether the call was that query."""
    extension = frame[_EXTENSION]
    if extension == 0 or int32s(extension + 8)[0] != _METADATA:
        return False
    metadata = int64s(int64s(extension)[3])
    metadata[3] = _MAJOR_VERSION | (_MINOR_VERSION << 32)
    metadata[4] = 0  # No traits.
    return True


@compiled
def has_counts(frame: Pointer, num_args: int, num_results: int) -> bool:
    """Returns whether the call has these numbers of arguments and results."""
    return frame[_NUM_ARGS] == num_args and frame[_NUM_RESULTS] == num_results


@compiled_for(types.int64, POINTER, types.int64)
def argument(frame: Pointer, index: int) -> int:
    """Returns the address of an argument's numbers."""
    return int64s(int64s(frame[_ARGS])[index])[_DATA]


@compiled_for(POINTER, POINTER, types.int64)
def shape(frame: Pointer, index: int) -> Pointer:
    """Returns the shape of an argument."""
    return int64s(int64s(int64s(frame[_ARGS])[index])[_SHAPE])


@compiled
def result(frame: Pointer, index: int) -> int:
    """Returns the address of a result's numbers."""
    return int64s(int64s(frame[_RESULTS])[index])[_DATA]


@compiled
def num_threads(frame: Pointer, room: int) -> int:
    """Returns the number of threads of XLA's pool; `room` is the address of `NUM_CALL_WORDS`."""
    count = int64s(room + 8 * (NUM_CALL_WORDS - 1))
    count[0] = 1
    _ask(frame, room, _NUM_THREADS, 4, (room + 8 * (NUM_CALL_WORDS - 1), 0))
    return count[0]


@compiled
def schedule(frame: Pointer, room: int, function: int, argument: int) -> bool:
    """Has a thread of XLA's pool call a C function by its address; returns whether it will."""
    return _ask(frame, room, _SCHEDULE, 5, (function, argument))


@compiled
def error(frame: Pointer, room: int, message: int, code: int) -> int:
    """Returns an error of XLA, which owns it from then on."""
    fields = int64s(room)
    fields[0], fields[1] = 28, 0
    fields[2], fields[3] = message, code
    return call(int64s(frame[_FUNCTIONS])[_CREATE_ERROR], room)


@compiled
def _ask(frame, room, function, num_fields, arguments):
    """Calls a function of XLA with two arguments; returns whether it succeeded."""
    fields = int64s(room)
    fields[0], fields[1] = 8 * num_fields, 0
    fields[2] = frame[_CONTEXT]
    fields[3], fields[4] = arguments
    failure = call(int64s(frame[_FUNCTIONS])[function], room)
    if failure == 0:
        return True
    fields[0], fields[1], fields[2] = 24, 0, failure
    call(int64s(frame[_FUNCTIONS])[_DESTROY_ERROR], room)
    return False
