"""The methods of a manager by which requests take fewer bytes, at some loss."""

from __future__ import annotations

import math
import time

import jax
import numpy as np
from jax.typing import ArrayLike

from ferrum_jax.checks import check_number, check_type
from ferrum_jax.compression.methods import (
    CompressionMethod,
    CompressionPlan,
    plan_compression,
    smallest_num_blocks,
)
from ferrum_jax.compression.rewrite import Loss, reference_queries
from ferrum_jax.errors import CompressionError
from ferrum_jax.manager.core import ManagerCore
from ferrum_jax.manager.handle import Entry
from ferrum_jax.records import CompressionReport, CompressionStats
from ferrum_jax.types import RequestId


class Compressing(ManagerCore):
    """Compression at run time, one request at a time."""

    _num_compressions = 0
    _compression_seconds = 0.0

    def compress_cache(
        self,
        request_id: RequestId,
        compression_ratio: float,
        method: CompressionMethod | None = None,
        queries: ArrayLike | None = None,
    ) -> None:
        """Writes a request's tokens anew in fewer blocks; waits for the device.

        The blocks saved go back to the pool. The sequence keeps its length and goes on: later
        tokens are written in the same format, at the positions that they would have had. Blocks
        that others hold too stay as they are for these; so compressing a request that shares much
        frees little, and may take blocks. What is cached of it stays cached, for nobody uses it
        any more and it can go; but if blocks are short, as much of it as is needed goes first, as
        if evicted, unless others hold it or it is pinned. What it has done is told by the handle's
        `compression`. A request that is within the ratio already stays as it is.

        The first request in a format compiles programs; so do the first of each power of two of
        blocks, before and after, the first with another scorer, and the first with another shape
        of queries. Other numbers of a method do not. Steps that run after a new format are
        compiled again. `ManagerOptions.token_formats` has steps compiled for it at once.

        Args:
          request_id: The caller's key.
          compression_ratio: Bytes after, over the bytes that the sequence takes uncompressed, in
            (0, 1]. Both are of whole blocks.
          method: What may be done; the defaults if absent.
          queries: [L, Hq, Q, D]. Queries of a few of the sequence's tokens, as the model's
            attention has them, positions applied: to choose tokens, to fit those kept, and to
            measure what was lost. If absent, queries are sampled to measure it.

        Raises:
          UnknownRequestError: If no such request is live.
          SwappedOutError: If it is not on the device.
          ValueError: If the ratio is not in (0, 1], or the method needs queries and has none.
          CompressionError: If the method cannot reach the ratio, or its format has more bits than
            the request's.
          OutOfBlocksError: If blocks are needed beside those of others, and there are none.
        """
        ratio = check_number("compression_ratio", compression_ratio)
        method = CompressionMethod() if method is None else method
        check_type("method", method, CompressionMethod)
        if not 0 < ratio <= 1:
            raise ValueError(f"compression_ratio must be in (0, 1], got {compression_ratio}.")
        if queries is None and method.needs_queries:
            raise ValueError(
                f"Method {method} needs queries of the model, and there are none. Pass some, or "
                'choose a scorer that needs none, as "key_difference", and no fit.'
            )
        if queries is not None:
            self._require_queries(np.shape(queries))
            queries = reference_queries(queries, self._geometry.num_kv_heads)
        with self._changing():
            entry = self._resident(request_id)
            plan = self._plan(entry, ratio, method)
            if plan is not None:
                self._compress(entry, plan, method, queries)
            self._note_use([entry])

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has won: of the requests that are compressed and here now."""
        with self._looking():
            ratios, freed_bytes = list[float](), 0
            for entry in self._entries.values():
                report = entry.compression
                if report is not None and entry.is_resident:
                    ratios.append(self._ratio_of(entry))
                    freed_bytes += report.freed_bytes
            mean_seconds = self._compression_seconds / max(1, self._num_compressions)
            return CompressionStats(
                compressed_caches=len(ratios),
                memory_saved_bytes=freed_bytes,
                avg_compression_ratio=sum(ratios or [1.0]) / max(1, len(ratios)),
                avg_compression_time_ms=1e3 * mean_seconds,
            )

    def _require_queries(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError unless queries of a shape are those of the model that is cached."""
        geometry = self._geometry
        layers, heads, head_dim = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim
        if (
            len(shape) != 4
            or (shape[0], shape[3]) != (layers, head_dim)
            or not shape[2]
            or not shape[1]
            or shape[1] % heads
        ):
            raise ValueError(
                f"queries must be [{layers}, Hq, Q, {head_dim}], Hq a multiple of {heads} and Q at "
                f"least 1, got {list(shape)}. Pass those of every layer and query head."
            )

    def _plan(
        self, entry: Entry, ratio: float, method: CompressionMethod
    ) -> CompressionPlan | None:
        """Returns what becomes of a request; None if it is small enough, or raises."""
        shape, cache = entry.shape, self._cache
        num_blocks = cache.counts.blocks_for(entry.num_tokens)
        max_blocks = math.floor(ratio * num_blocks + 1e-9)
        if entry.num_blocks <= max_blocks:
            return None
        name = entry.request_id
        if method.token_format is not None and method.token_format < shape.token_format:
            raise CompressionError(
                f"Request {name!r} is written as {shape.token_format.name}, and is to become "
                f"{method.token_format.name}, which has more bits. Ask for a format of fewer."
            )
        sizes = cache.counts.block_sizes
        if method.token_format is not None and method.token_format not in sizes:
            cache.enable([method.token_format])  # Raises, and says why.
        plan = plan_compression(method, shape.num_tokens, shape.token_format, sizes, max_blocks)
        if plan is None:
            least = smallest_num_blocks(method, shape.num_tokens, shape.token_format, sizes)
            raise CompressionError(
                f"Request {name!r} is to take {ratio:g} of its {num_blocks} blocks, which is "
                f"{max_blocks}; it takes {entry.num_blocks}, and {method} leaves {least} at least. "
                "Ask for a larger ratio, or let it drop more: by a scorer, and fewer num_sinks and "
                "num_recent."
            )
        return plan

    def _compress(
        self,
        entry: Entry,
        plan: CompressionPlan,
        method: CompressionMethod,
        queries: jax.Array | None,
    ) -> None:
        cache, started = self._cache, time.perf_counter()
        num_new = cache.queries.num_blocks_to_compress(entry.seq_id, plan.num_blocks)
        # What is cached of it may stay while there is room beside; else it is written in place.
        shortage = max(0, num_new - self._room.num_blocks)
        num_forgone = min(shortage, self._prefixes.num_held_alone(entry))
        num_new -= num_forgone
        priority = entry.request.priority
        self._make_room(f"compress_cache of {entry.request_id!r}", num_new, priority, but=[entry])
        before = self._room.num_blocks
        self._prefixes.forgo(entry, num_forgone)
        cache.reserve(num_new)
        loss = cache.compress(entry.seq_id, plan, method, queries)
        self._prefixes.leave(entry)
        cache.settling.settle()
        loss = cache.device_state.read_back(loss)
        freed_bytes = (self._room.num_blocks - before) * cache.block_bytes
        seconds = time.perf_counter() - started
        self._num_compressions += 1
        self._compression_seconds += seconds
        entry.compression = self._report(entry, freed_bytes, seconds, loss)

    def _report(
        self, entry: Entry, freed_bytes: int, seconds: float, loss: Loss
    ) -> CompressionReport:
        shape, before = entry.shape, entry.compression
        return CompressionReport(
            token_format=shape.token_format,
            num_tokens=entry.num_tokens,
            num_kept_tokens=shape.num_tokens,
            ratio=self._ratio_of(entry),
            freed_bytes=freed_bytes + (before.freed_bytes if before is not None else 0),
            seconds=seconds,
            attention_error=float(loss.error.mean()),
            pruning_error=float(loss.pruning_error.mean()),
            fitting_error=float(loss.fitting_error.mean()),
        )

    def _ratio_of(self, entry: Entry) -> float:
        """Returns the bytes that a request takes over those that it would take uncompressed."""
        return entry.num_blocks / self._cache.counts.blocks_for(entry.num_tokens)
