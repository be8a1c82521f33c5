"""Paged attention on a GPU: two Pallas kernels in Triton.

In the first, here, each program takes a few queries of one row and KV head and a run of that row's
tokens, and stores a partial result. The second, in `merging`, merges the partial results. Keys and
values are read token by token from the pool, so neither the block size nor the order of blocks
matters, and nothing is copied or transposed before. The two functions may be replaced by kernels
for another backend of Pallas: `ferrum_jax.attention.gpu` uses nothing else of them.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.gpu.merging import Partial
from ferrum_jax.attention.gpu.reading import (
    Places,
    Reader,
    columns,
    iota,
    load_planes,
    padded,
    readers_of,
    views_of,
)
from ferrum_jax.attention.gpu.tuning import Tiling, dot_dtype
from ferrum_jax.attention.softmax import LOWEST, Softmax, is_seen, soft_capped

_LOG2_E = math.log2(math.e)  # The hardware exponentiates in base 2.


class _Operands(NamedTuple):
    """Operands of the first kernel: arrays outside of it, references inside.

    Attributes:
      q: [R * T * H * G, D].
      kv: `views_of` the pool's keys and values.
      layer: i32[1].
      block_ids: i32[R, M].
      held_lens: i32[R].
      q_lens: i32[R].
    """

    q: Any
    kv: tuple[Any, Any]
    layer: Any
    block_ids: Any
    held_lens: Any
    q_lens: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and options that are static in the first kernel; letters as in `AttentionCall`."""

    num_queries: int  # T
    num_kv_heads: int  # H
    group: int  # G
    head_dim: int  # D
    num_blocks: int  # N
    num_layers: int  # L
    reach: int  # Tokens that a row of the table can hold.
    block_tokens: int  # Tokens per block, native or compressed.
    k: Reader
    v: Reader
    scale: float
    soft_cap: float | None
    sliding_window: int | None  # None if it spans all that the table can hold.
    dtype: np.dtype  # Dtype of queries and keys in their products.
    value_dtype: np.dtype  # Dtype of weights and values in their products.
    tiling: Tiling

    @property
    def sign(self) -> float:
        """The scale's sign, by which queries are multiplied without rounding."""
        return float(np.sign(self.scale))

    @property
    def slope(self) -> float:
        """Factor on a difference of logits, which is then an exponent to base e.

        Without a soft cap that is the scale: scaled before, a large logit could become infinite.
        """
        return abs(self.scale) or 1.0 if self.soft_cap is None else 1.0

    @property
    def exp2_slope(self) -> float:
        """Factor on a difference of logits, which is then an exponent to base 2."""
        return self.slope * _LOG2_E

    @property
    def guarded_tile_tokens(self) -> int:
        """Tokens of a tile with guarded values.

        A program is given the registers that its largest loop needs. With 16 tokens, the fewest
        that Triton multiplies, the guarded loop needs no more registers than the other one, for
        heads of up to 128 numbers of 16 bits.
        """
        return self.tiling.tile_tokens if self.dtype == jnp.float32 else 16


def sizes_of(call: AttentionCall, tiling: Tiling) -> Sizes:
    """Returns the sizes and options of a call."""
    _, num_queries, num_kv_heads, group, head_dim = call.q.shape
    k, v = readers_of(call)
    dtype = value_dtype = dot_dtype(call)
    if not call.is_native and dtype == jnp.float16:
        # A weight times the scale of its vector may be too small for float16.
        value_dtype = np.dtype(jnp.bfloat16)
    return Sizes(
        num_queries=num_queries,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        num_blocks=call.pool.num_blocks,
        num_layers=call.pool.num_layers,
        reach=call.reach,
        block_tokens=call.tokens_per_block,
        k=k,
        v=v,
        scale=call.options.scale_for(head_dim),
        soft_cap=call.options.float32_soft_cap,
        sliding_window=call.sliding_window,
        dtype=dtype,
        value_dtype=value_dtype,
        tiling=tiling,
    )


def attend_spans(call: AttentionCall, tiling: Tiling, interpret: bool = False) -> Partial:
    """Attends from every tile of queries to every share of the tokens that it sees.

    Args:
      call: Checked arguments; letters as in `AttentionCall`.
      tiling: Sizes of tiles. S is `num_splits`.
      interpret: Whether to run on any platform, slowly, to test.

    Returns:
      Partial results of R * T * H * G queries, in the order of `call.q`.

    References:
      Dao, FlashAttention-2 (2023), algorithm 1; Dao et al., Flash-Decoding (2023).
    """
    sizes = sizes_of(call, tiling)
    rows, head_dim = call.q.shape[0], sizes.head_dim
    operands = _Operands(
        q=call.q.reshape(-1, head_dim),
        kv=views_of(call),
        layer=call.layer.reshape(1),
        block_ids=call.block_ids,
        held_lens=call.held_lens,
        q_lens=call.q_lens,
    )
    num_tiles = ceil_div(sizes.num_queries * sizes.group, tiling.tile_queries)
    shape = (tiling.num_splits, call.q.size // head_dim)
    number = jax.ShapeDtypeStruct(shape, jnp.float32)
    return pl.pallas_call(
        functools.partial(_attend_span, sizes=sizes),
        grid=(tiling.num_splits, num_tiles, sizes.num_kv_heads, rows),
        out_shape=Partial(
            out=jax.ShapeDtypeStruct((*shape, head_dim), jnp.float32), peak=number, total=number
        ),
        compiler_params=pltriton.CompilerParams(
            num_warps=tiling.num_warps, num_stages=tiling.num_stages
        ),
        interpret=interpret,
        name="attend_spans",
    )(operands)


def _attend_span(operands: _Operands, *refs: Any, sizes: Sizes) -> None:
    """One program of `attend_spans`."""
    # In the softmax, peaks lack the factor `slope`, and the sums of values are planes.
    partial = Partial(*refs)
    split, tile, head, row = (pl.program_id(axis) for axis in range(4))
    tile_queries = sizes.tiling.tile_queries
    q_len = operands.q_lens[row]
    # A length beyond the row's blocks is a caller's mistake: a wrong result, not a wild address.
    held_before = jnp.minimum(operands.held_lens[row], sizes.reach) - q_len
    begin, end = span_of(split, tile, q_len, held_before, sizes)

    # The heads of a group read the same keys, so they are neighbouring queries of a tile.
    member = tile * tile_queries + iota(tile_queries)
    exists = member < sizes.num_queries * sizes.group
    query = member // sizes.group
    position = jnp.where(query < q_len, held_before + query, -1)
    q_index = (row * sizes.num_queries + query) * sizes.num_kv_heads + head
    q_index = q_index * sizes.group + member % sizes.group
    q = [x.astype(sizes.dtype) for x in load_planes(operands.q, q_index, exists, sizes.k)]
    if sizes.sign != 1:
        q = [x * sizes.sign for x in q]

    def take_tile(first: jax.Array, state: Softmax, size: int, is_guarded: bool) -> Softmax:
        peak, total, acc = state
        token = first + iota(size)
        # Past the end there may be garbage, and 0 * NaN is NaN.
        places = _find(operands, row, head, token, token < end, sizes)
        k = sizes.k.load(operands.kv, places)
        planes = zip(q, k.planes, strict=True)
        logits = functools.reduce(operator.add, (_dot(x, y, trans_b=True) for x, y in planes))
        if k.scales is not None:
            logits *= k.scales[None, :]
        logits = _mask(_cap(logits, sizes), token, position, sizes)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=1))
        decay = jnp.exp2((peak - new_peak) * sizes.exp2_slope)
        weights = jnp.exp2((logits - new_peak[:, None]) * sizes.exp2_slope)
        total = total * decay + jnp.sum(weights, axis=1)
        v = sizes.v.load(operands.kv, places)
        planes = v.planes
        if v.scales is not None:  # Scales may be NaN, integers cannot.
            weights = jnp.where(logits > -jnp.inf, weights * v.scales[None, :], 0.0)
        elif is_guarded:
            clean, sees_bad = _guard(logits, planes[0])
            planes, total = (clean,), jnp.where(sees_bad, jnp.nan, total)
        weights = weights.astype(sizes.value_dtype)
        acc = [x * decay[:, None] + _dot(weights, y) for x, y in zip(acc, planes, strict=True)]
        return Softmax(new_peak, total, tuple(acc))

    state = _take_tiles(take_tile, begin, end, sizes)
    _store(partial, state, (split, q_index, exists), sizes)


def _take_tiles(
    take_tile: Callable[..., Softmax], begin: jax.Array, end: jax.Array, sizes: Sizes
) -> Softmax:
    """Passes over all tiles of tokens; twice if a value that is not finite was read.

    Args:
      take_tile: `(first token, state, tokens, is_guarded) -> state`.
      begin: i32[]. First token.
      end: i32[]. One past the last token.
      sizes: Sizes.
    """
    tile_queries = sizes.tiling.tile_queries
    acc = jnp.zeros((tile_queries, padded(sizes.v.width)), jnp.float32)
    start = Softmax(
        jnp.full((tile_queries,), LOWEST, jnp.float32),
        jnp.zeros((tile_queries,), jnp.float32),
        (acc,) * sizes.v.num_planes,
    )

    def take(state: Softmax, end: jax.Array, size: int, is_guarded: bool) -> Softmax:
        def step(turn: jax.Array, state: Softmax) -> Softmax:
            return take_tile(begin + turn * size, state, size, is_guarded)

        turns = ceil_div(jnp.maximum(end - begin, 0), size)
        return lax.fori_loop(0, turns, step, state)

    state = take(start, end, sizes.tiling.tile_tokens, False)
    if sizes.num_queries == 1 or sizes.v.num_planes > 1:
        return state  # Every token that is read is seen, or was guarded.
    is_bad = functools.reduce(operator.or_, (_has_bad(x) for x in state.acc))
    state = jax.tree.map(lambda x, y: jnp.where(is_bad, x, y), start, state)
    return take(state, jnp.where(is_bad, end, begin), sizes.guarded_tile_tokens, True)


def _store(partial: Partial, state: Softmax, place: tuple[jax.Array, ...], sizes: Sizes) -> None:
    """Stores a tile's results.

    Args:
      partial: References to the results of all programs.
      state: Softmax of the tile's queries.
      place: The split, the index of each query, and whether there is such a query.
      sizes: Sizes.
    """
    split, q_index, exists = place
    some = state.total != 0
    peak = jnp.where(some, state.peak * sizes.slope, LOWEST)
    pltriton.store(partial.peak.at[split, q_index], peak, mask=exists)
    pltriton.store(partial.total.at[split, q_index], state.total, mask=exists)
    total = jnp.where(some, state.total, 1.0)
    for plane, (column, is_inside) in zip(state.acc, columns(sizes.v), strict=True):
        pltriton.store(
            partial.out.at[split, q_index[:, None], column[None, :]],
            plane / total[:, None],
            mask=(exists & some)[:, None] & is_inside[None, :],
        )


def span_of(
    split: jax.Array, tile: jax.Array, q_len: jax.Array, held_before: jax.Array, sizes: Sizes
) -> tuple[jax.Array, jax.Array]:
    """Returns the program's share of the tokens that its queries see: first, and one past last.

    Shares follow the length of the row. They are whole tiles, except the last ones, which may be
    shorter or empty.
    """
    tiling = sizes.tiling
    first_query = tile * tiling.tile_queries // sizes.group
    last_query = ((tile + 1) * tiling.tile_queries - 1) // sizes.group
    end = held_before + jnp.minimum(last_query + 1, q_len)
    end = jnp.where(first_query < q_len, end, 0)
    begin = jnp.zeros_like(end)
    if sizes.sliding_window is not None:
        begin = jnp.maximum(held_before + first_query - sizes.sliding_window + 1, 0)
    num_tiles = ceil_div(jnp.maximum(end - begin, 0), tiling.tile_tokens)
    share = ceil_div(num_tiles, tiling.num_splits) * tiling.tile_tokens
    begin += split * share
    return begin, jnp.minimum(end, begin + share)


def _dot(a: jax.Array, b: jax.Array, trans_b: bool = False) -> jax.Array:
    """Multiplies matrices, the second one converted to the dtype of the first.

    By default, the tensor cores would round float32 to 10 bits.
    """
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return pltriton.dot(a, b.astype(a.dtype), trans_b=trans_b, precision=precision)


def _find(
    operands: _Operands,
    row: jax.Array,
    head: jax.Array,
    token: jax.Array,
    held: jax.Array,
    sizes: Sizes,
) -> Places:
    """Returns the places of a row's tokens in the pool."""
    logical_index, offset = token // sizes.block_tokens, token % sizes.block_tokens
    block_id = pltriton.load(operands.block_ids.at[row, logical_index], mask=held, other=0)
    # `NULL_BLOCK` and ids out of range are read as the nearest block of the pool.
    block_id = jnp.clip(block_id, 0, sizes.num_blocks - 1)
    layer = jnp.clip(operands.layer[0], 0, sizes.num_layers - 1)
    index = block_id * sizes.num_layers + layer
    return Places(index * sizes.num_kv_heads + head, offset, held)


def _cap(logits: jax.Array, sizes: Sizes) -> jax.Array:
    """Scales and caps logits; without a cap, `Sizes.slope` scales their differences later."""
    if sizes.soft_cap is None:
        return logits
    return soft_capped(logits * abs(sizes.scale), sizes.soft_cap)


def _mask(logits: jax.Array, token: jax.Array, position: jax.Array, sizes: Sizes) -> jax.Array:
    """Masks logits [queries, tokens] of tokens that a query does not see."""
    seen = is_seen(token[None, :], position[:, None], sizes.sliding_window)
    return jnp.where(seen, logits, -jnp.inf)


def _has_bad(numbers: jax.Array) -> jax.Array:
    """Returns bool[], whether any number is not finite."""
    is_bad = ~(jnp.abs(numbers) < jnp.inf)
    return jnp.max(jnp.max(is_bad.astype(jnp.int32), axis=1), axis=0) > 0


def _guard(logits: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps values that are not finite from queries that do not see them.

    Args:
      logits: f32[queries, tokens]. Logits, minus infinity where a token is not seen.
      v: [tokens, W]. Values.

    Returns:
      Values, zero where they are not finite; and bool[queries], whether a query sees such a value.
    """
    is_finite = jnp.abs(v.astype(jnp.float32)) < jnp.inf
    is_bad = jnp.max((~is_finite).astype(jnp.int32), axis=1)
    sees_bad = jnp.max(jnp.where(logits > -jnp.inf, is_bad[None, :], 0), axis=1) > 0
    return jnp.where(is_finite, v, jnp.zeros_like(v)), sees_bad
