"""Native code on CPU, which XLA calls as foreign functions (`jax.ffi`).

numba compiles a function when the first program that calls it is traced, once; later processes load
the code from disk, see `code_cache`. numba is optional: without it, or if it fails to compile a
function, which is reported by one warning, XLA computes the same.
"""

import ctypes
import functools
import importlib.util
import sys
import threading
import warnings

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


def start_to_prepare(function: ForeignFunction) -> None:
    """Starts a process that compiles the longest part of a function, and returns at once.

    `prepare` compiles the other parts, and waits for that one.

    Args:
      function: One for which there is no `refusal`.
    """
    from ferrum_jax.foreign import compiler

    compiler.start(function.parts[-1])


@functools.cache
def _has_numba() -> bool:
    """Returns whether numba is installed, and native code can call the platform's C library."""
    has_posix = sys.platform in ("linux", "darwin")
    has_64_bits = sys.maxsize > 2**32 and sys.byteorder == "little"
    return has_posix and has_64_bits and importlib.util.find_spec("numba") is not None


def _register(function: ForeignFunction) -> str | None:
    """Compiles and registers a function; returns and warns what failed."""
    try:
        # Imported late: it needs llvmlite, which numba requires. numba itself, which takes a second
        # and refuses a numpy that is too new, is imported only to compile.
        from ferrum_jax.foreign import compiler, machine_code

        parts = [compiler.machine_code(part) for part in function.parts]
        address, code = machine_code.load(parts)
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
