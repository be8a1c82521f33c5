"""Attention on CPU in native code.

XLA copies blocks together before it multiplies them, and the copies take as long as all other
work. The kernel here reads keys and values in place, on all threads. The kernel serves decoding and
chunks of prompts, and a query gets the same bits from both. XLA computes the calls that the kernel
does not take, and all calls where `foreign` refuses.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import ferrum_jax.attention.xla as xla
import ferrum_jax.foreign as foreign
from ferrum_jax.attention.backend import first_unmet, refuse_format
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.cpu.limits import MAX_HEAD_DIM, MIN_VECTOR_WORDS
from ferrum_jax.attention.options import MAX_WINDOW
from ferrum_jax.foreign.function import CodePart, ForeignFunction

name = "cpu"

_DTYPES = ("float32", "bfloat16", "float16")


def accepts(call: AttentionCall) -> str | None:
    """Returns None if the kernel takes a call, or the reason why not."""
    pool = call.pool
    head_dim = call.q.shape[-1]
    return (
        foreign.refusal(_function(call))
        or first_unmet(
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
    )


def prepare(call: AttentionCall) -> str | None:
    """Compiles the kernel for the dtype of a pool, or for compressed rows of a width.

    Returns:
      None if the kernel is ready, or what failed.
    """
    return foreign.prepare(_function(call))


def prepare_kernels(dtype: DTypeLike) -> None:
    """Starts to compile the native code that a cache needs on a CPU, and returns at once.

    Compiling takes about five seconds, once on a machine: the code is kept on disk. Call this first
    and load the weights meanwhile; the first program that needs the code waits for it. On other
    platforms, without numba, and for a dtype that the kernel does not take, nothing happens.

    Args:
      dtype: Dtype of keys and values.

    Raises:
      TypeError: There is no such dtype.

    Example:
      >>> prepare_kernels("float32")
    """
    numbers = jnp.dtype(dtype).name
    function = _function_for(numbers)
    if numbers in _DTYPES and foreign.refusal(function) is None:
        foreign.start_to_prepare(function)


def attend(call: AttentionCall) -> jax.Array:
    """Computes attention on CPU without copying keys or values; XLA does under `vmap`.

    Args:
      call: A call that was accepted and prepared; letters as in `AttentionCall`.

    Returns:
      [R, T, H, G, D], dtype `call.out_dtype`. Zero where a query sees no token.
    """
    options, sinks = call.options, call.sinks
    if sinks is None:
        sinks = np.full(call.q.shape[2:4], -np.inf, np.float32)
    scalars = [options.scale_for(call.pool.head_dim), options.float32_soft_cap or 0.0]
    # Made here: a constant within a function with a rule for `vmap` is none under `vmap` of `cond`.
    constants = np.asarray(scalars, np.float32), np.asarray(_integers(call), np.int32)
    return _attend(call, sinks, *constants)


@jax.custom_batching.custom_vmap
def _attend(
    call: AttentionCall, sinks: jax.Array, scalars: jax.Array, integers: jax.Array
) -> jax.Array:
    out = jax.ffi.ffi_call(_function(call).target, jax.ShapeDtypeStruct(call.q.shape, jnp.float32))(
        call.q.astype(jnp.float32),
        *call.pool.payload.split(call.pool.arrays),
        call.layer,
        call.block_ids,
        call.held_lens,
        call.q_lens,
        sinks,
        scalars,
        integers,
    )
    return out.astype(call.out_dtype)


@_attend.def_vmap
def _attend_replicas(
    axis_size: int, is_mapped: list, call: AttentionCall, *_: jax.Array
) -> tuple[jax.Array, bool]:
    return xla.attend_replicas(axis_size, is_mapped, call)


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


def _function(call: AttentionCall) -> ForeignFunction:
    """Returns the foreign function for the numbers of a call's rows."""
    dtype = call.pool.dtype
    return _function_for(dtype.name if call.is_native else f"packed_{dtype.itemsize}")


def _function_for(numbers: str) -> ForeignFunction:
    sources = "ferrum_jax.attention.cpu", "ferrum_jax.attention.softmax"
    handler = CodePart("attention", "ferrum_jax.attention.cpu.handler", sources)
    helper = CodePart(f"attention_{numbers}", "ferrum_jax.attention.cpu.helper", sources)
    return ForeignFunction(f"attention_{numbers}", (handler, helper), "Attention")
