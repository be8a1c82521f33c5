"""Keeps the host's records in step with what steps have left on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ferrum_jax.errors import UncountedTokensError
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.device.prefixes import Prefixes
from ferrum_jax.manager.device.request_table import RequestTable
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.prefix.ghosts import Reason
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.tree import TreeBlock, TreeKey, blocks_from
from ferrum_jax.types import NULL_BLOCK, BlockId


class StepSync:
    """Adapts counts, requests and the prefix cache after a step. Not thread-safe.

    Args:
      pool: The device's pool.
      requests: The device's live requests.
      prefixes: The device's prefix cache.
    """

    def __init__(self, pool: DevicePool, requests: RequestTable, prefixes: Prefixes):
        self._pool, self._requests, self._prefixes = pool, requests, prefixes
        self._is_complete = True

    @property
    def is_settled(self) -> bool:
        """Whether nothing is left to adapt, as far as steps do what they were run for."""
        return self._is_complete and self._pool.device_state.is_settled

    def settle(self, requests: Sequence[LiveRequest] | None = None) -> None:
        """Adapts everything to what a step has left on the device; waits for it.

        Args:
          requests: The requests with rows that may have changed; all that have a row if absent.

        Raises:
          CacheLostError: If the device cannot be read.
          UncountedTokensError: If the step has filled rows of no request; these are empty again.
        """
        residents = self._requests.residents()
        requests = residents if requests is None else requests
        self._pool.device_state.wait()
        with interrupts.delayed():
            # Where settling was not completed before, the lengths of before are not known.
            were_empty = [r for r in requests if not (self._is_complete and r.num_tokens)]
            self._is_complete = False
            self._pool.device_state.settle()
            strays = self._pool.device_state.free_stray_rows()
            self._sync_rows(requests, residents, were_empty)
            for request in requests:
                if not request.shape.is_compressed:  # A step may have emptied the row.
                    request.note_compression(None)
            self._is_complete = True
        if strays:
            raise UncountedTokensError(
                f"A step has filled rows {strays}, which belong to no request; they are empty "
                "again. Allocate a request for each, with initial_tokens=0, and pass its handle."
            )

    def _sync_rows(
        self,
        requests: Sequence[LiveRequest],
        residents: Sequence[LiveRequest],
        were_empty: Sequence[LiveRequest],
    ) -> None:
        """Adapts what is known of requests to their rows.

        Cached blocks that a row holds since a `fork` or `share` are covered by its lease. Where
        that cannot be, since they were cached under another salt or are not the row's first ones,
        they are removed from the prefix cache. Waits for the device where blocks may be shared.

        Args:
          requests: The requests of the step.
          residents: All requests that have a row.
          were_empty: Those of the step that had no tokens before it.
        """
        rows = self._pool.queries.all_row_blocks() if self._prefixes.cache.num_blocks else {}
        loose = [b for r in requests for b in self._sync_row(r, rows.get(r.seq_id, []))]
        if loose:
            self._prefixes.uncache(loose, residents, Reason.EVICTED)
        if not all(request.known.may_be_cached for request in requests):
            # A fork of fewer tokens than a block leaves no trace but that a row has begun.
            for request in were_empty:
                if request.num_tokens:
                    request.known.forbid_caching()
        self._pool.counts.note_sharing()
        if self._pool.counts.may_share:
            self._link_sharing(requests, residents, rows or self._pool.queries.all_row_blocks())

    def _sync_row(self, request: LiveRequest, row: Sequence[BlockId]) -> list[TreeBlock]:
        """Adapts one request; returns the cached blocks of its row that its lease cannot cover."""
        cache, lease, length = self._prefixes.cache, request.lease, request.num_tokens
        request.known.truncate(length)
        self._prefixes.truncate_lease(lease, length)
        held = [cache.block(block_id) for block_id in row]
        path = _cached_path(lease, held, _num_released(row))
        is_same = path == lease.blocks
        if not is_same or self._pool.counts.has_windows:
            self._prefixes.cover(request, path)
        if not is_same and lease.node.end > len(request.known.longest):
            request.known.inherit(lease.tokens)
        return [block for block in held[len(path) :] if block is not None]

    def _link_sharing(
        self,
        requests: Sequence[LiveRequest],
        residents: Sequence[LiveRequest],
        rows: Mapping[int, Sequence[BlockId]],
    ) -> None:
        """Links requests with rows that begin with the same blocks.

        If one of them must not be cached, no other may that shares its uncached blocks.

        Args:
          requests: Requests with rows that may have changed.
          residents: All requests that have a row.
          rows: The blocks of each row that holds some, `NULL_BLOCK` where it has released one.
        """
        size = self._pool.counts.block_size
        for one in requests:
            for other in residents:
                pair = rows.get(one.seq_id, []), rows.get(other.seq_id, [])
                num_known = one.known.num_shared_with.get(other.known, 0) // size
                blocks = list(zip(*pair, strict=False))
                if one is other or num_known >= len(blocks):
                    continue
                if blocks[num_known][0] != blocks[num_known][1]:
                    continue  # No more is shared than is known of these two.
                num_same = _num_same(blocks)
                may_be_cached = one.known.may_be_cached and other.known.may_be_cached
                if num_same > one.lease.num_blocks and not may_be_cached:
                    one.known.forbid_caching()
                    other.known.forbid_caching()
                if num_same > num_known:
                    one.known.link(other.known, num_same * size)


def _num_same(blocks: Sequence[tuple[BlockId, BlockId]]) -> int:
    """Returns with how many equal blocks two rows begin, up to the last one that both hold.

    Rows that hold the same block also had the same ones before it, released or not.
    """
    num_same = 0
    for i, pair in enumerate(blocks, start=1):
        if NULL_BLOCK not in pair:
            if pair[0] != pair[1]:
                break
            num_same = i
    return num_same


def _num_released(row: Sequence[BlockId]) -> int:
    """Returns how many leading blocks a row has released."""
    return next((i for i, block_id in enumerate(row) if block_id != NULL_BLOCK), len(row))


def _cached_path(
    lease: Lease, held: Sequence[TreeBlock | None], num_released: int
) -> list[TreeBlock]:
    """Returns the cached blocks with which a row begins, released ones included.

    Args:
      lease: The lease of the row's request, which tells the released ones unless the first block
        that the row holds is cached.
      held: The cached block at each place of the row, if any.
      num_released: Leading blocks that the row has released.
    """
    end = held.index(None, num_released) if None in held[num_released:] else len(held)
    path = [block for block in held[num_released:end] if block is not None]
    if num_released:
        before = blocks_from(path[0].node, 0) if path else lease.blocks
        path = [*before[:num_released], *path]
    return path if path and _is_path(path, lease.key) else []


def _is_path(blocks: Sequence[TreeBlock], key: TreeKey) -> bool:
    """Returns whether blocks are the first ones of a prefix that is cached under a key."""
    nodes = list(blocks[-1].node.path())
    before = [block for node in nodes[::-1] for block in node.blocks]
    return nodes[0].root.key == key and before[: len(blocks)] == list(blocks)
