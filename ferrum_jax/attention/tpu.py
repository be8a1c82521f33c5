"""Attention through pages on a TPU, for the calls that its kernel takes.

Heads of a multiple of 128 numbers are taken with blocks of a multiple of 8 tokens. Other heads,
of 64 numbers say, need blocks of a multiple of 128 tokens: then XLA keeps the pool unpadded, in
an order that the kernel can read (`tpu_tiling.has_tokens_last`). With smaller blocks XLA spreads
each of them over the whole pool, which no kernel could read without a copy of it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.attention.tpu_tiling import (
    LANES,
    MAX_TILE_BYTES,
    MAX_TILE_TOKENS,
    SUBLANES,
    Tiling,
    has_tokens_last,
    tiling_for,
)
from ferrum_jax.attention.xla import xla_attention

_FLOATS = (jnp.bfloat16, jnp.float32)
_MAX_HEAD_DIM = 512

# A core has 1 MiB of scalar memory. Of each length there is one copy; of the rows of the table
# there are four, this step's and the next one's, each while the one after it arrives.
_MAX_SCALARS = (3 << 18) // 4


def supports(inputs: AttentionInputs) -> bool:
    """Returns whether `tpu_attention` takes a call, as far as its shapes and dtypes tell.

    Queries and pool may be bfloat16 or float32, stored natively; heads have a multiple of 8
    numbers, at most 512. All groups, batches and options are taken, and the block sizes named
    above whose keys of one head fit into 1 MiB.
    """
    pool = inputs.pool
    rows, max_blocks = inputs.block_ids.shape
    multiple = LANES if has_tokens_last(pool) else SUBLANES
    return (
        inputs.q.dtype in _FLOATS
        and pool.dtype in _FLOATS
        and pool.k.dtype == pool.dtype
        and min(*inputs.q.shape, max_blocks, *pool.k.shape) > 0
        and pool.block_size % multiple == 0
        and pool.head_dim % SUBLANES == 0
        and pool.head_dim <= _MAX_HEAD_DIM
        and pool.block_size * pool.head_dim * pool.dtype.itemsize <= MAX_TILE_BYTES
        and 2 * rows + 4 * max_blocks <= _MAX_SCALARS
        and _has_room_for_positions(inputs)
    )


def _has_room_for_positions(inputs: AttentionInputs) -> bool:
    """Returns whether distances of queries and tokens, times the group, have 32 bits."""
    _, num_queries, _, group, _ = inputs.q.shape
    row_tokens = inputs.block_ids.shape[1] * inputs.pool.block_size
    tile_tokens = max(MAX_TILE_TOKENS, inputs.pool.block_size)
    return (row_tokens + num_queries + tile_tokens) * group < 1 << 31


@jax.jit
def tpu_attention(inputs: AttentionInputs, tiling: Tiling | None = None) -> jax.Array:
    """Computes attention with a softmax in float32, on one core, without copying the pool.

    Under `vmap` the rows of all replicas are those of one call.

    Args:
      inputs: Checked arguments that `supports` accepts; letters as there.
      tiling: Sizes of tiles; `tiling_for(inputs)` if absent.

    Returns:
      [R, T, H, G, D], dtype of the queries. Zero where a query sees no token.
    """
    return _attend(inputs, tiling_for(inputs) if tiling is None else tiling)


@jax.custom_batching.custom_vmap
def _attend(inputs: AttentionInputs, tiling: Tiling) -> jax.Array:
    # Not above: it takes a while, and only programs for TPUs need it.
    from ferrum_jax.attention.tpu_kernel import attend_tiles

    rows, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    out = attend_tiles(inputs, tiling)
    return out.reshape(rows, num_kv_heads, num_queries, group, head_dim).swapaxes(1, 2)


@_attend.def_vmap
def _attend_replicas(
    axis_size: int, is_mapped: list[Any], inputs: AttentionInputs, tiling: Tiling
) -> tuple[jax.Array, bool]:
    mapped = is_mapped[0]
    if mapped.layer or mapped.options.sinks or mapped.pool.k != mapped.pool.v:
        # A kernel reads one layer. JAX would call it once a replica, on copies of their pools.
        axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, mapped)
        return jax.vmap(xla_attention, in_axes=(axes,), axis_size=axis_size)(inputs), True

    def joined(x: jax.Array, is_mapped: bool) -> jax.Array:
        x = x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    pool, block_ids = inputs.pool, joined(inputs.block_ids, mapped.block_ids)
    if mapped.pool.k:
        num_blocks = pool.k.shape[1]
        replica = jnp.arange(axis_size, dtype=jnp.int32)[:, None]
        first = jnp.repeat(replica, block_ids.shape[0] // axis_size, axis=0) * num_blocks
        block_ids = jnp.clip(block_ids, 0, num_blocks - 1) + first
        pool = dataclasses.replace(pool, k=joined(pool.k, True), v=joined(pool.v, True))
    all_rows = dataclasses.replace(
        inputs,
        q=joined(inputs.q, mapped.q),
        pool=pool,
        block_ids=block_ids,
        held_lens=joined(inputs.held_lens, mapped.held_lens),
        q_lens=joined(inputs.q_lens, mapped.q_lens),
    )
    out = _attend(all_rows, tiling)
    return out.reshape(axis_size, -1, *out.shape[1:]), True
