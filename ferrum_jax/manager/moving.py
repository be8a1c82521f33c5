"""The methods of a manager by which requests go over to another device's manager."""

from __future__ import annotations

import ferrum_jax.manager.kinship as kinship
from ferrum_jax.checks import check_flag, check_type
from ferrum_jax.errors import DuplicateRequestError, GeometryMismatchError
from ferrum_jax.manager.admission import shortage
from ferrum_jax.manager.core import ManagerCore
from ferrum_jax.manager.handle import Entry
from ferrum_jax.manager.pool import stored_for
from ferrum_jax.policies.balance import CacheLoad, PoolLoad
from ferrum_jax.types import NULL_SEQ, RequestId


class Moving(ManagerCore):
    """Moves requests between managers, each with a pool of its own."""

    def move_to(
        self, request_id: RequestId, target: Moving, *, must_be_resident: bool = False
    ) -> None:
        """Moves a request with all its handles to another manager, bit for bit, or not at all.

        Its row here is freed when the bytes have arrived; both managers wait until then. Cached
        prefixes that nobody uses go to make room there, but nobody is swapped out. Full blocks
        whose tokens are known are cached there, and stay cached here. What is swapped out moves
        from host to host. Room listeners may be called before both locks are given back.

        Args:
          request_id: The caller's key.
          target: Another manager, of the same geometry and block size.
          must_be_resident: Whether to raise if it is swapped out.

        Raises:
          UnknownRequestError: If no such request is live here.
          DuplicateRequestError: If a request of that id is live there.
          GeometryMismatchError: If the other manager's blocks are not like these.
          OutOfBlocksError: If too few blocks are free there.
          OutOfRowsError: If as many sequences are held there as may be.
          SwappedOutError: If it is swapped out, and must not be.
          OutOfHostMemoryError: If it is swapped out, and the tiers there have no room.
          CorruptFileError: If it is on disk, and its file is not what was written.
        """
        check_type("target", target, Moving)
        check_flag("must_be_resident", must_be_resident)
        first, second = sorted((self, target), key=id)  # So that no two moves wait for each other.
        with first._changing(), second._changing():
            entry = self._resident(request_id) if must_be_resident else self._known(request_id)
            if target is self:
                return
            self._require_fit(entry, target)
            seq_id = NULL_SEQ
            if entry.is_resident:
                seq_id = self._copy_to(target, entry)
            else:
                self._swapping.hand_over(entry, target._swapping)
                entry.blocks_away = ()
            kinship.unlink(entry)
            self._room.forget(entry)
            target._entries[request_id] = entry
            del self._entries[request_id]
            entry.cache, entry.lock, entry.seq_id = target._cache, target._lock, seq_id
            target._room.note_use(entry)

    def load(self) -> PoolLoad:
        """Returns how full the pool is, and what moving each request would change."""
        with self._looking():
            self._cache.device_state.require()
            cache, forest = self._cache, self._prefixes.cache.forest
            caches = []
            for name, entry in self._entries.items():
                if not entry.num_blocks:
                    continue
                freed = cache.queries.num_freed_by([entry.seq_id])
                freed += forest.num_idle_without([entry.lease.node])
                num_bytes = entry.num_blocks * cache.block_bytes
                caches.append(
                    CacheLoad(
                        request_id=name,
                        num_bytes=num_bytes,
                        freed_bytes=freed * cache.block_bytes,
                    )
                )
            return PoolLoad(
                capacity_bytes=cache.counts.max_blocks * cache.block_bytes,
                used_bytes=self.num_blocks_in_use * cache.block_bytes,
                num_free_rows=cache.counts.num_free_rows,
                caches=tuple(caches),
            )

    def _copy_to(self, target: Moving, entry: Entry) -> int:
        """Copies a request's blocks to another manager, frees them here, and returns the row."""
        num_new = entry.num_blocks
        if num_new > target._room.num_blocks or not target._cache.counts.num_free_rows:
            raise shortage(entry.request, num_new, target._room.num_blocks, target._cache)
        payload = stored_for(
            target._cache.state.pool, self._cache.queries.stream_row(entry.seq_id).gathered()
        ).gathered()
        target._room.make(num_new, victims=[])
        seq_id = target._cache.restore_row(entry.shape, payload, wait=True)
        lease = entry.lease
        with target._cache.freed_on_error(seq_id):
            target._prefixes.renew(entry, seq_id)
            try:
                self._cache.free([entry.seq_id])
            except BaseException:
                target._prefixes.release(entry)
                entry.lease = lease
                raise
        self._prefixes.cache.release(lease, self._clock())
        return seq_id

    def _require_fit(self, entry: Entry, target: Moving) -> None:
        """Raises unless another manager could take a request, if it had room."""
        if target.holds(entry.request_id):
            raise DuplicateRequestError(
                f"Another request {entry.request_id!r} is live where this one is to go. "
                "Deallocate it first."
            )
        one, other = self._geometry, target._geometry
        if one != other or self._cache.counts.block_size != target._cache.counts.block_size:
            raise GeometryMismatchError(
                f"Request {entry.request_id!r} of {one} in blocks of "
                f"{self._cache.counts.block_size} tokens cannot move to a pool of {other} in "
                f"blocks of {target._cache.counts.block_size}. Make both managers alike."
            )
