"""Attention on a TPU by a Pallas kernel, for the calls that it takes.

Heads of a multiple of 128 numbers need blocks of a multiple of 8 tokens. Other heads, of 64 numbers
for example, need blocks of a multiple of 128 tokens: then XLA stores the pool unpadded, in an order
that the kernel can read (`tiling.has_tokens_last`). With smaller blocks XLA spreads each block over
the whole pool, which a kernel could read only from a copy.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

import ferrum_jax.attention.xla as xla
from ferrum_jax.attention.backend import first_unmet, refuse_dtypes, refuse_platform
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.tpu.tiling import (
    LANES,
    MAX_TILE_BYTES,
    MAX_TILE_TOKENS,
    SUBLANES,
    Tiling,
    has_tokens_last,
    tiling_for,
)
from ferrum_jax.checks import INT32_LIMIT

name = "tpu"

_FLOATS = (jnp.bfloat16, jnp.float32)
_MAX_HEAD_DIM = 512

# A core has 1 MiB of scalar memory. It holds one copy of each length, and four copies of a row of
# the table: for this step and for the next one, each double-buffered.
_MAX_SCALARS = (3 << 18) // 4


def accepts(call: AttentionCall) -> str | None:
    """Returns None if the kernel takes a call, or the reason why not."""
    return refuse_platform(name) or refuse_shapes(call)


def refuse_shapes(call: AttentionCall) -> str | None:
    """Returns why the kernel does not take a call, on any platform; None if it takes it.

    Queries and pool may be bfloat16 or float32, stored natively; heads have a multiple of 8
    numbers, at most 512. All groups, batches and options are taken, and the block sizes named
    above if the keys of one head fit into 1 MiB.
    """
    pool = call.pool
    rows, max_blocks = call.block_ids.shape
    head_dim, block_size = pool.head_dim, pool.block_size
    multiple = LANES if has_tokens_last(pool) else SUBLANES
    return refuse_dtypes(call, _FLOATS) or first_unmet(
        (call.is_native, "the kernel reads native rows only"),
        (not call.is_empty, "there are no queries, or no blocks to read"),
        (
            block_size % multiple == 0,
            f"blocks have {block_size} tokens; heads of {head_dim} need a multiple of {multiple}",
        ),
        (
            head_dim % SUBLANES == 0 and head_dim <= _MAX_HEAD_DIM,
            f"heads have {head_dim} numbers; a multiple of 8 up to {_MAX_HEAD_DIM} is needed",
        ),
        (
            block_size * head_dim * pool.dtype.itemsize <= MAX_TILE_BYTES,
            "the keys of a block and head take more than 1 MiB",
        ),
        (
            2 * rows + 4 * max_blocks <= _MAX_SCALARS,
            "the table has too many rows or columns for scalar memory",
        ),
        (_has_room_for_positions(call), "the table has too many tokens for 32-bit positions"),
    )


def _has_room_for_positions(call: AttentionCall) -> bool:
    """Returns whether distances of queries and tokens, times the group, have 32 bits."""
    _, num_queries, _, group, _ = call.q.shape
    row_tokens = call.block_ids.shape[1] * call.pool.block_size
    tile_tokens = max(MAX_TILE_TOKENS, call.pool.block_size)
    return (row_tokens + num_queries + tile_tokens) * group < INT32_LIMIT


def prepare(call: AttentionCall) -> str | None:
    """Returns None: nothing is to be prepared."""
    del call
    return None


@jax.jit
def attend(call: AttentionCall, tiling: Tiling | None = None) -> jax.Array:
    """Computes attention with a softmax in float32, on one core, without copying the pool.

    Under `vmap` the rows of all replicas become the rows of one call.

    Args:
      call: A call that was accepted; letters as in `AttentionCall`.
      tiling: Sizes of tiles; `tiling_for(call)` if absent.

    Returns:
      [R, T, H, G, D], dtype of the queries. Zero where a query sees no token.
    """
    return _attend(call, tiling_for(call) if tiling is None else tiling)


@jax.custom_batching.custom_vmap
def _attend(call: AttentionCall, tiling: Tiling) -> jax.Array:
    """Computes attention with tiles of given sizes."""
    # Imported late: the import takes a while, and only programs for TPUs need it.
    from ferrum_jax.attention.tpu.kernel import attend_tiles

    rows, num_queries, num_kv_heads, group, head_dim = call.q.shape
    out = attend_tiles(call, tiling)
    return out.reshape(rows, num_kv_heads, num_queries, group, head_dim).swapaxes(1, 2)


@_attend.def_vmap
def _attend_replicas(
    axis_size: int, is_mapped: list[Any], call: AttentionCall, tiling: Tiling
) -> tuple[jax.Array, bool]:
    """The `vmap` rule of `_attend`; arguments and result as of `xla.attend_replicas`."""
    mapped = is_mapped[0]
    are_mapped = set(mapped.pool.arrays.values())
    if mapped.layer or mapped.options.sinks or len(are_mapped) > 1:
        # The kernel reads one layer. JAX would call it once per replica, on copies of the pools.
        return xla.attend_replicas(axis_size, is_mapped, call)

    def joined(x: jax.Array, is_mapped: bool) -> jax.Array:
        x = x if is_mapped else jnp.broadcast_to(x, (axis_size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    pool, block_ids = call.pool, joined(call.block_ids, mapped.block_ids)
    if True in are_mapped:
        num_blocks = next(iter(pool.arrays.values())).shape[1]
        replica = jnp.arange(axis_size, dtype=jnp.int32)[:, None]
        first = jnp.repeat(replica, block_ids.shape[0] // axis_size, axis=0) * num_blocks
        block_ids = jnp.clip(block_ids, 0, num_blocks - 1) + first
        pool = jax.tree.map(lambda x: joined(x, True), pool)
    all_rows = dataclasses.replace(
        call,
        q=joined(call.q, mapped.q),
        pool=pool,
        block_ids=block_ids,
        held_lens=joined(call.held_lens, mapped.held_lens),
        q_lens=joined(call.q_lens, mapped.q_lens),
    )
    out = _attend(all_rows, tiling)
    return out.reshape(axis_size, -1, *out.shape[1:]), True
