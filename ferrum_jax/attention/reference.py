"""Paged attention in its simplest form, with which tests compare every backend."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.softmax import is_seen, soft_capped
from ferrum_jax.encoding import decode_f32


def reference_attention(call: AttentionCall) -> jax.Array:
    """Gathers every block of every row and takes a masked softmax in float32.

    Args:
      call: Checked arguments, of native rows; letters as in `AttentionCall`.

    Returns:
      [R, T, H, G, D], dtype of the queries. Zero where a query sees no token; NaN where it sees a
      number that is not finite.
    """
    pool, options = call.pool, call.options
    rows, max_blocks = call.block_ids.shape
    num_tokens = max_blocks * pool.block_size
    held_lens = jnp.minimum(call.held_lens, num_tokens)
    call = dataclasses.replace(call, held_lens=held_lens)
    block_ids = jnp.clip(call.block_ids, 0, pool.num_blocks - 1)
    layer = jnp.clip(call.layer, 0, pool.num_layers - 1)

    def tokens_of(blocks: jax.Array) -> jax.Array:
        taken = blocks[block_ids, layer]  # [R, M, H, B, D]
        taken = decode_f32(taken, pool.dtype).swapaxes(2, 3)
        return taken.reshape(rows, num_tokens, pool.num_kv_heads, pool.head_dim)

    key_positions = jnp.arange(num_tokens, dtype=jnp.int32)[None, None, :]
    held = key_positions[0] < call.held_lens[:, None]
    # Slots past a row's tokens hold garbage, perhaps NaN, and 0 * NaN is NaN.
    arrays = pool.payload.split(pool.arrays)
    k, v = (jnp.where(held[:, :, None, None], tokens_of(x), 0.0) for x in arrays)

    # By default, accelerators round float32 before they multiply.
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    logits = einsum("rthgd,rshd->rthgs", call.q.astype(jnp.float32), k)
    logits = logits * options.scale_for(pool.head_dim)
    if options.float32_soft_cap is not None:
        logits = soft_capped(logits, options.float32_soft_cap)

    query_positions = call.positions[:, :, None]
    seen = is_seen(key_positions, query_positions, options.sliding_window) & held[:, None, :]
    logits = jnp.where(seen[:, :, None, None, :], logits, -jnp.inf)
    seen = logits != -jnp.inf
    if call.sinks is not None:
        sinks = jnp.broadcast_to(call.sinks[:, :, None], (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sinks], axis=-1)

    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    # Zero times NaN is NaN: a value that is not finite must reach only the queries that see it.
    is_finite = jnp.isfinite(v)
    out = einsum("rthgs,rshd->rthgd", weights[..., :num_tokens], jnp.where(is_finite, v, 0.0))
    count_seen = einsum("rthgs,rshd->rthgd", *(x.astype(jnp.float32) for x in (seen, ~is_finite)))
    return jnp.where(count_seen > 0, jnp.nan, out).astype(call.q.dtype)
