"""Starts requests with the tokens of another one."""

from __future__ import annotations

from collections.abc import Sequence

from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.device.reclaim import Reclaimer
from ferrum_jax.manager.device.request_table import RequestTable
from ferrum_jax.manager.pool import DevicePool, fork_row, num_blocks_to_fork
from ferrum_jax.manager.refusals import require_forkable, require_new
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.types import RequestId


class Forking:
    """Forks requests of one device. Not thread-safe.

    Args:
      pool: The device's pool.
      requests: The device's live requests.
      prefixes: The device's prefix cache.
      reclaimer: Makes room for copies of partly filled blocks.
    """

    def __init__(
        self, pool: DevicePool, requests: RequestTable, prefixes: Prefixes, reclaimer: Reclaimer
    ):
        self._pool, self._requests = pool, requests
        self._prefixes, self._reclaimer = prefixes, reclaimer

    def fork(self, source: LiveRequest, new_ids: Sequence[RequestId]) -> list[LiveRequest]:
        """Starts requests with all tokens of another one; see `SharingFront.fork`."""
        require_new(new_ids, self._requests)
        require_forkable(source)
        if not new_ids:
            return []
        num_blocks = num_blocks_to_fork(self._pool, source.seq_id, len(new_ids))
        priority = source.allocation.priority
        self._reclaimer.require_blocks("fork", num_blocks, priority, [source], len(new_ids))
        leases = [self._prefixes.cache.copy_lease(source.lease) for _ in new_ids]
        try:
            rows = fork_row(self._pool, source.seq_id, len(new_ids))
        except BaseException:
            for lease in leases:
                self._prefixes.undo_acquire(lease)
            raise
        return [
            self._requests.fork(source, *new) for new in zip(new_ids, rows, leases, strict=True)
        ]
