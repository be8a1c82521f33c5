"""Native code on CPU, which XLA calls as foreign functions (`jax.ffi`).

numba compiles a function when the first program that calls it is traced, once; later processes load
the code from disk, see `code_cache`. numba is optional: without it, or if it fails to compile a
function, which is reported by one warning, XLA computes the same.
"""

import contextlib
import ctypes
import functools
import gc
import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from ferrum_jax.foreign.function import ForeignFunction

_preparing = threading.Lock()
_outcomes: dict[str, str | None] = {}  # For each function: None if ready, or what failed.
_kept_alive = []  # Code that XLA may call until the process ends.


def refusal(function: ForeignFunction) -> str | None:
    """Returns why XLA cannot call a function here, or None; compiles nothing."""
    if jax.default_backend() != "cpu":
        return f"JAX runs on {jax.default_backend()} here"
    if not _has_numba():
        return "numba is not installed (the extra `cpu`), or not for this platform"
    return _outcomes.get(function.name)


def prepare(function: ForeignFunction) -> str | None:
    """Compiles a function and registers it with XLA, once; warns if that fails.

    Compiling takes up to a few seconds.

    Args:
      function: One for which there is no `refusal`.

    Returns:
      None if it is ready, or what failed.
    """
    with _preparing:
        if function.name not in _outcomes:
            _outcomes[function.name] = _register(function)
        return _outcomes[function.name]


def prepare_in_background(functions: Sequence[ForeignFunction]) -> None:
    """Starts a thread that prepares functions, in order, and returns at once.

    Args:
      functions: Functions; those for which there is a `refusal` are left out.
    """
    possible = [function for function in functions if refusal(function) is None]
    if not possible:
        return

    def prepare_all() -> None:
        for function in possible:
            prepare(function)

    # Not a daemon, at whose end a process would stop LLVM in the midst of its work.
    threading.Thread(target=prepare_all, name="ferrum_jax_compiler").start()


@functools.cache
def _has_numba() -> bool:
    """Returns whether numba is installed, and native code can call the platform's C library."""
    has_posix = sys.platform in ("linux", "darwin")
    has_64_bits = sys.maxsize > 2**32 and sys.byteorder == "little"
    return has_posix and has_64_bits and importlib.util.find_spec("numba") is not None


def _register(function: ForeignFunction) -> str | None:
    """Compiles and registers a function; returns and warns what failed."""
    try:
        address, code = _machine_code(function).load()
        capsule = jax.ffi.pycapsule(ctypes.c_void_p(address))
        jax.ffi.register_ffi_target(function.target, capsule, platform="cpu")
    except Exception as error:  # numba has many error classes, and passes on those of LLVM.
        failure = f"numba could not compile it, or XLA does not take it ({error!r})"
        warnings.warn(
            f"{function.purpose} on CPU runs without native code, and is slower: {failure}. "
            "Install versions of numba, numpy and jax that fit each other, or uninstall numba.",
            RuntimeWarning,
            stacklevel=2,
        )
        return failure
    _kept_alive.append(code)
    return None


def _machine_code(function: ForeignFunction) -> Any:
    """Returns a function's machine code, a `MachineCode`, from disk or compiled."""
    # Imported late: numba takes a second, and refuses a numpy that is too new. Code on disk needs
    # only llvmlite, which numba requires.
    from ferrum_jax.foreign import code_cache

    code = code_cache.read(function)
    if code is None:
        with _no_garbage_collection():
            code = importlib.import_module(function.module).compile_handler(function.name)
        code_cache.keep(function, code)
    return code


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
