"""Has numba compile code, in this process or in another while this one goes on.

numba holds Python's lock while it compiles: a thread would hold up all others. The other process
leaves the code in the cache on disk. Whatever goes wrong there, this process compiles.
"""

import atexit
import contextlib
import gc
import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator

from ferrum_jax.foreign import code_cache
from ferrum_jax.foreign.function import CodePart
from ferrum_jax.foreign.machine_code import MachineCode

_MOST_SECONDS = 60.0  # To wait for another process; it takes about six.

_starting = threading.Lock()
_compiling: dict[str, subprocess.Popen[bytes]] = {}
"""The process that compiles a part, by the part's name."""


def start(part: CodePart) -> None:
    """Starts a process that compiles a part if it is not on disk, and returns at once."""
    with _starting:
        if part.name in _compiling or not code_cache.is_kept() or not sys.executable:
            return
        if code_cache.read(part) is not None:
            return
        program = (
            f"import sys; sys.path[:] = {sys.path!r}; "
            "from ferrum_jax.foreign.compiler import machine_code; "
            "from ferrum_jax.foreign.function import CodePart; "
            f"machine_code({part!r})"
        )
        with contextlib.suppress(OSError):
            _compiling[part.name] = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )


def machine_code(part: CodePart) -> MachineCode:
    """Returns the machine code of a part, from disk or compiled; it is on disk afterwards."""
    code = code_cache.read(part)
    if code is None and part.name in _compiling:
        with contextlib.suppress(subprocess.TimeoutExpired):
            _compiling[part.name].wait(_MOST_SECONDS)
        _end(_compiling.pop(part.name))
        code = code_cache.read(part)
    if code is None:
        with _no_garbage_collection():
            code = importlib.import_module(part.module).compile_part(part.name)
        code_cache.keep(part, code)
    return code


@atexit.register
def _end_all() -> None:
    """Ends the processes that were not waited for."""
    while _compiling:
        _end(_compiling.popitem()[1])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Pauses the collection of cycles: each one looks at all objects, which numba makes many of.

    That took a sixth of the time of compiling in a process that had loaded a model.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
