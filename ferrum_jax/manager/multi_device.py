"""The manager of several devices: requests go where there is room, and move between pools."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from ferrum_jax.checks import check_items, check_type
from ferrum_jax.config import CacheConfig, CacheGeometry, PrefixCacheConfig
from ferrum_jax.errors import (
    OutOfBlocksError,
    OutOfRowsError,
    SwappedOutError,
    UnknownRequestError,
)
from ferrum_jax.interfaces import AdvancedKvCacheManager, KvCacheHandle, MultiDeviceCacheManager
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.devices import names_of, on_device
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.moves import load_of, move_request
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.routing import Routing
from ferrum_jax.policies.balance import CacheMove, plan_moves
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import (
    AllocationRequest,
    CacheGcStats,
    CacheManagerStats,
    CompressionStats,
)
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import Device, MemoryPressure, Priority, RequestId

_OVERTAKEN = OutOfBlocksError, OutOfRowsError, SwappedOutError, UnknownRequestError
"""Why a planned move may not be possible any more."""


class MultiDevicePagedKvCacheManager(Routing, MultiDeviceCacheManager, AdvancedKvCacheManager):
    """Keeps the caches of many requests in a pool on each of several devices.

    Each target device has a `PagedKvCacheManager` of its own, with `max_blocks` blocks and
    `max_seqs` rows, prefix cache and tiers. A request is on one device at a time; its handles
    stay valid when it moves.

    A new request goes to the device that it names, or else to the first one in the order of
    preference that has room, cached prefixes that nobody uses counted as room. Only if none has
    are less urgent requests swapped out, if there is a preemption policy. Once begun, a request
    stays where it is until it is moved: `extend` raises when that pool is full, whatever the
    others have.

    What concerns all devices is done on each, whatever another one raises; then it is raised.

    Methods are safe to call from several threads. A step on one device does not hold up steps on
    another, nor `extend` and `deallocate` there. A step must not use the manager.

    Args:
      config: The pools; `enable_multi_device` must be true.
      geometry: The model, and the limits of a request, on each device.
      options: How each device's manager works. Each has a copy of the preemption policy, and a
        directory of its own in that of the tiers.

    Raises:
      ValueError: If the config is for one device, or names one that this process does not have.

    Example:
      >>> manager = MultiDevicePagedKvCacheManager(
      ...     CacheConfig(block_size=4, max_blocks=8, initial_blocks=8, enable_multi_device=True),
      ...     CacheGeometry(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                   max_seqs=2, max_sequence_length=16))
      >>> handle = manager.allocate(manager.new_request("chat-1", initial_tokens=5))
      >>> manager.extend(handle, 4)
      >>> print(manager.get_cache_device("chat-1"), handle.num_tokens())
      cpu:0 9
    """

    def __init__(
        self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions | None = None
    ):
        check_type("config", config, CacheConfig)
        if not config.enable_multi_device:
            raise ValueError(
                "enable_multi_device must be true for a manager of several devices. Set it, or use "
                "PagedKvCacheManager."
            )
        super().__init__(config, geometry, ManagerOptions() if options is None else options)
        self._last_rebalance: tuple[CacheMove, ...] = ()

    # Devices.

    def supported_devices(self) -> list[Device]:
        """Returns the devices that have a pool, as configured."""
        return list(self._managers)

    def set_device_preference(self, devices: Sequence[Device]) -> None:
        """Sets which devices new sequences try, in this order; at first all, as configured.

        What is on a device that is left out stays there, and a request may still name it.

        Args:
          devices: Some of `supported_devices`, at least one.

        Raises:
          GeometryMismatchError: If one has no pool.
          ValueError: If none is named, or one twice.
        """
        devices = tuple(check_items("devices", devices))
        for device in devices:
            self._manager_on(device)
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(
                f"devices must name at least one, and none twice, got {names_of(devices)!r}."
            )
        with self._while_nothing_moves():
            self._preference = devices

    def get_cache_device(self, request_id: RequestId) -> Device | None:
        """Returns the device of a live request, or None.

        For one that is swapped out, it is the device to which it will return.
        """
        return self._found_on(request_id)

    def move_cache(self, request_id: RequestId, target_device: Device) -> None:
        """Moves a cache to another device, bit for bit, or not at all; both devices wait.

        Its place is freed when the bytes have arrived. Cached prefixes that nobody uses go to make
        room there, but nobody is swapped out. What is swapped out stays so, and will be swapped
        in over there.

        Args:
          request_id: The caller's key.
          target_device: Where to; where it is, for nothing to happen.

        Raises:
          UnknownRequestError: If no such request is live.
          GeometryMismatchError: If the target has no pool.
          OutOfBlocksError: If too few blocks are free there.
          OutOfRowsError: If as many sequences are held there as may be.
          OutOfHostMemoryError: If it is swapped out, and the tiers there have no room.
          CorruptFileError: If it is on disk, and its file is not what was written.
        """
        target = self._manager_on(target_device)
        with self._while_nothing_moves():
            source = self._managers[self._device_of(request_id)]
            move_request(request_id, source, target)

    def plan_rebalance(self, tolerance: float = 0.1) -> list[CacheMove]:
        """Returns what `rebalance_devices` would move now."""
        with self._while_nothing_moves():
            pools = {device: load_of(self._managers[device]) for device in self._preference}
        return plan_moves(pools, tolerance)

    def rebalance_devices(self, tolerance: float = 0.1) -> None:
        """Moves the fewest bytes that make devices about equally full; see `last_rebalance`.

        Devices outside the order of preference neither give nor take. Others may use the manager
        meanwhile: a move for which there is no room any more is left out, and so is one of a
        request that has ended, moved or been swapped out. What requests share is planned as if
        each moved alone, so that those which leave together may free more than was planned.

        Args:
          tolerance: Most by which the shares of blocks in use should differ, in [0, 1]. If that
            cannot be reached, they are brought as close as caches allow.

        Raises:
          ValueError: If the tolerance is not in [0, 1].
        """
        plan = self.plan_rebalance(tolerance)
        self._last_rebalance = ()
        for move in plan:
            with self._while_nothing_moves():
                if self._seen_on(move.request_id) != move.source:
                    continue
                source, target = self._managers[move.source], self._managers[move.target]
                with interrupts.delayed(), contextlib.suppress(*_OVERTAKEN):
                    move_request(move.request_id, source, target, must_be_resident=True)
                    self._last_rebalance += (move,)

    @property
    def last_rebalance(self) -> tuple[CacheMove, ...]:
        """What the last `rebalance_devices` moved, in order; the failed move, if any, not."""
        return self._last_rebalance

    def device_stats(self) -> dict[Device, CacheManagerStats]:
        """Returns each device's part of `stats`; a request counts as allocated where it began."""
        with self._while_nothing_moves():
            return {device: manager.stats() for device, manager in self._managers.items()}

    # Requests.

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
        """Returns a request of the pools' geometry.

        Args:
          request_id: The caller's key.
          initial_tokens: Tokens to have room for at once; the prompt's if absent.
          max_sequence_length: Tokens that it may grow to; the geometry's limit if absent.
          priority: How urgent it is.
          device: Which device to try first; the preferred one if absent.
          prompt_token_ids: Its prompt, if what is cached of it is to be used.
          cache_salt: Whose prompts it may share with.
        """
        manager = self._manager_on(self._preference[0] if device is None else device)
        return manager.admission.new_request(
            request_id,
            initial_tokens,
            max_sequence_length,
            priority,
            prompt_token_ids=prompt_token_ids,
            cache_salt=cache_salt,
        )

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Makes room for a new sequence on some device; see `KvCacheManager.allocate`.

        Raises:
          GeometryMismatchError: If there is no pool on the device that it names, or the pools are
            for another model.
          OutOfBlocksError: If no device has enough blocks; what is wrong is said of the first.
          OutOfRowsError: If no device has room, and the first one has no row.
        """
        check_type("request", request, AllocationRequest)
        with self._while_nothing_moves():
            tried = self._candidates(request)
            home = self._seen_on(request.request_id)  # Who is live already is refused there.
            device = home or self._device_for(request) or tried[0]
            try:
                return self._managers[device].allocate(on_device(request, device))
            except (OutOfBlocksError, OutOfRowsError) as error:
                others = names_of(other for other in tried if other != device)
                also = f"; nor has {others} room" if others else ""
                raise type(error)(f"{error} This is so on {device}{also}.") from error

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Says whether `allocate` would succeed now on any device that the request would try."""
        check_type("request", request, AllocationRequest)
        with self._while_nothing_moves():
            if request.device not in self._managers or self._seen_on(request.request_id):
                return False
            return self._device_for(request) is not None

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, device by device."""
        with self._while_nothing_moves():
            return [pair for manager in self._managers.values() for pair in manager.list_handles()]

    def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> dict[Device, LookupReport]:
        """Says what each device has cached of a prompt now, and why not more.

        Args:
          token_ids: The prompt.
          cache_salt: Whose.
        """
        managers = self._managers.items()
        if cache_salt is not None:
            check_type("cache_salt", cache_salt, str)
        tokens = TokenIds(token_ids)
        return {device: m.explain_lookup(tokens, cache_salt) for device, m in managers}

    # The whole.

    def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Begins to keep prompt prefixes on every device, or goes by another configuration.

        Args:
          config: Which prefixes are kept.
        """
        check_type("config", config, PrefixCacheConfig)
        with self._while_nothing_moves():
            self._on_each(lambda manager: manager.enable_prefix_caching(config))

    def reset_prefixes(self, salt: str | None = None) -> None:
        """Drops what is cached of prompts on every device; see `PagedKvCacheManager`.

        Args:
          salt: The salt whose prompts are dropped; those of every salt, and without one, if absent.
        """
        if salt is not None:
            check_type("salt", salt, str)
        with self._while_nothing_moves():
            self._on_each(lambda manager: manager.reset_prefixes(salt))

    def defragment(self) -> None:
        """Moves requests' blocks to the low ids of each pool."""
        with self._while_nothing_moves():
            self._on_each(lambda manager: manager.defragment())

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has won on all devices: of the requests compressed there now."""
        with self._while_nothing_moves():
            managers = self._managers.values()
            parts = [manager.compression_stats() for manager in managers]
            times = [manager.compression.num_compressions for manager in managers]
        counts = [part.compressed_caches for part in parts]
        ratios = [part.avg_compression_ratio for part in parts]
        milliseconds = [part.avg_compression_time_ms for part in parts]
        return CompressionStats(
            compressed_caches=sum(counts),
            memory_saved_bytes=sum(part.memory_saved_bytes for part in parts),
            avg_compression_ratio=_mean(ratios, counts, if_none=1.0),
            avg_compression_time_ms=_mean(milliseconds, times, if_none=0.0),
        )

    def stats(self) -> CacheManagerStats:
        """Returns what is held on all devices, and what was done so far.

        Each number is the sum of `device_stats`, but for the hit rate, which is of all prompts.
        """
        with self._while_nothing_moves():
            managers = self._managers.values()
            parts = [manager.stats() for manager in managers]
            counts = [manager.prefixes.num_prompt_tokens for manager in managers]
        total: dict[str, Any] = {
            field.name: sum(getattr(part, field.name) for part in parts)
            for field in dataclasses.fields(CacheManagerStats)
        }
        rates = [part.cache_hit_rate for part in parts]
        total["cache_hit_rate"] = _mean(rates, counts, if_none=0.0)
        return CacheManagerStats(**total)

    def gc(self) -> CacheGcStats:
        """Frees requests of which no handle is left, and prefixes that have expired."""
        with self._while_nothing_moves():
            parts = self._on_each(DeviceManager.gc)
        return CacheGcStats(
            memory_freed=sum(part.memory_freed for part in parts),
            caches_freed=sum(part.caches_freed for part in parts),
            gc_time_ms=sum(part.gc_time_ms for part in parts),
        )

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets what is called with the new level on every change of pressure.

        The level is that of blocks in use on all devices over all that these may have.
        """
        self._pressure.set_callback(callback)

    def check(self) -> None:
        """Raises AssertionError unless all that is known holds; waits for every device."""
        with self._while_nothing_moves():
            for manager in self._managers.values():
                manager.check()
            names = [name for m in self._managers.values() for name, _ in m.list_handles()]
            if len(set(names)) < len(names):
                raise AssertionError("A request is on two devices.")


def _mean(numbers: Sequence[float], counts: Sequence[int], *, if_none: float) -> float:
    """Returns the mean of all that is counted, given the means of its parts."""
    total = sum(number * count for number, count in zip(numbers, counts, strict=True))
    return total / sum(counts) if any(counts) else if_none
