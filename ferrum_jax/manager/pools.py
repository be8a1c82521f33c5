"""The pools of a manager, by device: calls over all of them, and the pool of one device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeVar

from ferrum_jax.checks import check_type
from ferrum_jax.errors import GeometryMismatchError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.totals import total_compression_stats, total_gc_stats, total_stats
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats, CompressionStats
from ferrum_jax.types import Device, MemoryPressure, RequestId

T = TypeVar("T")


class DeviceManagers:
    """The managers of devices, and calls over all of them.

    Args:
      devices: The manager of each device.

    Attributes:
      devices: As given.
    """

    def __init__(self, devices: dict[Device, DeviceManager]):
        self.devices = devices

    def manager_on(self, device: Device) -> DeviceManager:
        """Returns the manager of a device; raises GeometryMismatchError if it has no pool."""
        check_type("device", device, Device)
        if device not in self.devices:
            raise GeometryMismatchError(
                f"There is no pool on {device}; there are pools on {names_of(self.devices)}. Name "
                "one of these, or add the device to target_devices."
            )
        return self.devices[device]

    def on_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function with each device's manager."""
        return [call(manager) for manager in self.devices.values()]

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle; of each device, the oldest first."""
        return [pair for part in self.on_each(DeviceManager.list_handles) for pair in part]

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        return total_stats(self.on_each(lambda m: (m.stats(), m.prefixes.num_prompt_tokens)))

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved."""
        return total_compression_stats(
            self.on_each(lambda m: (m.compression_stats(), m.compression.num_compressions))
        )

    def gc(self) -> CacheGcStats:
        """Frees requests without a handle, and expired prefixes."""
        return total_gc_stats(self.on_each(DeviceManager.gc))

    @property
    def num_room_changes(self) -> int:
        """Changes so far, on any device, that may have made room."""
        return sum(manager.access.num_room_changes for manager in self.devices.values())

    @property
    def preempts(self) -> bool:
        """Whether less urgent requests are swapped out to make room, which copies bytes."""
        return any(manager.reclaimer.preempts for manager in self.devices.values())

    @property
    def is_lost(self) -> bool:
        """Whether a device's cache is lost, so that changes there raise CacheLostError."""
        return any(manager.is_lost for manager in self.devices.values())

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function called after each change that may have made room; returns its removal.

        With several devices, it may be called with the lock of the changed one held.
        """
        removals = [manager.add_room_listener(callback) for manager in self.devices.values()]

        def remove() -> None:
            for remove_one in removals:
                remove_one()

        return remove


class SinglePool(DeviceManagers):
    """One device's manager, where every request is; see `SeveralPools`.

    Args:
      first: The manager.

    Attributes:
      first: As given.
    """

    def __init__(self, first: DeviceManager):
        super().__init__({first.pool.device: first})
        self.first, self._home = first, contextlib.nullcontext(first)

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
        """Gives the manager; raises GeometryMismatchError if `device` is another one."""
        del handles  # There is one device.
        if device is not None:
            self.manager_on(device)
        return self._home

    def seen_on(self, request_id: RequestId) -> Device | None:
        """Returns the device of a live request, or None. Takes no lock."""
        return self.first.pool.device if self.first.holds(request_id) else None

    def devices_for(self, request: AllocationRequest) -> list[Device]:
        """Returns the one device."""
        del request  # There is one device.
        return list(self.devices)

    def allocate(
        self, request: AllocationRequest, exclude: Collection[Device] = ()
    ) -> PagedKvCacheHandle:
        """Starts a request; the one device is not excluded."""
        del exclude
        return self.first.allocate(request)

    def can_allocate(self, request: AllocationRequest, exclude: Collection[Device] = ()) -> bool:
        """Returns whether `allocate` would succeed now."""
        del exclude
        return self.first.can_allocate(request)

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        return self.first.get_handle(request_id)

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the device."""
        self.first.check()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function that is called on every change of pressure."""
        with self.first.access.reading():
            self.first.access.pressure.set_callback(callback)

    def close(self) -> None:
        """Closes the manager."""
        self.first.close()


def names_of(devices: Iterable[Device]) -> str:
    """Returns the names of devices for a message."""
    return ", ".join(map(str, devices))
