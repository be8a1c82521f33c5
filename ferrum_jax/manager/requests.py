"""A live request: what a manager knows of it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.errors import InvalidHandleError, SwappedOutError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.known_tokens import KnownTokens
from ferrum_jax.manager.pool import DevicePool, RowShape
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.records import AllocationRequest, CompressionReport
from ferrum_jax.types import NULL_SEQ, RequestId


@dataclasses.dataclass(eq=False, kw_only=True)
class LiveRequest:
    """One request of a manager. The pool counts the request's tokens and blocks.

    Attributes:
      allocation: The request as the caller made it.
      cache_id: A name that no other request of this process has.
      num_cached_tokens: Tokens that were cached when the request started.
      known: What is known of the request's tokens.
      pool: The pool that holds the request's blocks.
      lock: The lock of the pool's manager.
      seq_id: The request's row in the pool; `NULL_SEQ` while it is swapped out.
      lease: The request's hold on cached prefixes, while it has a row.
      shape_away: Length and token format while the request is swapped out.
      blocks_away: `Lease.marks` of when the request was swapped out: blocks among them that are
        still cached, and have had no ids added, hold the same bytes.
      last_access: Time of the last use, in seconds of the manager's clock.
      compression: What compression has done to the request; None if it is not compressed.
      is_live: Whether the request is still allocated.
      handles: The handles that callers hold.
    """

    allocation: AllocationRequest
    cache_id: str
    num_cached_tokens: int
    known: KnownTokens
    pool: DevicePool
    lock: threading.RLock
    seq_id: int
    lease: Lease
    shape_away: RowShape = RowShape(0)
    blocks_away: Sequence[tuple[TreeBlock, int]] = ()
    last_access: float = 0.0
    compression: CompressionReport | None = None
    is_live: bool = True
    handles: weakref.WeakSet[KvCacheHandle] = dataclasses.field(default_factory=weakref.WeakSet)

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Holds the manager's lock, so that the request stays on its device."""
        while True:
            lock = self.lock
            with lock:
                if lock is self.lock:  # Otherwise the request has moved meanwhile.
                    yield
                    return

    @property
    def request_id(self) -> RequestId:
        """The caller's key."""
        return self.allocation.request_id

    @property
    def is_resident(self) -> bool:
        """Whether the request is on the device."""
        return self.seq_id != NULL_SEQ

    @property
    def num_tokens(self) -> int:
        """Length of the sequence, dropped tokens included."""
        return (
            self.pool.counts.seq_len(self.seq_id) if self.is_resident else self.shape_away.seq_len
        )

    @property
    def shape(self) -> RowShape:
        """Length and token format of the sequence."""
        return self.pool.counts.row_shape(self.seq_id) if self.is_resident else self.shape_away

    @property
    def tokens_per_block(self) -> int:
        """Tokens that one block of the resident request holds in its token format."""
        return self.pool.counts.tokens_per_block(self.seq_id)

    @property
    def num_blocks(self) -> PerPool:
        """Blocks held on the device, of all layer groups."""
        counts = self.pool.counts
        return counts.num_held(self.seq_id) if self.is_resident else counts.none

    def require_live(self) -> LiveRequest:
        """Returns the request itself; raises InvalidHandleError if it was deallocated."""
        if not self.is_live:
            raise InvalidHandleError(
                f"The handle of request {self.request_id!r} ({self.cache_id}) is used after the "
                "request was deallocated. Allocate it again and use the new handle."
            )
        return self

    def require_resident(self) -> LiveRequest:
        """Returns the request itself.

        Raises:
          SwappedOutError: If the request is swapped out.
          InvalidHandleError: If the request was deallocated.
        """
        if self.is_live and self.is_resident:
            return self
        self.require_live()
        raise SwappedOutError(
            f"Request {self.request_id!r} ({self.cache_id}) is swapped out, so that its blocks "
            "cannot be used. Swap it in first."
        )

    def note_use(self, now: float) -> None:
        """Records the time of a use."""
        self.last_access = now

    def note_compression(self, report: CompressionReport | None) -> None:
        """Records what compression has done; None once the request is not compressed."""
        self.compression = report

    def renew_lease(self, lease: Lease) -> None:
        """Replaces a lease that was released."""
        self.lease = lease

    def note_swap_out(self, shape: RowShape) -> None:
        """Records that the request was swapped out.

        Args:
          shape: Length and token format of the row, which is freed.
        """
        self.shape_away, self.blocks_away, self.seq_id = shape, self.lease.marks, NULL_SEQ

    def note_row(self, seq_id: int, lease: Lease) -> None:
        """Records the row and the lease of a request that was swapped in, or has moved."""
        self.seq_id, self.lease, self.blocks_away = seq_id, lease, ()

    def discard_blocks_away(self) -> None:
        """Records that no cached block has the request's bytes any more."""
        self.blocks_away = ()

    def set_home(self, pool: DevicePool, lock: threading.RLock) -> None:
        """Records the pool that the request has moved to, and the lock of its manager."""
        self.known.unlink()  # The requests that share its tokens stay.
        self.pool, self.lock = pool, lock

    def end(self) -> None:
        """Records that the request was deallocated."""
        self.is_live = False
        self.known.unlink()
