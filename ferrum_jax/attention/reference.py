"""Attention through pages, written to be obviously right; the judge of every fast kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.attention.arithmetic import soft_capped
from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.encoding import decode_f32


def reference_attention(inputs: AttentionInputs) -> jax.Array:
    """Gathers every block of every row and takes a masked softmax in float32.

    Args:
      inputs: Checked arguments; letters as there.

    Returns:
      [R, T, H, G, D], dtype of the queries. Zero where a query sees no token; NaN where it sees a
      number that is not finite.
    """
    pool, options = inputs.pool, inputs.options
    rows, max_blocks = inputs.block_ids.shape
    num_tokens = max_blocks * pool.block_size
    held_lens = jnp.minimum(inputs.held_lens, num_tokens)
    inputs = dataclasses.replace(inputs, held_lens=held_lens)
    block_ids = jnp.clip(inputs.block_ids, 0, pool.num_blocks - 1)
    layer = jnp.clip(inputs.layer, 0, pool.num_layers - 1)

    def tokens_of(blocks: jax.Array) -> jax.Array:
        taken = blocks[block_ids, layer]  # [R, M, H, B, D]
        taken = decode_f32(taken, pool.dtype).swapaxes(2, 3)
        return taken.reshape(rows, num_tokens, pool.num_kv_heads, pool.head_dim)

    key_positions = jnp.arange(num_tokens, dtype=jnp.int32)[None, None, :]
    held = key_positions[0] < inputs.held_lens[:, None]
    # What lies beyond a row's tokens is garbage, perhaps NaN, and 0 * NaN is NaN.
    k, v = (jnp.where(held[:, :, None, None], tokens_of(x), 0.0) for x in (pool.k, pool.v))

    # Accelerators round float32 before they multiply, unless told not to.
    einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    logits = einsum("rthgd,rshd->rthgs", inputs.q.astype(jnp.float32), k)
    logits = logits * options.scale_for(pool.head_dim)
    if options.float32_soft_cap is not None:
        logits = soft_capped(logits, options.float32_soft_cap)

    query_positions = inputs.positions[:, :, None]
    seen = (key_positions <= query_positions) & held[:, None, :]
    if options.sliding_window is not None:
        seen &= key_positions > query_positions - options.sliding_window
    logits = jnp.where(seen[:, :, None, None, :], logits, -jnp.inf)
    seen = logits != -jnp.inf
    if inputs.sinks is not None:
        sinks = jnp.broadcast_to(inputs.sinks[:, :, None], (*logits.shape[:-1], 1))
        logits = jnp.concatenate([logits, sinks], axis=-1)

    peak = jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits - jnp.where(peak == -jnp.inf, 0.0, peak))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    # Zero times NaN is NaN: what is not finite must reach the queries that see it, and no other.
    is_finite = jnp.isfinite(v)
    out = einsum("rthgs,rshd->rthgd", weights[..., :num_tokens], jnp.where(is_finite, v, 0.0))
    count_seen = einsum("rthgs,rshd->rthgd", *(x.astype(jnp.float32) for x in (seen, ~is_finite)))
    return jnp.where(count_seen > 0, jnp.nan, out).astype(inputs.q.dtype)
