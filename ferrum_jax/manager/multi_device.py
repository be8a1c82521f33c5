"""The manager of several devices: requests go where there is room, and move between pools."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ferrum_jax.checks import check_items, check_type
from ferrum_jax.config import CacheConfig
from ferrum_jax.errors import (
    OutOfBlocksError,
    OutOfRowsError,
    SwappedOutError,
    UnknownRequestError,
)
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.interfaces import AdvancedKvCacheManager, MultiDeviceCacheManager
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.balance import CacheMove, plan_moves
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.front import ManagerFront
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.moves import load_of, move_request
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.pools import names_of
from ferrum_jax.manager.several_pools import SeveralPools
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import AllocationRequest, CacheManagerStats
from ferrum_jax.types import Device, Priority, RequestId

_OVERTAKEN = OutOfBlocksError, OutOfRowsError, SwappedOutError, UnknownRequestError
"""Why a planned move may not be possible any more."""


class MultiDevicePagedKvCacheManager(ManagerFront, MultiDeviceCacheManager, AdvancedKvCacheManager):
    """Keeps the caches of many requests in a pool on each of several devices.

    Each target device has `max_blocks` blocks and `max_seqs` rows, a prefix cache and tiers of its
    own. A request is on one device at a time; its handles stay valid when it moves.

    A new request goes to the device that it names, or else to the first one in the order of
    preference that has room, evictable cached blocks counted as room. Only if none has are less
    urgent requests swapped out, if there is a preemption policy. Once started, a request stays
    where it is until it is moved: `extend` raises when that pool is full, whatever the others have.

    A call over all devices is made on each, whatever another one raises; then that is raised.

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
        options = ManagerOptions() if options is None else options
        check_type("config", config, CacheConfig)
        check_type("geometry", geometry, CacheGeometry)
        check_type("options", options, ManagerOptions)
        if not config.enable_multi_device:
            raise ValueError(
                "enable_multi_device must be true for a manager of several devices. Set it, or use "
                "PagedKvCacheManager."
            )
        self._pools = SeveralPools(config, geometry, options)
        self._last_rebalance: tuple[CacheMove, ...] = ()
        super().__init__(self._pools)

    # Devices.

    def supported_devices(self) -> list[Device]:
        """Returns the devices that have a pool, as configured."""
        return list(self._pools.devices)

    def set_device_preference(self, devices: Sequence[Device]) -> None:
        """Sets which devices new requests try, in this order; at first all, as configured.

        Requests on a device that is left out stay there, and a new request may still name it.

        Args:
          devices: Some of `supported_devices`, at least one.

        Raises:
          GeometryMismatchError: If a device has no pool.
          ValueError: If no device is named, or one twice.
        """
        devices = check_items("devices", devices)
        for device in devices:
            self._pools.manager_on(device)
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(
                f"devices must name at least one, and none twice, got {names_of(devices)!r}."
            )
        self._pools.set_preference(devices)

    def get_cache_device(self, request_id: RequestLike) -> Device | None:
        """Returns the device of a live request, or None.

        For a request that is swapped out, it is the device to which it will return.

        Args:
          request_id: The request, by id or handle.
        """
        return self._pools.find(request_id)

    def move_cache(self, request_id: RequestLike, target_device: Device) -> None:
        """Moves a request to another device, bit for bit, or not at all; both devices wait.

        Its blocks are freed when the bytes have arrived. Cached prefixes that no request uses are
        evicted to make room there, but no request is swapped out. A request that is swapped out
        stays so, and will be swapped in on the other device.

        Args:
          request_id: The request, by id or handle.
          target_device: The device to move to; the present one, for nothing to happen.

        Raises:
          UnknownRequestError: If the request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
          GeometryMismatchError: If the target has no pool.
          OutOfBlocksError: If too few blocks are available there.
          OutOfRowsError: If `max_seqs` sequences are held there already.
          OutOfHostMemoryError: If it is swapped out, and the tiers there have no room.
          CorruptFileError: If it is on disk, and its file is not what was written.
        """
        target = self._pools.manager_on(target_device)
        with self._pools.unmoved():
            source = self._pools.devices[self._pools.device_of(request_id)]
            move_request(request_id, source, target)

    def plan_rebalance(self, tolerance: float = 0.1) -> list[CacheMove]:
        """Returns the moves that `rebalance_devices` would make now.

        Args:
          tolerance: As for `rebalance_devices`.
        """
        with self._pools.unmoved():
            loads = {each: load_of(self._pools.devices[each]) for each in self._pools.preference}
        return plan_moves(loads, tolerance)

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
        plan, pools = self.plan_rebalance(tolerance), self._pools
        self._last_rebalance = ()
        for move in plan:
            with pools.unmoved():
                source, target = pools.devices[move.source], pools.devices[move.target]
                if source.requests.get(move.request_id) is None:
                    continue
                with interrupts.delayed(), contextlib.suppress(*_OVERTAKEN):
                    move_request(move.request_id, source, target, must_be_resident=True)
                    self._last_rebalance += (move,)

    @property
    def last_rebalance(self) -> tuple[CacheMove, ...]:
        """The moves of the last `rebalance_devices`, in order; failed ones excluded."""
        return self._last_rebalance

    def device_stats(self) -> dict[Device, CacheManagerStats]:
        """Returns each device's part of `stats`; a request counts as allocated where it started."""
        stats = self._pools.read_each(DeviceManager.stats)
        return dict(zip(self._pools.devices, stats, strict=True))

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
          request_id: As for `PagedKvCacheManager.new_request`, as are the others.
          initial_tokens: Tokens to allocate room for at once.
          max_sequence_length: Tokens that the request may grow to.
          priority: How urgent the request is.
          device: The device to try first; the preferred one if absent.
          prompt_token_ids: The prompt.
          cache_salt: Tenant key.

        Raises:
          GeometryMismatchError: If there is no pool on `device`.
          SequenceTooLongError: If `initial_tokens` or the prompt is more than
            `max_sequence_length`.
        """
        home = self._pools.first if device is None else self._pools.manager_on(device)
        sizes = initial_tokens, max_sequence_length, priority
        return home.new_request(request_id, *sizes, prompt_token_ids, cache_salt)

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Allocates room for a new sequence on the first device that has room.

        Args:
          request: The request, as from `new_request`.

        Returns:
          A handle to the request's cache.

        Raises:
          GeometryMismatchError: If there is no pool on the device that the request names, or the
            pools are for another model.
          OutOfBlocksError: If no device has enough blocks; the message is about the first.
          OutOfRowsError: If no device has room, and the first one has no row.
          FerrumError: What else `PagedKvCacheManager.allocate` raises.
        """
        check_type("request", request, AllocationRequest)
        return self._pools.allocate(request)

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Returns whether `allocate` would succeed now on a device that the request would try.

        Args:
          request: The request, as from `new_request`.
        """
        check_type("request", request, AllocationRequest)
        return self._pools.can_allocate(request)

    def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> dict[Device, LookupReport]:
        """Returns what each device has cached of a prompt now, and why not more.

        Args:
          token_ids: The prompt.
          cache_salt: Tenant key of the prompt.
        """
        return self._pools.explain(token_ids, cache_salt)
