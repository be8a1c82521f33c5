"""Sums of the statistics of several devices."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ferrum_jax.records import CacheGcStats, CacheManagerStats, CompressionStats

T = TypeVar("T", CacheManagerStats, CompressionStats, CacheGcStats)


def total_stats(parts: Sequence[tuple[CacheManagerStats, int]]) -> CacheManagerStats:
    """Returns the sum of each number; the hit rate is the mean over all prompt tokens.

    Args:
      parts: The statistics of each device, and the prompt tokens that were looked up there.
    """
    total = _sum([part for part, _ in parts])
    mean = _mean((part.cache_hit_rate, count) for part, count in parts)
    return dataclasses.replace(total, cache_hit_rate=mean)


def total_compression_stats(parts: Sequence[tuple[CompressionStats, int]]) -> CompressionStats:
    """Returns the sums, and the means over all requests and all compressions.

    Args:
      parts: The statistics of each device, and the compressions done so far there.
    """
    ratios = ((part.avg_compression_ratio, part.compressed_caches) for part, _ in parts)
    return dataclasses.replace(
        _sum([part for part, _ in parts]),
        avg_compression_ratio=_mean(ratios, default=1.0),
        avg_compression_time_ms=_mean((part.avg_compression_time_ms, num) for part, num in parts),
    )


def total_gc_stats(parts: Sequence[CacheGcStats]) -> CacheGcStats:
    """Returns the sum of each number."""
    return _sum(parts)


def _sum(parts: Sequence[T]) -> T:
    names = [field.name for field in dataclasses.fields(parts[0])]
    sums = {name: _sum_of([getattr(part, name) for part in parts]) for name in names}
    return type(parts[0])(**sums)


def _sum_of(values: Sequence[Any]) -> Any:
    """Returns the sum of numbers, or of each number of mappings with equal keys."""
    if isinstance(values[0], Mapping):
        return {key: sum(value[key] for value in values) for key in values[0]}
    return sum(values)


def _mean(means: Iterable[tuple[float, int]], default: float = 0.0) -> float:
    """Returns the mean of everything counted, given the mean and the count of each part."""
    counted = [(mean, count) for mean, count in means if count]
    if len(counted) <= 1:
        return counted[0][0] if counted else default
    return sum(mean * count for mean, count in counted) / sum(count for _, count in counted)
