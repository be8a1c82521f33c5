"""The methods of the manager for an event loop that answer at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.balance import CacheMove
from ferrum_jax.manager.front import ManagerFront
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.records import AllocationRequest, CacheManagerStats, CompressionStats
from ferrum_jax.types import Device, MemoryPressure, Priority, RequestId

M = TypeVar("M", PagedKvCacheManager, MultiDevicePagedKvCacheManager)


class SyncQueries(Uncopied, Generic[M]):
    """Non-blocking queries of a wrapped manager.

    They block only while another thread holds the manager's lock. Methods of only one of the two
    managers raise TypeError over the other one.

    Args:
      manager: The manager to wrap.
    """

    def __init__(self, manager: M):
        if not isinstance(manager, ManagerFront):
            raise ValueError(
                "manager must be a PagedKvCacheManager or a MultiDevicePagedKvCacheManager, got "
                f"{manager!r}."
            )
        self._manager: M = manager

    @property
    def manager(self) -> M:
        """The wrapped manager."""
        return self._manager

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int | None = None,
        max_sequence_length: int | None = None,
        priority: Priority = Priority.Normal,
        *,
        device: Device | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> AllocationRequest:
        """Returns a request of the pool's geometry; see `PagedKvCacheManager.new_request`."""
        sizes = initial_tokens, max_sequence_length, priority
        prompt = {"prompt_token_ids": prompt_token_ids, "cache_salt": cache_salt}
        if device is None:
            return self._manager.new_request(request_id, *sizes, **prompt)
        return self._several("device").new_request(request_id, *sizes, device=device, **prompt)

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None; see `PagedKvCacheManager.get_handle`."""
        return self._manager.get_handle(request_id)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        return self._manager.list_handles()

    def stats(self) -> CacheManagerStats:
        """Returns what is held at this moment; a wait counts as one failure at most."""
        return self._manager.stats()

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved; see `PagedKvCacheManager.compression_stats`."""
        return self._manager.compression_stats()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function called with each new level of pressure.

        Args:
          callback: Called on the loop, or in the thread that made the change.
        """
        self._manager.set_pressure_callback(callback)

    # One device only.

    def free_block_count(self) -> int:
        """Returns how many blocks of the present pool are free; it may still grow."""
        return self._one("free_block_count").free_block_count()

    def total_block_count(self) -> int:
        """Returns how many blocks the pool has at present."""
        return self._one("total_block_count").total_block_count()

    def block_size(self) -> int:
        """Returns the tokens per block."""
        return self._one("block_size").block_size()

    # Several devices only.

    def supported_devices(self) -> list[Device]:
        """Returns the devices that have a pool."""
        return self._several("supported_devices").supported_devices()

    def get_cache_device(self, request_id: RequestId) -> Device | None:
        """Returns the device of a live request; see `MultiDevicePagedKvCacheManager`."""
        return self._several("get_cache_device").get_cache_device(request_id)

    def device_stats(self) -> dict[Device, CacheManagerStats]:
        """Returns each device's part of `stats`."""
        return self._several("device_stats").device_stats()

    @property
    def last_rebalance(self) -> tuple[CacheMove, ...]:
        """The moves of the last `rebalance_devices`, in order."""
        return self._several("last_rebalance").last_rebalance

    def _one(self, method: str) -> PagedKvCacheManager:
        """Returns the manager of one device, or raises TypeError."""
        if not isinstance(self._manager, PagedKvCacheManager):
            raise TypeError(
                f"{method} is for a PagedKvCacheManager, and this manager wraps one of several "
                "devices."
            )
        return self._manager

    def _several(self, method: str) -> MultiDevicePagedKvCacheManager:
        """Returns the manager of several devices, or raises TypeError."""
        if not isinstance(self._manager, MultiDevicePagedKvCacheManager):
            raise TypeError(
                f"{method} is for a MultiDevicePagedKvCacheManager, and this manager wraps one of "
                "one device."
            )
        return self._manager
