"""Private parts of managers that tests look at: each is named here, and in no other test."""

import threading
from typing import Any

import jax
import numpy as np

from ferrum_jax import CacheState, Device
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager import PagedKvCacheManager
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.device.request_table import RequestTable
from ferrum_jax.manager.front import ManagerFront
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.pools import Pools
from ferrum_jax.ops.transfer import BlockShape
from ferrum_jax.prefix.tree import Node, TreeBlock
from ferrum_jax.tiers import TieredStore
from ferrum_jax.tiers.disk import _name_of
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK, RequestId


class PartManager(PagedKvCacheManager):
    """The manager of one device of several, as if it were alone."""

    def __init__(self, device: DeviceManager):
        self._device = device
        ManagerFront.__init__(self, Pools({device.pool.device: device}))


def devices_of(manager: Any) -> dict[Device, PagedKvCacheManager]:
    """A manager of each device behind a manager."""
    return {device: PartManager(part) for device, part in manager.pools.devices.items()}


def device_of(manager: Any) -> DeviceManager:
    """The manager of the only device, or the one given."""
    return manager if isinstance(manager, DeviceManager) else manager.pools.first


def pool_of(manager: Any) -> DevicePool:
    """The pool of the only device."""
    return device_of(manager).pool


def requests_of(manager: Any) -> RequestTable:
    """The live requests of the only device."""
    return device_of(manager).requests


def state_of(manager: Any) -> CacheState:
    """The state on the device, without the checks that `run` makes."""
    return pool_of(manager).state


def wait_for_device(manager: Any) -> None:
    """Waits until the device has computed the state; the manager does not notice."""
    jax.block_until_ready(state_of(manager))


def taken_blocks(manager: Any) -> list[int]:
    """The blocks of `allocate_blocks` that are not freed, in ascending order."""
    return sorted(pool_of(manager).counts.taken)


def num_free(manager: Any) -> int:
    """Free blocks as the host counts them, without the checks that a call makes."""
    return pool_of(manager).counts.num_free.total


def row_blocks(manager: Any) -> dict[RequestId, list[int]]:
    """The blocks of each request that is on the device, group by group, as the tables have them."""
    rows = group_blocks(manager)
    return {name: [b for row in rows[name] for b in row if b != NULL_BLOCK] for name in rows}


def group_blocks(manager: Any) -> dict[RequestId, list[list[int]]]:
    """Each request's blocks in each layer group, at their logical indices; -1 for released ones.

    The ids are those of the host, which differ between pools.
    """
    parts = []
    pairs = zip(state_of(manager).page_tables, pool_of(manager).counts.ids.firsts, strict=True)
    for tables, first in pairs:
        ids = np.asarray(tables.block_ids)
        ids = np.where(ids == NULL_BLOCK, NULL_BLOCK, ids + first)
        parts.append(ids.reshape(len(tables.windows), -1, ids.shape[1]))
    table = np.concatenate(parts)
    return {
        request.request_id: [_without_end(row) for row in table[:, request.seq_id].tolist()]
        for request in requests_of(manager)
        if request.is_resident
    }


def _without_end(row: list[int]) -> list[int]:
    """A row of a table without `NULL_BLOCK` at its end."""
    return row[: max((i for i, b in enumerate(row, start=1) if b != NULL_BLOCK), default=0)]


def cached_blocks(manager: Any) -> dict[tuple[Any, tuple[int, ...]], tuple[Node, TreeBlock]]:
    """Each cached block and its node, by salt and all tokens up to the block's end.

    In place of the salt, it is salt and version if there is a version of the weights.
    """
    cached, size = {}, pool_of(manager).counts.block_size
    for node in device_of(manager).prefixes.cache.forest.nodes():
        path = list(node.path())[::-1]
        tokens = TokenIds.from_packed(b"".join(n.packed for n in path))
        for block in node.blocks:
            end = (block.logical_index + 1) * size
            key = node.root.key
            salt = key.salt if key.version is None else key
            cached[salt, tuple(tokens[:end])] = node, block
    return cached


def store_of(manager: Any) -> TieredStore:
    """The store of the requests that are swapped out."""
    return device_of(manager).swapping._store


def disk_format_of(manager: Any) -> BlockShape:
    """The format of the blocks that a manager swaps out."""
    (block_shape,) = store_of(manager).block_shapes
    return block_shape


def file_name_of(cache_id: str) -> str:
    """The name of the file of a request in a disk tier: of its blocks in the first pool."""
    return _name_of(f"{cache_id}/0")


def set_disk_open(manager: Any, open_file: Any) -> None:
    """Replaces the function by which the disk tier of a manager opens its files."""
    disk = store_of(manager)._disk
    assert disk is not None
    disk._open = open_file


def is_locked(manager: Any) -> bool:
    """Whether another thread cannot use the manager of a device."""
    lock, got = device_of(manager).access._lock, list[bool]()

    def take() -> None:
        got.append(lock.acquire(blocking=False))
        if got[0]:
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not got[0]


def are_interrupts_delayed() -> bool:
    """Whether signal handlers are held back at this moment."""
    return bool(interrupts._handlers)
