"""The methods of the async manager that do not wait for room: the wrapped manager does the work."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from jax.typing import ArrayLike

from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.aio.scheduler import Scheduler
from ferrum_jax.manager.balance import CacheMove
from ferrum_jax.manager.handle import PagedKvCacheHandle, require_handle
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.manager.uncopied import Uncopied
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import (
    AllocationRequest,
    BlockTable,
    CacheGcStats,
    CacheManagerStats,
    CompressionStats,
)
from ferrum_jax.types import Device, MemoryPressure, Priority, RequestId

M = TypeVar("M", PagedKvCacheManager, MultiDevicePagedKvCacheManager)


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
        sizes = initial_tokens, max_sequence_length, priority
        prompt = {"prompt_token_ids": prompt_token_ids, "cache_salt": cache_salt}
        if device is None:
            return self._manager.new_request(request_id, *sizes, **prompt)
        return self._several("device").new_request(request_id, *sizes, device=device, **prompt)

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None; see `PagedKvCacheManager.get_handle`."""
        return self._manager.get_handle(request_id)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        return self._manager.list_handles()

    def stats(self) -> CacheManagerStats:
        """Returns what is held at this moment; a wait counts as one failure at most."""
        return self._manager.stats()

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved; see `PagedKvCacheManager.compression_stats`."""
        return self._manager.compression_stats()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function called with each new level of pressure.

        Args:
          callback: Called on the loop, or in the thread that made the change.
        """
        self._manager.set_pressure_callback(callback)

    # One device only.

    def free_block_count(self) -> int:
        """Returns how many blocks of the present pool are free; it may still grow."""
        return self._one("free_block_count").free_block_count()

    def total_block_count(self) -> int:
        """Returns how many blocks the pool has at present."""
        return self._one("total_block_count").total_block_count()

    def block_size(self) -> int:
        """Returns the tokens per block."""
        return self._one("block_size").block_size()

    # Several devices only.

    def supported_devices(self) -> list[Device]:
        """Returns the devices that have a pool."""
        return self._several("supported_devices").supported_devices()

    def get_cache_device(self, request_id: RequestId) -> Device | None:
        """Returns the device of a live request; see `MultiDevicePagedKvCacheManager`."""
        return self._several("get_cache_device").get_cache_device(request_id)

    def device_stats(self) -> dict[Device, CacheManagerStats]:
        """Returns each device's part of `stats`."""
        return self._several("device_stats").device_stats()

    @property
    def last_rebalance(self) -> tuple[CacheMove, ...]:
        """The moves of the last `rebalance_devices`, in order."""
        return self._several("last_rebalance").last_rebalance

    async def move_cache(self, request_id: RequestId, target_device: Device) -> None:
        """Moves a request to a device; see `MultiDevicePagedKvCacheManager.move_cache`."""
        call = self._several("move_cache").move_cache
        await self._scheduler.run_in_thread(call, request_id, target_device)

    async def plan_rebalance(self, tolerance: float = 0.1) -> list[CacheMove]:
        """Returns planned moves; see `MultiDevicePagedKvCacheManager.plan_rebalance`."""
        call = self._several("plan_rebalance").plan_rebalance
        return await self._scheduler.run_in_thread(call, tolerance)

    async def rebalance_devices(self, tolerance: float = 0.1) -> None:
        """Moves requests; see `MultiDevicePagedKvCacheManager.rebalance_devices`."""
        call = self._several("rebalance_devices").rebalance_devices
        await self._scheduler.run_in_thread(call, tolerance)

    async def set_device_preference(self, devices: Sequence[Device]) -> None:
        """Sets devices to try; see `MultiDevicePagedKvCacheManager.set_device_preference`."""
        call = self._several("set_device_preference").set_device_preference
        await self._scheduler.run_on_loop(call, devices)

    # Calls that run in a thread.

    async def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[KvCacheHandle | None],
        *args: Any,
        device: Device | None = None,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Runs a jitted step on the cache; see `PagedKvCacheManager.run`.

        Settings of JAX that a `with` makes for one thread do not reach the step.
        """
        changes = {"extends": extends, "reserve_tokens": reserve_tokens}
        call = functools.partial(self._manager.run, device=device, **changes)
        return await self._scheduler.run_in_thread(call, step, handles, *args)

    async def commit(
        self,
        handle: KvCacheHandle,
        token_ids: Sequence[int] = (),
        *,
        num_tokens: int | None = None,
        retention: Retention | None = None,
    ) -> int:
        """Caches what was computed for later prompts; see `PagedKvCacheManager.commit`."""
        call = functools.partial(self._manager.commit, num_tokens=num_tokens, retention=retention)
        return await self._scheduler.run_in_thread(call, handle, token_ids)

    async def reset_prefixes(self, salt: str | None = None) -> None:
        """Removes cached prefixes; see `PagedKvCacheManager.reset_prefixes`."""
        await self._scheduler.run_in_thread(self._manager.reset_prefixes, salt)

    async def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Puts first tokens into another request; see `PagedKvCacheManager.share_prefix`."""
        call = self._manager.share_prefix
        await self._scheduler.run_in_thread(call, source, target, shared_tokens)

    async def swap_out(self, request_id: RequestId) -> None:
        """Moves a request's bytes to host memory; see `PagedKvCacheManager.swap_out`."""
        await self._scheduler.run_in_thread(self._manager.swap_out, request_id)

    async def compress_cache(
        self,
        request_id: RequestId,
        compression_ratio: float,
        method: CompressionMethod | None = None,
        queries: ArrayLike | None = None,
    ) -> None:
        """Rewrites a request in fewer blocks; see `PagedKvCacheManager.compress_cache`."""
        call = self._manager.compress_cache
        await self._scheduler.run_in_thread(call, request_id, compression_ratio, method, queries)

    async def gc(self) -> CacheGcStats:
        """Frees requests without a handle; see `PagedKvCacheManager.gc`."""
        return await self._scheduler.run_in_thread(self._manager.gc)

    async def defragment(self) -> None:
        """Moves the blocks in use to the low ids; see `PagedKvCacheManager.defragment`."""
        await self._scheduler.run_in_thread(self._manager.defragment)

    async def block_table(self, handle: KvCacheHandle) -> BlockTable:
        """Returns which blocks hold a sequence; see `KvCacheHandle.block_table`."""
        return await self._scheduler.run_in_thread(require_handle(handle).block_table)

    async def check(self) -> None:
        """Raises AssertionError unless everything that the manager knows agrees."""
        await self._scheduler.run_in_thread(self._manager.check)

    # Calls that run on the loop as soon as no thread is busy.

    async def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Enables prefix caching; see `PagedKvCacheManager.enable_prefix_caching`."""
        await self._scheduler.run_on_loop(self._manager.enable_prefix_caching, config)

    async def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> LookupReport | dict[Device, LookupReport]:
        """Returns how far a prompt is cached; see `PagedKvCacheManager.explain_lookup`."""
        call = self._manager.explain_lookup
        return await self._scheduler.run_on_loop(call, token_ids, cache_salt)

    def _one(self, method: str) -> PagedKvCacheManager:
        """Returns the manager of one device, or raises ValueError."""
        if not isinstance(self._manager, PagedKvCacheManager):
            raise ValueError(
                f"{method} is for one device, and this manager wraps one of several devices. Use a "
                "PagedKvCacheManager."
            )
        return self._manager

    def _several(self, method: str) -> MultiDevicePagedKvCacheManager:
        """Returns the manager of several devices, or raises ValueError."""
        if not isinstance(self._manager, MultiDevicePagedKvCacheManager):
            raise ValueError(
                f"{method} is for several devices, and this manager wraps one of one device. Use a "
                "MultiDevicePagedKvCacheManager."
            )
        return self._manager
