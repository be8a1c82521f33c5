"""A paged key/value cache for JAX decoding loops.

`__all__` lists what a program of yours types. The contract's abstract classes and the records of
statistics are in `ferrum_jax.interfaces`; they can be imported from here too, for ported code.
"""

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.compression import CompressionMethod
from ferrum_jax.config import CacheConfig, PrefixCacheConfig, TierConfig, load_config
from ferrum_jax.errors import FerrumError, OutOfBlocksError, OutOfRowsError, WaitTimeoutError
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.integrations import (
    Engine,
    EngineOptions,
    GenerateOptions,
    PagedBatch,
    RequestOptions,
    Sampling,
    ServeOptions,
    attend_new,
    generate,
    prefill,
    rollout,
    serve,
)
from ferrum_jax.interfaces import *
from ferrum_jax.invariants import check_state
from ferrum_jax.layers import LayerGroup, equal_sized
from ferrum_jax.manager import (
    AsyncKvCacheManager,
    ManagerOptions,
    MultiDevicePagedKvCacheManager,
    PagedKvCacheManager,
)
from ferrum_jax.ops import allocate, copy_blocks, extend, fork, free, gather, share, truncate, write
from ferrum_jax.outcomes import require
from ferrum_jax.payload import KeyValue
from ferrum_jax.policies.requests import LruEvictionPolicy
from ferrum_jax.records import AllocationRequest
from ferrum_jax.spec import CacheSpec
from ferrum_jax.state import CacheState, init
from ferrum_jax.types import DataType, Device, Priority

__all__ = [
    "AllocationRequest",
    "AsyncKvCacheManager",
    "AttentionOptions",
    "CacheConfig",
    "CacheGeometry",
    "CacheSpec",
    "CacheState",
    "CompressionMethod",
    "DataType",
    "Device",
    "Engine",
    "EngineOptions",
    "FerrumError",
    "GenerateOptions",
    "KeyValue",
    "LayerGroup",
    "LruEvictionPolicy",
    "ManagerOptions",
    "MultiDevicePagedKvCacheManager",
    "OutOfBlocksError",
    "OutOfRowsError",
    "PagedBatch",
    "PagedKvCacheManager",
    "PrefixCacheConfig",
    "Priority",
    "RequestOptions",
    "Sampling",
    "ServeOptions",
    "TierConfig",
    "WaitTimeoutError",
    "allocate",
    "attend_new",
    "check_state",
    "copy_blocks",
    "equal_sized",
    "extend",
    "fork",
    "free",
    "gather",
    "generate",
    "init",
    "load_config",
    "paged_attention",
    "prefill",
    "require",
    "rollout",
    "serve",
    "share",
    "truncate",
    "write",
]
