"""Requests that leave the device for a while: their bytes wait in host memory, or on disk."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from ferrum_jax.config import TierConfig
from ferrum_jax.manager.handle import Entry
from ferrum_jax.manager.pool import DevicePool, stored_for
from ferrum_jax.manager.prefixes import Prefixes
from ferrum_jax.ops.transfer import BlockFormat, BlockPayload
from ferrum_jax.tiers import TieredStore
from ferrum_jax.types import NULL_SEQ


class Swapping:
    """Moves requests between a device and a store. Not thread-safe.

    Args:
      blocks: The device's.
      prefixes: The prefix cache there, which a request leaves and joins again.
      store: Where the bytes wait.
    """

    def __init__(self, blocks: DevicePool, prefixes: Prefixes, store: TieredStore):
        self._blocks, self._prefixes, self._store = blocks, prefixes, store

    @property
    def host_bytes(self) -> int:
        """Bytes that wait, in host memory and on disk."""
        stats = self._store.stats()
        return stats.host_used_bytes + stats.disk_used_bytes

    def holds_just(self, entries: Collection[Entry]) -> bool:
        """Says whether what is stored belongs to these requests, and all of them; reads no file."""
        is_each_held = all(entry.cache_id in self._store for entry in entries)
        return is_each_held and len(entries) == len(self._store)

    def has_room_for(self, entries: Iterable[Entry]) -> bool:
        """Says whether the bytes of some requests could be stored, one after the other."""
        return self._store.has_room_for(
            {entry.cache_id: (entry.num_blocks, _metadata_of(entry)) for entry in entries}
        )

    def swap_out(self, entries: Sequence[Entry]) -> None:
        """Copies the bytes of requests away, then frees their blocks; all of them, or none.

        Blocks are freed as soon as the copies to host memory are ordered, and the files written;
        what is written goes through host memory chunk by chunk.

        Raises:
          OutOfHostMemoryError: If there is no room for them; all requests stay. Others that wait
            may have moved to disk for them.
        """
        stored, shapes = [], [entry.shape for entry in entries]
        try:
            for entry in entries:
                payload = self._blocks.queries.stream_row(entry.seq_id)
                self._store.put(entry.cache_id, payload, _metadata_of(entry))
                stored.append(entry)
            if entries:
                self._blocks.free([entry.seq_id for entry in entries])
        except BaseException:
            for entry in stored:
                self._store.drop(entry.cache_id)
            raise
        for entry, shape in zip(entries, shapes, strict=True):
            entry.shape_away, entry.seq_id = shape, NULL_SEQ
            entry.blocks_away = entry.lease.blocks
            self._prefixes.release(entry)

    def read(self, entry: Entry, *, checks: bool) -> BlockPayload:
        """Returns the bytes of a request that is away; they stay.

        Args:
          entry: The request.
          checks: Whether a file is to be read once, and found sound, before this returns. It is
            checked again as it is read for use.

        Raises:
          CorruptFileError: If they are on disk, and are not what was written.
        """
        payload, _ = self._store.stream(entry.cache_id)
        if checks and payload.is_stream:
            collections.deque(payload.chunks, maxlen=0)
        return payload

    def swap_in(self, entry: Entry, payload: BlockPayload) -> None:
        """Brings a request back with what `read` returned, bit for bit. There is room for it.

        Raises:
          CorruptFileError: If it is on disk, and is not what was written; it stays away.
        """
        seq_id = self._blocks.restore_row(entry.shape_away, payload)
        with self._blocks.freed_on_error(seq_id):
            self._prefixes.renew(entry, seq_id)
        entry.seq_id = seq_id
        self._store.drop(entry.cache_id)

    def hand_over(self, entry: Entry, other: Swapping) -> None:
        """Gives the bytes of a request that is away to the store of another device.

        Raises:
          OutOfHostMemoryError: If there is no room for them; they stay.
          CorruptFileError: If they were on disk, and are not what was written; they stay.
        """
        payload, metadata = self._store.stream(entry.cache_id)
        other._store.put(entry.cache_id, stored_for(other._blocks.state.pool, payload), metadata)
        self._store.drop(entry.cache_id)

    def forget(self, entry: Entry) -> None:
        """Drops the bytes of a request that is over."""
        self._store.drop(entry.cache_id)

    def close(self) -> None:
        """Drops what is left, and gives the directory back, if there is one."""
        self._store.clear()
        self._store.close()


def make_store(blocks: DevicePool, tiers: TierConfig) -> TieredStore:
    """Returns an empty store for the requests of a device's cache."""
    host_bytes = tiers.host_budget_bytes
    if host_bytes is None:
        host_bytes = blocks.counts.max_blocks * blocks.block_bytes
    store = TieredStore(
        BlockFormat.of(blocks.state.pool),
        host_bytes,
        disk_directory=tiers.disk_directory,
        disk_budget_bytes=tiers.disk_budget_bytes,
        keeps_files=False,  # Another process cannot know its requests.
    )
    store.clear()  # What an earlier process left there belongs to nobody now.
    return store


def _metadata_of(entry: Entry) -> dict[str, Any]:
    """Returns what is stored beside a request's blocks."""
    return dataclasses.asdict(entry.shape)
