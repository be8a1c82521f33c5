"""Compression of live requests at run time, one request at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import jax
import numpy as np
from jax.typing import ArrayLike

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import check_number, check_type
from ferrum_jax.compression.methods import (
    CompressionMethod,
    CompressionPlan,
    plan_compression,
    smallest_num_blocks,
)
from ferrum_jax.compression.rewrite import Loss, reference_queries
from ferrum_jax.errors import CompressionError
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.device.reclaim import Reclaimer
from ferrum_jax.manager.device.request_table import RequestTable
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.records import CompressionReport, CompressionStats


class Compression:
    """Compresses requests of one device, and keeps count. Not thread-safe.

    Args:
      pool: The device's pool.
      requests: The device's live requests.
      prefixes: The device's prefix cache.
      reclaimer: Makes room where a compression takes blocks.

    Attributes:
      num_compressions: Compressions so far.
    """

    def __init__(
        self,
        pool: DevicePool,
        requests: RequestTable,
        prefixes: Prefixes,
        reclaimer: Reclaimer,
    ):
        self._pool, self._requests = pool, requests
        self._prefixes, self._reclaimer = prefixes, reclaimer
        self.num_compressions, self._seconds = 0, 0.0

    def compress(
        self,
        request: LiveRequest,
        ratio: float,
        method: CompressionMethod,
        queries: tuple[jax.Array, ...] | None,
    ) -> None:
        """Compresses a request to a share of its uncompressed bytes; waits for the device.

        Args:
          request: The request, which has a row.
          ratio: Bytes afterwards over uncompressed bytes, in (0, 1].
          method: What may be done.
          queries: Reference queries of each layer group that keeps all tokens, f32[L, H, Q, D];
            sampled if absent.

        Raises:
          CompressionError: If the method cannot reach the ratio, or its format is not possible, or
            all layer groups have a sliding window.
          OutOfBlocksError: If blocks are needed beside those of others, and there are none.
        """
        plan = self._plan(request, ratio, method)
        if plan is None:
            return
        pool, started = self._pool, time.perf_counter()
        of_row = pool.counts.blocks_of_row(plan.num_kept, plan.token_format)
        num_new = pool.queries.num_blocks_to_compress(request.seq_id, of_row)
        # Cached blocks stay while there is room beside them; else they are overwritten in place.
        shortage, num_full = num_new - self._reclaimer.obtainable, pool.counts.num_full_groups
        pairs = zip(shortage.at_least_zero(), num_full, strict=True)
        num_uncached = max(ceil_div(lacking, max(1, count)) for lacking, count in pairs)
        num_uncached = min(num_uncached, self._prefixes.num_lone_blocks(request))
        num_new = (num_new - num_full.times(num_uncached)).at_least_zero()
        self._reclaimer.require_blocks(
            f"compress_cache of {request.request_id!r}",
            num_new,
            request.allocation.priority,
            exclude=[request],
        )
        before = self._reclaimer.obtainable
        self._prefixes.uncache_for_rewrite(request, num_uncached, self._requests.residents())
        pool.sizes.reserve(num_new)
        loss = pool.compress(request.seq_id, plan, method, queries)
        self._prefixes.detach(request)
        pool.device_state.settle()
        loss = pool.device_state.read_back(loss)
        freed_bytes = pool.bytes_of(self._reclaimer.obtainable - before)
        seconds = time.perf_counter() - started
        self.num_compressions += 1
        self._seconds += seconds
        request.note_compression(self._report(request, freed_bytes, seconds, loss))

    def stats(self) -> CompressionStats:
        """Returns what compression has saved, of the requests that are on the device."""
        compressed = [r for r in self._requests.residents() if r.compression is not None]
        ratios = [self._ratio_of(request) for request in compressed]
        freed = [r.compression.freed_bytes for r in compressed if r.compression is not None]
        return CompressionStats(
            compressed_caches=len(compressed),
            memory_saved_bytes=sum(freed),
            avg_compression_ratio=sum(ratios or [1.0]) / max(1, len(ratios)),
            avg_compression_time_ms=1e3 * self._seconds / max(1, self.num_compressions),
        )

    def _plan(
        self, request: LiveRequest, ratio: float, method: CompressionMethod
    ) -> CompressionPlan | None:
        """Returns what becomes of a request; None if it is small enough, or raises."""
        shape, pool = request.shape, self._pool
        name, wanted = request.request_id, method.token_format
        if not pool.counts.full_groups:
            raise CompressionError(
                f"Request {name!r} has only layers with a sliding window, which are not "
                "compressed: their blocks are released as it is extended."
            )
        num_blocks, num_held = self._blocks_before(request), self._blocks_now(request)
        max_blocks = math.floor(ratio * num_blocks + 1e-9)
        if num_held <= max_blocks:
            return None
        if wanted is not None:
            if wanted < shape.token_format:
                raise CompressionError(
                    f"Request {name!r} is stored as {shape.token_format.name}, and is to become "
                    f"{wanted.name}, which has more bits. Ask for a format of fewer."
                )
            for i in pool.counts.full_pools:  # ValueError if the geometry forbids it.
                pool.state.pools[i].tokens_per_block(wanted)
        sizes = pool.counts.block_sizes
        plan = plan_compression(method, shape.held_len, shape.token_format, sizes, max_blocks)
        if plan is None:
            least = smallest_num_blocks(method, shape.held_len, shape.token_format, sizes)
            raise CompressionError(
                f"Request {name!r} is to take {ratio:g} of its {num_blocks} blocks, which is "
                f"{max_blocks}; it takes {num_held}, and {method} leaves at least "
                f"{least}. Ask for a larger ratio, or let it drop more: by a scorer, and fewer "
                "num_sinks and num_recent."
            )
        return plan

    def _report(
        self, request: LiveRequest, freed_bytes: int, seconds: float, loss: Loss
    ) -> CompressionReport:
        shape, before = request.shape, request.compression
        names = self._pool.group_names
        return CompressionReport(
            token_format=shape.token_format,
            num_tokens=request.num_tokens,
            num_kept_tokens=shape.held_len,
            ratio=self._ratio_of(request),
            freed_bytes=freed_bytes + (before.freed_bytes if before is not None else 0),
            seconds=seconds,
            attention_error=float(loss.error.mean()),
            pruning_error=float(loss.pruning_error.mean()),
            fitting_error=float(loss.fitting_error.mean()),
            groups=tuple(names[group] for group in self._pool.counts.full_groups),
        )

    def _ratio_of(self, request: LiveRequest) -> float:
        """Returns the bytes of a request's compressed groups over the uncompressed bytes."""
        return self._blocks_now(request) / self._blocks_before(request)

    def _blocks_now(self, request: LiveRequest) -> int:
        """Returns a request's blocks in each group that compression changes."""
        counts = self._pool.counts
        return int(counts.num_blocks_held[counts.main_row(request.seq_id)])

    def _blocks_before(self, request: LiveRequest) -> int:
        """Returns how many blocks a request would have in such a group uncompressed."""
        return ceil_div(request.num_tokens, self._pool.counts.block_size)


def checked_compression(
    ratio: float,
    method: CompressionMethod | None,
    queries: ArrayLike | None,
    geometry: CacheGeometry,
) -> tuple[float, CompressionMethod, tuple[jax.Array, ...] | None]:
    """Checks the arguments of `compress_cache`.

    Args:
      ratio: Bytes afterwards over uncompressed bytes.
      method: What may be done; the defaults if absent.
      queries: [L, Hq, Q, D]. Queries of the model for each layer that keeps all tokens, in the
        order of the layers' numbers; None for none.
      geometry: What is cached.

    Returns:
      `(ratio, method, queries)`, the queries as f32[L', H, Q', D] for each layer group that keeps
      all tokens, or None.

    Raises:
      ValueError: If the ratio is not in (0, 1], the method needs queries and there are none, or
        their shape is not that of the geometry.
    """
    number = check_number("compression_ratio", ratio)
    method = CompressionMethod() if method is None else method
    check_type("method", method, CompressionMethod)
    if not 0 < number <= 1:
        raise ValueError(f"compression_ratio must be in (0, 1], got {ratio}.")
    if queries is None:
        if method.needs_queries:
            raise ValueError(
                f"Method {method} needs queries of the model, and there are none. Pass some, or "
                'choose a scorer that needs none, as "key_difference", and no fit.'
            )
        return number, method, None
    full = [p.group for p in geometry.layer_map.by_pool() if p.group.sliding_window is None]
    sizes = {(group.payload.num_kv_heads, group.payload.head_dim) for group in full}
    if len(sizes) > 1:
        raise ValueError(
            f"queries are one array for all layers that keep all tokens, and these have heads of "
            f"{sorted(sizes)} (num_kv_heads, head_dim). Leave queries out: they are sampled then."
        )
    groups, shape = [group.layers for group in full], np.shape(queries)
    num_heads, head_dim = sizes.pop() if sizes else (geometry.num_kv_heads, geometry.head_dim)
    layers = sum(map(len, groups))
    is_right = len(shape) == 4 and (shape[0], shape[3]) == (layers, head_dim)
    if not is_right or not shape[2] or not shape[1] or shape[1] % num_heads:
        raise ValueError(
            f"queries must be [{layers}, Hq, Q, {head_dim}], Hq a multiple of {num_heads} and Q at "
            f"least 1, got {list(shape)}. Pass those of every layer that keeps all tokens, and of "
            "every query head."
        )
    return number, method, _of_groups(reference_queries(queries, num_heads), groups)


def _of_groups(queries: jax.Array, groups: Sequence[Sequence[int]]) -> tuple[jax.Array, ...]:
    """Returns the queries of each group, given those of its layers in the layers' order."""
    order = sorted(layer for layers in groups for layer in layers)
    if [order] == [list(layers) for layers in groups]:
        return (queries,)
    return tuple(queries[np.asarray([order.index(i) for i in layers])] for layers in groups)
