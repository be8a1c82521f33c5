"""The methods that managers of one device and of several have alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

from jax.typing import ArrayLike

from ferrum_jax.checks import (
    check_callable,
    check_count,
    check_flag,
    check_items,
    check_type,
)
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.errors import InvalidHandleError, UnknownRequestError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.decoding_front import DecodingFront
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.device.compression import checked_compression
from ferrum_jax.manager.handle import PagedKvCacheHandle, RequestLike
from ferrum_jax.manager.sharing_front import SharingFront
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.records import CacheGcStats, CacheManagerStats, CompressionStats
from ferrum_jax.types import Device, MemoryPressure, RequestId


class ManagerFront(SharingFront, DecodingFront):
    """Checks arguments, finds the device of a request, holds its lock, and calls its parts.

    Args:
      pools: The pools of the manager.

    Attributes:
      pools: As given; for the package's own use.
    """

    def close(self) -> None:
        """Ends all requests, deletes the files of the disk tier, and releases its directory.

        Another manager may use the directory from then on. Methods that need the cache raise
        RuntimeError afterwards; closing the manager again does nothing. A `with` block closes the
        manager at its end, even if the cache is lost.
        """
        self.pools.close()

    def __enter__(self) -> Self:
        """Returns the manager itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the manager."""
        self.close()

    # Requests.

    def extend(self, handle: RequestLike, additional_tokens: int) -> None:
        """Allocates room for more tokens at the end of one sequence; see `extend_all`."""
        self.extend_all([handle], additional_tokens)

    def extend_all(self, handles: Sequence[RequestLike], additional_tokens: int) -> None:
        """Allocates room for more tokens in each of several sequences, or in none.

        Args:
          handles: Different requests, each by handle or id, all on one device.
          additional_tokens: Tokens to add to each sequence.

        Raises:
          InvalidHandleError: If a request was deallocated, is another manager's, or is named twice.
          UnknownRequestError: If no request of an id is live.
          SwappedOutError: If a request is swapped out.
          GeometryMismatchError: If the requests are on several devices.
          SequenceTooLongError: If a sequence would pass its `max_sequence_length`.
          OutOfBlocksError: If too few blocks are available.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        handles = check_items("handles", handles)
        with self.pools.home_of(handles) as device, device.access.changing():
            device.extend_all(handles, additional_tokens)

    def deallocate(self, request_id: RequestLike) -> None:
        """Ends a request and frees its blocks; its handles become invalid.

        Args:
          request_id: The request, by id or handle.

        Raises:
          UnknownRequestError: If the request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
        """
        with self.pools.home_of([request_id]) as device, device.access.changing():
            device.free([device.requests.known(request_id)])

    def get_handle(self, request_id: RequestLike) -> PagedKvCacheHandle | None:
        """Returns a new handle of a live request, or None.

        Args:
          request_id: The request, by id or handle.
        """
        try:
            return self.pools.handle_of(request_id)
        except (UnknownRequestError, InvalidHandleError):
            return None

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns the id and a handle of every live request; of each device, the oldest first."""
        return [pair for part in self.pools.read_each(DeviceManager.list_handles) for pair in part]

    def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[RequestLike | None],
        *args: Any,
        device: Device | None = None,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Runs a jitted step on the cache, in place.

        `step(state, seq_ids, *args)` returns `(state, output)`, or `(output, state)` as
        `ferrum_jax.prefill` does; several outputs are a tuple. The step may donate the state,
        which the manager takes back; `seq_ids` is i32[len(handles)], `NULL_SEQ` for None. The step
        may write tokens. With `extends`, it may also change the tables of these rows, and of no
        others: `extend`, `truncate`, `free`, and `fork` or `share` among them (a child of `fork` is
        a request allocated with `initial_tokens=0`). It must not truncate a row below the tokens
        that are committed and extend it again.

        Signal handlers, such as that of Ctrl-C, wait until a jitted step has returned. A step in
        Python is interrupted at once; if it has donated the state by then, the cache is lost.

        Args:
          step: A function, jitted with `donate_argnums=0`.
          handles: The requests that the step gets the rows of, each by handle or id, all on one
            device; None for a padded row. A jitted step is compiled for each number of them.
          *args: Further arguments of the step. Do not overwrite a NumPy array among them before
            the step is over: JAX may read it.
          device: The device of the pool, if there may be no handle.
          extends: Whether the step changes lengths; the call then waits for the device.
          reserve_tokens: Tokens that the step may add to each row. The pool grows, and cached
            blocks are evicted, as far as possible; the step's `extend` says whether they fit.

        Returns:
          The step's output.

        Raises:
          InvalidHandleError: If a request was deallocated, or is of another manager.
          UnknownRequestError: If no request of an id is live.
          SwappedOutError: If a request is swapped out.
          GeometryMismatchError: If the requests are on several devices, or not on `device`.
          TypeError: If the step does not return the state first or last.
          CacheLostError: If the step consumed the state and did not return it.
          UncountedTokensError: If the step filled a row of no request.
        """
        check_callable("step", step)
        handles = check_items("handles", handles)
        check_flag("extends", extends)
        num_reserved = check_count("reserve_tokens", reserve_tokens, minimum=0)
        with self.pools.home_of_step(handles, device) as home, home.access.changing():
            return home.run(step, handles, *args, extends=extends, reserve_tokens=num_reserved)

    # Prefix caching; see also `SharingFront`.

    def enable_prefix_caching(self, config: PrefixCacheConfig) -> None:
        """Enables prefix caching, or replaces its configuration; cached entries stay.

        Args:
          config: What is cached, and for how long.

        Raises:
          ValueError: If there are several layer groups, or one with a sliding window.
        """
        check_type("config", config, PrefixCacheConfig)
        self.pools.change_each(lambda device: device.prefixes.configure(config))

    def commit(
        self,
        handle: RequestLike,
        token_ids: Sequence[int] = (),
        *,
        num_tokens: int | None = None,
        retention: Retention | None = None,
    ) -> int:
        """Caches what was computed for later prompts: full blocks, from the first token on.

        Call it after prefill, and as tokens are generated. Equal prompts that are allocated before
        the first of them is committed share nothing: commit first, or `fork`. A block that another
        request has committed meanwhile replaces the request's own, so that equal content is stored
        once.
        Without prefix caching, the tokens are only recorded. The call waits for the device when
        there are blocks to cache.

        Args:
          handle: The request, by handle or id.
          token_ids: Tokens that follow those that are known, at first those of the prompt for which
            the request was given room.
          num_tokens: Leading tokens, of all that are known then, for which a step has written keys
            and values, or is writing them. If absent, the manager finds out: it knows how long the
            request was when a step last had its row, and, with `ManagerOptions.scrub_freed_blocks`
            and a pool of floats, which slots are not zero. Without scrubbing, pass the number where
            a prompt is computed in chunks.
          retention: How long all of these tokens are kept; as configured if absent. It also
            applies to what is cached again after the request was swapped out.

        Returns:
          Leading tokens that are cached.

        Raises:
          InvalidHandleError: If the request was deallocated.
          SwappedOutError: If the request is swapped out.
          PrefixMismatchError: If the request is known to hold other tokens, from the prefix cache
            or from a request with which it shares.
          ValueError: If more tokens are named than the request holds, or `num_tokens` is more than
            are computed, as far as the manager can know.
        """
        if retention is not None:
            check_type("retention", retention, Retention)
        if num_tokens is not None:
            num_tokens = check_count("num_tokens", num_tokens, minimum=0)
        with self.pools.home_of([handle]) as device, device.access.changing():
            request = device.requests.known(handle).require_resident()
            num_cached = device.prefixes.commit(request, token_ids, num_tokens, retention)
            device.note_use([request])
            return num_cached

    # Swapping, compression and upkeep.

    def swap_out(self, request_id: RequestLike) -> None:
        """Moves a request's bytes to host memory or disk, and frees its blocks.

        Its handles stay valid, and report the request's length. A request that is swapped out
        already stays so.

        Args:
          request_id: The request, by id or handle.

        Raises:
          UnknownRequestError: If the request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
          OutOfHostMemoryError: If no tier has room for it; it stays on the device.
        """
        with self.pools.home_of([request_id]) as device, device.access.changing():
            request = device.requests.known(request_id)
            if request.is_resident:
                device.swapping.swap_out([request])

    def swap_in(self, request_id: RequestLike) -> None:
        """Moves a request's bytes back to its device, bit for bit, unless they are there already.

        Args:
          request_id: The request, by id or handle.

        Raises:
          UnknownRequestError: If the request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
          OutOfBlocksError: If too few blocks are available.
          OutOfRowsError: If `max_seqs` sequences are held already.
          OutOfHostMemoryError: If a less urgent request cannot be stored; nothing changes then.
          CorruptFileError: If its file is not what was written; it stays swapped out.
        """
        with self.pools.home_of([request_id]) as device, device.access.changing():
            device.swap_in(device.requests.known(request_id))

    def compress_cache(
        self,
        request_id: RequestLike,
        compression_ratio: float,
        method: CompressionMethod | None = None,
        queries: ArrayLike | None = None,
    ) -> None:
        """Rewrites a request's tokens in fewer blocks; waits for the device.

        The blocks saved are freed. The sequence keeps its length and goes on: later tokens are
        written in the same format, at the positions that they would have had. Blocks that other
        requests hold too stay as they are; so compressing a request that shares much frees little,
        and may allocate blocks. Its cached prefix stays cached, unused, and can be evicted; but if
        blocks are short, as much of it as is needed is evicted at once, unless others hold it or it
        is pinned. The handle's `compression` reports what was done. A request within the ratio
        stays as it is.

        Programs are compiled for the first request in a format, of each power of two of blocks
        before and after, with another scorer, and with another shape of queries. Steps that run
        after a new format are compiled again; `ManagerOptions.token_formats` avoids that.

        Layer groups with a sliding window stay as they are, and do not count in the ratio.

        Args:
          request_id: The request, by id or handle.
          compression_ratio: Bytes afterwards over the bytes that the sequence takes uncompressed,
            in (0, 1]. Both are of whole blocks.
          method: What may be done; the defaults if absent.
          queries: [L, Hq, Q, D]. Queries of a few of the sequence's tokens, as the model's
            attention has them, positions applied: to choose tokens, to fit those kept, and to
            measure what was lost. L layers without a sliding window, in the order of their numbers.
            If absent, queries are sampled to measure it.

        Raises:
          UnknownRequestError: If the request is not live.
          InvalidHandleError: If a handle is of another manager, or its request was deallocated.
          SwappedOutError: If the request is swapped out.
          ValueError: If the ratio is not in (0, 1], or the method needs queries and has none.
          CompressionError: If the method cannot reach the ratio, or its format has more bits than
            the request's, or all layers have a sliding window.
          OutOfBlocksError: If blocks are needed beside those of others, and too few are available.
        """
        checked = checked_compression(compression_ratio, method, queries, self.pools.first.geometry)
        with self.pools.home_of([request_id]) as device, device.access.changing():
            request = device.requests.known(request_id).require_resident()
            device.compression.compress(request, *checked)
            device.note_use([request])

    def gc(self) -> CacheGcStats:
        """Frees requests of which no handle is left, and prefixes that have expired.

        Without pooling, it shrinks the pool too. Keep the handles of requests, also if you work by
        request id alone.
        """
        return self.pools.gc()

    def defragment(self) -> None:
        """Moves requests' blocks to the low ids; those of `allocate_blocks` keep theirs."""
        self.pools.change_each(DeviceManager.defragment)

    def stats(self) -> CacheManagerStats:
        """Returns what is held now, and what was done so far."""
        return self.pools.stats()

    def compression_stats(self) -> CompressionStats:
        """Returns what compression has saved, of the requests that are on a device now."""
        return self.pools.compression_stats()

    def set_pressure_callback(self, callback: Callable[[MemoryPressure], None]) -> None:
        """Sets the function that is called with the new level on every change of pressure.

        The level is that of blocks in use over all blocks that there can be: cached blocks that
        no request uses do not count as in use.

        Args:
          callback: Called without the manager's lock, by the thread that made the change. What it
            raises is logged.
        """
        self.pools.set_pressure_callback(callback)

    def check(self) -> None:
        """Raises AssertionError unless everything that is known agrees; waits for the device.

        It costs about what the tables hold, so that a service can call it now and then.
        """
        self.pools.check()
