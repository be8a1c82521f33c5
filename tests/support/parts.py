"""The parts behind a manager, for tests of what no public method tells."""

from typing import Any

from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.requests import RequestTable
from ferrum_jax.types import Device


def devices_of(manager: Any) -> dict[Device, DeviceManager]:
    """The manager of each device."""
    return manager.pools.devices


def device_of(manager: Any) -> DeviceManager:
    """The manager of the only device, or the one given."""
    return manager if isinstance(manager, DeviceManager) else manager.pools.first


def pool_of(manager: Any) -> DevicePool:
    """The pool of the only device."""
    return device_of(manager).pool


def requests_of(manager: Any) -> RequestTable:
    """The live requests of the only device."""
    return device_of(manager).requests


def store_of(manager: Any) -> Any:
    """The store of what is swapped out of the only device."""
    return device_of(manager).swapping._store
