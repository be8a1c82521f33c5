"""The live requests of one device, by id."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator

from ferrum_jax.checks import check_key
from ferrum_jax.errors import FerrumError, InvalidHandleError, UnknownRequestError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike, require_handle
from ferrum_jax.manager.known_tokens import KnownTokens
from ferrum_jax.manager.pool import DevicePool
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import RequestId

_cache_numbers = itertools.count()


class RequestTable:
    """The live requests of one device, by request id. Not thread-safe.

    Args:
      pool: The device's pool.
      lock: The lock that guards the pool and this table.
    """

    def __init__(self, pool: DevicePool, lock: threading.RLock):
        self._pool, self._lock = pool, lock
        self._requests: dict[RequestId, LiveRequest] = {}

    def __contains__(self, request: RequestLike) -> bool:
        """Whether a request is live here; one atomic operation."""
        return self.get(request) is not None

    def __len__(self) -> int:
        """Number of live requests."""
        return len(self._requests)

    def __iter__(self) -> Iterator[LiveRequest]:
        """The live requests, in the order in which they started here."""
        return iter(self._requests.values())

    def residents(self) -> list[LiveRequest]:
        """Returns the requests that have a row."""
        return [request for request in self if request.is_resident]

    def get(self, request: RequestLike) -> LiveRequest | None:
        """Returns the request that an id or a handle names; None if it is not live here.

        Raises:
          ValueError: If it is neither a handle nor something that can be an id.
        """
        if not isinstance(request, KvCacheHandle):
            check_key("request_id", request)
            return self._requests.get(request)
        live = request.live_request() if isinstance(request, PagedKvCacheHandle) else None
        return live if live and self._requests.get(live.request_id) is live else None

    def known(self, request: RequestLike) -> LiveRequest:
        """Returns the request that an id or a handle names.

        Raises:
          UnknownRequestError: If no request of this id is live here.
          InvalidHandleError: If the request of the handle was deallocated, or is not one of these.
        """
        live = self.get(request)
        if live is None:
            raise absent_error(request, f"here; others that are: {len(self)}")
        return live

    def start(
        self, allocation: AllocationRequest, seq_id: int, lease: Lease, num_cached_tokens: int
    ) -> LiveRequest:
        """Adds a request to which a row was allocated.

        Args:
          allocation: The request as the caller made it.
          seq_id: The request's row.
          lease: The request's hold on cached prefixes.
          num_cached_tokens: Leading tokens that were cached.

        Returns:
          The live request.
        """
        num_tokens = self._pool.counts.seq_len(seq_id)
        request = LiveRequest(
            allocation=allocation,
            cache_id=f"cache-{next(_cache_numbers)}",
            num_cached_tokens=num_cached_tokens,
            known=KnownTokens(
                tokens=TokenIds(allocation.prompt_token_ids or ())[:num_tokens],
                num_computed=num_cached_tokens,
                max_computed=num_cached_tokens,
            ),
            pool=self._pool,
            lock=self._lock,
            seq_id=seq_id,
            lease=lease,
        )
        self._requests[request.request_id] = request
        return request

    def fork(
        self, source: LiveRequest, request_id: RequestId, seq_id: int, lease: Lease
    ) -> LiveRequest:
        """Adds a request that begins with all tokens of another one.

        Args:
          source: The other request.
          request_id: The caller's key of the new one.
          seq_id: The new request's row.
          lease: The new request's hold on cached prefixes.

        Returns:
          The live request.
        """
        request = LiveRequest(
            allocation=dataclasses.replace(source.allocation, request_id=request_id),
            cache_id=f"cache-{next(_cache_numbers)}",
            num_cached_tokens=source.known.max_computed,
            known=source.known.fork(source.num_tokens),
            pool=self._pool,
            lock=self._lock,
            seq_id=seq_id,
            lease=lease,
            compression=source.compression,
        )
        self._requests[request_id] = request
        return request

    def end(self, request: LiveRequest) -> None:
        """Removes a request that was deallocated."""
        request.end()
        del self._requests[request.request_id]

    def adopt(self, request: LiveRequest) -> None:
        """Adds a request that has moved here from another device."""
        self._requests[request.request_id] = request
        request.set_home(self._pool, self._lock)

    def remove(self, request: LiveRequest) -> None:
        """Removes a request that has moved to another device."""
        del self._requests[request.request_id]

    def check(self) -> None:
        """Raises AssertionError unless each request is of this table and has its own row."""
        for name, request in self._requests.items():
            is_here = request.pool is self._pool and request.lock is self._lock
            if not (request.is_live and is_here) or request.request_id != name:
                raise AssertionError(f"Request {name!r} has a record that is not its own.")
        rows = [request.seq_id for request in self.residents()]
        if len(set(rows)) < len(rows):
            raise AssertionError("Two requests share a row.")
        held = set(self._pool.counts.seqs_with_blocks)
        if not held <= set(rows):
            raise AssertionError(f"Rows {sorted(held - set(rows))} hold blocks for no request.")


def absent_error(request: RequestLike, where: str) -> FerrumError:
    """Returns the error for a request that is not live in a manager.

    Args:
      request: The id or the handle that was given.
      where: Where the request is not live, for the message.

    Raises:
      InvalidHandleError: If it is a handle of a request that was deallocated.
    """
    if isinstance(request, KvCacheHandle):
        require_handle(request).live_request().require_live()
        return InvalidHandleError(
            f"{request!r} belongs to another manager. Use the one that allocated it."
        )
    return UnknownRequestError(
        f"Request {request!r} is not live {where}. It was never allocated here, or is deallocated "
        "already."
    )
