"""The manager of one device: requests by id, on the pure operations of one cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferrum_jax.checks import (
    check_callable,
    check_count,
    check_flag,
    check_integer,
    check_items,
    check_type,
)
from ferrum_jax.config import CacheConfig
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.interfaces import AdvancedKvCacheManager, BlockAllocator
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.front import ManagerFront
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.moves import move_request
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.pools import Pools
from ferrum_jax.prefix.report import LookupReport
from ferrum_jax.records import AllocationRequest
from ferrum_jax.types import BlockId, Priority, RequestId


class PagedKvCacheManager(ManagerFront, AdvancedKvCacheManager, BlockAllocator):
    """Keeps the caches of many requests in the blocks of one pool.

    The pool is on one device, or over a mesh: see `ManagerOptions.mesh`.

    Methods are safe to call from several threads. `allocate`, `extend` and `deallocate` do not
    wait for the device. A call that cannot be fulfilled raises a `FerrumError`, a wrong argument a
    `ValueError`; either changes nothing.

    Args:
      config: Sizes of the pool. Its first target device is used.
      geometry: The model, and the limits of a request.
      options: How the manager works; the defaults if absent.

    Raises:
      ValueError: If the config is for a pool on each of several devices.

    Example:
      >>> manager = PagedKvCacheManager(
      ...     CacheConfig(block_size=4, max_blocks=8, initial_blocks=8),
      ...     CacheGeometry(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                   max_seqs=2, max_sequence_length=16))
      >>> handle = manager.allocate(manager.new_request("chat-1", initial_tokens=5))
      >>> manager.extend(handle, 4)
      >>> handle.num_tokens(), manager.free_block_count()
      (9, 5)
      >>> manager.deallocate("chat-1")
    """

    def __init__(
        self, config: CacheConfig, geometry: CacheGeometry, options: ManagerOptions | None = None
    ):
        options = ManagerOptions() if options is None else options
        check_type("config", config, CacheConfig)
        check_type("geometry", geometry, CacheGeometry)
        check_type("options", options, ManagerOptions)
        if config.enable_multi_device:
            raise ValueError(
                "enable_multi_device is true, and a PagedKvCacheManager has one pool. Use a "
                "MultiDevicePagedKvCacheManager for a pool on each target device, or leave it out."
            )
        self._device = DeviceManager(config, geometry, options)
        super().__init__(Pools({self._device.pool.device: self._device}))

    # Requests.

    def new_request(
        self,
        request_id: RequestId,
        initial_tokens: int | None = None,
        max_sequence_length: int | None = None,
        priority: Priority = Priority.Normal,
        *,
        prompt_token_ids: Sequence[int] | None = None,
        cache_salt: str | None = None,
    ) -> AllocationRequest:
        """Returns a request of the pool's geometry and device.

        Args:
          request_id: The caller's key.
          initial_tokens: Tokens to allocate room for at once; the prompt's if absent. 0 for a row
            that a step forks or extends, or a prompt that `prefill` is given and makes room for.
            For a prompt that is longer, room is made for what is cached and this many more: compute
            these, then `extend` by the next.
          max_sequence_length: Tokens that the request may grow to; the geometry's limit if absent.
          priority: How urgent the request is.
          prompt_token_ids: The prompt, if its cached prefix is to be used.
          cache_salt: Tenant key; prompts share cached prefixes only under an equal one.

        Raises:
          SequenceTooLongError: If `initial_tokens` or the prompt is more than
            `max_sequence_length`.
        """
        sizes = initial_tokens, max_sequence_length, priority
        return self._device.new_request(request_id, *sizes, prompt_token_ids, cache_salt)

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Allocates room for a new sequence, which begins with the cached prefix of its prompt.

        The handle's `num_cached_tokens` need not be computed. If too few blocks are free, cached
        blocks are evicted, and then, if there is a preemption policy, less urgent requests are
        swapped out.

        Args:
          request: The request, as from `new_request`.

        Returns:
          A handle to the request's cache.

        Raises:
          DuplicateRequestError: If the request id is live.
          GeometryMismatchError: If the request is of another geometry or device than the pool.
          SequenceTooLongError: If the request may grow longer than a row.
          RequestTooLargeError: If the request does not fit in an empty pool.
          OutOfBlocksError: If too few blocks are available.
          OutOfRowsError: If `max_seqs` sequences are held already.
          OutOfHostMemoryError: If a less urgent request cannot be stored.
        """
        check_type("request", request, AllocationRequest)
        return self.pools.allocate(request)

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Returns whether `allocate` would succeed now; growth, eviction and preemption counted.

        Args:
          request: The request, as from `new_request`.
        """
        check_type("request", request, AllocationRequest)
        return self.pools.can_allocate(request)

    def holds(self, request_id: RequestLike) -> bool:
        """Returns whether a request is live here; does not wait for other threads.

        Args:
          request_id: The request, by id or handle.
        """
        return request_id in self._device.requests

    def explain_lookup(
        self, token_ids: Sequence[int], cache_salt: str | None = None
    ) -> LookupReport:
        """Returns what `allocate` would find cached of a prompt now, and why not more.

        The report is for operators: it also says when other salts have more of the prompt.

        Args:
          token_ids: The prompt.
          cache_salt: Tenant key of the prompt.
        """
        return self.pools.explain(token_ids, cache_salt)[self._device.pool.device]

    def move_to(
        self,
        request_id: RequestLike,
        target: PagedKvCacheManager,
        *,
        must_be_resident: bool = False,
    ) -> None:
        """Moves a request with all its handles to another manager, bit for bit, or not at all.

        Its row here is freed when the bytes have arrived; both managers wait until then. Cached
        prefixes that no request uses are evicted to make room there, but no request is swapped
        out. Full blocks of known tokens are cached there, and stay cached here. A request
        that is swapped out moves from host to host. Room listeners may be called before both
        locks are released.

        Args:
          request_id: The request, by id or handle.
          target: Another manager, of the same geometry and block size.
          must_be_resident: Whether to raise SwappedOutError if the request is swapped out.

        Raises:
          UnknownRequestError: If the request is not live here.
          InvalidHandleError: If the handle's request was deallocated, or is not live here.
          DuplicateRequestError: If a request of that id is live there.
          GeometryMismatchError: If the other manager's blocks are not like these.
          OutOfBlocksError: If too few blocks are available there.
          OutOfRowsError: If `max_seqs` sequences are held there already.
          SwappedOutError: If the request is swapped out, and must not be.
          OutOfHostMemoryError: If the request is swapped out, and the tiers there have no room.
          CorruptFileError: If the request is on disk, and its file is not what was written.
        """
        check_type("target", target, PagedKvCacheManager)
        check_flag("must_be_resident", must_be_resident)
        move_request(
            request_id, self._device, target.pools.first, must_be_resident=must_be_resident
        )

    # Blocks.

    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Allocates blocks for no request; waits for the device, which knows their ids.

        Where layer groups have several pools, these are blocks of the first one.

        Args:
          num_blocks: Blocks to allocate, all or none.

        Returns:
          Ids of the blocks.

        Raises:
          RequestTooLargeError: If the pool can never have this many blocks.
          OutOfBlocksError: If too few blocks are available.
        """
        num_blocks = check_count("num_blocks", num_blocks, minimum=0)
        with self._device.access.changing():
            return self._device.allocate_blocks(num_blocks)

    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Frees blocks of `allocate_blocks`, all or none.

        Args:
          blocks: Ids that `allocate_blocks` returned.

        Raises:
          DoubleFreeError: If a block is free already, or named twice.
          ForeignBlockError: If a block was not allocated here.
        """
        blocks = [check_integer("blocks", block) for block in check_items("blocks", blocks)]
        with self._device.access.changing():
            self._device.free_blocks(blocks)

    def free_block_count(self) -> int:
        """Returns the number of free blocks in the present pools, which may still grow."""
        with self._device.access.reading():
            return self._device.pool.counts.num_free.total

    def total_block_count(self) -> int:
        """Returns the number of blocks in the present pools."""
        with self._device.access.reading():
            return self._device.pool.counts.num_blocks.total

    def block_size(self) -> int:
        """Returns the number of tokens per block."""
        return self._device.pool.counts.block_size

    # Waiting for room.

    def add_room_listener(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Adds a function that is called after each change which may have made room.

        Args:
          callback: Called without the manager's lock, by the thread that made the change. What it
            raises is logged.

        Returns:
          A function that removes the callback.
        """
        check_callable("callback", callback)
        return self.pools.add_room_listener(callback)

    @property
    def num_room_changes(self) -> int:
        """Changes so far that may have made room."""
        return self.pools.num_room_changes

    @property
    def is_lost(self) -> bool:
        """Whether a step has consumed a cache, so that changes raise CacheLostError."""
        return self.pools.is_lost

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests share the cached prefixes of others."""
        config = self._device.prefixes.cache.config
        return config is not None and config.enable_cross_request_sharing

    @property
    def preempts(self) -> bool:
        """Whether less urgent requests may be swapped out to make room."""
        return self.pools.preempts
