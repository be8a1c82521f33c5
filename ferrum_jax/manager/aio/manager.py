"""The manager for an event loop: the same names as coroutines, and room is waited for."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from typing import Self

from ferrum_jax.checks import check_callable, check_count, check_items, check_type
from ferrum_jax.manager.aio.delegates import Delegates, M
from ferrum_jax.manager.aio.queue import Waiter, WaitingQueue, names_of, takes_no_block
from ferrum_jax.manager.aio.scheduler import Exclude, Scheduler
from ferrum_jax.manager.front import ManagerFront
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.records import AllocationRequest
from ferrum_jax.types import BlockId, Device, Priority


class AsyncKvCacheManager(Delegates[M]):
    """A manager for coroutines: `allocate` and `extend` wait until there is room.

    It wraps a `PagedKvCacheManager` or a `MultiDevicePagedKvCacheManager`. Only a shortage is
    waited for; any other refusal is raised at once. Calls that wait on a device are served in this
    order, and strictly: a small request does not overtake a large one that comes before it, or the
    large one would never find enough blocks free.

    - Calls that extend come first, since others may be waiting for the blocks that their requests
      hold. One that needs no new block does not wait at all.
    - Then `Priority`, where a level is worth `ageing_seconds` of waiting: with 10, a Normal
      request goes before a High one that arrives more than 10 seconds later. None starves.
    - Equal ones are served in the order in which they arrived.

    Over several devices, a new request goes to a device for which no other call waits.

    When every live request that holds blocks on a device waits to extend, on this event loop or on
    others over the same manager, none would ever be served: the last of them gets
    `OutOfBlocksError`, and should be swapped out, moved or deallocated. Blocks of
    `allocate_blocks` count as held for good there. A task that holds several requests should extend
    them by one `extend_all`, and set a timeout where it waits for anything else: its other requests
    look as if they went on meanwhile.

    A cancelled call has changed nothing, or if its work was under way in a thread, that is
    finished first, so that nothing is left half done; `deallocate`, `free_blocks` and the end of
    `hold` are always done. What waits for the device or copies bytes runs in a thread, one call
    at a time: `allocate` and `extend` too, if the manager preempts. Settings of JAX that a `with`
    makes for one thread do not reach a step of `run`. Calls that change something
    wait for it without blocking the loop. Methods that are not coroutines answer at once; they
    block while such a call holds the manager's lock. In `stats`, a wait counts as one failure at
    most.

    Calls that wait are woken when the wrapped manager is closed, and raise RuntimeError; when a
    step has lost its cache, they raise CacheLostError.

    It belongs to the event loop of its first coroutine. The wrapped manager may be used directly
    meanwhile, by other threads too: such calls do not queue, and wake the calls that wait here.
    Methods of only one of the two managers raise ValueError over the other one.

    Args:
      manager: The manager to wrap.
      ageing_seconds: Waiting time that is worth one level of `Priority`.
      clock: Returns seconds that only grow, for the ageing; for tests.

    Raises:
      ValueError: If `ageing_seconds` is not positive and finite, or another argument is not what it
        should be.

    Example:
      >>> import asyncio
      >>> from ferrum_jax import CacheConfig, CacheGeometry
      >>> from ferrum_jax.manager import PagedKvCacheManager
      >>> async def serve():
      ...     manager = AsyncKvCacheManager(PagedKvCacheManager(
      ...         CacheConfig(block_size=4, max_blocks=8, initial_blocks=8),
      ...         CacheGeometry(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                       max_seqs=2, max_sequence_length=16)))
      ...     async with manager.hold(manager.new_request("chat-1", initial_tokens=5)) as handle:
      ...         await manager.extend(handle, 4, timeout_seconds=1.0)
      ...         print(handle.num_tokens(), manager.free_block_count())
      ...     print(manager.free_block_count())
      >>> asyncio.run(serve())
      9 5
      8
    """

    def __init__(
        self,
        manager: M,
        *,
        ageing_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not isinstance(manager, ManagerFront):
            raise ValueError(
                "manager must be a PagedKvCacheManager or a MultiDevicePagedKvCacheManager, got "
                f"{manager!r}."
            )
        check_callable("clock", clock)
        self._pools = manager.pools
        self._queue = WaitingQueue(self._pools.devices, ageing_seconds, clock)
        super().__init__(manager, Scheduler(self._pools, self._queue))

    # Calls that wait for room.

    async def allocate(
        self, request: AllocationRequest, *, timeout_seconds: float | None = None
    ) -> PagedKvCacheHandle:
        """Allocates room for a new sequence, as soon as there is enough.

        Args:
          request: The request to start.
          timeout_seconds: How long to wait; 0 to try once, None for no limit.

        Returns:
          A handle to its cache.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          FerrumError: What `KvCacheManager.allocate` raises, except the shortages.
        """
        check_type("request", request, AllocationRequest)
        pools = self._pools
        waiter = Waiter(
            asks=f"Request {request.request_id!r}",
            priority=request.priority,
            devices=lambda: pools.devices_for(request),
            may_skip_queue=lambda: not pools.can_allocate(request),
            timeout_seconds=timeout_seconds,
        )

        def allocate(exclude: Exclude) -> PagedKvCacheHandle:
            shortage = waiter.shortage
            if shortage is not None and not (pools.is_lost or pools.can_allocate(request, exclude)):
                if self._manager.get_handle(request.request_id) is None:
                    raise shortage  # The same one: not to be counted as another failure.
            return pools.allocate(request, exclude)

        def undo(handle: PagedKvCacheHandle) -> None:
            self._manager.deallocate(handle)

        return await self._scheduler.wait(waiter, allocate, undo if pools.preempts else None)

    @contextlib.asynccontextmanager
    async def hold(
        self, request: AllocationRequest, *, timeout_seconds: float | None = None
    ) -> AsyncIterator[PagedKvCacheHandle]:
        """Allocates for the length of an `async with`, and deallocates whatever happens there.

        Args:
          request: The request to start.
          timeout_seconds: How long to wait for room; None for no limit.

        Yields:
          A handle to its cache. The request may be deallocated early.

        Raises:
          FerrumError: What `allocate` raises.
        """
        handle = await self.allocate(request, timeout_seconds=timeout_seconds)

        def end() -> None:
            if handle.is_valid():
                self._manager.deallocate(handle)

        try:
            yield handle
        finally:
            await self._scheduler.run_uncancellable(end)

    async def extend(
        self, handle: RequestLike, additional_tokens: int, *, timeout_seconds: float | None = None
    ) -> None:
        """Allocates room for more tokens at the end of a sequence; see `extend_all`."""
        await self.extend_all([handle], additional_tokens, timeout_seconds=timeout_seconds)

    async def extend_all(
        self,
        handles: Sequence[RequestLike],
        additional_tokens: int,
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        """Allocates room for more tokens in several sequences, as soon as there is enough.

        Args:
          handles: Different requests on one device, each by handle or id. They wait together, as
            urgent as the most urgent one.
          additional_tokens: Additional tokens for each.
          timeout_seconds: How long to wait; 0 to try once, None for no limit.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          OutOfBlocksError: If every request that holds blocks waits for more, this one last.
          InvalidHandleError: If a request is deallocated, even while this call waits.
          FerrumError: What else `PagedKvCacheManager.extend_all` raises.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        found = [await self._handle_of(handle) for handle in check_items("handles", handles)]
        requests = tuple(handle.live_request().require_resident() for handle in found)
        priorities = [request.allocation.priority for request in requests]
        waiter = Waiter(
            asks=f"{additional_tokens} more tokens for {names_of(requests)}",
            priority=max(priorities, default=Priority.Normal),
            devices=lambda: {request.pool.device for request in requests},
            may_skip_queue=lambda: takes_no_block(requests, additional_tokens),
            requests=requests,
            timeout_seconds=timeout_seconds,
        )

        may_swap = self._pools.preempts and not takes_no_block(requests, additional_tokens)
        await self._scheduler.wait(
            waiter,
            lambda _: self._manager.extend_all(found, additional_tokens),
            _keep if may_swap else None,
        )

    async def allocate_blocks(
        self,
        num_blocks: int,
        *,
        priority: Priority = Priority.Normal,
        timeout_seconds: float | None = None,
    ) -> list[BlockId]:
        """Allocates blocks without a request, as soon as there are enough; one device only.

        Args:
          num_blocks: How many.
          priority: How urgent they are.
          timeout_seconds: How long to wait for room; 0 to try once, None for no limit.

        Returns:
          Their ids.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          FerrumError: What else `PagedKvCacheManager.allocate_blocks` raises.
        """
        num_blocks = check_count("num_blocks", num_blocks, minimum=0)
        check_type("priority", priority, Priority)
        allocate_blocks = self._named("allocate_blocks")
        waiter = Waiter(
            asks=f"allocate_blocks({num_blocks})",
            priority=priority,
            devices=lambda: self._pools.devices,
            may_skip_queue=lambda: False,
            timeout_seconds=timeout_seconds,
        )

        return await self._scheduler.wait(
            waiter, lambda _: allocate_blocks(num_blocks), undo=self._named("free_blocks")
        )

    async def swap_in(
        self, request_id: RequestLike, *, timeout_seconds: float | None = None
    ) -> None:
        """Moves a request's bytes back, as soon as there is room; it queues like a new request.

        Args:
          request_id: The request, by id or handle.
          timeout_seconds: How long to wait for room; 0 to try once, None for no limit.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          FerrumError: What else `PagedKvCacheManager.swap_in` raises.
        """
        handle = await self._scheduler.run_on_loop(self._manager.get_handle, request_id)

        def devices() -> Collection[Device]:
            device = self._pools.seen_on(request_id)
            return self._pools.devices if device is None else [device]

        waiter = Waiter(
            asks=f"Request {request_id!r}, swapped out,",
            priority=Priority.Normal if handle is None else handle.request.priority,
            devices=devices,
            may_skip_queue=lambda: handle is None,  # To learn that it is unknown.
            timeout_seconds=timeout_seconds,
        )
        await self._scheduler.wait(waiter, lambda _: self._manager.swap_in(request_id), _keep)

    async def __aenter__(self) -> Self:
        """Returns the manager itself."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Closes the manager and the one that it wraps."""
        await self.close()

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Returns whether `allocate` would succeed now, without waiting for other calls either.

        Args:
          request: The request to start.
        """
        check_type("request", request, AllocationRequest)
        exclude = self._queue.devices_before(request.priority)
        if exclude.issuperset(self._pools.devices_for(request)):
            return False
        return self._pools.can_allocate(request, exclude)

    @property
    def num_waiting(self) -> int:
        """Number of calls that wait for room."""
        return len(self._queue)


def _keep(result: None) -> None:
    """Undoes nothing: what was done is done, and no more is held than before."""
    del result  # Unused.
