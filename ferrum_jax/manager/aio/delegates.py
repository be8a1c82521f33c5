"""The methods of the async manager that do not wait for room: the wrapped manager does the work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.aio.scheduler import Scheduler
from ferrum_jax.manager.balance import CacheMove
from ferrum_jax.manager.front import ManagerFront
from ferrum_jax.manager.handle import (
    PagedKvCacheHandle,
    RequestLike,
    require_handle,
)
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import AllocationRequest, BlockTable
from ferrum_jax.types import Device, Priority, RequestId

M = TypeVar("M", PagedKvCacheManager, MultiDevicePagedKvCacheManager)
P = ParamSpec("P")
T = TypeVar("T")


def _at_once(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """Returns a method that calls a method of the wrapped manager."""

    @functools.wraps(method)
    def call(self: Delegates[Any], *args: P.args, **kwargs: P.kwargs) -> T:
        return self._named(method.__name__)(*args, **kwargs)

    return call


def _by(
    run: Callable[..., Coroutine[Any, Any, Any]], method: Callable[Concatenate[Any, P], T]
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """Returns a coroutine function that calls a method of the wrapped manager.

    Args:
      run: The method of `Scheduler` that runs the call.
      method: The method, as a function of its class.
    """

    @functools.wraps(method)
    async def call(self: Delegates[Any], *args: P.args, **kwargs: P.kwargs) -> T:
        return await run(self._scheduler, self._named(method.__name__), *args, **kwargs)

    return call


class Delegates(Uncopied, Generic[M]):
    """Calls on a wrapped manager: at once, on the event loop, or in a thread.

    Methods that are not coroutines block only while another thread holds the manager's lock.
    Methods of only one of the two managers raise ValueError over the other one.

    Args:
      manager: The manager to wrap.
      scheduler: Runs the calls of coroutines.
    """

    def __init__(self, manager: M, scheduler: Scheduler):
        self._manager: M = manager
        self._scheduler = scheduler

    @property
    def manager(self) -> M:
        """The wrapped manager."""
        return self._manager

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int | None = None,
        max_sequence_length: int | None = None,
        priority: Priority = Priority.Normal,
        *,
        device: Device | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> AllocationRequest:
        """Returns a request of the pool's geometry; see `PagedKvCacheManager.new_request`."""
        given: dict[str, Any] = {"prompt_token_ids": prompt_token_ids, "cache_salt": cache_salt}
        if device is not None:
            if not isinstance(self._manager, MultiDevicePagedKvCacheManager):
                raise self._error("device")
            given["device"] = device
        return self._manager.new_request(
            request_id, initial_tokens, max_sequence_length, priority, **given
        )

    @property
    def last_rebalance(self) -> tuple[CacheMove, ...]:
        """The moves of the last `rebalance_devices`, in order."""
        return self._named("last_rebalance")

    async def block_table(self, handle: RequestLike) -> BlockTable:
        """Returns which blocks hold a sequence; see `KvCacheHandle.block_table`."""
        return await self._scheduler.run_in_thread((await self._handle_of(handle)).block_table)

    async def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> LookupReport | dict[Device, LookupReport]:
        """Returns how far a prompt is cached; see `PagedKvCacheManager.explain_lookup`."""
        call = self._manager.explain_lookup
        return await self._scheduler.run_on_loop(call, token_ids, cache_salt)

    get_handle = _at_once(ManagerFront.get_handle)
    list_handles = _at_once(ManagerFront.list_handles)
    stats = _at_once(ManagerFront.stats)
    compression_stats = _at_once(ManagerFront.compression_stats)
    set_pressure_callback = _at_once(ManagerFront.set_pressure_callback)
    free_block_count = _at_once(PagedKvCacheManager.free_block_count)
    total_block_count = _at_once(PagedKvCacheManager.total_block_count)
    block_size = _at_once(PagedKvCacheManager.block_size)
    supported_devices = _at_once(MultiDevicePagedKvCacheManager.supported_devices)
    get_cache_device = _at_once(MultiDevicePagedKvCacheManager.get_cache_device)
    device_stats = _at_once(MultiDevicePagedKvCacheManager.device_stats)

    run = _by(Scheduler.run_in_thread, ManagerFront.run)
    prefill = _by(Scheduler.run_in_thread, ManagerFront.prefill)
    generate = _by(Scheduler.run_in_thread, ManagerFront.generate)
    commit = _by(Scheduler.run_in_thread, ManagerFront.commit)
    reset_prefixes = _by(Scheduler.run_in_thread, ManagerFront.reset_prefixes)
    fork = _by(Scheduler.run_in_thread, ManagerFront.fork)
    share_prefix = _by(Scheduler.run_in_thread, ManagerFront.share_prefix)
    swap_out = _by(Scheduler.run_in_thread, ManagerFront.swap_out)
    compress_cache = _by(Scheduler.run_in_thread, ManagerFront.compress_cache)
    gc = _by(Scheduler.run_in_thread, ManagerFront.gc)
    defragment = _by(Scheduler.run_in_thread, ManagerFront.defragment)
    check = _by(Scheduler.run_in_thread, ManagerFront.check)
    move_cache = _by(Scheduler.run_in_thread, MultiDevicePagedKvCacheManager.move_cache)
    plan_rebalance = _by(Scheduler.run_in_thread, MultiDevicePagedKvCacheManager.plan_rebalance)
    rebalance_devices = _by(
        Scheduler.run_in_thread, MultiDevicePagedKvCacheManager.rebalance_devices
    )

    enable_prefix_caching = _by(Scheduler.run_on_loop, ManagerFront.enable_prefix_caching)
    set_weights_version = _by(Scheduler.run_on_loop, ManagerFront.set_weights_version)
    set_device_preference = _by(
        Scheduler.run_on_loop, MultiDevicePagedKvCacheManager.set_device_preference
    )

    # Calls that make room; they are done even if cancelled.
    close = _by(Scheduler.run_uncancellable, ManagerFront.close)
    deallocate = _by(Scheduler.run_uncancellable, ManagerFront.deallocate)
    free_blocks = _by(Scheduler.run_uncancellable, PagedKvCacheManager.free_blocks)

    async def _handle_of(self, request: RequestLike) -> PagedKvCacheHandle:
        """Returns a handle of a live request: the given one, if it is one."""
        if isinstance(request, KvCacheHandle):
            return require_handle(request)
        return await self._scheduler.run_on_loop(self._manager.pools.handle_of, request)

    def _named(self, name: str) -> Any:
        """Returns a method or property of the wrapped manager.

        Raises:
          ValueError: If only the other of the two managers has it.
        """
        if not hasattr(self._manager, name):
            raise self._error(name)
        return getattr(self._manager, name)

    def _error(self, name: str) -> ValueError:
        """Returns the error for what only the other of the two managers has."""
        is_one = isinstance(self._manager, PagedKvCacheManager)
        wanted, wrapped = (
            ("several devices", "one device") if is_one else ("one device", "several devices")
        )
        other = MultiDevicePagedKvCacheManager if is_one else PagedKvCacheManager
        return ValueError(
            f"{name} is for {wanted}, and this manager wraps one of {wrapped}. Use a "
            f"{other.__name__}."
        )
