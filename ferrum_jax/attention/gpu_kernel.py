"""Attention through pages on a GPU: two Pallas kernels in Triton.

The first, here, gives each program a few queries of one row and KV head and a run of that row's
tokens; it leaves a partial result. The second, in `gpu_merging`, merges the partial results. Keys
and values are fetched token by token from where the pool holds them, so neither the block size nor
the order of blocks matters, and nothing is copied or transposed before. Bodies for another backend
of Pallas may take the place of these two: `ferrum_jax.attention.gpu` knows nothing else of them.
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

from ferrum_jax.attention.arithmetic import LOWEST, divide_up, soft_capped
from ferrum_jax.attention.gpu_merging import Partial
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

_LOG2_E = math.log2(math.e)  # The hardware exponentiates in base 2.


class _Operands(NamedTuple):
    """What the first kernel reads, as arrays outside of it and as references inside.

    Attributes:
      q: [R * T * H * G, D].
      kv: The pool's arrays of keys and of values, as `views_of` it.
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

    @property
    def sign(self) -> float:
        """What queries are multiplied by, exactly: the scale's sign."""
        return float(np.sign(self.scale))

    @property
    def slope(self) -> float:
        """What a difference of logits is multiplied by before it is an exponent to base e.

        Without a soft cap that is the scale: a logit so large that a factor makes it infinite
        would be lost.
        """
        return abs(self.scale) or 1.0 if self.soft_cap is None else 1.0

    @property
    def exp2_slope(self) -> float:
        """The same to base 2."""
        return self.slope * _LOG2_E

    @property
    def guarded_tile_tokens(self) -> int:
        """Tokens of a tile whose values are guarded.

        A program has the registers that its largest loop needs. With 16 tokens, the least that
        Triton multiplies, guarding takes no more of them for heads of up to 128 numbers of 16 bits.
        """
        return self.tiling.tile_tokens if self.dtype == jnp.float32 else 16


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
        soft_cap=inputs.options.float32_soft_cap,
        sliding_window=window if window and window < reach else None,
        dtype=dtype,
        value_dtype=value_dtype,
        tiling=tiling,
    )


class _State(NamedTuple):
    """The softmax of a tile's queries under way.

    Attributes:
      peak: f32[queries]. Largest logit so far, to be multiplied by `_Sizes.slope`.
      total: f32[queries]. Sum of all weights, each relative to the largest.
      acc: Planes of the values weighted alike, each f32[queries, W].
    """

    peak: jax.Array
    total: jax.Array
    acc: tuple[jax.Array, ...]


def attend_spans(
    inputs: AttentionInputs, token_format: TokenFormat, tiling: Tiling, interpret: bool = False
) -> Partial:
    """Attends from every tile of queries to every share of the tokens it sees.

    Args:
      inputs: Checked arguments; letters as there.
      token_format: How the rows' tokens are written. What is rotated stays so.
      tiling: Sizes of tiles. S is `num_splits`.
      interpret: Whether to run on any platform, slowly, to test.

    Returns:
      Partial results of R * T * H * G queries, in the order of `inputs.q`.

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
        held_lens=inputs.held_lens,
        q_lens=inputs.q_lens,
    )
    num_tiles = pl.cdiv(sizes.num_queries * sizes.group, tiling.tile_queries)
    shape = (tiling.num_splits, inputs.q.size // head_dim)
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


def _attend_span(operands: _Operands, *refs: Any, sizes: _Sizes) -> None:
    """One program of `attend_spans`."""
    partial = Partial(*refs)
    split, tile, head, row = (pl.program_id(axis) for axis in range(4))
    tile_queries = sizes.tiling.tile_queries
    q_len = operands.q_lens[row]
    # More tokens than blocks are a caller's mistake: a wrong result, not a wild address.
    held_before = jnp.minimum(operands.held_lens[row], sizes.reach) - q_len
    begin, end = _span(split, tile, q_len, held_before, sizes)

    # The heads of a group read the same keys, so they stand as neighbouring queries.
    member = tile * tile_queries + iota(tile_queries)
    exists = member < sizes.num_queries * sizes.group
    query = member // sizes.group
    position = jnp.where(query < q_len, held_before + query, -1)
    q_index = (row * sizes.num_queries + query) * sizes.num_kv_heads + head
    q_index = q_index * sizes.group + member % sizes.group
    q = [x.astype(sizes.dtype) for x in load_planes(operands.q, q_index, exists, sizes.k)]
    if sizes.sign != 1:
        q = [x * sizes.sign for x in q]

    def take_tile(first: jax.Array, state: _State, size: int, is_guarded: bool) -> _State:
        peak, total, acc = state
        token = first + iota(size)
        # Beyond the end there may be garbage, and 0 * NaN is NaN.
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
        if v.scales is not None:  # These may be NaN, the numbers not.
            weights = jnp.where(logits > -jnp.inf, weights * v.scales[None, :], 0.0)
        elif is_guarded:
            clean, sees_bad = _guard(logits, planes[0])
            planes, total = (clean,), jnp.where(sees_bad, jnp.nan, total)
        weights = weights.astype(sizes.value_dtype)
        acc = [x * decay[:, None] + _dot(weights, y) for x, y in zip(acc, planes, strict=True)]
        return _State(new_peak, total, tuple(acc))

    state = _take_tiles(take_tile, begin, end, sizes)
    _store(partial, state, (split, q_index, exists), sizes)


def _take_tiles(
    take_tile: Callable[..., _State], begin: jax.Array, end: jax.Array, sizes: _Sizes
) -> _State:
    """Passes over all tiles of tokens: twice where a value that is not finite was met.

    Args:
      take_tile: `(first token, state, tokens, is_guarded) -> state`.
      begin: i32[]. First token.
      end: i32[]. One past the last.
      sizes: Sizes.
    """
    tile_queries = sizes.tiling.tile_queries
    acc = jnp.zeros((tile_queries, padded(sizes.v.width)), jnp.float32)
    start = _State(
        jnp.full((tile_queries,), LOWEST, jnp.float32),
        jnp.zeros((tile_queries,), jnp.float32),
        (acc,) * sizes.v.num_planes,
    )

    def take(state: _State, end: jax.Array, size: int, is_guarded: bool) -> _State:
        def step(turn: jax.Array, state: _State) -> _State:
            return take_tile(begin + turn * size, state, size, is_guarded)

        turns = divide_up(jnp.maximum(end - begin, 0), size)
        return lax.fori_loop(0, turns, step, state)

    state = take(start, end, sizes.tiling.tile_tokens, False)
    if sizes.num_queries == 1 or sizes.v.num_planes > 1:
        return state  # All that is read is seen, or it was guarded.
    is_bad = functools.reduce(operator.or_, (_has_bad(x) for x in state.acc))
    state = jax.tree.map(lambda x, y: jnp.where(is_bad, x, y), start, state)
    return take(state, jnp.where(is_bad, end, begin), sizes.guarded_tile_tokens, True)


def _store(partial: Partial, state: _State, place: tuple[jax.Array, ...], sizes: _Sizes) -> None:
    """Stores a tile's results.

    Args:
      partial: References to all results.
      state: The tile's softmax.
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
    end = jnp.where(first_query < q_len, end, 0)
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
    """Scales and caps logits, unless there is no cap: `_Sizes.slope` scales them then."""
    if sizes.soft_cap is None:
        return logits
    return soft_capped(logits * abs(sizes.scale), sizes.soft_cap)


def _mask(logits: jax.Array, token: jax.Array, position: jax.Array, sizes: _Sizes) -> jax.Array:
    """Leaves of logits [queries, tokens] those that a query sees."""
    seen = token[None, :] <= position[:, None]
    if sizes.sliding_window is not None:
        seen &= token[None, :] > position[:, None] - sizes.sliding_window
    return jnp.where(seen, logits, -jnp.inf)


def _has_bad(numbers: jax.Array) -> jax.Array:
    """Returns bool[], whether any of some numbers is not finite."""
    is_bad = ~(jnp.abs(numbers) < jnp.inf)
    return jnp.max(jnp.max(is_bad.astype(jnp.int32), axis=1), axis=0) > 0


def _guard(logits: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keeps values that are not finite from queries that do not see them.

    Args:
      logits: f32[queries, tokens]. Logits, minus infinity where a token is not seen.
      v: [tokens, W]. Values.

    Returns:
      Values, zero where they are not finite, and bool[queries]: whether a query sees one of these.
    """
    is_finite = jnp.abs(v.astype(jnp.float32)) < jnp.inf
    is_bad = jnp.max((~is_finite).astype(jnp.int32), axis=1)
    sees_bad = jnp.max(jnp.where(logits > -jnp.inf, is_bad[None, :], 0), axis=1) > 0
    return jnp.where(is_finite, v, jnp.zeros_like(v)), sees_bad
