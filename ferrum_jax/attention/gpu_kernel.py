"""Attention through pages on a GPU: two Pallas kernels in Triton.

The first gives each program a few queries of one row and KV head and a run of that row's tokens;
it leaves a partial result. The second merges the partial results. Keys and values are fetched
token by token from where the pool holds them, so neither the block size nor the order of blocks
matters, and nothing is copied or transposed before. Bodies for another backend of Pallas may
take the place of these two: `ferrum_jax.attention.gpu` knows nothing else of this file.
"""

import dataclasses
import functools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ferrum_jax.attention.arithmetic import divide_up
from ferrum_jax.attention.gpu_reading import (
    Places,
    Reader,
    columns,
    iota,
    load_planes,
    padded,
    readers_of,
    views_of,
)
from ferrum_jax.attention.gpu_tuning import Tiling, dot_dtype
from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.types import TokenFormat

# Logits are kept in base 2, in which the hardware exponentiates.
_LOG2_E = math.log2(math.e)

# A running maximum starts finite: minus infinity less itself is not a number. As the logarithm
# of a partial result's weight it says that there is no result.
_LOWEST = -1e30

_MERGE_NUMBERS = 8192  # Numbers that one merging program holds; 64 a thread.


class _Operands(NamedTuple):
    """What the first kernel reads, as arrays outside of it and as references inside.

    Attributes:
      q: [R * T * H * G, D].
      kv: The pool's arrays of keys and of values, as `views_of` it.
      layer: i32[1].
      block_ids: i32[R, M].
      seq_lens: i32[R].
      q_lens: i32[R].
    """

    q: Any
    kv: tuple[Any, Any]
    layer: Any
    block_ids: Any
    seq_lens: Any
    q_lens: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """What the first kernel knows when it is compiled; letters as in `AttentionInputs`."""

    num_queries: int  # T
    num_kv_heads: int  # H
    group: int  # G
    head_dim: int  # D
    num_blocks: int  # N
    num_layers: int  # L
    reach: int  # Tokens that a row of the table can hold.
    block_tokens: int  # B, or those of a compressed block.
    k: Reader
    v: Reader
    scale: float
    soft_cap: float | None
    sliding_window: int | None  # None if it spans all that the table can hold.
    dtype: np.dtype  # Of queries and keys in their products.
    value_dtype: np.dtype  # Of weights and values in theirs.
    tiling: Tiling


def _sizes_of(inputs: AttentionInputs, token_format: TokenFormat, tiling: Tiling) -> _Sizes:
    _, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    k, v = readers_of(inputs.pool, token_format)
    reach = inputs.reach(token_format)
    window = inputs.options.sliding_window
    dtype = value_dtype = dot_dtype(inputs, token_format)
    if token_format != TokenFormat.Native and dtype == jnp.float16:
        # A weight times the scale of its vector may be too small a number for float16.
        value_dtype = np.dtype(jnp.bfloat16)
    return _Sizes(
        num_queries=num_queries,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        num_blocks=inputs.pool.num_blocks,
        num_layers=inputs.pool.num_layers,
        reach=reach,
        block_tokens=inputs.pool.tokens_per_block(token_format),
        k=k,
        v=v,
        scale=inputs.options.scale_for(head_dim),
        soft_cap=inputs.options.soft_cap,
        sliding_window=window if window and window < reach else None,
        dtype=dtype,
        value_dtype=value_dtype,
        tiling=tiling,
    )


class _State(NamedTuple):
    """The softmax of a tile's queries under way.

    Attributes:
      peak: f32[queries]. Largest logit so far.
      total: f32[queries]. Sum of all weights, each relative to the largest.
      acc: Planes of the values weighted alike, each f32[queries, W].
    """

    peak: jax.Array
    total: jax.Array
    acc: tuple[jax.Array, ...]


def attend_spans(
    inputs: AttentionInputs, token_format: TokenFormat, tiling: Tiling, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Attends from every tile of queries to every share of the tokens it sees.

    Args:
      inputs: Checked arguments; letters as there.
      token_format: How the rows' tokens are written. What is rotated stays so.
      tiling: Sizes of tiles. S is `num_splits`.
      interpret: Whether to run on any platform, slowly, to test.

    Returns:
      f32[S, R * T * H * G, D], results, with queries in the order of `inputs.q`; and
      f32[S, R * T * H * G], logarithms in base 2 of the denominators of their softmax. Where
      the logarithm is -1e30 no token was seen, and the result was not written.

    References:
      Dao, FlashAttention-2 (2023), algorithm 1; Dao et al., Flash-Decoding (2023).
    """
    sizes = _sizes_of(inputs, token_format, tiling)
    rows, head_dim = inputs.q.shape[0], sizes.head_dim
    operands = _Operands(
        q=inputs.q.reshape(-1, head_dim),
        kv=views_of(inputs.pool, token_format),
        layer=inputs.layer.reshape(1),
        block_ids=inputs.block_ids,
        seq_lens=inputs.seq_lens,
        q_lens=inputs.q_lens,
    )
    num_tiles = pl.cdiv(sizes.num_queries * sizes.group, tiling.tile_queries)
    shape = (tiling.num_splits, inputs.q.size // head_dim)
    return pl.pallas_call(
        functools.partial(_attend_span, sizes=sizes),
        grid=(tiling.num_splits, num_tiles, sizes.num_kv_heads, rows),
        out_shape=(
            jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=interpret,
        name="attend_spans",
    )(operands)


def _attend_span(operands: _Operands, out_ref: Any, lse_ref: Any, *, sizes: _Sizes) -> None:
    """One program of `attend_spans`."""
    split, tile, head, row = (pl.program_id(axis) for axis in range(4))
    tile_queries, tile_tokens = sizes.tiling.tile_queries, sizes.tiling.tile_tokens
    q_len = operands.q_lens[row]
    held_before = operands.seq_lens[row] - q_len
    begin, end = _span(split, tile, q_len, held_before, sizes)

    # The heads of a group read the same keys, so they stand as neighbouring queries.
    member = tile * tile_queries + iota(tile_queries)
    exists = member < sizes.num_queries * sizes.group
    query = member // sizes.group
    position = jnp.where(query < q_len, held_before + query, -1)
    q_index = (row * sizes.num_queries + query) * sizes.num_kv_heads + head
    q_index = q_index * sizes.group + member % sizes.group
    q = [x.astype(sizes.dtype) for x in load_planes(operands.q, q_index, exists, sizes.k)]

    def take_tile(turn: jax.Array, state: _State) -> _State:
        peak, total, acc = state
        token = begin + turn * tile_tokens + iota(tile_tokens)
        # Beyond the end there may be garbage, and 0 * NaN is NaN.
        places = _find(operands, row, head, token, token < end, sizes)
        k = sizes.k.load(operands.kv, places)
        planes = zip(q, k.planes, strict=True)
        logits = functools.reduce(operator.add, (_dot(x, y, trans_b=True) for x, y in planes))
        if k.scales is not None:
            logits *= k.scales[None, :]
        logits = _mask(_cap(logits, sizes), token, position, sizes)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        decay = jnp.exp2(peak - new_peak)
        weights = jnp.exp2(logits - new_peak[:, None])
        total = total * decay + jnp.sum(weights, axis=1)
        v = sizes.v.load(operands.kv, places)
        if v.scales is not None:
            weights *= v.scales[None, :]
        weights = weights.astype(sizes.value_dtype)
        acc = [x * decay[:, None] + _dot(weights, y) for x, y in zip(acc, v.planes, strict=True)]
        return _State(new_peak, total, tuple(acc))

    acc = jnp.zeros((tile_queries, padded(sizes.v.width)), jnp.float32)
    state = _State(
        jnp.full((tile_queries,), _LOWEST, jnp.float32),
        jnp.zeros((tile_queries,), jnp.float32),
        (acc,) * sizes.v.num_planes,
    )
    turns = divide_up(jnp.maximum(end - begin, 0), tile_tokens)
    peak, total, acc = lax.fori_loop(0, turns, take_tile, state)
    some = total != 0
    total = jnp.where(some, total, 1.0)
    lse = jnp.where(some, peak + jnp.log2(total), _LOWEST)
    pltriton.store(lse_ref.at[split, q_index], lse, mask=exists)
    for plane, (column, is_inside) in zip(acc, columns(sizes.v), strict=True):
        pltriton.store(
            out_ref.at[split, q_index[:, None], column[None, :]],
            plane / total[:, None],
            mask=(exists & some)[:, None] & is_inside[None, :],
        )


def _span(
    split: jax.Array, tile: jax.Array, q_len: jax.Array, held_before: jax.Array, sizes: _Sizes
) -> tuple[jax.Array, jax.Array]:
    """Returns the program's share of the tokens that its queries see: first, and one past last.

    Shares follow the row's own length. They are whole tiles, save the last, which may be less or
    nothing.
    """
    tiling = sizes.tiling
    first_query = tile * tiling.tile_queries // sizes.group
    last_query = ((tile + 1) * tiling.tile_queries - 1) // sizes.group
    end = held_before + jnp.minimum(last_query + 1, q_len)
    # More tokens than blocks are a caller's mistake: a wrong result, not a wild address.
    end = jnp.where(first_query < q_len, jnp.minimum(end, sizes.reach), 0)
    begin = jnp.zeros_like(end)
    if sizes.sliding_window is not None:
        begin = jnp.maximum(held_before + first_query - sizes.sliding_window + 1, 0)
    num_tiles = divide_up(jnp.maximum(end - begin, 0), tiling.tile_tokens)
    share = divide_up(num_tiles, tiling.num_splits) * tiling.tile_tokens
    begin += split * share
    return begin, jnp.minimum(end, begin + share)


def _dot(a: jax.Array, b: jax.Array, trans_b: bool = False) -> jax.Array:
    """Multiplies matrices, the second one brought to the dtype of the first.

    float32 is kept from being rounded to 10 bits, as the tensor cores would have it.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b.astype(a.dtype), trans_b=trans_b, precision=precision)


def _find(
    operands: _Operands,
    row: jax.Array,
    head: jax.Array,
    token: jax.Array,
    held: jax.Array,
    sizes: _Sizes,
) -> Places:
    """Returns where tokens of a row lie in the pool."""
    logical_index, offset = token // sizes.block_tokens, token % sizes.block_tokens
    block_id = pltriton.load(operands.block_ids.at[row, logical_index], mask=held, other=0)
    # So are `NULL_BLOCK` among the tokens, and what the pool does not have.
    block_id = jnp.clip(block_id, 0, sizes.num_blocks - 1)
    layer = jnp.clip(operands.layer[0], 0, sizes.num_layers - 1)
    index = block_id * sizes.num_layers + layer
    return Places(index * sizes.num_kv_heads + head, offset, held)


def _cap(logits: jax.Array, sizes: _Sizes) -> jax.Array:
    """Scales logits, caps them and brings them to base 2."""
    if sizes.soft_cap is None:
        return logits * (sizes.scale * _LOG2_E)
    return jnp.tanh(logits * (sizes.scale / sizes.soft_cap)) * (sizes.soft_cap * _LOG2_E)


def _mask(logits: jax.Array, token: jax.Array, position: jax.Array, sizes: _Sizes) -> jax.Array:
    """Leaves of logits [queries, tokens] those that a query sees."""
    seen = token[None, :] <= position[:, None]
    if sizes.sliding_window is not None:
        seen &= token[None, :] > position[:, None] - sizes.sliding_window
    return jnp.where(seen, logits, -jnp.inf)


def merge_splits(
    out: jax.Array,
    lse: jax.Array,
    sinks: jax.Array | None,
    dtype: np.dtype,
    interpret: bool = False,
) -> jax.Array:
    """Merges the results of `attend_spans`.

    Args:
      out: f32[S, n, D]. Results.
      lse: f32[S, n]. Logarithms of their weights.
      sinks: f32[Hq]. One logit more for each query, of head `i % Hq`, or None.
      dtype: Of the merged results.
      interpret: Whether to run on any platform, slowly, to test.

    Returns:
      [n, D]. Zero where there is no result.
    """
    num_splits, num_rows, head_dim = out.shape
    tile = max(1, _MERGE_NUMBERS // (num_splits * padded(head_dim)))
    return pl.pallas_call(
        functools.partial(_merge_tile, tile=tile),
        grid=(pl.cdiv(num_rows, tile),),
        out_shape=jax.ShapeDtypeStruct((num_rows, head_dim), dtype),
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="merge_splits",
    )(out, lse, sinks)


def _merge_tile(out_ref: Any, lse_ref: Any, sinks_ref: Any, merged_ref: Any, *, tile: int) -> None:
    """One program of `merge_splits`."""
    num_splits, num_rows, head_dim = out_ref.shape
    row = pl.program_id(0) * tile + iota(tile)
    split, dim = iota(num_splits), iota(padded(head_dim))
    exists = row < num_rows
    lse = pltriton.load(
        lse_ref.at[split[:, None], row[None, :]], mask=exists[None, :], other=_LOWEST
    )
    peak = jnp.max(lse, axis=0)
    sinks = jnp.full_like(peak, -jnp.inf)
    if sinks_ref is not None:
        sinks = pltriton.load(sinks_ref.at[row % sinks_ref.size], mask=exists, other=0) * _LOG2_E
        peak = jnp.maximum(peak, sinks)
    # A weight that is not a number goes on into the result.
    weights = jnp.where(lse == _LOWEST, 0.0, jnp.exp2(lse - peak[None, :]))
    total = jnp.sum(weights, axis=0) + jnp.exp2(sinks - peak)
    stored = exists[:, None] & (dim < head_dim)[None, :]
    out = pltriton.load(
        out_ref.at[split[:, None, None], row[None, :, None], dim[None, None, :]],
        mask=(weights != 0)[:, :, None] & stored[None],
        other=0,
    )
    merged = jnp.sum(weights[:, :, None] * out, axis=0) / jnp.where(total == 0, 1.0, total)[:, None]
    pltriton.store(
        merged_ref.at[row[:, None], dim[None, :]], merged.astype(merged_ref.dtype), mask=stored
    )
