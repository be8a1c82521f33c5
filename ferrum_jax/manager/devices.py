"""What a manager of several devices stands on: a manager for each, and which one has a request."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Self, TypeVar

from ferrum_jax.checks import check_items, check_key, check_type
from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.errors import GeometryMismatchError, InvalidHandleError, UnknownRequestError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.handle import require_handle
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.refusals import require_open
from ferrum_jax.manager.signals import PressureMonitor
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.records import AllocationRequest
from ferrum_jax.types import Device, Priority, RequestId

T = TypeVar("T")


class DeviceManagers(Uncopied):
    """A manager for each device, and the rules by which threads share them.

    What concerns one device is done under its manager's lock alone. What concerns several, moves
    above all, is done by one thread at a time.
    """

    def __init__(self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions):
        if options.mesh is not None:
            raise ValueError(
                "mesh is for one pool over several devices, and this manager has a pool on each. "
                "Use a PagedKvCacheManager, or leave mesh out."
            )
        self._managers: dict[Device, DeviceManager] = {}
        for device in config.target_devices:
            alone = dataclasses.replace(config, target_devices=(device,), enable_multi_device=False)
            manager = DeviceManager(alone, geometry, _options_for(device, options))
            self._managers[device] = manager
        self._preference = config.target_devices
        self._max_blocks = config.max_blocks * len(self._managers)
        self._pressure = PressureMonitor(config.pressure_thresholds)
        self._observing = threading.Lock()
        self._moving = threading.RLock()
        self._this_thread = threading.local()
        self._is_closed = False

    def close(self) -> None:
        """Closes each device's manager; see `PagedKvCacheManager.close`."""
        if self._is_closed:
            return
        with self._while_nothing_moves(), interrupts.delayed():
            self._is_closed = True
            self._on_each(DeviceManager.close)

    def __enter__(self) -> Self:
        """Returns the manager itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes it."""
        self.close()

    @contextlib.contextmanager
    def _while_nothing_moves(self) -> Iterator[None]:
        """Keeps other threads from moving and allocating."""
        self._require_use()
        with self._telling_of_pressure(), self._moving:
            yield

    def _on_each(self, call: Callable[[DeviceManager], T]) -> list[T]:
        """Calls a function with each device's manager, whatever it raises for another one."""
        results = list[T]()
        with interrupts.delayed(), contextlib.ExitStack() as calls:
            for manager in reversed(self._managers.values()):  # The last one is called first.
                calls.callback(lambda manager=manager: results.append(call(manager)))
        return results

    @contextlib.contextmanager
    def _home_of(
        self, request_ids: Collection[RequestId], device: Device | None = None
    ) -> Iterator[DeviceManager]:
        """Keeps requests of one device where they are, and yields its manager.

        Args:
          request_ids: Who.
          device: The device; wherever they are if absent.
        """
        self._require_use()
        request_ids = check_items("request_ids", request_ids)
        while True:
            manager = self._managers[self._device_of_all(request_ids, device)]
            with self._telling_of_pressure(), manager.keeping(request_ids) as are_here:
                if are_here:  # Or one has moved meanwhile.
                    yield manager
                    return

    @contextlib.contextmanager
    def _telling_of_pressure(self) -> Iterator[None]:
        """Tells afterwards if all pools together are under another pressure."""
        try:
            yield
        finally:
            with self._observing:
                in_use = sum(
                    manager.access.num_blocks_in_use for manager in self._managers.values()
                )
                level = self._pressure.observe(in_use, self._max_blocks)
            self._pressure.notify(level)

    def _require_use(self) -> None:
        """Raises RuntimeError where the manager cannot be used just now, or any more."""
        require_open(self._is_closed)
        if getattr(self._this_thread, "is_in_step", False):
            raise RuntimeError(
                "The manager is used inside a step that it runs, while other threads may wait for "
                "that step. Ask before or after run."
            )

    def _manager_on(self, device: Device) -> DeviceManager:
        check_type("device", device, Device)
        if device not in self._managers:
            raise GeometryMismatchError(
                f"There is no pool on {device}; there are pools on {names_of(self._managers)}. "
                "Name one of these, or add the device to target_devices."
            )
        return self._managers[device]

    def _seen_on(self, request_id: RequestId) -> Device | None:
        """Returns where a request is seen; None also for one that is just moving."""
        check_key("request_id", request_id)
        for device, manager in self._managers.items():
            if manager.holds(request_id):
                return device
        return None

    def _found_on(self, request_id: RequestId) -> Device | None:
        """Returns where a request is, or None."""
        device = self._seen_on(request_id)
        if device is None:
            self._require_use()
            with self._moving:  # Pressure is not told: a caller may hold the lock already.
                device = self._seen_on(request_id)
        return device

    def _device_of(self, request_id: RequestId) -> Device:
        device = self._found_on(request_id)
        if device is None:
            raise UnknownRequestError(
                f"Request {request_id!r} is not live on any of {names_of(self._managers)}. "
                "It was never allocated here, or is deallocated already."
            )
        return device

    def _device_of_all(
        self, request_ids: Iterable[RequestId], device: Device | None = None
    ) -> Device:
        """Returns the one device on which requests are."""
        devices = {self._device_of(request_id): None for request_id in request_ids}
        if device is not None:
            self._manager_on(device)
            devices[device] = None
        if len(devices) != 1:
            raise GeometryMismatchError(
                "One call works on one device, and this one names "
                f"{names_of(devices) or 'none'}. Call once for each device, or use move_cache; "
                "without handles, name the device."
            )
        return next(iter(devices))

    def _ids_of(self, handles: Iterable[KvCacheHandle | None]) -> list[RequestId]:
        """Returns whose blocks are about to be used, or raises why they cannot be."""
        ids = []
        for handle in check_items("handles", handles):
            if handle is None:
                continue
            request_id = require_handle(handle).live_request().request_id
            if self._found_on(request_id) is None:
                raise InvalidHandleError(
                    f"{handle!r} belongs to another manager. Use the one that allocated it."
                )
            ids.append(request_id)
        return ids

    def _candidates(self, request: AllocationRequest) -> list[Device]:
        """Returns the devices that a request tries: the one that it names first."""
        self._manager_on(request.device)
        others = [device for device in self._preference if device != request.device]
        return [request.device, *others]

    def _device_for(self, request: AllocationRequest) -> Device | None:
        """Returns the device that takes a request, if any has room."""
        # Nobody is less urgent than the least urgent, so that nobody is swapped out for it.
        patient = dataclasses.replace(request, priority=Priority.Low)
        for wanted in (patient, request):
            for device in self._candidates(request):
                if self._managers[device].can_allocate(on_device(wanted, device)):
                    return device
        return None


def on_device(request: AllocationRequest, device: Device) -> AllocationRequest:
    """Returns a request as it would be for another device."""
    return dataclasses.replace(request, device=device)


def names_of(devices: Iterable[Device]) -> str:
    """Returns devices for a message."""
    return ", ".join(map(str, devices))


def _options_for(device: Device, options: ManagerOptions) -> ManagerOptions:
    """Returns options whose parts no other device's manager uses."""
    tiers = options.tiers
    if tiers.disk_directory is not None:
        directory = os.path.join(tiers.disk_directory, f"{device.platform}-{device.index}")
        tiers = dataclasses.replace(tiers, disk_directory=directory)
    policy = copy.deepcopy(options.preemption_policy)
    return dataclasses.replace(options, tiers=tiers, preemption_policy=policy)
