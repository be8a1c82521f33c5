"""The contract: what a cache, its manager, an allocator and an eviction policy must offer.

Names and meanings are those of the Rust crate ferrum-interfaces 0.6, module kv_cache. Methods
are synchronous, since JAX dispatches work without waiting for it; where the Rust trait returns
an error, the method raises a `FerrumError`. Times are seconds of `time.monotonic()`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence

import jax

from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.records import (
    AllocationRequest,
    BlockTable,
    CacheGcStats,
    CacheHandleStats,
    CacheManagerStats,
    CompressionStats,
)
from ferrum_jax.types import BlockId, Device, MemoryPressure, RequestId


class KvCacheHandle(abc.ABC):
    """A view of one request's cache. It copies nothing, and dies with the request."""

    @abc.abstractmethod
    def block_table(self) -> BlockTable:
        """Returns which blocks hold the sequence at this moment."""

    @abc.abstractmethod
    def block_table_mut(self) -> BlockTable:
        """Returns the same as `block_table`.

        A table is an immutable value here: to lengthen a sequence, ask the manager to `extend`.
        """

    @abc.abstractmethod
    def as_any(self) -> object:
        """Returns the handle itself, for code that knows its class."""

    @abc.abstractmethod
    def device(self) -> Device:
        """Returns where the cache lives."""

    def num_tokens(self) -> int:
        """Returns the length of the sequence, tokens included that compression has dropped.

        This default is for caches that drop no tokens.
        """
        return self.block_table().sequence_length

    @abc.abstractmethod
    def num_layers(self) -> int:
        """Returns how many layers are cached."""

    @abc.abstractmethod
    def num_heads(self) -> int:
        """Returns how many heads are cached."""

    @abc.abstractmethod
    def head_dim(self) -> int:
        """Returns how many numbers a head has."""

    @abc.abstractmethod
    def key_cache(self, layer: int) -> jax.Array | None:
        """Reads one layer's keys.

        Args:
          layer: Which layer, from 0.

        Returns:
          [tokens, heads, head_dim] in the cache's dtype; None while not on the device.

        Raises:
          LayerOutOfRangeError: If there is no such layer.
          InvalidHandleError: If the request was deallocated.
        """

    @abc.abstractmethod
    def value_cache(self, layer: int) -> jax.Array | None:
        """Reads one layer's values.

        Args:
          layer: Which layer, from 0.

        Returns:
          [tokens, heads, head_dim] in the cache's dtype; None while not on the device.

        Raises:
          LayerOutOfRangeError: If there is no such layer.
          InvalidHandleError: If the request was deallocated.
        """

    def kv_cache(self, layer: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Reads one layer's keys and values.

        Args:
          layer: Which layer, from 0.

        Returns:
          What `key_cache` and `value_cache` return.
        """
        return self.key_cache(layer), self.value_cache(layer)

    @abc.abstractmethod
    def clone_handle(self) -> KvCacheHandle:
        """Returns another view of the same cache; nothing is copied."""

    @abc.abstractmethod
    def stats(self) -> CacheHandleStats:
        """Returns what the cache costs at this moment."""

    @abc.abstractmethod
    def is_valid(self) -> bool:
        """Says whether the request is still live. It never raises."""

    @abc.abstractmethod
    def cache_id(self) -> str:
        """Returns a name which no other cache of this process has."""


class KvCacheManager(abc.ABC):
    """Gives room to sequences and takes it back."""

    @abc.abstractmethod
    def allocate(self, request: AllocationRequest) -> KvCacheHandle:
        """Makes room for a new sequence.

        Args:
          request: What it asks for.

        Returns:
          A handle to its cache.

        Raises:
          DuplicateRequestError: If the request id is live.
          GeometryMismatchError: If it asks for another geometry than the pool's.
          SequenceTooLongError: If it may grow longer than the tables are wide.
          RequestTooLargeError: If it could not fit even in an empty pool.
          OutOfBlocksError: If too few blocks are free and none can be evicted.
          OutOfRowsError: If as many sequences are held as may be.
        """

    @abc.abstractmethod
    def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """Makes room for more tokens at the end of a sequence, or changes nothing.

        Args:
          handle: The sequence's handle.
          additional_tokens: How many more.

        Raises:
          InvalidHandleError: If the request was deallocated.
          SequenceTooLongError: If it would pass its `max_sequence_length`.
          OutOfBlocksError: If too few blocks are free and none can be evicted.
        """

    @abc.abstractmethod
    def deallocate(self, request_id: RequestId) -> None:
        """Takes a sequence's room back; its handles become invalid.

        Args:
          request_id: The caller's key.

        Raises:
          UnknownRequestError: If no such request is live.
        """

    @abc.abstractmethod
    def can_allocate(self, request: AllocationRequest) -> bool:
        """Says whether `allocate` would succeed now, counting what it could evict."""

    @abc.abstractmethod
    def stats(self) -> CacheManagerStats:
        """Returns what is held at this moment, and what was done so far."""

    @abc.abstractmethod
    def gc(self) -> CacheGcStats:
        """Frees what nobody uses any more, and returns how much that was."""

    @abc.abstractmethod
    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets what is called with the new level on every change of pressure.

        Args:
          callback: Called outside the manager's lock; what it raises is logged.
        """

    @abc.abstractmethod
    def get_handle(self, request_id: RequestId) -> KvCacheHandle | None:
        """Returns a handle of a live request, or None."""

    @abc.abstractmethod
    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle."""


class AdvancedKvCacheManager(KvCacheManager):
    """A manager that also shares, swaps and compresses caches."""

    @abc.abstractmethod
    def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Begins to keep prompt prefixes for later requests.

        Args:
          config: Which prefixes are kept.
        """

    @abc.abstractmethod
    def share_prefix(self, source: RequestId, target: RequestId, shared_tokens: int) -> None:
        """Lets a sequence hold the beginning of another one instead of its own.

        Args:
          source: Whose tokens are shared.
          target: Who holds them from now on; its own blocks there are freed.
          shared_tokens: How many; at most either sequence's length.

        Raises:
          UnknownRequestError: If either request is not live.
          ValueError: If `shared_tokens` passes a sequence's length.
        """

    @abc.abstractmethod
    def swap_out(self, request_id: RequestId) -> None:
        """Moves a cache to host memory and frees its blocks.

        Args:
          request_id: The caller's key.

        Raises:
          UnknownRequestError: If no such request is live.
        """

    @abc.abstractmethod
    def swap_in(self, request_id: RequestId) -> None:
        """Moves a cache back from host memory, bit for bit.

        Args:
          request_id: The caller's key.

        Raises:
          UnknownRequestError: If no such request is live.
          OutOfBlocksError: If too few blocks are free.
        """

    @abc.abstractmethod
    def compress_cache(self, request_id: RequestId, compression_ratio: float) -> None:
        """Makes a cache smaller, at some loss.

        Args:
          request_id: The caller's key.
          compression_ratio: Bytes after over bytes before, in (0, 1].

        Raises:
          UnknownRequestError: If no such request is live.
          ValueError: If the ratio is not in (0, 1].
        """

    @abc.abstractmethod
    def compression_stats(self) -> CompressionStats:
        """Returns what compression has won so far."""


class BlockAllocator(abc.ABC):
    """Hands out single blocks, without sequences."""

    @abc.abstractmethod
    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Takes blocks from the pool, all or none.

        Args:
          num_blocks: How many.

        Returns:
          Their ids.

        Raises:
          RequestTooLargeError: If there could never be so many.
          OutOfBlocksError: If too few are free.
        """

    @abc.abstractmethod
    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Gives blocks back, all or none.

        Args:
          blocks: Ids that `allocate_blocks` returned.

        Raises:
          DoubleFreeError: If one is free already, or named twice.
          ForeignBlockError: If one was not handed out here.
        """

    @abc.abstractmethod
    def free_block_count(self) -> int:
        """Returns how many blocks are free."""

    @abc.abstractmethod
    def total_block_count(self) -> int:
        """Returns how many blocks there are."""

    @abc.abstractmethod
    def block_size(self) -> int:
        """Returns the tokens of one block."""

    @abc.abstractmethod
    def defragment(self) -> None:
        """Gathers the blocks in use at the low ids; what they hold does not change."""


class MultiDeviceCacheManager(KvCacheManager):
    """A manager with a pool on each of several devices."""

    @abc.abstractmethod
    def supported_devices(self) -> list[Device]:
        """Returns the devices that have a pool."""

    @abc.abstractmethod
    def set_device_preference(self, devices: Sequence[Device]) -> None:
        """Sets which devices new sequences try, in this order.

        Args:
          devices: Some of `supported_devices`.
        """

    @abc.abstractmethod
    def move_cache(self, request_id: RequestId, target_device: Device) -> None:
        """Moves a cache to another device, bit for bit.

        Args:
          request_id: The caller's key.
          target_device: Where to.

        Raises:
          UnknownRequestError: If no such request is live.
          OutOfBlocksError: If too few blocks are free there.
        """

    @abc.abstractmethod
    def get_cache_device(self, request_id: RequestId) -> Device | None:
        """Returns where a live request's cache is, or None."""

    @abc.abstractmethod
    def rebalance_devices(self) -> None:
        """Moves caches so that the devices are about equally full."""

    @abc.abstractmethod
    def device_stats(self) -> dict[Device, CacheManagerStats]:
        """Returns each device's part of `stats`."""


class CacheEvictionPolicy(abc.ABC):
    """Decides whose cache goes when room is short."""

    @abc.abstractmethod
    def select_eviction_candidates(
        self, required_memory: int, active_caches: Sequence[tuple[RequestId, KvCacheHandle]]
    ) -> list[RequestId]:
        """Names the requests to evict.

        Args:
          required_memory: Bytes to free.
          active_caches: Every request that may be evicted, with its handle.

        Returns:
          Request ids, the first to evict first.
        """

    @abc.abstractmethod
    def record_access(self, request_id: RequestId, access_time: float) -> None:
        """Notes that a request was used.

        Args:
          request_id: The caller's key.
          access_time: When, in seconds of `time.monotonic()`.
        """

    def forget(self, request_id: RequestId) -> None:
        """Notes that a request is gone, so that its id may come again as another one.

        Args:
          request_id: The caller's key. The default keeps nothing, so it forgets nothing.
        """
        del request_id  # Unused.

    @abc.abstractmethod
    def name(self) -> str:
        """Returns the policy's name."""
