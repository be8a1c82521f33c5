"""The stateful facade: managers that keep caches by request id."""

from ferrum_jax.manager.async_manager import AsyncKvCacheManager
from ferrum_jax.manager.core import ManagerOptions
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.manager import PagedKvCacheManager

__all__ = [
    "AsyncKvCacheManager",
    "ManagerOptions",
    "PagedKvCacheHandle",
    "PagedKvCacheManager",
]
