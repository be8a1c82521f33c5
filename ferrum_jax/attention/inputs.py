"""The one form in which every attention kernel receives its arguments."""

import dataclasses
from typing import Any, TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.ops.indexing import newest_positions
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat

Integers: TypeAlias = jax.Array | np.ndarray
"""Integers of any dtype."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionInputs:
    """Checked arguments of one attention call.

    R rows, T queries a row, H KV heads, G query heads a KV head, D head dimension, M blocks.

    Attributes:
      q: [R, T, H, G, D]. Queries; query head `h * G + g` reads KV head h.
      pool: Keys and values.
      layer: i32[]. Layer of the pool to read.
      block_ids: i32[R, M]. Blocks of each row in order, `NULL_BLOCK` where absent.
      held_lens: i32[R]. Tokens of each row, the queries' own included; not negative.
      q_lens: i32[R]. Queries of each row, from 0 to T; those at `t >= q_lens[r]` are padding.
      options: Variants.
      formats: i32[R]. The `TokenFormat` of each row; None if all are native.
    """

    q: jax.Array
    pool: BlockPool
    layer: jax.Array
    block_ids: jax.Array
    held_lens: jax.Array
    q_lens: jax.Array
    options: AttentionOptions
    formats: jax.Array | None = None

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Position of each query in its sequence; -1 where it is padding."""
        return newest_positions(self.held_lens, self.q_lens, self.q.shape[1])

    def reach(self, token_format: TokenFormat) -> int:
        """Tokens of a format for which a row of the table has blocks; within int32."""
        tokens = self.block_ids.shape[1] * self.pool.tokens_per_block(token_format)
        return min(tokens, np.iinfo(np.int32).max)

    def out_dtype(self, token_format: TokenFormat) -> np.dtype:
        """Dtype of what a kernel returns: that of the queries, or float32 for values still rotated.

        These may be `D ** 0.5` times as large as those that the queries' dtype has.
        """
        is_rotated = token_format != TokenFormat.Native
        is_rotated = is_rotated and self.pool.layout(token_format).v.is_rotated
        return np.dtype(jnp.float32) if is_rotated else self.q.dtype

    @property
    def sinks(self) -> jax.Array | None:
        """f32[H, G]. The sinks' logits, or None."""
        if self.options.sinks is None:
            return None
        return self.options.sinks.astype(jnp.float32).reshape(self.q.shape[2:4])


def attention_inputs(
    q: jax.Array,
    pool: BlockPool,
    layer: Integers | int,
    block_ids: Integers,
    held_lens: Integers,
    q_lens: Integers | None,
    options: AttentionOptions,
    formats: jax.Array | None = None,
) -> AttentionInputs:
    """Checks the arguments of `paged_attention` and brings them into one form."""
    _refuse_checked_mesh((q, pool, layer, block_ids, held_lens, q_lens, options))
    chex.assert_rank(q, {3, 4})
    chex.assert_type(q, float)
    if q.ndim == 3:
        q = q[:, None]
    rows, num_queries, num_q_heads, head_dim = q.shape
    num_kv_heads = pool.num_kv_heads
    chex.assert_shape([pool.k, pool.v], pool.k.shape)
    chex.assert_axis_dimension(q, -1, pool.head_dim)
    chex.assert_shape(block_ids, (rows, None))
    chex.assert_shape(held_lens, (rows,))
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, which the pool's {num_kv_heads} KV heads do not divide. "
            "Every KV head serves the same number of query heads."
        )
    if options.sinks is not None:
        chex.assert_shape(options.sinks, (num_q_heads,))
    if q_lens is None:
        q_lens = jnp.full((rows,), num_queries, jnp.int32)
    chex.assert_shape(q_lens, (rows,))
    layer = layer if isinstance(layer, jax.Array) else np.asarray(layer)
    chex.assert_rank(layer, 0)
    chex.assert_type([layer, block_ids, held_lens, q_lens], int)
    q_lens = jnp.clip(_as_int32(q_lens), 0, num_queries)
    # Without queries nothing is read.
    held_lens = jnp.where(q_lens > 0, jnp.maximum(_as_int32(held_lens), 0), 0)
    if formats is not None:
        chex.assert_shape(formats, (rows,))
        chex.assert_type(formats, int)
    return AttentionInputs(
        q=q.reshape(rows, num_queries, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
        pool=pool,
        layer=_as_int32(layer),
        block_ids=_as_int32(block_ids),
        held_lens=held_lens,
        q_lens=q_lens,
        options=options,
        formats=None if len(pool.formats) == 1 else formats,
    )


def _as_int32(integers: Integers) -> jax.Array:
    """Returns integers as int32; one beyond its range becomes the nearest that it has."""
    has, wants = jnp.iinfo(integers.dtype), np.iinfo(np.int32)
    if has.max > wants.max:
        integers = integers.clip(max(int(has.min), wants.min), wants.max)
    return jnp.asarray(integers.astype(np.int32))


def _refuse_checked_mesh(args: Any) -> None:
    """Raises ValueError where `jax.shard_map` checks what varies over a mesh, and something does.

    Kernels in foreign code have no rule for that.
    """
    axes = {name for x in jax.tree.leaves(args) for name in jax.typeof(x).manual_axis_type.varying}
    if axes:
        raise ValueError(
            f"paged_attention cannot tell jax.shard_map what varies over the mesh axes "
            f"{sorted(axes)}. Give jax.shard_map check_vma=False; or call paged_attention outside "
            "of it, on a pool of ferrum_jax.sharding.init_sharded."
        )
