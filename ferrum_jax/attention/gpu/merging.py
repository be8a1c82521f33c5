"""Partial results of attention on a GPU, and the Pallas kernel in Triton that merges them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention.gpu.reading import iota, padded

_MERGE_NUMBERS = 8192  # Numbers that one merging program holds; 64 per thread.
_WARP_NUMBERS = 4096  # Most numbers that a warp holds, where one query has more; 128 per thread.


class Partial(NamedTuple):
    """Results of S splits for n queries.

    `peak` and `total` are kept apart: the logarithm of `total` would be lost in a sum with large
    peaks.

    Attributes:
      out: f32[S, n, D]. Values, averaged; not written where `total` is 0.
      peak: f32[S, n]. Largest logit.
      total: f32[S, n]. Sum of `exp(logit - peak)`; 0 where no token was seen.
    """

    out: Any
    peak: Any
    total: Any


def merge_splits(
    partial: Partial, sinks: jax.Array | None, dtype: np.dtype, interpret: bool = False
) -> jax.Array:
    """Merges the partial results of `kernel.attend_spans`.

    Args:
      partial: Results of S splits.
      sinks: f32[Hq]. One more logit for each query i, that of head `i % Hq`; or None.
      dtype: Dtype of the merged results.
      interpret: Whether to run on any platform, slowly, to test.

    Returns:
      [n, D]. Zero where a query sees no token.
    """
    num_splits, num_rows, head_dim = partial.out.shape
    query_numbers = num_splits * padded(head_dim)
    tile = max(1, _MERGE_NUMBERS // query_numbers)
    num_warps = max(4, query_numbers // _WARP_NUMBERS)
    return pl.pallas_call(
        functools.partial(_merge_tile, tile=tile),
        grid=(ceil_div(num_rows, tile),),
        out_shape=jax.ShapeDtypeStruct((num_rows, head_dim), dtype),
        compiler_params=pltriton.CompilerParams(num_warps=num_warps, num_stages=1),
        interpret=interpret,
        name="merge_splits",
    )(partial, sinks)


def _merge_tile(partial: Partial, sinks_ref: Any, merged_ref: Any, *, tile: int) -> None:
    """One program of `merge_splits`."""
    num_splits, num_rows, head_dim = partial.out.shape
    row = pl.program_id(0) * tile + iota(tile)
    split, dim = iota(num_splits), iota(padded(head_dim))
    exists = row < num_rows
    peaks, totals = (
        pltriton.load(x.at[split[:, None], row[None, :]], mask=exists[None, :], other=0)
        for x in (partial.peak, partial.total)
    )
    peak = jnp.max(peaks, axis=0)
    sinks = jnp.full_like(peak, -jnp.inf)
    if sinks_ref is not None:
        sinks = pltriton.load(sinks_ref.at[row % sinks_ref.size], mask=exists, other=0)
        peak = jnp.maximum(peak, sinks)
    # A weight that is NaN makes the result NaN.
    weights = totals * jnp.exp(peaks - peak[None, :])
    total = jnp.sum(weights, axis=0) + jnp.exp(sinks - peak)
    stored = exists[:, None] & (dim < head_dim)[None, :]
    out = pltriton.load(
        partial.out.at[split[:, None, None], row[None, :, None], dim[None, None, :]],
        mask=(weights != 0)[:, :, None] & stored[None],
        other=0,
    )
    merged = jnp.sum(weights[:, :, None] * out, axis=0) / jnp.where(total == 0, 1.0, total)[:, None]
    pltriton.store(
        merged_ref.at[row[:, None], dim[None, :]], merged.astype(merged_ref.dtype), mask=stored
    )
