"""Handles: a caller's live view of one request's cache."""

from __future__ import annotations

from typing import NoReturn, SupportsIndex, TypeAlias

import jax

from ferrum_jax.checks import check_integer
from ferrum_jax.errors import InvalidHandleError, LayerOutOfRangeError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.records import AllocationRequest, BlockTable, CacheHandleStats, CompressionReport
from ferrum_jax.types import Device, RequestId


class PagedKvCacheHandle(KvCacheHandle):
    """A live view of one request's cache in a manager.

    Each method reads the present state. Once the request is deallocated, `is_valid` is false and
    every other method raises `InvalidHandleError`, except `request_id` and `cache_id`. While the
    request is swapped out, it has tokens but no blocks: its keys and values are None. A copy,
    deep or not, is another view, as from `clone_handle`. A handle cannot be pickled.
    """

    def __init__(self, live: LiveRequest):
        self._live = live
        live.handles.add(self)

    @property
    def request_id(self) -> RequestId:
        """The caller's key."""
        return self._live.request_id

    @property
    def request(self) -> AllocationRequest:
        """The request as it was made."""
        return self._live.allocation

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that were cached when the request started: prefill may skip this many."""
        return self._live.num_cached_tokens

    @property
    def is_resident(self) -> bool:
        """Whether the cache is on the device: live, and not swapped out."""
        return self._live.is_live and self._live.is_resident

    @property
    def compression(self) -> CompressionReport | None:
        """What compression has done to the cache; None if it is not compressed."""
        return self._live.compression

    def block_table(self) -> BlockTable:
        """Returns the blocks that hold the sequence; waits for the device.

        With several layer groups, these are the blocks of the first one that keeps all tokens; if
        none does, of the first one.

        Returns:
          The block table. Its `num_pruned` counts the tokens that its blocks do not hold: those
          that compression has dropped, or a sliding window has passed. Its `block_size` is that of
          the cache's token format.

        Raises:
          SwappedOutError: If the request is swapped out.
          InvalidHandleError: If the request was deallocated.
          CacheLostError: If a step or a failed device has consumed the cache.
        """
        with self._live.at_home():
            live = self._live.require_resident()
            live.pool.device_state.require()
            counts = live.pool.counts
            return BlockTable(
                physical_blocks=tuple(live.pool.queries.main_blocks(live.seq_id)),
                sequence_length=live.num_tokens,
                block_size=live.tokens_per_block,
                num_pruned=live.num_tokens - counts.num_stored(live.seq_id),
            )

    def block_table_mut(self) -> BlockTable:
        """Returns `block_table()`, which is immutable: use the manager's `extend` to lengthen."""
        return self.block_table()

    def as_any(self) -> PagedKvCacheHandle:
        """Returns the handle itself."""
        return self

    def device(self) -> Device:
        """Returns the device of the cache: the host's CPU while the request is swapped out."""
        live = self._live.require_live()
        return live.pool.device if live.is_resident else Device("cpu")

    def num_tokens(self) -> int:
        """Returns the length of the sequence, dropped tokens included; does not wait."""
        with self._live.at_home():
            return self._live.require_live().num_tokens

    def num_layers(self) -> int:
        """Returns the number of layers that have a cache."""
        return self._live.require_live().pool.geometry.num_layers

    def num_heads(self) -> int:
        """Returns the number of KV heads."""
        return self._live.require_live().pool.geometry.num_kv_heads

    def head_dim(self) -> int:
        """Returns the dimension of a head."""
        return self._live.require_live().pool.geometry.head_dim

    def key_cache(self, layer: int) -> jax.Array | None:
        """Returns a copy of one layer's keys, [tokens, heads, head_dim]; see `kv_cache`."""
        return self.kv_cache(layer)[0]

    def value_cache(self, layer: int) -> jax.Array | None:
        """Returns a copy of one layer's values, [tokens, heads, head_dim]; see `kv_cache`."""
        return self.kv_cache(layer)[1]

    def kv_cache(self, layer: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns copies of one layer's keys and values; waits for the device.

        The arrays are cut to the request's length on the host: XLA would compile a program for
        each length. One program is compiled for each power of two of blocks.

        Args:
          layer: The model's number of the layer, from 0.

        Returns:
          `(keys, values)`, each [tokens, heads, head_dim] in the cache's dtype: of the tokens that
          are kept, rounded where they are compressed. In a layer with a sliding window, which
          compression does not change, they are of all tokens, and zero for those in blocks that
          the window has passed. Both are None while the request is swapped out.

        Raises:
          LayerOutOfRangeError: If there is no such layer.
          InvalidHandleError: If the request was deallocated.
          CacheLostError: If a step or a failed device has consumed the cache.
          ValueError: If `layer` is not an integer.
        """
        layer = check_integer("layer", layer)
        with self._live.at_home():
            live = self._live.require_live()
            layers = live.pool.state.layers
            if not layers.can_read(layer):
                raise LayerOutOfRangeError(
                    f"Layer {layer} of request {self.request_id!r} was asked for; the cache has "
                    f"{layers}."
                )
            return (
                live.pool.queries.read_row(live.seq_id, layer) if live.is_resident else (None, None)
            )

    def clone_handle(self) -> PagedKvCacheHandle:
        """Returns another view of the same cache; copies no data."""
        with self._live.at_home():
            return PagedKvCacheHandle(self._live.require_live())

    def __copy__(self) -> PagedKvCacheHandle:
        """Returns `clone_handle()`, so that the copy counts as a handle for `gc`."""
        return self.clone_handle()

    def __deepcopy__(self, memo: dict[int, object]) -> PagedKvCacheHandle:
        """Returns `clone_handle()`: the request itself is not copied."""
        del memo  # Unused.
        return self.clone_handle()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raises TypeError: another process does not have the cache."""
        raise TypeError(
            f"{self!r} cannot be pickled: it is a view of a cache in this process. Send its "
            "request_id, and call get_handle of the manager here."
        )

    def stats(self) -> CacheHandleStats:
        """Returns the memory that the cache uses on the device; does not wait."""
        with self._live.at_home():
            live = self._live.require_live()
            num_blocks, capacity, num_stored = live.num_blocks, 0, live.shape.held_len
            if live.is_resident:
                capacity = live.pool.counts.capacity(live.seq_id)
                num_stored = live.pool.counts.num_stored(live.seq_id)
            return CacheHandleStats(
                memory_bytes=live.pool.bytes_of(num_blocks),
                blocks_allocated=num_blocks.total,
                tokens_stored=num_stored,
                utilization=num_stored / capacity if capacity else 0.0,
                last_access=live.last_access,
            )

    def is_valid(self) -> bool:
        """Returns whether the request is still live."""
        return self._live.is_live

    def cache_id(self) -> str:
        """Returns a name that no other cache of this process has."""
        return self._live.cache_id

    def live_request(self) -> LiveRequest:
        """Returns the manager's record of the request, which may have ended."""
        return self._live

    def __repr__(self) -> str:
        """Names the request, and says whether it is live."""
        state = "deallocated"
        if self.is_valid():
            state = "live" if self.is_resident else "swapped out"
        return f"PagedKvCacheHandle({self.request_id!r}, {self.cache_id()}, {state})"


RequestLike: TypeAlias = RequestId | KvCacheHandle
"""A request as callers name it: its id, or a handle of it."""


def require_handle(handle: object) -> PagedKvCacheHandle:
    """Returns a handle that a manager has made; raises InvalidHandleError for anything else."""
    if not isinstance(handle, PagedKvCacheHandle):
        raise InvalidHandleError(
            f"{handle!r} is not a handle of a PagedKvCacheManager. Use what allocate returned."
        )
    return handle
