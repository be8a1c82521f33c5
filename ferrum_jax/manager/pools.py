"""The pools of a manager, by device: calls over all of them, and the pool of one device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias, TypeVar

from ferrum_jax.checks import check_type
from ferrum_jax.errors import GeometryMismatchError
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.totals import total_compression_stats, total_gc_stats, total_stats
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import AllocationRequest, CacheGcStats, CacheManagerStats, CompressionStats
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import Device, MemoryPressure, RequestId

T = TypeVar("T")
Home: TypeAlias = contextlib.AbstractContextManager[DeviceManager]
"""Keeps requests on their device for the length of a `with`, and gives the device's manager."""


class Pools:
    """The managers of devices. Here, every request is on the only one; see `SeveralPools`.

    Args:
      devices: The manager of each device.

    Attributes:
      devices: As given.
      preference: Devices that a new request tries, in this order.
    """

    def __init__(self, devices: dict[Device, DeviceManager]):
        self.devices, self.preference = devices, tuple(devices)
        self._home = contextlib.nullcontext(self.first)

    @property
    def first(self) -> DeviceManager:
        """The manager of the device that new requests try first."""
        return self.devices[self.preference[0]]

    def manager_on(self, device: Device) -> DeviceManager:
        """Returns the manager of a device; raises GeometryMismatchError if it has no pool."""
        check_type("device", device, Device)
        if device not in self.devices:
            raise GeometryMismatchError(
                f"There is no pool on {device}; there are pools on {names_of(self.devices)}. Name "
                "one of these, or add the device to target_devices."
            )
        return self.devices[device]

    # Finding a request's device.

    def home_of(self, requests: Sequence[RequestLike]) -> Home:
        """Keeps requests on their one device, and gives that device's manager."""
        del requests  # There is one device.
        return self._home

    def home_of_step(self, requests: Iterable[RequestLike | None], device: Device | None) -> Home:
        """Like `home_of`; raises GeometryMismatchError if `device` is another one."""
        del requests  # There is one device.
        if device is not None:
            self.manager_on(device)
        return self._home

    def handle_of(self, request: RequestLike) -> PagedKvCacheHandle:
        """Returns a new handle of a live request."""
        with self.home_of([request]) as device, device.access.reading():
            return PagedKvCacheHandle(device.requests.known(request))

    def seen_on(self, request: RequestLike) -> Device | None:
        """Returns the device of a live request, or None. Takes no lock: a move may hide it."""
        found = (d for d, manager in self.devices.items() if request in manager.requests)
        return next(found, None)

    def devices_for(self, request: AllocationRequest) -> list[Device]:
        """Returns the devices that a request tries: first the device that it names."""
        devices = dict.fromkeys([request.device, *self.preference])
        return [device for device in devices if device in self.devices]

    # Requests.

    def allocate(
        self, request: AllocationRequest, exclude: Collection[Device] = ()
    ) -> PagedKvCacheHandle:
        """Starts a request on the first device that has room.

        Args:
          request: The request to start.
          exclude: Devices that the request must not go to, if there are several.

        Raises:
          GeometryMismatchError: If the request names a device without a pool.
          OutOfBlocksError, OutOfRowsError: If no device has room; the message names the first.
        """
        del exclude
        with self.first.access.changing():
            return self.first.start(request)

    def can_allocate(self, request: AllocationRequest, exclude: Collection[Device] = ()) -> bool:
        """Returns whether `allocate` would succeed now; see there."""
        del exclude
        with self.first.access.reading():
            return self.first.can_start(request)

    def fork(self, source: RequestLike, new_ids: Sequence[RequestId]) -> list[PagedKvCacheHandle]:
        """Starts requests with all tokens of another one, on its device."""
        with self.first.access.changing():
            return self.first.fork(source, new_ids)

    # Calls over all devices.

    def on_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function with each device's manager, whatever it raises for another one."""
        return [call(self.first)]

    def read_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function that changes nothing with each device's manager, under its lock."""

        def read(device: DeviceManager) -> T:
            with device.access.reading():
                return call(device)

        return self.on_each(read)

    def change_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Changes each device by a function of its manager, under its lock."""

        def change(device: DeviceManager) -> T:
            with device.access.changing():
                return call(device)

        return self.on_each(change)

    def explain(self, token_ids: Sequence[int], salt: str | None) -> dict[Device, LookupReport]:
        """Returns what each device has cached of a prompt now, and why not more."""
        if salt is not None:
            check_type("cache_salt", salt, str)
        tokens = TokenIds(token_ids)
        reports = dict[Device, LookupReport]()
        for device, manager in self.devices.items():
            with manager.access.reading():
                reports[device] = manager.prefixes.explain(tokens, salt)
        return reports

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        return total_stats(self.read_each(lambda m: (m.stats(), m.prefixes.num_prompt_tokens)))

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved."""
        return total_compression_stats(
            self.read_each(lambda m: (m.compression.stats(), m.compression.num_compressions))
        )

    def gc(self) -> CacheGcStats:
        """Frees requests without a handle, and expired prefixes."""
        return total_gc_stats(self.change_each(DeviceManager.gc))

    def close(self) -> None:
        """Closes each device's manager."""
        self.first.close()

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the devices."""
        self.read_each(DeviceManager.check)

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function called with each new level of pressure, of all blocks together."""
        with self.first.access.reading():
            self.first.access.pressure.set_callback(callback)

    # Waiting for room.

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
        return any(manager.pool.is_lost for manager in self.devices.values())

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function called after each change that may have made room; returns its removal.

        With several devices, it may be called with the lock of the changed one held.
        """
        removals = contextlib.ExitStack()
        for manager in self.devices.values():
            with manager.access.reading():
                removals.callback(manager.access.listeners.add(callback))
        return removals.close


def names_of(devices: Iterable[Device]) -> str:
    """Returns the names of devices for a message."""
    return ", ".join(map(str, devices))
