"""Sums of the statistics of several devices."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ferrum_jax.records import CacheGcStats, CacheManagerStats, CompressionStats


def total_stats(
    parts: Sequence[CacheManagerStats], num_prompt_tokens: Sequence[int]
) -> CacheManagerStats:
    """Returns the sum of each number; the hit rate is the mean over all prompt tokens.

    Args:
      parts: The statistics of each device.
      num_prompt_tokens: Prompt tokens looked up on each device.
    """
    total: dict[str, Any] = {
        field.name: sum(getattr(part, field.name) for part in parts)
        for field in dataclasses.fields(CacheManagerStats)
    }
    rates = [part.cache_hit_rate for part in parts]
    total["cache_hit_rate"] = _mean(rates, num_prompt_tokens, default=0.0)
    return CacheManagerStats(**total)


def total_compression_stats(
    parts: Sequence[CompressionStats], num_compressions: Sequence[int]
) -> CompressionStats:
    """Returns the sums, and the means over all requests and all compressions.

    Args:
      parts: The statistics of each device.
      num_compressions: Compressions done so far on each device.
    """
    counts = [part.compressed_caches for part in parts]
    ratios = [part.avg_compression_ratio for part in parts]
    milliseconds = [part.avg_compression_time_ms for part in parts]
    return CompressionStats(
        compressed_caches=sum(counts),
        memory_saved_bytes=sum(part.memory_saved_bytes for part in parts),
        avg_compression_ratio=_mean(ratios, counts, default=1.0),
        avg_compression_time_ms=_mean(milliseconds, num_compressions, default=0.0),
    )


def total_gc_stats(parts: Sequence[CacheGcStats]) -> CacheGcStats:
    """Returns the sum of each number."""
    return CacheGcStats(
        memory_freed=sum(part.memory_freed for part in parts),
        caches_freed=sum(part.caches_freed for part in parts),
        gc_time_ms=sum(part.gc_time_ms for part in parts),
    )


def _mean(means: Sequence[float], counts: Sequence[int], *, default: float) -> float:
    """Returns the mean of everything counted, given the mean and the count of each part."""
    total = sum(mean * count for mean, count in zip(means, counts, strict=True))
    return total / sum(counts) if any(counts) else default
