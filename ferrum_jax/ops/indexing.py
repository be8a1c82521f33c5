"""Converts ids to array indices: the only place where sentinels are translated.

An absent row or block becomes the index one past the end; a read there returns a fill value, and a
write is dropped. (A negative index would wrap around to the last element.)
"""

import functools

import jax
import jax.numpy as jnp

from ferrum_jax.types import NULL_BLOCK


def blocks_for(num_tokens: jax.Array, block_size: jax.Array | int) -> jax.Array:
    """Returns `ceil(num_tokens / block_size)`; cannot overflow."""
    return num_tokens // block_size + (num_tokens % block_size > 0).astype(jnp.int32)


def index_or_end(ids: jax.Array, size: int) -> jax.Array:
    """Returns `ids` where they are in [0, size), and `size` elsewhere."""
    return jnp.where((ids >= 0) & (ids < size), ids, size)


def read(array: jax.Array, index: jax.Array, fill_value: int) -> jax.Array:
    """Returns `array[index]`; `fill_value` where the index is one past the end."""
    return array.at[index].get(mode="fill", fill_value=fill_value, wrap_negative_indices=False)


def columns(size: int) -> jax.Array:
    """Returns 0 to `size - 1` as i32[1, size], to compare with a column of counts [R, 1]."""
    return jnp.arange(size, dtype=jnp.int32)[None]


# `jit` here has each layer of a model take what the first one traced.
@functools.partial(jax.jit, static_argnames="num_tokens")
def newest_places(ends: jax.Array, q_lens: jax.Array, num_tokens: int) -> jax.Array:
    """Returns the places of the newest tokens of rows, among the tokens that each row holds.

    Args:
      ends: i32[R]. Held tokens of each row, the newest included.
      q_lens: i32[R]. New tokens of each row.
      num_tokens: T, the most new tokens of a row (static).

    Returns:
      i32[R, T]. Places, from 0; -1 for padding.
    """
    token = columns(num_tokens)
    first = (ends - q_lens)[:, None]
    return jnp.where(token < q_lens[:, None], first + token, -1)


@functools.partial(jax.jit, static_argnames=("num_blocks", "slots_per_block"))
def token_slots(
    block_ids: jax.Array,
    positions: jax.Array,
    num_blocks: int,
    block_size: jax.Array | int,
    slots_per_block: int,
) -> jax.Array:
    """Returns the slots of tokens.

    Args:
      block_ids: i32[R, M]. Each row's blocks, `NULL_BLOCK` where absent.
      positions: i32[R, T]. Indices among the tokens that each row holds; negative for no token.
      num_blocks: Blocks in the pool (static).
      block_size: Tokens per block; i32[R, 1] if rows differ.
      slots_per_block: Slots per block, not below `block_size` (static).

    Returns:
      i32[R, T]. Slots. For no token, or a token without a block: the number of all slots, at which
      a write is dropped.
    """
    logical = index_or_end(positions // block_size, block_ids.shape[1])
    row = jnp.arange(block_ids.shape[0], dtype=jnp.int32)[:, None]
    block = block_ids.at[row, logical].get(mode="fill", fill_value=NULL_BLOCK)
    slots = block * slots_per_block + positions % block_size
    return jnp.where(block == NULL_BLOCK, num_blocks * slots_per_block, slots)
