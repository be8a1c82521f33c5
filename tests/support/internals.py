"""Private parts of managers that tests look at: each is named here, and in no other test."""

import threading
from typing import Any

import jax

from ferrum_jax import CacheState, Device, PagedKvCacheManager
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.handle import Entry
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.ops.transfer import BlockShape
from ferrum_jax.prefix.forest import root_of
from ferrum_jax.prefix.tree import Node, TreeBlock
from ferrum_jax.tiers import TieredStore
from ferrum_jax.tiers.disk import _name_of
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import RequestId


def pools_of(
    manager: PagedKvCacheManager | MultiDevicePagedKvCacheManager,
) -> dict[Device, PagedKvCacheManager]:
    """The managers of one device that a manager consists of."""
    if isinstance(manager, PagedKvCacheManager):
        return {manager._cache.device: manager}
    return dict(manager._managers)


def state_of(manager: PagedKvCacheManager) -> CacheState:
    """The state on the device, without the checks that `run` makes."""
    return manager._cache.state


def wait_for_device(manager: PagedKvCacheManager) -> None:
    """Waits until the device has computed the state; the manager does not notice."""
    jax.block_until_ready(state_of(manager))


def taken_blocks(manager: PagedKvCacheManager) -> list[int]:
    """The blocks of `allocate_blocks` that are not freed, in ascending order."""
    return sorted(manager._cache.taken)


def entries_of(manager: PagedKvCacheManager) -> dict[RequestId, Entry]:
    """The record of each live request, swapped out or not."""
    return dict(manager._entries)


def num_free(manager: PagedKvCacheManager) -> int:
    """Free blocks as the host counts them, without the checks that a call makes."""
    return manager._cache.num_free


def row_blocks(manager: PagedKvCacheManager) -> dict[RequestId, list[int]]:
    """The blocks of each request that is on the device, as the tables have them."""
    rows = manager._cache.all_row_blocks()
    entries = entries_of(manager).items()
    return {name: rows.get(e.seq_id, []) for name, e in entries if e.is_resident}


def cached_blocks(
    manager: PagedKvCacheManager,
) -> dict[tuple[str | None, tuple[int, ...]], tuple[Node, TreeBlock]]:
    """Each cached block and its node, by salt and all tokens up to the block's end."""
    cached = {}
    for node in manager._prefixes.cache.forest.nodes():
        path = list(node.path())[::-1]
        tokens = TokenIds.from_packed(b"".join(n.packed for n in path))
        for block in node.blocks:
            end = (block.logical_index + 1) * manager.block_size()
            cached[root_of(node).salt, tuple(tokens[:end])] = node, block
    return cached


def store_of(manager: PagedKvCacheManager) -> TieredStore:
    """The store of the requests that are swapped out."""
    return manager._swapping._store


def disk_format_of(manager: PagedKvCacheManager) -> BlockShape:
    """The format of the blocks that a manager swaps out."""
    return store_of(manager)._format


def file_name_of(cache_id: str) -> str:
    """The name of the file of a request in a disk tier."""
    return _name_of(cache_id)


def set_disk_open(manager: PagedKvCacheManager, open_file: Any) -> None:
    """Replaces the function by which the disk tier of a manager opens its files."""
    disk = store_of(manager)._disk
    assert disk is not None
    disk._open = open_file


def is_locked(manager: PagedKvCacheManager) -> bool:
    """Whether another thread cannot use a manager."""
    got: list[bool] = []

    def take() -> None:
        got.append(manager._lock.acquire(blocking=False))
        if got[0]:
            manager._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not got[0]


def are_interrupts_delayed() -> bool:
    """Whether signal handlers are held back at this moment."""
    return bool(interrupts._handlers)
