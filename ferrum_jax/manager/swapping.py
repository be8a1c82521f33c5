"""Requests that leave the device for a while: their bytes wait in host memory, or on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from ferrum_jax.manager.device_cache import DeviceCache
from ferrum_jax.manager.handle import Entry
from ferrum_jax.manager.prefixes import Prefixes
from ferrum_jax.manager.rows import export_row, restore_row, stored_for
from ferrum_jax.tiers import TieredStore
from ferrum_jax.types import NULL_SEQ


class Swapping:
    """Moves requests between a device and a store. Not thread-safe.

    Args:
      blocks: The device's.
      prefixes: The prefix cache there, which a request leaves and joins again.
      store: Where the bytes wait.
    """

    def __init__(self, blocks: DeviceCache, prefixes: Prefixes, store: TieredStore):
        self._blocks, self._prefixes, self._store = blocks, prefixes, store

    @property
    def host_bytes(self) -> int:
        """Bytes that wait, in host memory and on disk."""
        stats = self._store.stats()
        return stats.host_used_bytes + stats.disk_used_bytes

    def keys(self) -> list[str]:
        """Returns the cache ids of what is stored."""
        return self._store.keys()

    def has_room_for(self, entries: Iterable[Entry]) -> bool:
        """Says whether the bytes of some requests could be stored."""
        stats, num_bytes = self._store.stats(), self._blocks.block_bytes
        needed = sum(entry.num_blocks * num_bytes for entry in entries)
        if stats.disk_budget_bytes is None:
            return True  # Only trying shows what the disk has.
        budgets = stats.host_budget_bytes + stats.disk_budget_bytes
        return needed <= budgets - stats.host_used_bytes - stats.disk_used_bytes

    def swap_out(self, entry: Entry) -> None:
        """Copies a request's bytes away and frees its blocks, as soon as the copy is ordered.

        Raises:
          OutOfHostMemoryError: If there is no room for them; the request stays.
        """
        shape, payload = entry.shape, export_row(self._blocks, entry.seq_id)
        self._store.put(entry.cache_id, payload, dataclasses.asdict(shape))
        self._prefixes.release(entry)
        self._blocks.free([entry.seq_id])
        entry.seq_id, entry.shape_away = NULL_SEQ, shape

    def swap_in(self, entry: Entry) -> None:
        """Brings a request's bytes back, bit for bit. There is room for them.

        Raises:
          CorruptFileError: If they were on disk, and are not what was written; it stays away.
        """
        payload, _ = self._store.get(entry.cache_id)
        entry.seq_id = restore_row(self._blocks, entry.shape_away, payload)
        self._store.drop(entry.cache_id)
        self._prefixes.renew(entry)

    def hand_over(self, entry: Entry, other: Swapping) -> None:
        """Gives the bytes of a request that is away to the store of another device.

        Raises:
          OutOfHostMemoryError: If there is no room for them; they stay.
          CorruptFileError: If they were on disk, and are not what was written; they stay.
        """
        payload, metadata = self._store.get(entry.cache_id)
        other._store.put(entry.cache_id, stored_for(other._blocks, payload), metadata)
        self._store.drop(entry.cache_id)

    def forget(self, entry: Entry) -> None:
        """Drops the bytes of a request that is over."""
        self._store.drop(entry.cache_id)
