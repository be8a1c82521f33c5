"""The pools of several devices: which of them has a request, and calls over all of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from ferrum_jax.config import CacheConfig
from ferrum_jax.errors import (
    GeometryMismatchError,
    OutOfBlocksError,
    OutOfRowsError,
)
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.device.request_table import absent_error
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.pools import Pools, names_of
from ferrum_jax.manager.refusals import require_new, require_open
from ferrum_jax.manager.signals import PressureMonitor
from ferrum_jax.records import AllocationRequest
from ferrum_jax.types import Device, MemoryPressure, Priority, RequestId

T = TypeVar("T")


class SeveralPools(Pools):
    """A pool on each of several devices. Thread-safe.

    A call about one device holds that device's lock alone. A call about several devices, moves
    above all, runs in one thread at a time.

    Args:
      config: The pools: one per target device.
      geometry: The model, and the limits of a request, on each device.
      options: How each device's manager works. Each has a copy of the preemption policy and its
        own directory in the directory of the tiers.

    Raises:
      ValueError: If a mesh is given.
    """

    def __init__(self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions):
        if options.mesh is not None:
            raise ValueError(
                "mesh is for one pool over several devices, and this manager has a pool on each. "
                "Use a PagedKvCacheManager, or leave mesh out."
            )
        managers: dict[Device, DeviceManager] = {}
        for device in config.target_devices:
            alone = dataclasses.replace(config, target_devices=(device,), enable_multi_device=False)
            managers[device] = DeviceManager(alone, geometry, _options_for(device, options))
        super().__init__(managers)
        counts = [manager.pool.counts for manager in self.devices.values()]
        self._no_blocks = counts[0].none
        self._max_blocks = sum((it.max_blocks for it in counts), self._no_blocks)
        self._pressure = PressureMonitor(config.pressure_thresholds)
        self._observing = threading.Lock()
        self._moving = threading.RLock()
        self._this_thread = threading.local()
        self._is_closed = False

    # Finding a request's device.

    @contextlib.contextmanager
    def home_of(
        self, requests: Sequence[RequestLike], device: Device | None = None
    ) -> Iterator[DeviceManager]:
        """Keeps requests on their one device, and gives that device's manager.

        Args:
          requests: Requests that must all be on one device; without any, it is the first.
          device: That device; any if absent.

        Raises:
          UnknownRequestError: If a request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
          GeometryMismatchError: If the requests are on several devices, or not on `device`.
        """
        self._require_use()
        if not requests and device is None:
            device = self.preference[0]
        while True:
            manager = self.devices[self._device_of_all(requests, device)]
            with self._observing_pressure(), manager.access.reading():
                if all(request in manager.requests for request in requests):  # Or it has moved.
                    yield manager
                    return

    @contextlib.contextmanager
    def home_of_step(
        self, requests: Iterable[RequestLike | None], device: Device | None
    ) -> Iterator[DeviceManager]:
        """Like `home_of`, for a step; refuses other calls of this thread meanwhile.

        They might wait for another device, while other threads wait for the step.

        Args:
          requests: Requests that must all be on one device; None is ignored.
          device: That device, which must be named if there is no request.
        """
        self._require_use()
        named = [request for request in requests if request is not None]
        if not named:
            device = self._device_of_all(named, device)
        with self.home_of(named, device) as home:
            self._this_thread.is_in_step = True
            try:
                yield home
            finally:
                self._this_thread.is_in_step = False

    def find(self, request: RequestLike) -> Device | None:
        """Returns the device of a live request, or None."""
        device = self.seen_on(request)
        if device is None:
            self._require_use()
            with self._moving:  # Pressure is not observed: a caller may hold that lock already.
                device = self.seen_on(request)
        return device

    def device_of(self, request: RequestLike) -> Device:
        """Returns the device of a live request; raises what `RequestTable.known` raises."""
        device = self.find(request)
        if device is None:
            raise absent_error(request, f"on any of {names_of(self.devices)}")
        return device

    def set_preference(self, devices: Sequence[Device]) -> None:
        """Sets the devices that a new request tries; calls that wait for room try again."""
        with self.unmoved():
            self.preference = tuple(devices)
        for manager in self.devices.values():
            manager.access.listeners.notify()

    # Requests.

    def allocate(
        self, request: AllocationRequest, exclude: Collection[Device] = ()
    ) -> PagedKvCacheHandle:
        """Starts a request on the first device that has room."""
        with self.unmoved():
            self.manager_on(request.device)
            home = self.seen_on(request.request_id)  # A live request is refused on its device.
            tried = [each for each in self.devices_for(request) if each not in exclude]
            device = home or self._device_for(request, tried) or next(iter(tried), None)
            if device is None:
                raise OutOfBlocksError(
                    f"Request {request.request_id!r} may go to none of {names_of(self.devices)}. "
                    "Exclude fewer devices."
                )
            try:
                with self.devices[device].access.changing():
                    return self.devices[device].start(_for_device(request, device))
            except (OutOfBlocksError, OutOfRowsError) as error:
                others = names_of(other for other in tried if other != device)
                also = f"; nor has {others} room" if others else ""
                raise type(error)(f"{error} This is so on {device}{also}.") from error

    def can_allocate(self, request: AllocationRequest, exclude: Collection[Device] = ()) -> bool:
        """Returns whether `allocate` would succeed now; see there."""
        with self.unmoved():
            if request.device not in self.devices or self.seen_on(request.request_id):
                return False
            tried = [each for each in self.devices_for(request) if each not in exclude]
            return self._device_for(request, tried) is not None

    def fork(self, source: RequestLike, new_ids: Sequence[RequestId]) -> list[PagedKvCacheHandle]:
        """Starts requests with all tokens of another one, on its device."""
        with self.unmoved():
            device = self.device_of(source)
            require_new(new_ids, [name for name in new_ids if self.seen_on(name)])
            with self.devices[device].access.changing():
                return self.devices[device].fork(source, new_ids)

    # Calls over all devices.

    @contextlib.contextmanager
    def unmoved(self) -> Iterator[None]:
        """Keeps other threads from moving and allocating."""
        self._require_use()
        with self._observing_pressure(), self._moving:
            yield

    def on_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function with each device's manager, whatever it raises for another one."""
        with self.unmoved():
            return _call_each(self.devices, call)

    def close(self) -> None:
        """Closes each device's manager."""
        if not self._is_closed:
            with self.unmoved(), interrupts.delayed():
                self._is_closed = True
                _call_each(self.devices, DeviceManager.close)

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the devices."""
        with self.unmoved():
            super().check()
            names = [r.request_id for manager in self.devices.values() for r in manager.requests]
            if len(set(names)) < len(names):
                raise AssertionError("A request is on two devices.")

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function called with each new level of pressure, of all blocks together."""
        self._pressure.set_callback(callback)

    @contextlib.contextmanager
    def _observing_pressure(self) -> Iterator[None]:
        """Afterwards calls the callback if all pools together are under another pressure."""
        try:
            yield
        finally:
            with self._observing:
                parts = (manager.access.blocks_in_use for manager in self.devices.values())
                level = self._pressure.observe(sum(parts, self._no_blocks), self._max_blocks)
            self._pressure.notify(level)

    def _require_use(self) -> None:
        """Raises RuntimeError if the manager is closed, or used inside a step of this thread."""
        require_open(self._is_closed)
        if getattr(self._this_thread, "is_in_step", False):
            raise RuntimeError(
                "The manager is used inside a step that it runs, while other threads may wait for "
                "that step. Ask before or after run."
            )

    def _device_of_all(self, requests: Sequence[RequestLike], device: Device | None) -> Device:
        """Returns the one device on which all requests are."""
        devices = {self.device_of(request): None for request in requests}
        if device is not None:
            self.manager_on(device)
            devices[device] = None
        if len(devices) != 1:
            raise GeometryMismatchError(
                "One call works on one device, and this one names "
                f"{names_of(devices) or 'none'}. Call once for each device, or use move_cache; "
                "without handles, name the device."
            )
        return next(iter(devices))

    def _device_for(
        self, request: AllocationRequest, candidates: Sequence[Device]
    ) -> Device | None:
        """Returns the device that takes a request, if any has room."""
        # No request is less urgent than `Low`, so that none is swapped out for such a request.
        patient = dataclasses.replace(request, priority=Priority.Low)
        for wanted in (patient, request):
            for device in candidates:
                with self.devices[device].access.reading():
                    if self.devices[device].can_start(_for_device(wanted, device)):
                        return device
        return None


def _call_each(devices: dict[Device, DeviceManager], call: Callable[[DeviceManager], T]) -> list[T]:
    """Calls a function with each device's manager, whatever it raises for another one."""
    results = list[T]()
    with interrupts.delayed(), contextlib.ExitStack() as calls:
        for manager in reversed(devices.values()):  # The last one is called first.
            calls.callback(lambda manager=manager: results.append(call(manager)))
    return results


def _for_device(request: AllocationRequest, device: Device) -> AllocationRequest:
    """Returns a request as it would be made for another device."""
    return dataclasses.replace(request, device=device)


def _options_for(device: Device, options: ManagerOptions) -> ManagerOptions:
    """Returns options with a policy and a directory for one device alone."""
    tiers = options.tiers
    if tiers.disk_directory is not None:
        directory = os.path.join(tiers.disk_directory, f"{device.platform}-{device.index}")
        tiers = dataclasses.replace(tiers, disk_directory=directory)
    policy = copy.deepcopy(options.preemption_policy)
    return dataclasses.replace(options, tiers=tiers, preemption_policy=policy)
