"""The stateful facade: managers that keep caches by request id."""

from ferrum_jax.config import TierConfig
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.policies.blocks import Retention

__all__ = [
    "AsyncKvCacheManager",
    "ManagerOptions",
    "MultiDevicePagedKvCacheManager",
    "PagedKvCacheHandle",
    "PagedKvCacheManager",
    "RequestLike",
    "Retention",
    "TierConfig",
]
