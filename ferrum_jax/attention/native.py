"""Attention on CPU by native code, compiled by numba when the first program is traced.

XLA copies blocks together before it multiplies them, which takes as long as all the rest. The
kernel here reads keys and values where they lie, on all threads, and XLA calls it like an
operation of its own (`jax.ffi`). It is for decoding: one or a few queries a row. numba is
optional; without it, and for what the kernel does not do, there is `xla_attention`. So it is where
numba is there but fails, after a warning.
"""

import ctypes
import functools
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.attention.options import MAX_WINDOW
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat

_DTYPES = ("float32", "bfloat16", "float16")

_compiling = threading.Lock()
_kept_alive = []  # What XLA may call until the process ends.


def supports(inputs: AttentionInputs, token_format: TokenFormat = TokenFormat.Native) -> bool:
    """Returns whether `native_attention` does what is asked, here.

    The first time that it does for a dtype of the pool, or for compressed rows, it compiles the
    kernel: two to three seconds, once a process.
    """
    pool = inputs.pool
    if not _has_numba() or jax.default_backend() != "cpu":
        return False
    if pool.dtype.name not in _DTYPES or pool.k.dtype.itemsize != pool.dtype.itemsize:
        return False
    if not (inputs.q.size and inputs.block_ids.size and pool.k.size):
        return False
    with _compiling:
        return (
            _is_importable()
            and _fits(inputs, token_format)
            and _is_registered(_numbers(pool, token_format))
        )


def _fits(inputs: AttentionInputs, token_format: TokenFormat) -> bool:
    """Returns whether the kernel has room for the queries, and reads vectors of that size."""
    from ferrum_jax.attention.native_item import MAX_HEAD_DIM, MAX_QUERIES
    from ferrum_jax.attention.native_packed import MIN_VECTOR_WORDS

    _, num_queries, _, group, head_dim = inputs.q.shape
    if num_queries * group > MAX_QUERIES or head_dim > MAX_HEAD_DIM:
        return False
    if token_format == TokenFormat.Native:
        return True
    layout = inputs.pool.layout(token_format)
    return min(layout.k.num_words, layout.v.num_words) >= MIN_VECTOR_WORDS


def native_attention(
    inputs: AttentionInputs, token_format: TokenFormat = TokenFormat.Native
) -> jax.Array:
    """Computes attention on CPU without copying keys or values; under `vmap` `xla_attention` does.

    Args:
      inputs: Checked arguments that `supports` accepts; letters as there.
      token_format: How the rows' tokens are written (static). What is rotated stays so.

    Returns:
      [R, T, H, G, D], dtype `inputs.out_dtype`. Zero where a query sees no token.
    """
    return _call_or_vmap(token_format)(inputs)


@functools.cache
def _call_or_vmap(token_format: TokenFormat) -> Callable[[AttentionInputs], jax.Array]:
    @jax.custom_batching.custom_vmap
    def attend(inputs: AttentionInputs) -> jax.Array:
        return _call(inputs, token_format)

    @attend.def_vmap
    def attend_to_replicas(
        axis_size: int, is_mapped: Sequence[AttentionInputs], inputs: AttentionInputs
    ) -> tuple[jax.Array, bool]:
        (inputs_mapped,) = is_mapped  # One entry an argument.
        axes = jax.tree.map(lambda mapped: 0 if mapped else None, inputs_mapped)
        attend_in_xla = functools.partial(xla_attention, token_format=token_format)
        return jax.vmap(attend_in_xla, in_axes=(axes,), axis_size=axis_size)(inputs), True

    return attend


def _call(inputs: AttentionInputs, token_format: TokenFormat) -> jax.Array:
    pool, options = inputs.pool, inputs.options
    sinks = inputs.sinks
    if sinks is None:
        sinks = np.full(inputs.q.shape[2:4], -np.inf, np.float32)
    scalars = [options.scale_for(pool.head_dim), options.float32_soft_cap or 0.0]
    call = jax.ffi.ffi_call(
        _target(_numbers(pool, token_format)),
        jax.ShapeDtypeStruct(inputs.q.shape, jnp.float32),
    )
    out = call(
        inputs.q.astype(jnp.float32),
        pool.k,
        pool.v,
        inputs.layer,
        inputs.block_ids,
        inputs.held_lens,
        inputs.q_lens,
        sinks,
        np.asarray(scalars, np.float32),
        np.asarray(_integers(inputs, token_format), np.int32),
    )
    return out.astype(inputs.out_dtype(token_format))


def _integers(inputs: AttentionInputs, token_format: TokenFormat) -> list[int]:
    """Returns the integers that the handler takes; `native_job` names them."""
    pool = inputs.pool
    window = inputs.options.sliding_window or MAX_WINDOW
    integers = [window, pool.tokens_per_block(token_format), pool.dtype.itemsize]
    if token_format == TokenFormat.Native:
        return integers + [0] * 6
    layout = pool.layout(token_format)
    return integers + [
        x for part in (layout.k, layout.v) for x in (part.start, part.num_words, part.bits)
    ]


def _numbers(pool: BlockPool, token_format: TokenFormat) -> str:
    """Returns what the handler calls the numbers of a format's blocks."""
    is_native = token_format == TokenFormat.Native
    return pool.dtype.name if is_native else f"packed_{pool.dtype.itemsize}"


@functools.cache
def _has_numba() -> bool:
    """Returns whether numba is installed, where its code can call what the handler needs."""
    has_posix = sys.platform in ("linux", "darwin")
    has_64_bits = sys.maxsize > 2**32 and sys.byteorder == "little"
    return has_posix and has_64_bits and importlib.util.find_spec("numba") is not None


@functools.cache
def _is_importable() -> bool:
    """Returns whether the kernel's code can be imported; warns once if not."""
    try:
        importlib.import_module("ferrum_jax.attention.native_handler")
    except Exception as error:  # numba refuses a numpy that is too new with an ImportError.
        _warn(error)
        return False
    return True


def _target(numbers: str) -> str:
    """Returns the name under which XLA knows the handler for a kind of numbers."""
    return f"ferrum_jax_attention_{numbers}"


@functools.cache
def _is_registered(numbers: str) -> bool:
    """Compiles the handler for a kind of numbers; returns whether XLA takes it, warns if not."""
    from ferrum_jax.attention.native_handler import compile_handler

    try:
        address, handler = compile_handler(numbers)
        capsule = jax.ffi.pycapsule(ctypes.c_void_p(address))
        jax.ffi.register_ffi_target(_target(numbers), capsule, platform="cpu")
    except Exception as error:  # numba has many of its own, and passes on LLVM's.
        _warn(error)
        return False
    _kept_alive.append(handler)
    return True


def _warn(error: Exception) -> None:
    warnings.warn(
        f"Attention on CPU does without its native kernel, and is slower: numba could not compile "
        f"it, or XLA does not take it ({type(error).__name__}: {error}). Install versions that "
        "fit each other, or uninstall numba to hear no more of it.",
        RuntimeWarning,
        stacklevel=2,
    )
