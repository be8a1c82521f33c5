"""Swaps requests out to host memory or disk, and back in."""

from __future__ import annotations

import collections
from collections.abc import Collection, Iterable, Sequence

from ferrum_jax.config import TierConfig
from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.pool import DevicePool, stored_for
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.ops.transfer import BlockPayload, BlockShape
from ferrum_jax.tiers import TieredStore


class Swapping:
    """Moves requests between a device and a store. Not thread-safe.

    Args:
      pool: The device's pool.
      prefixes: The device's prefix cache, which a request leaves and joins again.
      store: The host memory and disk that hold the bytes.
    """

    def __init__(self, pool: DevicePool, prefixes: Prefixes, store: TieredStore):
        self._pool, self._prefixes, self._store = pool, prefixes, store

    @property
    def host_bytes(self) -> int:
        """Bytes that are stored, in host memory and on disk."""
        return self._store.host_used_bytes + self._store.disk_used_bytes

    def holds_just(self, requests: Collection[LiveRequest]) -> bool:
        """Returns whether the store holds these requests, and no others; reads no file."""
        keys = [key for request in requests for key in self._keys(request)]
        return all(key in self._store for key in keys) and len(keys) == len(self._store)

    def has_room_for(self, requests: Iterable[LiveRequest]) -> bool:
        """Returns whether requests could be stored, one after the other."""
        sizes = {}
        for request in requests:
            parts = zip(self._store.block_shapes, request.num_blocks, strict=True)
            sizes.update(zip(self._keys(request), parts, strict=True))
        return self._store.has_room_for(sizes)

    def swap_out(self, requests: Sequence[LiveRequest]) -> None:
        """Copies the bytes of requests to the store, then frees their rows: of all, or of none.

        Rows are freed as soon as the copies to host memory are ordered, and the files written.
        What is written to disk goes through host memory chunk by chunk.

        Raises:
          OutOfHostMemoryError: If there is no room for them; all requests stay. Others in the
            store may have moved to disk for them.
        """
        stored, shapes = [], [request.shape for request in requests]
        try:
            for request in requests:
                self._put(request, self._pool.queries.stream_seq(request.seq_id))
                stored.append(request)
            if requests:
                self._pool.free([request.seq_id for request in requests])
        except BaseException:
            for request in stored:
                self.discard(request)
            raise
        for request, shape in zip(requests, shapes, strict=True):
            request.note_swap_out(shape)
            self._prefixes.release(request.lease)

    def read(self, request: LiveRequest, *, check: bool) -> list[BlockPayload]:
        """Returns the blocks of each pool of a request that is swapped out; they stay stored.

        Args:
          request: The request.
          check: Whether to read a file through, and find it sound, before this returns. It is
            checked again as it is read for use.

        Raises:
          CorruptFileError: If the bytes are on disk, and are not what was written.
        """
        payloads = list(map(self._store.stream, self._keys(request)))
        for payload in payloads:
            if check and payload.is_stream:
                collections.deque(payload.chunks, maxlen=0)
        return payloads

    def swap_in(self, request: LiveRequest, payloads: Sequence[BlockPayload]) -> None:
        """Restores a request from what `read` returned, bit for bit. There is room for it.

        Raises:
          CorruptFileError: If the bytes are on disk, and are not what was written; the request
            stays swapped out.
        """
        seq_id = self._pool.restore_row(request.shape_away, payloads)
        with self._pool.freed_on_error(seq_id):
            lease = self._prefixes.recache(request, seq_id)
        request.note_row(seq_id, lease)
        self.discard(request)

    def take_over(self, request: LiveRequest, other: Swapping) -> None:
        """Stores the bytes of a request that is swapped out on another device.

        Args:
          request: The request.
          other: The other device's swapping, which no longer stores the bytes afterwards.

        Raises:
          OutOfHostMemoryError: If there is no room for them; they stay where they are.
          CorruptFileError: If they were on disk, and are not what was written; they stay.
        """
        self._put(request, stored_for(self._pool.state, other.read(request, check=False)))
        other.discard(request)
        request.discard_blocks_away()

    def discard(self, request: LiveRequest) -> None:
        """Discards the stored bytes of a request."""
        for key in self._keys(request):
            self._store.discard(key)

    def close(self) -> None:
        """Discards all stored bytes, and releases the disk tier's directory."""
        self._store.close()

    def _keys(self, request: LiveRequest) -> list[str]:
        """Returns the key of a request's blocks in each pool."""
        return [f"{request.cache_id}/{pool}" for pool in range(len(self._store.block_shapes))]

    def _put(self, request: LiveRequest, payloads: Sequence[BlockPayload]) -> None:
        """Stores the blocks of each pool, or those of none."""
        stored: list[str] = []
        try:
            for key, payload in zip(self._keys(request), payloads, strict=True):
                self._store.put(key, payload)
                stored.append(key)
        except BaseException:
            for key in stored:
                self._store.discard(key)
            raise


def make_store(pool: DevicePool, tiers: TierConfig) -> TieredStore:
    """Returns an empty store for the requests of a device."""
    host_bytes = tiers.host_budget_bytes
    if host_bytes is None:
        host_bytes = pool.bytes_of(pool.counts.max_blocks)
    return TieredStore(
        list(map(BlockShape.of, pool.state.pools)),
        host_bytes,
        disk_directory=tiers.disk_directory,
        disk_budget_bytes=tiers.disk_budget_bytes,
    )
