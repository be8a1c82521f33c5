"""Attention on CPU in native code, which numba compiles when the first program is traced, once.

XLA copies blocks together before it multiplies them, and the copies take as long as all other
work. The kernel here reads keys and values in place, on all threads, and XLA calls the kernel as a
foreign function (`jax.ffi`). The kernel serves decoding and chunks of prompts, and a query gets the
same bits from both. numba is optional; without it, and for calls that the kernel does not take, XLA
computes attention. The same holds if numba fails to compile the kernel, which is reported by one
warning.
"""

import ctypes
import functools
import importlib.util
import sys
import threading
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax.attention.xla as xla
from ferrum_jax.attention.backend import first_unmet, refuse_format
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.cpu.limits import MAX_HEAD_DIM, MIN_VECTOR_WORDS
from ferrum_jax.attention.options import MAX_WINDOW

name = "cpu"

_DTYPES = ("float32", "bfloat16", "float16")

_preparing = threading.Lock()
_outcomes: dict[str, str | None] = {}  # For each kind of numbers: None if ready, or what failed.
_kept_alive = []  # Code that XLA may call until the process ends.


def accepts(call: AttentionCall) -> str | None:
    """Returns None if the kernel takes a call, or the reason why not."""
    pool = call.pool
    head_dim = call.q.shape[-1]
    return (
        first_unmet(
            (jax.default_backend() == "cpu", f"JAX runs on {jax.default_backend()} here"),
            (_has_numba(), "numba is not installed (the extra `cpu`), or not for this platform"),
            (not call.is_empty, "there are no queries, or no blocks to read"),
            (
                pool.dtype.name in _DTYPES and pool.stored_dtype.itemsize == pool.dtype.itemsize,
                f"the pool is {pool.dtype}; the kernel reads {', '.join(_DTYPES)}",
            ),
            (head_dim <= MAX_HEAD_DIM, f"heads have {head_dim} numbers; {MAX_HEAD_DIM} may"),
        )
        or refuse_format(call)
        or first_unmet(
            (
                _vector_words(call) >= MIN_VECTOR_WORDS,
                f"a compressed vector has {_vector_words(call)} words; it needs {MIN_VECTOR_WORDS}",
            )
        )
        or _outcomes.get(_numbers(call))
    )


def prepare(call: AttentionCall) -> str | None:
    """Compiles the kernel and registers it with XLA; warns if that fails.

    That takes a few seconds for each dtype of a pool, and for compressed rows of each
    width. Later processes load the code from disk; see `code_cache`.

    Returns:
      None if the kernel is ready, or what failed.
    """
    numbers = _numbers(call)
    with _preparing:
        if numbers not in _outcomes:
            _outcomes[numbers] = _register(numbers)
        return _outcomes[numbers]


@jax.custom_batching.custom_vmap
def attend(call: AttentionCall) -> jax.Array:
    """Computes attention on CPU without copying keys or values; XLA does under `vmap`.

    Args:
      call: A call that was accepted and prepared; letters as in `AttentionCall`.

    Returns:
      [R, T, H, G, D], dtype `call.out_dtype`. Zero where a query sees no token.
    """
    pool, options = call.pool, call.options
    sinks = call.sinks
    if sinks is None:
        sinks = np.full(call.q.shape[2:4], -np.inf, np.float32)
    scalars = [options.scale_for(pool.head_dim), options.float32_soft_cap or 0.0]
    out = jax.ffi.ffi_call(
        _target(_numbers(call)), jax.ShapeDtypeStruct(call.q.shape, jnp.float32)
    )(
        call.q.astype(jnp.float32),
        *pool.payload.split(pool.arrays),
        call.layer,
        call.block_ids,
        call.held_lens,
        call.q_lens,
        sinks,
        np.asarray(scalars, np.float32),
        np.asarray(_integers(call), np.int32),
    )
    return out.astype(call.out_dtype)


attend.def_vmap(xla.attend_replicas)


def _integers(call: AttentionCall) -> list[int]:
    """Returns the integers that the handler takes; `job` names them."""
    window = call.options.sliding_window or MAX_WINDOW
    integers = [window, call.tokens_per_block, call.pool.dtype.itemsize]
    if call.is_native:
        return integers + [0] * 6
    layout = call.packed_codec
    return integers + [
        x for part in (layout.k, layout.v) for x in (part.start, part.num_words, part.bits)
    ]


def _vector_words(call: AttentionCall) -> int:
    """Returns the words of the shorter vector, that of a key or a value; many if native."""
    if call.is_native:
        return MIN_VECTOR_WORDS
    layout = call.packed_codec
    return min(layout.k.num_words, layout.v.num_words)


def _numbers(call: AttentionCall) -> str:
    """Returns the handler's name for the numbers of a call's rows."""
    dtype = call.pool.dtype
    return dtype.name if call.is_native else f"packed_{dtype.itemsize}"


def _target(numbers: str) -> str:
    """Returns the name under which XLA knows the handler for a kind of numbers."""
    return f"ferrum_jax_attention_{numbers}"


@functools.cache
def _has_numba() -> bool:
    """Returns whether numba is installed, and the handler can call the platform's C library."""
    has_posix = sys.platform in ("linux", "darwin")
    has_64_bits = sys.maxsize > 2**32 and sys.byteorder == "little"
    return has_posix and has_64_bits and importlib.util.find_spec("numba") is not None


def _register(numbers: str) -> str | None:
    """Compiles and registers the handler for a kind of numbers; returns and warns what failed."""
    try:
        address, handler = _machine_code(numbers).load()
        capsule = jax.ffi.pycapsule(ctypes.c_void_p(address))
        jax.ffi.register_ffi_target(_target(numbers), capsule, platform="cpu")
    except Exception as error:  # numba has many error classes, and passes on those of LLVM.
        failure = f"numba could not compile it, or XLA does not take it ({error!r})"
        warnings.warn(
            f"Attention on CPU runs without its native kernel, and is slower: {failure}. Install "
            "versions of numba, numpy and jax that fit each other, or uninstall numba.",
            RuntimeWarning,
            stacklevel=2,
        )
        return failure
    _kept_alive.append(handler)
    return None


def _machine_code(numbers: str) -> Any:
    """Returns the handler's machine code, a `MachineCode`, from disk or compiled."""
    # Imported late: numba takes a second, and refuses a numpy that is too new. Code on disk needs
    # only llvmlite, which numba requires.
    from ferrum_jax.attention.cpu import code_cache

    code = code_cache.read(numbers)
    if code is None:
        from ferrum_jax.attention.cpu.handler import compile_handler

        code = compile_handler(numbers)
        code_cache.keep(numbers, code)
    return code
