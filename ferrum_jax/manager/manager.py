"""The manager: requests come and go by name, on the pure operations of one device's cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ferrum_jax.checks import (
    check_callable,
    check_count,
    check_flag,
    check_integer,
    check_items,
    check_key,
    check_type,
)
from ferrum_jax.config import CacheConfig, CacheGeometry
from ferrum_jax.errors import DuplicateRequestError, FerrumError, InvalidHandleError
from ferrum_jax.interfaces import AdvancedKvCacheManager, BlockAllocator, KvCacheHandle
from ferrum_jax.manager.admission import (
    refusal,
    require_ever,
    require_length,
    require_taken,
)
from ferrum_jax.manager.compressing import Compressing
from ferrum_jax.manager.handle import Entry, PagedKvCacheHandle
from ferrum_jax.manager.moving import Moving
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.manager.sharing import Sharing
from ferrum_jax.prefix.tree import Match
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_SEQ, BlockId, Priority, RequestId

_cache_numbers = itertools.count()


class PagedKvCacheManager(Sharing, Moving, Compressing, AdvancedKvCacheManager, BlockAllocator):
    """Keeps the caches of many requests in the blocks of one pool.

    The pool is on one device, or over a mesh: see `ManagerOptions.mesh`.

    Methods are safe to call from several threads. `allocate`, `extend` and `deallocate` do not
    wait for the device. What cannot be done raises a `FerrumError`, a wrong argument a
    `ValueError`; either changes nothing.

    Args:
      config: The pool. Its first target device is used.
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
        super().__init__(config, geometry, options)

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
        """Returns a request of this pool's geometry and device.

        Args:
          request_id: The caller's key.
          initial_tokens: Tokens to have room for at once; the prompt's if absent.
          max_sequence_length: Tokens that it may grow to; the geometry's limit if absent.
          priority: How urgent it is.
          prompt_token_ids: Its prompt, if what is cached of it is to be used.
          cache_salt: Whose prompts it may share with.

        Raises:
          SequenceTooLongError: If it begins with more tokens than it may grow to.
        """
        geometry = self._geometry
        if max_sequence_length is None:
            max_sequence_length = geometry.max_sequence_length
        prompt = None if prompt_token_ids is None else TokenIds(prompt_token_ids)
        return AllocationRequest(
            request_id=request_id,
            initial_tokens=len(prompt or ()) if initial_tokens is None else initial_tokens,
            max_sequence_length=max_sequence_length,
            num_layers=geometry.num_layers,
            num_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            device=self._cache.device,
            dtype=geometry.dtype,
            priority=priority,
            prompt_token_ids=prompt,
            cache_salt=cache_salt,
        )

    def allocate(self, request: AllocationRequest) -> PagedKvCacheHandle:
        """Makes room for a new sequence; see `KvCacheManager.allocate`.

        What is cached of its prompt is attached: the handle's `num_cached_tokens` need not be
        computed. If there are too few blocks, cached ones go, and then, if the manager preempts,
        less urgent requests are swapped out.
        """
        check_type("request", request, AllocationRequest)
        with self._changing():
            match, lease = self._prefixes.acquire(request)
            try:
                num_new = self._num_new_blocks(request, match)
                self._room.make(num_new, self._admit(request, match))
                seq_id, num_cached_tokens = self._prefixes.start(request, match)
            except BaseException:
                self._prefixes.cache.cancel(lease)
                self._num_refused += 1
                raise
            entry = Entry(
                request=request,
                cache_id=f"cache-{next(_cache_numbers)}",
                cache=self._cache,
                seq_id=seq_id,
                lease=lease,
                tokens=TokenIds(request.prompt_token_ids or ()),
                num_computed_tokens=num_cached_tokens,
                num_cached_tokens=num_cached_tokens,
                max_computed_tokens=num_cached_tokens,
                lock=self._lock,
            )
            self._entries[request.request_id] = entry
            self._note_use([entry])
            self._num_allocated += 1
            return PagedKvCacheHandle(entry)

    def can_allocate(self, request: AllocationRequest) -> bool:
        """Says whether `allocate` would succeed now: growth, eviction and preemption counted."""
        check_type("request", request, AllocationRequest)
        with self._looking():
            if self.is_lost:
                return False
            match, lease = self._prefixes.acquire(request)
            try:
                self._admit(request, match)
            except FerrumError:
                return False
            else:
                return True
            finally:
                self._prefixes.cache.cancel(lease)

    def extend(self, handle: KvCacheHandle, additional_tokens: int) -> None:
        """Makes room for more tokens; see `KvCacheManager.extend`."""
        self.extend_all([handle], additional_tokens)

    def extend_all(self, handles: Sequence[KvCacheHandle], additional_tokens: int) -> None:
        """Makes room for more tokens in several sequences, or in none; one operation.

        Args:
          handles: Different sequences.
          additional_tokens: How many more for each.

        Raises:
          InvalidHandleError: If a request was deallocated, or is named twice.
          SequenceTooLongError: If one would pass its `max_sequence_length`.
          OutOfBlocksError: If too few blocks are free.
        """
        additional_tokens = check_count("additional_tokens", additional_tokens, minimum=0)
        handles = check_items("handles", handles)
        with self._changing():
            entries = [self._entry_of(handle) for handle in handles]
            if len({entry.seq_id for entry in entries}) < len(entries):
                raise InvalidHandleError("A request is named twice in one call. Name it once.")
            for entry in entries:
                require_length(entry, additional_tokens)
            seq_ids = [entry.seq_id for entry in entries]
            num_new = sum(
                self._cache.counts.num_new_blocks(row, additional_tokens) for row in seq_ids
            )
            names = ", ".join(repr(entry.request_id) for entry in entries)
            asked = f"{additional_tokens} more tokens for {names}"
            priority = max((entry.request.priority for entry in entries), default=Priority.Low)
            self._make_room(asked, num_new, priority, but=entries)
            if seq_ids and additional_tokens:
                self._cache.extend(seq_ids, [additional_tokens] * len(seq_ids))
            self._note_use(entries)

    def deallocate(self, request_id: RequestId) -> None:
        """Takes a sequence's room back; see `KvCacheManager.deallocate`."""
        with self._changing():
            self._drop([self._known(request_id)])

    def get_handle(self, request_id: RequestId) -> PagedKvCacheHandle | None:
        """Returns a handle of a live request, or None."""
        check_key("request_id", request_id)
        with self._looking():
            entry = self._entries.get(request_id)
            return None if entry is None else PagedKvCacheHandle(entry)

    def list_handles(self) -> list[tuple[RequestId, KvCacheHandle]]:
        """Returns every live request with a handle, the oldest request first."""
        with self._looking():
            return [(name, PagedKvCacheHandle(entry)) for name, entry in self._entries.items()]

    def run(
        self,
        step: Callable[..., Any],
        handles: Sequence[KvCacheHandle | None],
        *args: Any,
        extends: bool = False,
        reserve_tokens: int = 0,
    ) -> Any:
        """Lets a jitted step compute on the cache, in place.

        `step(state, seq_ids, *args)` returns `(state, output)`. It may donate the state, which the
        manager takes back; seq_ids is i32[len(handles)], `NULL_SEQ` for None. It may write tokens.
        When `extends` is set, it may also change the tables of these rows, and no others: `extend`,
        `truncate`, `free`, and `fork` or `share` among them (a child of `fork` is a request
        allocated with `initial_tokens=0`). It must not cut a row below the tokens that are
        committed and let it grow again.

        Signal handlers, such as that of Ctrl-C, wait until a jitted step has returned. A step in
        Python is interrupted at once; if it has donated the state by then, the cache is lost.

        Args:
          step: A function, jitted with `donate_argnums=0`.
          handles: Whose rows the step gets; None for a padded row. A jitted step is compiled for
            each number of them.
          *args: Handed on. Do not overwrite a NumPy array before the step is over: JAX may read it.
          extends: Whether the step changes lengths; it is then waited for.
          reserve_tokens: Tokens that the step may add to each row. The pool grows, and cached
            blocks are evicted, as far as that can be done: the step's `extend` says if it fits.

        Returns:
          The step's output.

        Raises:
          InvalidHandleError, SwappedOutError: If a request was deallocated, or is not resident.
          TypeError, ValueError: If the step does not return the state first, or an argument is bad.
          CacheLostError: If it consumed the state and did not return it.
          UncountedTokensError: If it filled a row of no request.

        Example:
          >>> from ferrum_jax.integrations import prefill
          >>> def prefill_step(state, seq_ids, model_fn, params, prompts):
          ...     logits, state = prefill(model_fn, params, state, seq_ids, prompts)
          ...     return state, logits
        """
        check_callable("step", step)
        handles = check_items("handles", handles)
        check_flag("extends", extends)
        num_reserved = check_count("reserve_tokens", reserve_tokens, minimum=0)
        with self._changing():
            entries = [None if handle is None else self._entry_of(handle) for handle in handles]
            rows = [NULL_SEQ if entry is None else entry.seq_id for entry in entries]
            if num_reserved:
                self._reserve(rows, num_reserved)
            self._is_in_step = True
            try:
                output = self._cache.steps.run(
                    step, np.asarray(rows, np.int32), *args, extends=extends
                )
            finally:
                self._is_in_step = False
            self._after_step([entry for entry in entries if entry is not None], extends)
            return output

    # Blocks.

    def allocate_blocks(self, num_blocks: int) -> list[BlockId]:
        """Takes blocks for no request; waits for the device, which knows their ids."""
        num_blocks = check_count("num_blocks", num_blocks, minimum=0)
        with self._changing():
            require_ever("allocate_blocks", num_blocks, self._cache)
            self._make_room("allocate_blocks", num_blocks, Priority.Normal)
            return self._cache.take_blocks(num_blocks) if num_blocks else []

    def free_blocks(self, blocks: Sequence[BlockId]) -> None:
        """Gives blocks of `allocate_blocks` back; see `BlockAllocator.free_blocks`."""
        blocks = [check_integer("blocks", block) for block in check_items("blocks", blocks)]
        with self._changing():
            require_taken(blocks, self._cache)
            if len(blocks):
                self._cache.release_taken(blocks)

    def free_block_count(self) -> int:
        """Returns how many blocks of the present pool are free; it may still grow."""
        with self._looking():
            return self._cache.counts.num_free

    def total_block_count(self) -> int:
        """Returns how many blocks the pool has at present."""
        with self._looking():
            return self._cache.counts.num_blocks

    def block_size(self) -> int:
        """Returns the tokens of one block."""
        return self._cache.counts.block_size

    def defragment(self) -> None:
        """Moves requests' blocks to the low ids; those of `allocate_blocks` keep theirs."""
        with self._changing():
            self._prefixes.renumber(self._cache.defragment())

    # How it is done.

    def _admit(self, request: AllocationRequest, match: Match) -> list[Entry]:
        """Returns who has to be swapped out for a request, or raises why it cannot be allocated.

        Args:
          request: What is asked.
          match: What is cached of its prompt; it is held.
        """
        if request.request_id in self._entries:
            raise DuplicateRequestError(
                f"Request {request.request_id!r} is live already. Deallocate it first, or use "
                "another id."
            )
        error = refusal(request, self.new_request(request.request_id), self._cache)
        if error is not None:
            raise error
        return self._victims_for(request, self._num_new_blocks(request, match))

    def _num_new_blocks(self, request: AllocationRequest, match: Match) -> int:
        return self._cache.counts.blocks_for(request.initial_tokens) - len(match.blocks)

    def _after_step(self, entries: Sequence[Entry], extends: bool) -> None:
        """Notes what a step may have done to its requests."""
        for entry in entries:  # Settling cuts it to what a row holds, whenever that is known.
            longest = self._geometry.max_sequence_length
            entry.max_computed_tokens = longest if extends else entry.num_tokens
        self._note_use(entries)
        if extends:
            self._settle(entries)

    def _reserve(self, rows: Sequence[int], num_tokens: int) -> None:
        """Frees blocks for so many more tokens in each row, as far as that can be had."""
        num_tokens = min(num_tokens, self._geometry.max_sequence_length)
        held = [row for row in rows if row != NULL_SEQ]
        num_new = sum(self._cache.counts.num_new_blocks(row, num_tokens) for row in held)
        num_new = min(num_new, self._room.num_blocks)
        self._make_room("run", num_new, Priority.Low)
        self._cache.reserve(num_new)
