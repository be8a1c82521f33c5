"""Changes one layer of blocks by reading whole blocks and writing them back."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.ops.indexing import blocks_for, columns, index_or_end

_PART_BYTES = 4 << 20  # Bounds the temporaries.

LayerBlocks: TypeAlias = tuple[jax.Array, ...]
"""One layer of P blocks: [P, H, B, D] of each array of a pool."""


def change_blocks(
    arrays: LayerBlocks,
    layer: jax.Array,
    block_ids: jax.Array,
    change: Callable[[jax.Array, LayerBlocks], LayerBlocks],
) -> LayerBlocks:
    """Changes one layer of some blocks, each block once.

    Args:
      arrays: Arrays of a pool, each [N, L, H, B, D].
      layer: i32[]. Layer to change.
      block_ids: i32[..., T]. Block of each token, in any order and repeated; out of range for none.
        It is fastest if the last axis is consecutive tokens of a row.
      change: Takes block ids (i32[P], N for none) and the content of these blocks, and returns the
        new content. It is called for a few blocks at a time, and may be called for a block again.

    Returns:
      The changed arrays.
    """
    if block_ids.size == 0:
        return arrays
    block_ids = jnp.atleast_1d(block_ids)
    num_blocks, _, *shape = arrays[0].shape
    ids = _distinct(index_or_end(block_ids.reshape(-1), num_blocks), num_blocks)
    block_bytes = shape[0] * shape[1] * shape[2] * arrays[0].dtype.itemsize
    num_tokens = block_ids.shape[-1]
    row_blocks = min(num_tokens, num_tokens // shape[1] + 2)
    part = max(1, min(_PART_BYTES // block_bytes, ids.size // num_tokens * row_blocks))

    def change_part(i: jax.Array, arrays: LayerBlocks) -> LayerBlocks:
        # The last part overlaps the one before; to write a block again changes nothing. Without the
        # barrier XLA hoists what a single part needs out of the loop, and so computes it even if
        # there is nothing to change.
        some, _ = lax.optimization_barrier((lax.dynamic_slice_in_dim(ids, i * part, part), i))
        blocks = tuple(
            array.at[some, layer].get(mode="clip", wrap_negative_indices=False) for array in arrays
        )
        return tuple(
            array.at[some, layer].set(block, mode="drop", wrap_negative_indices=False)
            for array, block in zip(arrays, change(some, blocks), strict=True)
        )

    num_changed = jnp.sum(ids < num_blocks, dtype=jnp.int32)
    return lax.fori_loop(0, blocks_for(num_changed, part), change_part, arrays)


def newest_tokens(slots: jax.Array, block_ids: jax.Array, slots_per_block: int) -> jax.Array:
    """Finds the token for each slot of some blocks.

    Args:
      slots: i32[n]. Slot of each token.
      block_ids: i32[P]. Blocks.
      slots_per_block: S, slots per block.

    Returns:
      i32[P, S]. Index of the last token for each slot, -1 for none.
    """
    of_block = block_ids[:, None] * slots_per_block + columns(slots_per_block)
    token_ids = jnp.arange(slots.size, dtype=jnp.int32)[:, None, None]
    return jnp.max(jnp.where(slots[:, None, None] == of_block[None], token_ids, -1), axis=0)


def _distinct(block_ids: jax.Array, num_blocks: int) -> jax.Array:
    """Returns block ids (i32[n], N for none) in ascending order, each once, then N."""
    # `jnp.unique` would be a third of the operations that write a compressed token.
    block_ids = jnp.sort(block_ids)
    is_repeated = jnp.pad(block_ids[1:] == block_ids[:-1], (1, 0))
    return jnp.sort(jnp.where(is_repeated, num_blocks, block_ids))
