"""Attention through pages in plain XLA operations, reading live blocks only."""

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.encoding import decode_f32

_TILE_TOKENS = 256
_MASKED = -1e30  # A finite stand-in for minus infinity: differences of two stay numbers.


def xla_attention(inputs: AttentionInputs) -> jax.Array:
    """Computes attention row by row with an online softmax over tiles of blocks.

    Args:
      inputs: Checked arguments; letters as there.

    Returns:
      [R, T, H, G, D], dtype of the queries. Zero where a query sees no token.
    """
    pool, options = inputs.pool, inputs.options
    _, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    tile_blocks = max(1, min(_TILE_TOKENS // pool.block_size, inputs.block_ids.shape[1]))
    tile = tile_blocks * pool.block_size
    padding = -inputs.block_ids.shape[1] % tile_blocks
    block_ids = jnp.pad(jnp.maximum(inputs.block_ids, 0), ((0, 0), (0, padding)))
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)[:, None]
    head_rows = [x.reshape(-1, pool.block_size, head_dim) for x in (pool.k, pool.v)]

    def attend_row(row: tuple[jax.Array, ...]) -> jax.Array:
        q, ids, seq_len, positions = row
        q = q.astype(jnp.float32) * options.scale_for(head_dim)
        q = q.transpose(1, 0, 2, 3).reshape(num_kv_heads, num_queries * group, head_dim)
        positions = jnp.repeat(positions, group)[:, None]
        index = ((ids * pool.num_layers + inputs.layer) * num_kv_heads)[None, :] + heads

        def add_tile(i, carry):
            peak, total, acc = carry
            index_tile = lax.dynamic_slice_in_dim(index, i * tile_blocks, tile_blocks, 1)
            k, v = (_tokens(x, index_tile, pool.dtype) for x in head_rows)
            key_positions = (i * tile + jnp.arange(tile, dtype=jnp.int32))[None, :]
            logits = jnp.einsum("hqd,hsd->hqs", q, k)
            if options.soft_cap is not None:
                logits = options.soft_cap * jnp.tanh(logits / options.soft_cap)
            seen = (key_positions <= positions) & (key_positions < seq_len)
            if options.sliding_window is not None:
                seen &= key_positions > positions - options.sliding_window
            seen = seen[None]
            v = jnp.where((key_positions < seq_len)[:, :, None], v, 0.0)
            logits = jnp.where(seen, logits, _MASKED)
            new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
            weights = jnp.where(seen, jnp.exp(logits - new_peak[..., None]), 0.0)
            decay = jnp.exp(peak - new_peak)
            total = total * decay + jnp.sum(weights, axis=-1)
            acc = acc * decay[..., None] + jnp.einsum("hqs,hsd->hqd", weights, v)
            return new_peak, total, acc

        first = jnp.int32(0)
        if options.sliding_window is not None:
            lowest = jnp.min(jnp.where(positions < 0, seq_len, positions))
            first = jnp.maximum(lowest - options.sliding_window + 1, 0) // tile
        zeros = jnp.zeros(q.shape[:2], jnp.float32)
        carry = (zeros + _MASKED, zeros, jnp.zeros(q.shape, jnp.float32))
        peak, total, acc = lax.fori_loop(first, (seq_len + tile - 1) // tile, add_tile, carry)
        if inputs.sinks is not None:
            sinks = jnp.tile(inputs.sinks, (1, num_queries))
            new_peak = jnp.maximum(peak, sinks)
            decay = jnp.exp(peak - new_peak)
            total = total * decay + jnp.exp(sinks - new_peak)
            acc = acc * decay[..., None]
        out = acc / jnp.where(total > 0, total, 1.0)[..., None]
        out = out.reshape(num_kv_heads, num_queries, group, head_dim).transpose(1, 0, 2, 3)
        return out.astype(inputs.q.dtype)

    return lax.map(attend_row, (inputs.q, block_ids, inputs.seq_lens, inputs.positions))


def _tokens(head_rows: jax.Array, index: jax.Array, dtype) -> jax.Array:
    """Gathers [H, C] head rows of blocks as f32[H, C * B, D]."""
    taken = head_rows.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
    return decode_f32(taken, dtype).reshape(index.shape[0], -1, head_rows.shape[-1])
