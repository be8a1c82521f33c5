"""Writes numbers into an array of blocks, in the form that the platform does in place.

Array [N, L, H, B, D], `layer` i32[], slots i32[...], tokens [..., H, D] of the array's dtype.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import ferrum_jax.foreign as foreign
from ferrum_jax.foreign.function import CodePart, ForeignFunction
from ferrum_jax.ops.block_updates import LayerBlocks, change_blocks, newest_tokens
from ferrum_jax.ops.indexing import columns
from ferrum_jax.ops.platforms import traced_platforms

# A TPU stores numbers in tiles that are 128 wide.
_TPU_LANES = 128

WRITE = ForeignFunction(
    "write",
    (CodePart("write", "ferrum_jax.ops.cpu.handler", ("ferrum_jax.ops.cpu",)),),
    "Writing tokens",
)
"""Writes tokens on a CPU."""


def write_numbers(
    array: jax.Array,
    layer: jax.Array,
    slots: jax.Array,
    tokens: jax.Array,
    backend: str | None = None,
) -> jax.Array:
    """Writes tokens into one layer; one for a slot outside the array is dropped.

    Args:
      array: [N, L, H, B, D].
      layer: i32[]. One that the array does not have is not written.
      slots: i32[...]. Slot of each token, `block_id * B + offset`.
      tokens: [..., H, D].
      backend: "xla" for XLA's operations alone; None for the fastest form of the platform that the
        program is lowered for.

    Returns:
      The array with the tokens in it.
    """
    forms = {}
    is_any = array.size > 0 and tokens.size > 0
    may_be_foreign = backend is None and is_any and _has_whole_bytes(array.dtype)
    if may_be_foreign and (foreign.refusal(WRITE) or foreign.prepare(WRITE)) is None:
        forms["cpu"] = write_on_cpu
    if "tpu" in traced_platforms():
        has_whole_tiles = array.shape[-1] % _TPU_LANES == 0
        forms["tpu"] = write_each_vector if has_whole_tiles else write_whole_blocks
    args = array, layer, slots, tokens
    if not forms:
        return write_each_token(*args)
    return lax.platform_dependent(*args, default=write_each_token, **forms)


def _has_whole_bytes(dtype: np.dtype) -> bool:
    """Returns whether a number takes whole bytes: XLA stores smaller ones side by side."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.iinfo(dtype).bits % 8 == 0
    return not jnp.issubdtype(dtype, jnp.floating) or jnp.finfo(dtype).bits % 8 == 0


@jax.custom_jvp
def write_on_cpu(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Like `write_each_token`, by a foreign function; a scatter under `vmap` and for gradients.

    XLA compiles a scatter for each layer, which took two thirds of the time of compiling a step of
    30 layers; all layers call the same function.
    """
    # Made here: a constant within a function with a rule for `vmap` is none under `vmap` of `cond`.
    number_bytes = np.asarray([array.dtype.itemsize], np.int32)
    return _write_in_place(array, layer, slots, tokens, number_bytes)


@write_on_cpu.defjvp
def _write_with_tangents(
    args: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    return jax.jvp(write_each_token, args, tangents)


@jax.custom_batching.custom_vmap
def _write_in_place(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array, number_bytes: jax.Array
) -> jax.Array:
    assert layer.dtype == slots.dtype == jnp.int32
    like = jax.eval_shape(write_each_token, array, layer, slots, tokens)
    call = jax.ffi.ffi_call(WRITE.target, like, input_output_aliases={0: 0})
    vectors = tokens.reshape(-1, *tokens.shape[-2:])
    return call(array, layer, slots.reshape(-1), vectors, number_bytes)


@_write_in_place.def_vmap
def _write_in_each(
    axis_size: int, is_batched: list[bool], *args: jax.Array
) -> tuple[jax.Array, bool]:
    axes = tuple(0 if batched else None for batched in is_batched[:-1])
    return jax.vmap(write_each_token, in_axes=axes, axis_size=axis_size)(*args[:-1]), True


def write_each_token(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Writes all heads of each token at once (array [N, L, H, B, D], tokens [..., H, D])."""
    block_size = array.shape[3]
    # A negative slot has a negative block, which is outside the pool too.
    target = array.at[slots // block_size, layer, :, slots % block_size]
    return target.set(tokens, mode="drop", wrap_negative_indices=False)


def write_each_vector(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Like `write_each_token`, but one vector of D numbers at a time.

    To write all heads of a token at once, XLA for TPU wants them adjacent in memory, and transposes
    the whole pool to that order and back in each layer.
    """
    num_heads, block_size, head_dim = array.shape[2:]
    slots = slots.reshape(-1, 1)
    target = array.at[slots // block_size, layer, columns(num_heads), slots % block_size]
    vectors = tokens.reshape(-1, num_heads, head_dim)
    return target.set(vectors, mode="drop", wrap_negative_indices=False)


def write_whole_blocks(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Like `write_each_token`, but reads whole blocks, changes them and writes them back.

    On a TPU the tokens of such heads are the last axis (`attention.tpu.tiling.has_tokens_last`).
    The numbers of a token are then far apart, and XLA would transpose the whole pool to write some
    tokens; it writes whole blocks in place.
    """
    num_heads, block_size, head_dim = array.shape[2:]
    block_ids = slots // block_size
    slots, tokens = slots.reshape(-1), tokens.reshape(-1, num_heads, head_dim)

    def change(block_ids: jax.Array, blocks: LayerBlocks) -> LayerBlocks:
        sources = newest_tokens(slots, block_ids, block_size)
        new = tokens.at[sources].get(mode="clip", wrap_negative_indices=False).swapaxes(1, 2)
        return (jnp.where((sources >= 0)[:, None, :, None], new, blocks[0]),)

    (array,) = change_blocks((array,), layer, block_ids, change)
    return array
