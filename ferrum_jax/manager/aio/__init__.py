"""The manager for an event loop, and how its calls wait for room."""

from ferrum_jax.manager.aio.manager import AsyncKvCacheManager

__all__ = ["AsyncKvCacheManager"]
