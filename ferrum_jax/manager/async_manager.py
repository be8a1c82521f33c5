"""The manager for an event loop: the same names as coroutines, and room is waited for."""

import contextlib
import functools
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Self

from jax.typing import ArrayLike

from ferrum_jax.checks import check_callable, check_count, check_items, check_type
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.async_looks import AsyncLooks
from ferrum_jax.manager.handle import PagedKvCacheHandle, require_handle
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.waiting import Waiter, WaitingQueue, names_of, takes_no_block
from ferrum_jax.manager.waiting_room import WaitingRoom
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import (
    AllocationRequest,
    BlockTable,
    CacheGcStats,
)
from ferrum_jax.types import BlockId, Priority, RequestId


class AsyncKvCacheManager(AsyncLooks):
    """A `PagedKvCacheManager` for coroutines: `allocate` and `extend` wait until there is room.

    Only a shortage is waited for; any other refusal is raised at once. Who waits is served in
    this order, and strictly: a small request does not overtake a large one that comes before it,
    or the large one would never find enough blocks free.

    - Those who extend come first, since others may be waiting for the blocks that they hold.
      One that needs no new block does not wait at all.
    - Then `Priority`, where a level is worth `ageing_seconds` of waiting: with 10, a Normal
      request goes before a High one that comes more than 10 seconds later. None starves.
    - Equal ones are served in the order in which they came.

    When every live request that holds blocks waits to extend, on this event loop or on others over
    the same manager, none would ever be served: the last of them gets `OutOfBlocksError`, and
    should be swapped out or deallocated. Blocks of `allocate_blocks` count as held for good there.
    A task that holds several requests should extend them by one `extend_all`, and set a timeout
    where it waits for anything else: its other requests look as if they went on meanwhile.

    A cancelled call has changed nothing, or if its work was under way in a thread, that is
    finished first, so that nothing is left half done; `deallocate`, `free_blocks` and the end of
    `hold` are always done. What waits for the device or copies bytes runs in a thread, one call
    at a time: `allocate` and `extend` too, if the manager preempts. Calls that change something
    wait for it without blocking the loop. Methods that are no coroutines look at once; they block
    while such a call holds the manager's lock.

    Calls that wait are woken when the wrapped manager is closed, and raise RuntimeError; when a
    step has lost its cache, they raise CacheLostError.

    It belongs to the event loop of its first coroutine. The wrapped manager may be used directly
    meanwhile, by other threads too: they do not queue, and wake who waits here.

    Args:
      manager: What is wrapped.
      ageing_seconds: Waiting time that is worth one level of `Priority`.
      clock: Returns seconds that only grow, for the ageing; for tests.

    Raises:
      ValueError: If `ageing_seconds` is not positive and finite, or another argument is not what it
        should be.

    Example:
      >>> import asyncio
      >>> from ferrum_jax import CacheConfig, CacheGeometry
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
        manager: PagedKvCacheManager,
        *,
        ageing_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        check_type("manager", manager, PagedKvCacheManager)
        check_callable("clock", clock)
        super().__init__(manager)
        self._queue = WaitingRoom(manager, WaitingQueue(ageing_seconds, clock))

    @property
    def num_waiting(self) -> int:
        """How many calls wait for room."""
        return self._queue.num_waiting

    async def close(self) -> None:
        """Ends all requests, even if cancelled; see `PagedKvCacheManager.close`.

        Calls that wait for room raise RuntimeError. An `async with` closes it at its end.
        """
        await self._queue.surely(self._manager.close)

    async def __aenter__(self) -> Self:
        """Returns the manager itself."""
        return self

    async def __aexit__(self, *exception: object) -> None:
        """Closes it, and what it wraps."""
        await self.close()

    # Calls that wait for room.

    async def allocate(
        self, request: AllocationRequest, *, timeout_seconds: float | None = None
    ) -> PagedKvCacheHandle:
        """Makes room for a new sequence, as soon as there is enough.

        Args:
          request: What it asks for.
          timeout_seconds: How long to wait at most; 0 to try once, None for ever.

        Returns:
          A handle to its cache.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          FerrumError: What `KvCacheManager.allocate` raises, but for the shortages.
        """
        check_type("request", request, AllocationRequest)
        manager = self._manager
        waiter = Waiter(
            asks=f"Request {request.request_id!r}",
            priority=request.priority,
            may_go_ahead=lambda: not manager.can_allocate(request),
            timeout_seconds=timeout_seconds,
        )

        def allocate() -> PagedKvCacheHandle:
            shortage = waiter.shortage
            if shortage is not None and not manager.is_lost and not manager.can_allocate(request):
                if manager.get_handle(request.request_id) is None:
                    raise shortage  # The same one: not to be counted as another failure.
            return manager.allocate(request)

        def give_back(handle: PagedKvCacheHandle) -> None:
            manager.deallocate(handle.request_id)

        return await self._queue.wait(waiter, allocate, give_back if manager.preempts else None)

    @contextlib.asynccontextmanager
    async def hold(
        self, request: AllocationRequest, *, timeout_seconds: float | None = None
    ) -> AsyncIterator[PagedKvCacheHandle]:
        """Allocates for the length of an `async with`, and deallocates whatever happens there.

        Args:
          request: What it asks for.
          timeout_seconds: How long to wait for room at most; None for ever.

        Yields:
          A handle to its cache. The request may be deallocated early.

        Raises:
          FerrumError: What `allocate` raises.
        """
        handle = await self.allocate(request, timeout_seconds=timeout_seconds)

        def end() -> None:
            if handle.is_valid():
                self._manager.deallocate(request.request_id)

        try:
            yield handle
        finally:
            await self._queue.surely(end)

    async def extend(
        self, handle: KvCacheHandle, additional_tokens: int, *, timeout_seconds: float | None = None
    ) -> None:
        """Makes room for more tokens at the end of a sequence; see `extend_all`."""
        await self.extend_all([handle], additional_tokens, timeout_seconds=timeout_seconds)

    async def extend_all(
        self,
        handles: Sequence[KvCacheHandle],
        additional_tokens: int,
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        """Makes room for more tokens in several sequences at once, as soon as there is enough.

        Args:
          handles: Different sequences. They wait together, as urgent as the most urgent one.
          additional_tokens: How many more for each.
          timeout_seconds: How long to wait at most; 0 to try once, None for ever.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          OutOfBlocksError: If every request that holds blocks waits for more, this one last.
          InvalidHandleError: If a request is deallocated, even while this call waits.
          FerrumError: What else `PagedKvCacheManager.extend_all` raises.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        handles = check_items("handles", handles)
        entries = tuple(require_handle(handle).live_request() for handle in handles)
        waiter = Waiter(
            asks=f"{additional_tokens} more tokens for {names_of(entries)}",
            priority=max((entry.allocation.priority for entry in entries), default=Priority.Normal),
            may_go_ahead=lambda: takes_no_block(entries, additional_tokens),
            entries=entries,
            timeout_seconds=timeout_seconds,
        )
        call = functools.partial(self._manager.extend_all, handles, additional_tokens)
        may_swap = self._manager.preempts and not takes_no_block(entries, additional_tokens)
        await self._queue.wait(waiter, call, _keep if may_swap else None)

    async def allocate_blocks(
        self,
        num_blocks: int,
        *,
        priority: Priority = Priority.Normal,
        timeout_seconds: float | None = None,
    ) -> list[BlockId]:
        """Takes blocks for no request, as soon as there are enough.

        Args:
          num_blocks: How many.
          priority: How urgent they are.
          timeout_seconds: How long to wait for room at most; 0 to try once, None for ever.

        Returns:
          Their ids.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          FerrumError: What else `PagedKvCacheManager.allocate_blocks` raises.
        """
        num_blocks = check_count("num_blocks", num_blocks, minimum=0)
        check_type("priority", priority, Priority)
        waiter = Waiter(
            asks=f"allocate_blocks({num_blocks})",
            priority=priority,
            may_go_ahead=lambda: False,
            timeout_seconds=timeout_seconds,
        )
        call = functools.partial(self._manager.allocate_blocks, num_blocks)
        return await self._queue.wait(waiter, call, undo=self._manager.free_blocks)

    async def swap_in(self, request_id: RequestId, *, timeout_seconds: float | None = None) -> None:
        """Moves a request's bytes back, as soon as there is room; it waits as who begins does.

        Args:
          request_id: The caller's key.
          timeout_seconds: How long to wait for room at most; 0 to try once, None for ever.

        Raises:
          WaitTimeoutError: If there was not enough room in that time.
          FerrumError: What else `PagedKvCacheManager.swap_in` raises.
        """
        handle = await self._queue.on_loop(self._manager.get_handle, request_id)
        waiter = Waiter(
            asks=f"Request {request_id!r}, swapped out,",
            priority=Priority.Normal if handle is None else handle.request.priority,
            may_go_ahead=lambda: handle is None,  # To hear that it is unknown.
            timeout_seconds=timeout_seconds,
        )
        call = functools.partial(self._manager.swap_in, request_id)
        await self._queue.wait(waiter, call, _keep)

    # Calls that give room back.

    async def deallocate(self, request_id: RequestId) -> None:
        """Takes a sequence's room back, even if cancelled; see `KvCacheManager.deallocate`."""
        await self._queue.surely(self._manager.deallocate, request_id)

    async def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Gives blocks back, even if cancelled; see `BlockAllocator.free_blocks`."""
        await self._queue.surely(self._manager.free_blocks, blocks)

    # Calls that run in a thread.

    async def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[KvCacheHandle | None],
        *args: Any,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Lets a jitted step compute on the cache; see `PagedKvCacheManager.run`.

        Settings of JAX that a `with` makes for one thread do not reach the step.
        """
        call = functools.partial(self._manager.run, extends=extends, reserve_tokens=reserve_tokens)
        return await self._queue.off_loop(call, step, handles, *args)

    async def commit(
        self,
        handle: KvCacheHandle,
        token_ids: Sequence[int] = (),
        *,
        num_tokens: int | None = None,
        retention: Retention | None = None,
    ) -> int:
        """Keeps what was computed for later prompts; see `PagedKvCacheManager.commit`."""
        call = functools.partial(self._manager.commit, num_tokens=num_tokens, retention=retention)
        return await self._queue.off_loop(call, handle, token_ids)

    async def reset_prefixes(self, salt: str | None = None) -> None:
        """Drops what is cached of prompts; see `PagedKvCacheManager.reset_prefixes`."""
        await self._queue.off_loop(self._manager.reset_prefixes, salt)

    async def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Lets a sequence hold another's beginning; see `PagedKvCacheManager.share_prefix`."""
        await self._queue.off_loop(self._manager.share_prefix, source, target, shared_tokens)

    async def swap_out(self, request_id: RequestId) -> None:
        """Moves a request's bytes to host memory; see `PagedKvCacheManager.swap_out`."""
        await self._queue.off_loop(self._manager.swap_out, request_id)

    async def compress_cache(
        self,
        request_id: RequestId,
        compression_ratio: float,
        method: CompressionMethod | None = None,
        queries: ArrayLike | None = None,
    ) -> None:
        """Writes a request in fewer blocks; see `PagedKvCacheManager.compress_cache`."""
        call = self._manager.compress_cache
        await self._queue.off_loop(call, request_id, compression_ratio, method, queries)

    async def gc(self) -> CacheGcStats:
        """Frees what nobody uses any more; see `PagedKvCacheManager.gc`."""
        return await self._queue.off_loop(self._manager.gc)

    async def defragment(self) -> None:
        """Gathers the blocks in use at the low ids; see `BlockAllocator.defragment`."""
        await self._queue.off_loop(self._manager.defragment)

    async def block_table(self, handle: KvCacheHandle) -> BlockTable:
        """Returns which blocks hold a sequence; see `KvCacheHandle.block_table`."""
        return await self._queue.off_loop(require_handle(handle).block_table)

    async def check(self) -> None:
        """Raises AssertionError unless all that the manager knows holds."""
        await self._queue.off_loop(self._manager.check)

    # Quick calls, which wait only for a thread that works.

    async def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Begins to keep prompt prefixes; see `PagedKvCacheManager.enable_prefix_caching`."""
        await self._queue.on_loop(self._manager.enable_prefix_caching, config)

    async def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> LookupReport:
        """Says what is cached of a prompt; see `PagedKvCacheManager.explain_lookup`."""
        return await self._queue.on_loop(self._manager.explain_lookup, token_ids, cache_salt)

    # A look that does not wait; the others are `AsyncLooks`.

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Says whether `allocate` would succeed now, and need not wait for others either."""
        check_type("request", request, AllocationRequest)
        is_first = not self._queue.is_anyone_before(request.priority)
        return is_first and self._manager.can_allocate(request)


def _keep(result: None) -> None:
    """Undoes nothing: what was done is done, and no more is held than before."""
    del result  # Unused.
