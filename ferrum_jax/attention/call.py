"""The one form in which every attention backend receives its arguments."""

import dataclasses
from typing import Any, NotRequired, TypeAlias, TypedDict, Unpack

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.codecs import CODECS, Codec, PackedCodec
from ferrum_jax.ops.arguments import saturate
from ferrum_jax.ops.indexing import newest_places
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat

Integers: TypeAlias = jax.Array | np.ndarray
"""Integers of any dtype."""


class AttentionRows(TypedDict):
    """The arrays of a call's rows, which `paged_attention` takes as keyword arguments.

    R rows, M blocks per row.

    Attributes:
      block_ids: i32[R, M]. Blocks of each row in order, `NULL_BLOCK` where absent.
      held_lens: i32[R]. Tokens of each row.
      q_lens: i32[R]. Queries of each row.
      token_formats: i32[R]. The `TokenFormat` of each row.
    """

    block_ids: Integers
    held_lens: Integers
    q_lens: NotRequired[Integers | None]
    token_formats: NotRequired[Integers | None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """Checked arguments of one attention call.

    R rows, T queries per row, H KV heads, G query heads per KV head, D head dimension, M blocks
    per row.

    Attributes:
      q: [R, T, H, G, D]. Queries; query head `h * G + g` reads KV head h.
      pool: Keys and values.
      layer: i32[]. Layer of the pool to read.
      block_ids: i32[R, M]. Blocks of each row in order, `NULL_BLOCK` where absent.
      held_lens: i32[R]. Tokens of each row, those of the queries included; not negative.
      q_lens: i32[R]. Queries of each row, from 0 to T; those at `t >= q_lens[r]` are padding.
      options: Scale, sliding window, soft cap and sinks.
      token_formats: i32[R]. The `TokenFormat` of each row; None if all rows are in
        `token_format`, as in the calls that a backend gets.
      token_format: How the rows' tokens are written (static). Rotated numbers stay rotated.
    """

    q: jax.Array
    pool: BlockPool
    layer: jax.Array
    block_ids: jax.Array
    held_lens: jax.Array
    q_lens: jax.Array
    options: AttentionOptions
    token_formats: jax.Array | None = None
    token_format: TokenFormat = dataclasses.field(
        default=TokenFormat.Native, metadata={"static": True}
    )

    @property
    def is_native(self) -> bool:
        """Whether the rows' tokens are numbers of the pool's dtype."""
        return CODECS[self.token_format].is_native

    @property
    def codec(self) -> Codec:
        """Codec of the rows' blocks."""
        return self.pool.codec(self.token_format)

    @property
    def packed_codec(self) -> PackedCodec:
        """The `codec`, which must be a `PackedCodec`."""
        assert isinstance(self.codec, PackedCodec)
        return self.codec

    @property
    def is_empty(self) -> bool:
        """Whether there are no queries, or no blocks to read."""
        return any(x.size == 0 for x in (self.q, self.block_ids, *self.pool.arrays.values()))

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Place of each query among its row's held tokens; -1 for padding."""
        return newest_places(self.held_lens, self.q_lens, self.q.shape[1])

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block in the rows' format."""
        return self.codec.num_tokens

    @property
    def reach(self) -> int:
        """Tokens for which a row of the table has blocks; within int32."""
        return min(self.block_ids.shape[1] * self.tokens_per_block, np.iinfo(np.int32).max)

    @property
    def sliding_window(self) -> int | None:
        """Tokens that a query sees; None if a query sees all that the table has blocks for."""
        window = self.options.sliding_window
        return None if window is None or window >= self.reach else window

    @property
    def out_dtype(self) -> np.dtype:
        """Dtype of the result: that of the queries, or float32 for values that are still rotated.

        Rotated values may be `D ** 0.5` times as large as the queries' dtype can hold.
        """
        return np.dtype(jnp.float32) if self.codec.rotates_values else self.q.dtype

    @property
    def sinks(self) -> jax.Array | None:
        """f32[H, G]. The sinks' logits, or None."""
        if self.options.sinks is None:
            return None
        return self.options.sinks.astype(jnp.float32).reshape(self.q.shape[2:4])


def attention_call(
    q: jax.Array,
    pool: BlockPool,
    layer: Integers | int,
    *,
    options: AttentionOptions,
    **rows: Unpack[AttentionRows],
) -> AttentionCall:
    """Checks the arguments of `paged_attention` and brings them into one form."""
    _check_names(rows)
    _refuse_checked_mesh((q, pool, layer, options, rows))
    chex.assert_rank(q, {3, 4})
    chex.assert_type(q, float)
    if q.ndim == 3:
        q = q[:, None]
    num_rows, num_queries, num_q_heads, head_dim = q.shape
    num_kv_heads = pool.num_kv_heads
    chex.assert_equal_shape([*pool.arrays.values()])
    chex.assert_axis_dimension(q, -1, pool.head_dim)
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"q has {num_q_heads} heads, which the pool's {num_kv_heads} KV heads do not divide. "
            "Every KV head serves the same number of query heads."
        )
    if options.sinks is not None:
        chex.assert_shape(options.sinks, (num_q_heads,))
    layer = layer if isinstance(layer, jax.Array) else np.asarray(layer)
    block_ids, held_lens = rows["block_ids"], rows["held_lens"]
    q_lens, token_formats = rows.get("q_lens"), rows.get("token_formats")
    if q_lens is None:
        q_lens = jnp.full((num_rows,), num_queries, jnp.int32)
    chex.assert_rank(layer, 0)
    chex.assert_shape(block_ids, (num_rows, None))
    chex.assert_shape([held_lens, q_lens], (num_rows,))
    chex.assert_type([layer, block_ids, held_lens, q_lens], int)
    if token_formats is not None:
        chex.assert_shape(token_formats, (num_rows,))
        chex.assert_type(token_formats, int)
    q_lens = jnp.clip(saturate(q_lens), 0, num_queries)
    # Without queries nothing is read.
    held_lens = jnp.where(q_lens > 0, jnp.maximum(saturate(held_lens), 0), 0)
    return AttentionCall(
        q=q.reshape(num_rows, num_queries, num_kv_heads, num_q_heads // num_kv_heads, head_dim),
        pool=pool,
        layer=saturate(layer),
        block_ids=saturate(block_ids),
        held_lens=held_lens,
        q_lens=q_lens,
        options=options,
        token_formats=(
            None if token_formats is None or len(pool.formats) == 1 else jnp.asarray(token_formats)
        ),
    )


def _check_names(rows: AttentionRows) -> None:
    """Raises TypeError if a keyword argument is missing or unknown."""
    missing = sorted(AttentionRows.__required_keys__ - rows.keys())
    unknown = sorted(rows.keys() - AttentionRows.__annotations__.keys())
    if missing or unknown:
        raise TypeError(
            f"paged_attention got the arrays {sorted(rows)} of its rows: {missing} are missing, "
            f"{unknown} unknown. Give block_ids and held_lens, and q_lens and token_formats if "
            "needed."
        )


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
