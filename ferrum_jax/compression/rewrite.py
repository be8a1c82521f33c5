"""Rewrites a row in fewer blocks, layer by layer: read, select, fit, write.

L layers, H KV heads, D head dimension, Q reference queries of a head.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ferrum_jax.checks import INT32_LIMIT
from ferrum_jax.compression.fitting import attention, attention_error, fit
from ferrum_jax.compression.held import HeldTokens
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.compression.scores import compact, select_tokens, token_scorer
from ferrum_jax.meshes import with_auto_axes
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.compressed import decode_blocks, encode_blocks, read_blocks
from ferrum_jax.ops.replacing import rewrite_row
from ferrum_jax.ops.rows import held_blocks
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.state import BlockPool, CacheState
from ferrum_jax.types import TokenFormat

_NUM_SAMPLED = 16
_MAX_COUNT = INT32_LIMIT - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rewrite:
    """How a row is rewritten.

    A program is compiled for each combination of formats, block limits, scorer, and whether tokens
    are fitted. The other numbers of the method, and the scale, are data of the program.

    Attributes:
      source: Present format of the row.
      target: New format of the row.
      max_source_blocks: Most blocks that the row holds now.
      max_target_blocks: Most blocks that the row will hold.
      method: How tokens are selected and fitted; None if all are kept.
      scale: Factor of the logits; `D ** -0.5` if absent.
    """

    source: TokenFormat
    target: TokenFormat
    max_source_blocks: int
    max_target_blocks: int
    method: CompressionMethod | None = None
    scale: float | None = None


@dataclasses.dataclass(frozen=True)
class _Form:
    """Static part of a `Rewrite`: what a program is compiled for."""

    source: TokenFormat
    target: TokenFormat
    max_source_blocks: int
    max_target_blocks: int
    scorer: str | None
    is_fitted: bool


class _Numbers(NamedTuple):
    """Numbers of a `Rewrite` that are data of a program, each i32[] or f32[].

    Attributes:
      scale: Factor of the logits; 0 for `D ** -0.5`.
      num_sinks: As in `CompressionMethod`.
      num_recent: As in `CompressionMethod`.
      fit_steps: As in `CompressionMethod`.
      learning_rate: As in `CompressionMethod`.
    """

    scale: jax.Array
    num_sinks: jax.Array
    num_recent: jax.Array
    fit_steps: jax.Array
    learning_rate: jax.Array


class Loss(NamedTuple):
    """Loss of a rewrite: relative L2 errors of attention outputs on the queries.

    Each is f32[R * L], for R rows with L layers.

    Attributes:
      error: Error of the row as it is stored.
      pruning_error: Error of the kept tokens before they were fitted and rounded.
      fitting_error: Error of the fitted tokens before they were rounded.
    """

    error: jax.Array
    pruning_error: jax.Array
    fitting_error: jax.Array


def compress_rows(
    state: CacheState,
    rows: Sequence[tuple[int, int]],
    num_kept: ArrayLike,
    queries: Sequence[jax.Array],
    rewrite: Rewrite,
) -> tuple[CacheState, jax.Array, Loss]:
    """Rewrites rows in fewer blocks, all alike; donates the state.

    They are the rows of one sequence in the layer groups that are compressed. Blocks that another
    row holds too stay unchanged; free blocks are taken instead. The work is proportional to the
    rows. It needs scratch memory for one rewritten row at a time.

    Args:
      state: The cache, with the target format enabled. Called outside `jit`, this consumes it: use
        the one returned.
      rows: R pairs of the index of a pool, and a row of its tables.
      num_kept: i32[]. Tokens to keep in each layer and head; all tokens without a method.
      queries: Reference queries of each row, f32[L, H, Q, D]: of each layer of the row's group and
        KV head, with positions applied; see `reference_queries`. A program is compiled for each Q.
      rewrite: How the rows are rewritten (static, except the numbers of its method and its scale).

    Returns:
      `(state, ok, loss)`, ok: bool[]. False if a row, which then stays as it is, holds fewer tokens
      than `num_kept`, has another format or more blocks than the source, or finds too few blocks
      free. The loss has the layers of all rows, one row after the other.
    """
    form, numbers = _parts_of(rewrite)
    pools, of_pools = zip(*rows, strict=True)
    ids, num_kept = as_ids(np.asarray(of_pools)), as_ids(num_kept)
    return _compress_rows(state, ids, num_kept, tuple(queries), numbers, form, pools)


def reference_queries(queries: ArrayLike, num_kv_heads: int) -> jax.Array:
    """Groups the queries of a model by KV head.

    Args:
      queries: [L, Hq, Q, D]. Queries of a few tokens, in the order of the model's query heads,
        with positions applied.
      num_kv_heads: H, a divisor of Hq.

    Returns:
      f32[L, H, Hq // H * Q, D].
    """
    queries = jnp.asarray(queries, jnp.float32)
    num_layers, num_q_heads, num_tokens, head_dim = queries.shape
    group = num_q_heads // num_kv_heads
    return queries.reshape(num_layers, num_kv_heads, group * num_tokens, head_dim)


def sample_queries(state: CacheState, row: ArrayLike, rewrite: Rewrite) -> jax.Array:
    """Draws random queries, for a caller without reference queries.

    They are normal, each number with the standard deviation of that number in the row's keys: the
    best guess of a model's queries that the cache allows.

    Args:
      state: The cache.
      row: i32[]. The row of the tables.
      rewrite: How the row will be rewritten; only `source` and `max_source_blocks` matter.

    Returns:
      f32[L, H, Q, D], Q = 16.
    """
    return _sample_queries(state, as_ids(row), rewrite.source, rewrite.max_source_blocks)


def _parts_of(rewrite: Rewrite) -> tuple[_Form, _Numbers]:
    """Returns the static part of a rewrite, and its numbers."""
    method = rewrite.method or CompressionMethod(scorer=None)
    form = _Form(
        source=rewrite.source,
        target=rewrite.target,
        max_source_blocks=rewrite.max_source_blocks,
        max_target_blocks=rewrite.max_target_blocks,
        scorer=method.scorer,
        is_fitted=method.fit_steps > 0,
    )
    counts = method.num_sinks, method.num_recent, method.fit_steps
    num_sinks, num_recent, fit_steps = (jnp.asarray(np.int32(min(n, _MAX_COUNT))) for n in counts)
    numbers = _Numbers(
        scale=jnp.asarray(np.float32(rewrite.scale or 0.0)),
        num_sinks=num_sinks,
        num_recent=num_recent,
        fit_steps=fit_steps,
        learning_rate=jnp.asarray(np.float32(method.learning_rate)),
    )
    return form, numbers


@functools.partial(jax.jit, static_argnames=("source", "max_blocks"))
def _sample_queries(
    state: CacheState, row: jax.Array, source: TokenFormat, max_blocks: int
) -> jax.Array:
    pool = state.pool
    block_ids = _blocks_of(state, row, max_blocks)
    num_held = state.tables.held_lens[row]

    def sample(layer: jax.Array) -> jax.Array:
        k = _read(pool, layer, block_ids, num_held, source).k
        spread = jnp.sqrt(jnp.sum(k**2, axis=1) / jnp.maximum(num_held, 1).astype(jnp.float32))
        key = jax.random.fold_in(jax.random.key(0), layer)
        shape = pool.num_kv_heads, _NUM_SAMPLED, pool.head_dim
        return jax.random.normal(key, shape, jnp.float32) * spread[:, None, :]

    return lax.map(sample, jnp.arange(pool.num_layers, dtype=jnp.int32))


@functools.partial(jax.jit, static_argnames=("form", "pools"), donate_argnames="state")
def _compress_rows(
    state: CacheState,
    rows: jax.Array,
    num_kept: jax.Array,
    queries: tuple[jax.Array, ...],
    numbers: _Numbers,
    form: _Form,
    pools: tuple[int, ...],
) -> tuple[CacheState, jax.Array, Loss]:
    oks, losses = [], []
    for i, (pool, of_row) in enumerate(zip(pools, queries, strict=True)):
        # The heads of a row are scored together, and their loss is one number.
        compress = functools.partial(_compress_row, form=form)
        compress = with_auto_axes(compress, state.pools[pool].mesh)
        part, (ok, loss) = compress(state.part(pool), rows[i], num_kept, of_row, numbers)
        state = state.with_part(pool, part)
        oks.append(ok)
        losses.append(loss)
    return state, jnp.all(jnp.stack(oks)), jax.tree.map(lambda *x: jnp.concatenate(x), *losses)


def _compress_row(
    state: CacheState,
    row: jax.Array,
    num_kept: jax.Array,
    queries: jax.Array,
    numbers: _Numbers,
    form: _Form,
) -> tuple[CacheState, tuple[jax.Array, Loss]]:
    """Rewrites one row; returns the cache, whether it was rewritten, and the loss."""
    pool, tables = state.pool, state.tables
    block_ids = _blocks_of(state, row, form.max_source_blocks)
    num_held = tables.held_lens[row]

    def rewritten(args: tuple[jax.Array, jax.Array]) -> tuple[KeysAndValues, Loss]:
        layer, layer_queries = args
        full = _read(pool, layer, block_ids, num_held, form.source)
        return _rewrite_layer(pool, full, num_kept, layer_queries, numbers, form)

    layers = jnp.arange(pool.num_layers, dtype=jnp.int32)
    halves, loss = lax.map(rewritten, (layers, queries))
    is_meant = tables.token_formats[row] == form.source
    is_meant &= tables.num_blocks_held[row] <= form.max_source_blocks
    num_kept = jnp.where(is_meant, num_kept, 0)  # 0 is refused.
    tables, targets, ok = rewrite_row(tables, row, num_kept, form.target, form.max_target_blocks)
    k, v = (
        array.at[targets].set(half.swapaxes(0, 1), mode="drop", wrap_negative_indices=False)
        for array, half in zip(pool.payload.split(pool.arrays), halves, strict=True)
    )
    pool = dataclasses.replace(pool, arrays=pool.payload.join(k, v))
    return state.with_pools([pool]).with_tables([tables]), (ok, loss)


def _rewrite_layer(
    pool: BlockPool,
    full: HeldTokens,
    num_kept: jax.Array,
    queries: jax.Array,
    numbers: _Numbers,
    form: _Form,
) -> tuple[KeysAndValues, Loss]:
    """Returns one layer of the new blocks, each half [P, H, B, D] as stored, and its loss."""
    scale = jnp.where(numbers.scale == 0.0, pool.head_dim**-0.5, numbers.scale)
    reference, _ = attention(full, queries, scale)

    def error_of(tokens: HeldTokens) -> jax.Array:
        return attention_error(attention(tokens, queries, scale)[0], reference)

    tokens = full._replace(num_held=num_kept)
    pruning_error = fitting_error = jnp.zeros((), jnp.float32)
    if form.scorer is not None:
        scores = token_scorer(form.scorer)(full, queries, scale)
        order = select_tokens(
            scores,
            full.num_held,
            num_kept,
            num_sinks=numbers.num_sinks,
            num_recent=numbers.num_recent,
        )
        tokens = HeldTokens(compact(full.k, order), compact(full.v, order), num_kept)
        pruning_error = fitting_error = error_of(tokens)
    size = form.max_target_blocks * pool.tokens_per_block(form.target)
    tokens = tokens.resized(size)
    if form.is_fitted:
        fitted = fit(
            full,
            tokens,
            queries,
            scale,
            num_steps=numbers.fit_steps,
            learning_rate=numbers.learning_rate,
        )
        tokens, fitting_error = fitted.tokens, fitted.error_after
    halves = encode_blocks(pool, KeysAndValues(tokens.k, tokens.v), form.target)
    k, v = (x.astype(jnp.float32) for x in decode_blocks(pool, halves, form.target))
    error = error_of(HeldTokens(k, v, num_kept))
    return halves, Loss(error, pruning_error, fitting_error)


def _blocks_of(state: CacheState, row: jax.Array, max_blocks: int) -> jax.Array:
    """Returns the first `max_blocks` blocks of a row, i32[P]."""
    return held_blocks(state.tables, row[None])[0, :max_blocks]


def _read(
    pool: BlockPool,
    layer: jax.Array,
    block_ids: jax.Array,
    num_held: jax.Array,
    token_format: TokenFormat,
) -> HeldTokens:
    """Returns a layer's keys and values, each f32[H, T, D], with zeros as padding."""
    k, v = read_blocks(pool, layer, block_ids, token_format)
    tokens = HeldTokens(k.astype(jnp.float32), v.astype(jnp.float32), num_held)
    return tokens.resized(k.shape[1])
