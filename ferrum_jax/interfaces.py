"""The contract: interfaces of caches, managers, allocators and request policies.

As in the Rust crate ferrum-interfaces 0.6, module kv_cache. Methods are synchronous, since JAX does
not wait for what it dispatches, and raise `FerrumError`. Times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import jax

from ferrum_jax.config import CacheConfig, MemoryPressureThresholds, PrefixCacheConfig
from ferrum_jax.records import (
    AllocationRequest,
    BlockTable,
    CacheGcStats,
    CacheHandleStats,
    CacheManagerStats,
    CompressionReport,
    CompressionStats,
)
from ferrum_jax.types import BlockId, Device, MemoryPressure, RequestId

__all__ = ["AdvancedKvCacheManager", "AllocationRequest", "BlockAllocator", "BlockTable"]
__all__ += ["CacheConfig", "CacheEvictionPolicy", "CacheGcStats", "CacheHandleStats"]
__all__ += ["CacheManagerStats", "CompressionReport", "CompressionStats", "KvCacheHandle"]
__all__ += ["KvCacheManager", "MemoryPressure", "MemoryPressureThresholds"]
__all__ += ["MultiDeviceCacheManager", "PrefixCacheConfig"]


class KvCacheHandle(abc.ABC):
    """A view of one request's cache. It copies nothing, and is invalid once the request is freed.

    `num_tokens` is the length of the sequence. After compression has dropped tokens, the blocks
    hold `block_table().num_pruned` fewer.
    """

    @abc.abstractmethod
    def block_table(self) -> BlockTable:
        """Returns the blocks that hold the sequence now, and its length."""

    @abc.abstractmethod
    def block_table_mut(self) -> BlockTable:
        """Returns `block_table`, an immutable value; `extend` of the manager lengthens it."""

    @abc.abstractmethod
    def as_any(self) -> object:
        """Returns the handle itself, for code that knows its class."""

    @abc.abstractmethod
    def device(self) -> Device:
        """Returns the device that has the cache."""

    def num_tokens(self) -> int:
        """Returns the length of the sequence, dropped tokens included."""
        return self.block_table().sequence_length

    @abc.abstractmethod
    def num_layers(self) -> int:
        """Returns the number of cached layers."""

    @abc.abstractmethod
    def num_heads(self) -> int:
        """Returns the number of key/value heads."""

    @abc.abstractmethod
    def head_dim(self) -> int:
        """Returns the numbers per head."""

    @abc.abstractmethod
    def key_cache(self, layer: int) -> jax.Array | None:
        """Reads the keys of one layer.

        Args:
          layer: Index of the layer, from 0.

        Returns:
          [tokens, heads, head_dim] in the cache's dtype; None while the cache is swapped out.

        Raises:
          LayerOutOfRangeError: There is no such layer.
          InvalidHandleError: The request was deallocated.
        """

    @abc.abstractmethod
    def value_cache(self, layer: int) -> jax.Array | None:
        """Reads the values of one layer.

        Args:
          layer: Index of the layer, from 0.

        Returns:
          [tokens, heads, head_dim] in the cache's dtype; None while the cache is swapped out.

        Raises:
          LayerOutOfRangeError: There is no such layer.
          InvalidHandleError: The request was deallocated.
        """

    def kv_cache(self, layer: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Reads the keys and values of one layer.

        Args:
          layer: Index of the layer, from 0.

        Returns:
          `(keys, values)`, as `key_cache` and `value_cache` return them.
        """
        return self.key_cache(layer), self.value_cache(layer)

    @abc.abstractmethod
    def clone_handle(self) -> KvCacheHandle:
        """Returns another view of the same cache, without a copy."""

    @abc.abstractmethod
    def stats(self) -> CacheHandleStats:
        """Returns the memory that the cache takes now."""

    @abc.abstractmethod
    def is_valid(self) -> bool:
        """Returns whether the request is live. Never raises."""

    @abc.abstractmethod
    def cache_id(self) -> str:
        """Returns an id that no other cache of this process has."""


class KvCacheManager(abc.ABC):
    """Allocates, extends and frees the caches of requests."""

    @abc.abstractmethod
    def allocate(self, request: AllocationRequest) -> KvCacheHandle:
        """Allocates the cache of a new request.

        Args:
          request: The request.

        Returns:
          A handle to its cache.

        Raises:
          DuplicateRequestError: The request id is live.
          GeometryMismatchError: The request's layers, heads, head_dim or dtype are not the pool's.
          SequenceTooLongError: `max_sequence_length` exceeds what one row can hold.
          RequestTooLargeError: The request would not fit in an empty pool.
          OutOfBlocksError: Too few blocks are free, and too few can be evicted.
          OutOfRowsError: The maximum number of sequences is live.
        """

    @abc.abstractmethod
    def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """Makes room for more tokens at the end of a sequence, or changes nothing.

        Args:
          handle: Handle of the sequence's cache.
          additional_tokens: Number of tokens to add.

        Raises:
          InvalidHandleError: The request was deallocated.
          SequenceTooLongError: The sequence would exceed its `max_sequence_length`.
          OutOfBlocksError: Too few blocks are free, and too few can be evicted.
        """

    @abc.abstractmethod
    def deallocate(self, request_id: RequestId) -> None:
        """Frees the cache of a request; its handles become invalid.

        Args:
          request_id: Id of the request.

        Raises:
          UnknownRequestError: No such request is live.
        """

    @abc.abstractmethod
    def can_allocate(self, request: AllocationRequest) -> bool:
        """Returns whether `allocate` would succeed now for a request, including by eviction."""

    @abc.abstractmethod
    def stats(self) -> CacheManagerStats:
        """Returns the manager's present contents, and counts since it was made."""

    @abc.abstractmethod
    def gc(self) -> CacheGcStats:
        """Frees what is no longer used, and returns how much that was."""

    @abc.abstractmethod
    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function to call with the new level whenever memory pressure changes.

        Args:
          callback: Called outside the manager's lock. An exception that it raises is logged.
        """

    @abc.abstractmethod
    def get_handle(self, request_id: RequestId) -> KvCacheHandle | None:
        """Returns a handle of a request, or None if the id is not live."""

    @abc.abstractmethod
    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns the id and a handle of every live request."""


class AdvancedKvCacheManager(KvCacheManager):
    """A manager that also shares, swaps and compresses caches."""

    @abc.abstractmethod
    def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Enables prefix caching, or replaces its configuration; cached entries stay.

        Args:
          config: Which prefixes are cached.
        """

    @abc.abstractmethod
    def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Makes a sequence share the first tokens of another one, in place of its own.

        Args:
          source: Id of the request that has the tokens.
          target: Id of the request that shares them; its own blocks of these tokens are freed.
          shared_tokens: Number of tokens, at most the length of either sequence.

        Raises:
          UnknownRequestError: A request is not live.
          ValueError: `shared_tokens` exceeds a sequence's length.
        """

    @abc.abstractmethod
    def swap_out(self, request_id: RequestId) -> None:
        """Moves a cache to host memory, and frees its blocks.

        Args:
          request_id: Id of the request.

        Raises:
          UnknownRequestError: No such request is live.
        """

    @abc.abstractmethod
    def swap_in(self, request_id: RequestId) -> None:
        """Moves a cache back to the device, bit for bit.

        Args:
          request_id: Id of the request.

        Raises:
          UnknownRequestError: No such request is live.
          OutOfBlocksError: Too few blocks are free.
        """

    @abc.abstractmethod
    def compress_cache(self, request_id: RequestId, compression_ratio: float) -> None:
        """Compresses a cache, with some loss.

        Args:
          request_id: Id of the request.
          compression_ratio: Wanted ratio of the bytes after to the bytes before, in (0, 1].

        Raises:
          UnknownRequestError: No such request is live.
          ValueError: The ratio is not in (0, 1].
        """

    @abc.abstractmethod
    def compression_stats(self) -> CompressionStats:
        """Returns statistics of the compressed caches."""


class BlockAllocator(abc.ABC):
    """Allocates single blocks, without sequences."""

    @abc.abstractmethod
    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Allocates blocks of the pool, all or none.

        Args:
          num_blocks: Number of blocks.

        Returns:
          Their ids.

        Raises:
          RequestTooLargeError: The pool cannot have that many blocks.
          OutOfBlocksError: Too few blocks are free.
        """

    @abc.abstractmethod
    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Frees blocks, all or none.

        Args:
          blocks: Ids that `allocate_blocks` returned.

        Raises:
          DoubleFreeError: A block is free already, or repeated.
          ForeignBlockError: A block was not allocated by `allocate_blocks`.
        """

    @abc.abstractmethod
    def free_block_count(self) -> int:
        """Returns the number of free blocks."""

    @abc.abstractmethod
    def total_block_count(self) -> int:
        """Returns the number of blocks in the pool."""

    @abc.abstractmethod
    def block_size(self) -> int:
        """Returns the tokens per block."""

    @abc.abstractmethod
    def defragment(self) -> None:
        """Moves the blocks in use to the lowest ids; their contents do not change."""


class MultiDeviceCacheManager(KvCacheManager):
    """A manager with a pool on each of several devices."""

    @abc.abstractmethod
    def supported_devices(self) -> list[Device]:
        """Returns the devices that have a pool."""

    @abc.abstractmethod
    def set_device_preference(self, devices: Sequence[Device]) -> None:
        """Sets the devices that new requests try, in this order.

        Args:
          devices: Some of `supported_devices`.
        """

    @abc.abstractmethod
    def move_cache(self, request_id: RequestId, target_device: Device) -> None:
        """Moves a cache to another device, bit for bit.

        Args:
          request_id: Id of the request.
          target_device: Device to move the cache to.

        Raises:
          UnknownRequestError: No such request is live.
          OutOfBlocksError: Too few blocks are free on that device.
        """

    @abc.abstractmethod
    def get_cache_device(self, request_id: RequestId) -> Device | None:
        """Returns the device of a request's cache, or None if the id is not live."""

    @abc.abstractmethod
    def rebalance_devices(self) -> None:
        """Moves caches so that all devices are about equally full."""

    @abc.abstractmethod
    def device_stats(self) -> dict[Device, CacheManagerStats]:
        """Returns the statistics of each device."""


class CacheEvictionPolicy(abc.ABC):
    """Chooses the requests to preempt when a more urgent request needs room."""

    @abc.abstractmethod
    def select_eviction_candidates(
        self, required_memory: int, active_caches: Sequence[tuple[RequestId, KvCacheHandle]]
    ) -> list[RequestId]:
        """Chooses the requests to preempt.

        Args:
          required_memory: Bytes to free.
          active_caches: Id and handle of every request that may be preempted.

        Returns:
          Request ids, the first to preempt first.
        """

    @abc.abstractmethod
    def record_access(self, request_id: RequestId, access_time: float) -> None:
        """Records that a request was used.

        Args:
          request_id: Id of the request.
          access_time: Time of the use, in seconds of `time.monotonic()`.
        """

    def forget(self, request_id: RequestId) -> None:
        """Discards what is recorded of a request; another request may get its id.

        Args:
          request_id: Id of a request that has ended. The default does nothing.
        """
        del request_id  # Unused.

    @abc.abstractmethod
    def name(self) -> str:
        """Returns the policy's name."""
