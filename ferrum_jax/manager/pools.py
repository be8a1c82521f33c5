"""The pool of a manager of one device, behind the methods that several pools have too."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from ferrum_jax.checks import check_type
from ferrum_jax.errors import GeometryMismatchError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats, CompressionStats
from ferrum_jax.types import Device, MemoryPressure, RequestId

T = TypeVar("T")


class SinglePool:
    """One device's manager, where every request is; see `SeveralPools`.

    Args:
      first: The manager.

    Attributes:
      first: As given.
      devices: The manager by its device.
    """

    def __init__(self, first: DeviceManager):
        self.first = first
        self.devices = {first.pool.device: first}
        self._home = contextlib.nullcontext(first)

    def home_of(
        self, request_ids: Sequence[RequestId]
    ) -> contextlib.AbstractContextManager[DeviceManager]:
        """Gives the manager."""
        del request_ids  # There is one device.
        return self._home

    def home_of_handles(
        self, handles: Sequence[KvCacheHandle]
    ) -> contextlib.AbstractContextManager[DeviceManager]:
        """Gives the manager."""
        del handles  # There is one device.
        return self._home

    def home_of_step(
        self, handles: Iterable[KvCacheHandle | None], device: Device | None
    ) -> contextlib.AbstractContextManager[DeviceManager]:
        """Gives the manager; raises GeometryMismatchError if `device` is another one's."""
        del handles  # There is one device.
        if device is not None:
            self.manager_on(device)
        return self._home

    def find(self, request_id: RequestId) -> Device | None:
        """Returns the device of a live request, or None."""
        return self.first.pool.device if self.first.holds(request_id) else None

    def manager_on(self, device: Device) -> DeviceManager:
        """Returns the manager; raises GeometryMismatchError if it is of another device."""
        return manager_on(device, self.devices)

    def devices_for(self, request: AllocationRequest) -> list[Device]:
        """Returns the one device."""
        del request  # There is one device.
        return list(self.devices)

    def allocate(
        self, request: AllocationRequest, exclude: Collection[Device] = ()
    ) -> PagedKvCacheHandle:
        """Starts a request, wherever it must not go."""
        del exclude  # There is one device.
        return self.first.allocate(request)

    def can_allocate(self, request: AllocationRequest, exclude: Collection[Device] = ()) -> bool:
        """Returns whether `allocate` would succeed now."""
        del exclude  # There is one device.
        return self.first.can_allocate(request)

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        return self.first.get_handle(request_id)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        return self.first.list_handles()

    def on_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function with the manager."""
        return [call(self.first)]

    def close(self) -> None:
        """Closes the manager."""
        self.first.close()

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        return self.first.stats()

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved."""
        return self.first.compression_stats()

    def gc(self) -> CacheGcStats:
        """Frees requests without a handle, and expired prefixes."""
        return self.first.gc()

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the device."""
        self.first.check()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function that is called on every change of pressure."""
        with self.first.access.reading():
            self.first.access.pressure.set_callback(callback)

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function called after each change that may have made room; returns its removal."""
        return self.first.add_room_listener(callback)

    @property
    def num_room_changes(self) -> int:
        """Changes so far that may have made room."""
        return self.first.access.num_room_changes

    @property
    def preempts(self) -> bool:
        """Whether less urgent requests are swapped out to make room, which copies bytes."""
        return self.first.reclaimer.preempts

    @property
    def is_lost(self) -> bool:
        """Whether the cache is lost, so that changes raise CacheLostError."""
        return self.first.is_lost


def manager_on(device: Device, managers: Mapping[Device, DeviceManager]) -> DeviceManager:
    """Returns the manager of a device; raises GeometryMismatchError if it has no pool."""
    check_type("device", device, Device)
    if device not in managers:
        raise GeometryMismatchError(
            f"There is no pool on {device}; there are pools on {names_of(managers)}. Name one of "
            "these, or add the device to target_devices."
        )
    return managers[device]


def names_of(devices: Iterable[Device]) -> str:
    """Returns the names of devices for a message."""
    return ", ".join(map(str, devices))
