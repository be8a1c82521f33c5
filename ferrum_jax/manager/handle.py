"""What the caller holds of one request: a live view, and the entry that it looks at."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn, SupportsIndex

import jax
import numpy as np

from ferrum_jax.checks import check_integer
from ferrum_jax.errors import InvalidHandleError, LayerOutOfRangeError, SwappedOutError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.pool import DevicePool, RowShape
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.records import AllocationRequest, BlockTable, CacheHandleStats, CompressionReport
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_SEQ, Device, RequestId


@dataclasses.dataclass(eq=False, kw_only=True)
class Entry:
    """One request of a manager. Its tokens are counted by the cache, not here.

    Attributes:
      request: What was asked.
      cache_id: A name which no other entry has.
      cache: Where its blocks are.
      seq_id: Its row there; `NULL_SEQ` while it is swapped out.
      lease: Its hold on cached prefixes, while it has a row.
      tokens: Its tokens as far as they are known: the prompt, and what was committed.
      num_computed_tokens: Those of them, the first ones, that are known to be computed: what was
        cached, and what was committed.
      num_cached_tokens: Tokens that were cached when it began.
      max_computed_tokens: The most of its first tokens that can be computed: what was cached, and
        its length when a step last had its row.
      inherited_tokens: Its first tokens as far as they are known from requests that share them,
        or from cached blocks that a step gave to it.
      kin: Requests that share its first tokens uncached, and how many.
      may_be_cached: Whether its blocks may join the prefix cache; not after a reset, nor after
        sharing with one that was computed before that.
      blocks_away: While it is swapped out, the cached blocks that it held: these have its bytes.
      retention: How long its first tokens are kept, as its last commit that named it said.
      num_retained_tokens: How many that commit was of.
      lock: Its manager's.
      last_access: When it was used last, in seconds of the manager's clock.
      shape_away: What it holds, while it is swapped out.
      compression: What compressing it has done, if it is compressed.
      is_live: Whether it is still allocated.
      handles: The handles that callers hold.
    """

    request: AllocationRequest
    cache_id: str
    cache: DevicePool
    seq_id: int
    lease: Lease
    tokens: TokenIds
    num_computed_tokens: int
    num_cached_tokens: int
    lock: threading.RLock
    max_computed_tokens: int = 0
    inherited_tokens: TokenIds = TokenIds(())
    kin: dict[Entry, int] = dataclasses.field(default_factory=dict)
    may_be_cached: bool = True
    blocks_away: Sequence[TreeBlock] = ()
    retention: Retention | None = None
    num_retained_tokens: int = 0
    last_access: float = 0.0
    shape_away: RowShape = RowShape(0)
    compression: CompressionReport | None = None
    is_live: bool = True
    handles: weakref.WeakSet[PagedKvCacheHandle] = dataclasses.field(
        default_factory=weakref.WeakSet
    )

    @contextlib.contextmanager
    def at_home(self) -> Iterator[None]:
        """Holds its manager's lock, so that it stays where it is."""
        while True:
            lock = self.lock
            with lock:
                if lock is self.lock:  # Or it has moved to another manager meanwhile.
                    yield
                    return

    @property
    def request_id(self) -> RequestId:
        """The caller's key."""
        return self.request.request_id

    @property
    def known_tokens(self) -> TokenIds:
        """Its tokens as far as they are known, by itself, or from those that share them."""
        return max(self.tokens, self.inherited_tokens, key=len)

    @property
    def is_resident(self) -> bool:
        """Whether it is on the device."""
        return self.seq_id != NULL_SEQ

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequence, those included that were dropped."""
        return self.cache.counts.length(self.seq_id) if self.is_resident else self.shape_away.length

    @property
    def shape(self) -> RowShape:
        """What it holds, and how."""
        return self.cache.counts.row_shape(self.seq_id) if self.is_resident else self.shape_away

    @property
    def block_size(self) -> int:
        """Tokens that one of its blocks holds."""
        return self.cache.state.pool.tokens_per_block(self.shape.token_format)

    @property
    def num_blocks(self) -> int:
        """Blocks held on the device."""
        return int(self.cache.counts.num_blocks_held[self.seq_id]) if self.is_resident else 0


class PagedKvCacheHandle(KvCacheHandle):
    """A view of one request's cache in a `PagedKvCacheManager`.

    Everything it tells is read at that moment. Once the request is deallocated, `is_valid` is
    false and all else raises `InvalidHandleError`, but for `request_id` and `cache_id`. While it
    is swapped out, it has tokens but no blocks: its caches are None. A copy, deep or not, is one
    more view, as `clone_handle` returns it; a handle cannot be pickled.
    """

    def __init__(self, entry: Entry):
        self._entry = entry
        entry.handles.add(self)

    @property
    def request_id(self) -> RequestId:
        """The caller's key."""
        return self._entry.request_id

    @property
    def request(self) -> AllocationRequest:
        """What was asked."""
        return self._entry.request

    @property
    def num_cached_tokens(self) -> int:
        """Tokens that were cached when the request began: prefill may skip so many."""
        return self._entry.num_cached_tokens

    @property
    def is_resident(self) -> bool:
        """Whether the cache is on the device: not swapped out, by a caller or a preemption."""
        return self._entry.is_live and self._entry.is_resident

    @property
    def compression(self) -> CompressionReport | None:
        """What compressing the cache has done; None if it is as the model has written it."""
        return self._entry.compression

    def block_table(self) -> BlockTable:
        """Returns which blocks hold the sequence, as far as tokens are kept; waits for the device.

        Raises:
          SwappedOutError: If none do just now.
          InvalidHandleError: If the request was deallocated.
          CacheLostError: If a step or a failed device has consumed the cache.
        """
        with self._entry.at_home():
            entry = self._resident()
            entry.cache.device_state.require()
            return BlockTable(
                physical_blocks=tuple(entry.cache.queries.row_blocks(entry.seq_id)),
                sequence_length=entry.shape.num_tokens,
                block_size=entry.block_size,
            )

    def block_table_mut(self) -> BlockTable:
        """Returns the same as `block_table`, which is immutable: `extend` via the manager."""
        return self.block_table()

    def as_any(self) -> PagedKvCacheHandle:
        """Returns the handle itself."""
        return self

    def device(self) -> Device:
        """Returns where the cache lives: the host's memory while it is swapped out."""
        entry = self._live()
        return entry.cache.device if entry.is_resident else Device("cpu")

    def num_tokens(self) -> int:
        """Returns the sequence's length, dropped tokens included, without asking the device."""
        with self._entry.at_home():
            return self._live().num_tokens

    def num_layers(self) -> int:
        """Returns how many layers are cached."""
        return self._live().cache.geometry.num_layers

    def num_heads(self) -> int:
        """Returns how many KV heads are cached."""
        return self._live().cache.geometry.num_kv_heads

    def head_dim(self) -> int:
        """Returns how many numbers a head has."""
        return self._live().cache.geometry.head_dim

    def key_cache(self, layer: int) -> jax.Array | None:
        """Returns one layer's keys, [tokens, heads, head_dim]: a copy of this moment."""
        return self.kv_cache(layer)[0]

    def value_cache(self, layer: int) -> jax.Array | None:
        """Returns one layer's values, [tokens, heads, head_dim]: a copy of this moment."""
        return self.kv_cache(layer)[1]

    def kv_cache(self, layer: int) -> tuple[jax.Array | None, jax.Array | None]:
        """Returns one layer's keys and values, each [tokens, heads, head_dim]; waits for them.

        They are those of the tokens kept, rounded where they are compressed, and None while the
        request is swapped out. They are cut to the request's length on the host: XLA would compile
        a program for each length. One is compiled for each power of two of blocks.

        Args:
          layer: Which layer, from 0.

        Raises:
          LayerOutOfRangeError: If there is no such layer.
          InvalidHandleError: If the request was deallocated.
          CacheLostError: If a step or a failed device has consumed the cache.
          ValueError: If `layer` is not an integer.
        """
        layer = check_integer("layer", layer)
        with self._entry.at_home():
            entry = self._live()
            num_layers = entry.cache.geometry.num_layers
            if not 0 <= layer < num_layers:
                raise LayerOutOfRangeError(
                    f"Layer {layer} of request {self.request_id!r} was asked for; the cache has "
                    f"{num_layers} layers, counted from 0."
                )
            return (
                entry.cache.queries.read_row(entry.seq_id, layer)
                if entry.is_resident
                else (None, None)
            )

    def clone_handle(self) -> PagedKvCacheHandle:
        """Returns another view of the same cache; nothing is copied."""
        with self._entry.at_home():
            return PagedKvCacheHandle(self._live())

    def __copy__(self) -> PagedKvCacheHandle:
        """Returns what `clone_handle` does, so that the copy counts as a handle for `gc`."""
        return self.clone_handle()

    def __deepcopy__(self, memo: dict[int, object]) -> PagedKvCacheHandle:
        """Returns what `clone_handle` does: the request itself is not copied."""
        del memo  # Unused.
        return self.clone_handle()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Raises TypeError: another process does not have the cache."""
        raise TypeError(
            f"{self!r} cannot be pickled: it is a view of a cache in this process. Send its "
            "request_id, and call get_handle of the manager here."
        )

    def stats(self) -> CacheHandleStats:
        """Returns what the cache costs, without asking the device."""
        with self._entry.at_home():
            entry = self._live()
            room, num_stored = entry.num_blocks * entry.block_size, entry.shape.num_tokens
            return CacheHandleStats(
                memory_bytes=entry.num_blocks * entry.cache.block_bytes,
                blocks_allocated=entry.num_blocks,
                tokens_stored=num_stored,
                utilization=num_stored / room if room else 0.0,
                last_access=entry.last_access,
            )

    def is_valid(self) -> bool:
        """Says whether the request is still live."""
        return self._entry.is_live

    def cache_id(self) -> str:
        """Returns a name which no other cache of this process has."""
        return self._entry.cache_id

    def entry(self) -> Entry:
        """Returns what the handle looks at, for a manager that is about to use its blocks.

        Raises:
          SwappedOutError: If it has none just now.
          InvalidHandleError: If the request was deallocated.
        """
        return self._resident()

    def _resident(self) -> Entry:
        entry = self._live()
        if not entry.is_resident:
            raise SwappedOutError(
                f"Request {self.request_id!r} ({self.cache_id()}) is swapped out, so that its "
                "blocks cannot be used. Swap it in first."
            )
        return entry

    def _live(self) -> Entry:
        if not self._entry.is_live:
            raise InvalidHandleError(
                f"The handle of request {self.request_id!r} ({self.cache_id()}) is used after the "
                "request was deallocated. Allocate it again and use the new handle."
            )
        return self._entry

    def __repr__(self) -> str:
        """Names the request, and says whether it is live."""
        state = "deallocated"
        if self.is_valid():
            state = "live" if self.is_resident else "swapped out"
        return f"PagedKvCacheHandle({self.request_id!r}, {self.cache_id()}, {state})"


def require_handle(handle: object) -> PagedKvCacheHandle:
    """Returns a handle that a manager here has made; raises InvalidHandleError for all else."""
    if not isinstance(handle, PagedKvCacheHandle):
        raise InvalidHandleError(
            f"{handle!r} is not a handle of a PagedKvCacheManager. Use what allocate returned."
        )
    return handle


def check_entries(
    entries: Mapping[RequestId, Entry], cache: DevicePool, lock: threading.RLock
) -> None:
    """Raises AssertionError unless requests are their manager's own, each with a row of its own.

    Args:
      entries: All live requests.
      cache: Their manager's.
      lock: Their manager's.
    """
    for name, entry in entries.items():
        is_here = entry.cache is cache and entry.lock is lock
        if not (entry.is_live and is_here) or entry.request_id != name:
            raise AssertionError(f"Request {name!r} has an entry that is not its own.")
    rows = [entry.seq_id for entry in entries.values() if entry.is_resident]
    if len(set(rows)) < len(rows):
        raise AssertionError("Two requests share a row.")
    held = set(np.flatnonzero(cache.counts.num_blocks_held).tolist())
    if not held <= set(rows):
        raise AssertionError(f"Rows {sorted(held - set(rows))} hold blocks for no request.")
