"""The pools of a manager, and which of them has a request."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats, CompressionStats
from ferrum_jax.types import Device, MemoryPressure, RequestId

T = TypeVar("T")


class PoolSet:
    """One device's manager.

    Args:
      device: The manager.
    """

    def __init__(self, device: DeviceManager):
        self._device, self._home = device, contextlib.nullcontext(device)

    @property
    def first(self) -> DeviceManager:
        """The device that new requests name, if they name none."""
        return self._device

    @property
    def devices(self) -> list[DeviceManager]:
        """The managers of all devices."""
        return [self._device]

    def home_of(
        self, request_ids: Sequence[RequestId]
    ) -> contextlib.AbstractContextManager[DeviceManager]:
        """Returns a context that yields the device of requests, and keeps them there."""
        del request_ids  # There is one device.
        return self._home

    def home_of_handles(
        self, handles: Sequence[KvCacheHandle | None], device: Device | None = None
    ) -> contextlib.AbstractContextManager[DeviceManager]:
        """Returns a context that yields the device of handles, and keeps their requests there."""
        del handles, device  # There is one device.
        return self._home

    def on_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function with each device's manager."""
        return [call(self._device)]

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Starts a request."""
        return self._device.allocate(request)

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Returns whether `allocate` would succeed now."""
        return self._device.can_allocate(request)

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        return self._device.get_handle(request_id)

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function that is called after changes that may have made room.

        Returns:
          A function that removes the callback.
        """
        return self._device.add_room_listener(callback)

    @property
    def num_room_changes(self) -> int:
        """Changes so far that may have made room."""
        return self._device.access.num_room_changes

    @property
    def is_lost(self) -> bool:
        """Whether a step has consumed the cache, so that changes raise CacheLostError."""
        return self._device.is_lost

    @property
    def preempts(self) -> bool:
        """Whether less urgent requests may be swapped out to make room."""
        return self._device.reclaimer.preempts

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function that is called on every change of pressure."""
        with self._device.access.reading():
            self._device.access.pressure.set_callback(callback)

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        return self._device.stats()

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved."""
        return self._device.compression_stats()

    def gc(self) -> CacheGcStats:
        """Frees requests without a handle, and expired prefixes."""
        return self._device.gc()

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees."""
        self._device.check()

    def close(self) -> None:
        """Closes the manager of each device."""
        self._device.close()
