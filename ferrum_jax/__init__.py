"""A paged key/value cache for JAX decoding loops."""

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.config import (
    CacheConfig,
    CacheGeometry,
    CacheSpec,
    MemoryPressureThresholds,
    PrefixCacheConfig,
    load_config,
)
from ferrum_jax.errors import FerrumError
from ferrum_jax.interfaces import (
    AdvancedKvCacheManager,
    AllocationRequest,
    BlockAllocator,
    BlockTable,
    CacheEvictionPolicy,
    CacheGcStats,
    CacheHandleStats,
    CacheManagerStats,
    KvCacheHandle,
    KvCacheManager,
    MultiDeviceCacheManager,
)
from ferrum_jax.invariants import check_state
from ferrum_jax.manager import AsyncKvCacheManager, PagedKvCacheManager
from ferrum_jax.ops import allocate, copy_blocks, extend, fork, free, gather, share, truncate, write
from ferrum_jax.outcomes import require
from ferrum_jax.policies.requests import LruEvictionPolicy
from ferrum_jax.state import CacheState, init
from ferrum_jax.types import DataType, Device, MemoryPressure, Priority

__all__ = [
    "AdvancedKvCacheManager",
    "AllocationRequest",
    "AsyncKvCacheManager",
    "AttentionOptions",
    "BlockAllocator",
    "BlockTable",
    "CacheConfig",
    "CacheEvictionPolicy",
    "CacheGcStats",
    "CacheGeometry",
    "CacheHandleStats",
    "CacheManagerStats",
    "CacheSpec",
    "CacheState",
    "DataType",
    "Device",
    "FerrumError",
    "KvCacheHandle",
    "KvCacheManager",
    "LruEvictionPolicy",
    "MemoryPressure",
    "MemoryPressureThresholds",
    "MultiDeviceCacheManager",
    "PagedKvCacheManager",
    "PrefixCacheConfig",
    "Priority",
    "allocate",
    "check_state",
    "copy_blocks",
    "extend",
    "fork",
    "free",
    "gather",
    "init",
    "load_config",
    "paged_attention",
    "require",
    "share",
    "truncate",
    "write",
]
