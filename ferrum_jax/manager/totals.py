"""Sums of the statistics of several devices."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from ferrum_jax.records import CacheGcStats, CacheManagerStats, CompressionStats


def total_stats(parts: Sequence[tuple[CacheManagerStats, int]]) -> CacheManagerStats:
    """Returns the sum of each number; the hit rate is the mean over all prompt tokens.

    Args:
      parts: The statistics of each device, and the prompt tokens that were looked up there.
    """
    total: dict[str, Any] = {
        field.name: sum(getattr(part, field.name) for part, _ in parts)
        for field in dataclasses.fields(CacheManagerStats)
    }
    total["cache_hit_rate"] = _mean((part.cache_hit_rate, count) for part, count in parts)
    return CacheManagerStats(**total)


def total_compression_stats(parts: Sequence[tuple[CompressionStats, int]]) -> CompressionStats:
    """Returns the sums, and the means over all requests and all compressions.

    Args:
      parts: The statistics of each device, and the compressions done so far there.
    """
    ratios = ((part.avg_compression_ratio, part.compressed_caches) for part, _ in parts)
    return CompressionStats(
        compressed_caches=sum(part.compressed_caches for part, _ in parts),
        memory_saved_bytes=sum(part.memory_saved_bytes for part, _ in parts),
        avg_compression_ratio=_mean(ratios, default=1.0),
        avg_compression_time_ms=_mean((part.avg_compression_time_ms, num) for part, num in parts),
    )


def total_gc_stats(parts: Sequence[CacheGcStats]) -> CacheGcStats:
    """Returns the sum of each number."""
    return CacheGcStats(
        memory_freed=sum(part.memory_freed for part in parts),
        caches_freed=sum(part.caches_freed for part in parts),
        gc_time_ms=sum(part.gc_time_ms for part in parts),
    )


def _mean(means: Iterable[tuple[float, int]], default: float = 0.0) -> float:
    """Returns the mean of everything counted, given the mean and the count of each part."""
    counted = [(mean, count) for mean, count in means if count]
    if len(counted) <= 1:
        return counted[0][0] if counted else default
    return sum(mean * count for mean, count in counted) / sum(count for _, count in counted)
