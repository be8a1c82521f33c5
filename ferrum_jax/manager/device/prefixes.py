"""The prefix cache of one device, kept in step with the blocks of its pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.manager.device.prefix_removal import PrefixRemoval
from ferrum_jax.manager.pool import DevicePool, RowShape
from ferrum_jax.manager.refusals import require_as_known, require_computed
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.commit import CommitPlan
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.report import LookupReport, explain_lookup
from ferrum_jax.prefix.tree import Match, TreeBlock
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK, BlockId


class Prefixes(PrefixRemoval):
    """Prefix caching of one device: lookup, commit, sharing and eviction. Not thread-safe.

    Args:
      pool: The device's pool.
      cache: The record of cached blocks.
      clock: Returns seconds that only grow.

    Attributes:
      cache: As given.
      num_prompt_tokens: Tokens of all prompts that were looked up.
      num_reused_tokens: Those of them that were found.
    """

    def __init__(self, pool: DevicePool, cache: PrefixCache, clock: Callable[[], float]):
        super().__init__(pool, cache, clock)
        self.num_prompt_tokens = self.num_reused_tokens = 0

    @property
    def hit_rate(self) -> float:
        """Tokens found over tokens looked up."""
        return self.num_reused_tokens / max(1, self.num_prompt_tokens)

    def configure(self, config: PrefixCacheConfig) -> None:
        """Enables prefix caching, or replaces its configuration; cached entries stay."""
        self.cache.configure(config)

    # A request's start.

    def acquire(
        self, request: AllocationRequest, *, full_blocks_only: bool = False
    ) -> tuple[Match, Lease]:
        """Finds the cached prefix of a request's prompt, and holds it.

        Args:
          request: The request.
          full_blocks_only: Whether to end before a block of which only a part would be copied.

        Returns:
          `(match, lease)`. The lease is given back by `undo_acquire`, or kept by the request.
        """
        prompt = TokenIds(request.prompt_token_ids or ())
        match = self.cache.lookup(prompt, request.cache_salt, self._clock())
        if full_blocks_only and match.tail is not None:
            prompt = prompt[: len(match.blocks) * self._pool.counts.block_size + 1]
            match = self.cache.lookup(prompt, request.cache_salt, self._clock())
        return match, self.cache.acquire(match)

    def undo_acquire(self, lease: Lease) -> None:
        """Undoes `acquire` or `recache`, as if the lease had never been held."""
        self.cache.undo_acquire(lease)

    def start_row(self, request: AllocationRequest, match: Match, lease: Lease) -> tuple[int, int]:
        """Allocates a request's row, which begins with the cached blocks.

        Args:
          request: The request to start.
          match: The cached prefix of its prompt. There is room for the rest.
          lease: The hold on it, which covers the full blocks afterwards.

        Returns:
          `(seq_id, num_cached_tokens)`.
        """
        counts, num_full = self._pool.counts, len(match.blocks)
        tail, num_tail = match.tail, match.num_tokens % counts.block_size
        if tail is None or not tail.is_cached:
            tail, num_tail = None, 0  # It was evicted while room was made.
        num_cached = num_full * counts.block_size + num_tail
        length = first_length(request, match)
        if num_cached:
            released = match.num_released if counts.has_windows else ()
            seq_id = self._pool.attach(
                RowShape(length, num_released=released),
                match.row_blocks,
                [NULL_BLOCK] * len(counts.windows) if tail is None else tail.block_ids,
                num_tail,
            )
        else:
            seq_id = self._pool.allocate(RowShape(length))
        if lease.num_blocks > num_full:
            self.cache.cover(lease, lease.node, num_full)
        if request.prompt_token_ids and self.cache.config is not None:
            self.num_prompt_tokens += len(request.prompt_token_ids)
            self.num_reused_tokens += num_cached
        return seq_id, num_cached

    # Commits.

    def commit(
        self,
        request: LiveRequest,
        token_ids: Sequence[int],
        num_tokens: int | None,
        retention: Retention | None,
    ) -> int:
        """Caches the full blocks of a request's computed tokens; waits for the device.

        Blocks of a compressed request are not cached: a prompt's prefill computes other ones.

        Args:
          request: The request.
          token_ids: Tokens that follow those that are known.
          num_tokens: Leading tokens that are computed; as many as can be found if absent.
          retention: How long they are kept; as configured, or as they are, if absent.

        Returns:
          Leading tokens that are cached.
        """
        known, lease = request.known, request.lease
        tokens = require_as_known(request, known.tokens + token_ids)
        num_claimed = len(tokens) if num_tokens is None else min(num_tokens, len(tokens))
        num_computed, num_sure = self._num_computed(request, num_claimed)
        if num_tokens is not None:
            require_computed(request, num_tokens, len(tokens), num_computed)
        num_sure = max(num_sure, known.num_computed)
        num_full = num_sure // self._pool.counts.block_size
        if num_full > lease.num_blocks or retention is not None:
            plan = self._plan(request, lease, request.seq_id, tokens, num_full)
            if plan is not None:
                self._pool.cache_blocks(request.seq_id, plan)
                self.cache.apply_commit(lease, plan, self._clock(), retention)
        known.commit(tokens, num_sure, retention)
        return lease.num_blocks * self._pool.counts.block_size

    def _num_computed(self, request: LiveRequest, num_tokens: int) -> tuple[int, int]:
        """Returns how many of a request's first tokens are computed, as far as can be known.

        It waits for the device where that could add blocks to the prefix cache.

        Args:
          request: The request.
          num_tokens: Leading tokens to look at.

        Returns:
          `(num_computed, num_sure)`: tokens that may be taken as computed now, and those of them
          that may be later too, since they were looked at, or are in cached blocks.
        """
        known = request.known.num_computed
        bound = max(min(num_tokens, request.known.max_computed), min(num_tokens, known))
        num_cached = request.lease.num_blocks * self._pool.counts.block_size
        is_wanted = bound // self._pool.counts.block_size > request.lease.num_blocks
        if not is_wanted or not self._may_cache(request, request.seq_id):
            return bound, min(bound, num_cached)
        num_written = self._pool.queries.num_written(request.seq_id, min(known, bound), bound)
        return num_written, num_written

    def _may_cache(self, request: LiveRequest, seq_id: int) -> bool:
        """Returns whether the blocks of a request's row may join the prefix cache."""
        is_plain = not self._pool.counts.row_shape(seq_id).is_compressed
        is_shared = self.cache.shares(request.allocation.cache_salt)
        return is_plain and is_shared and request.known.may_be_cached

    def _plan(
        self,
        request: LiveRequest,
        lease: Lease,
        seq_id: int,
        tokens: TokenIds,
        num_full: int,
        own: Sequence[TreeBlock] | None = None,
    ) -> CommitPlan | None:
        """Returns what caching a request's first blocks does; None for nothing.

        Args:
          request: The request.
          lease: The request's lease.
          seq_id: The request's row.
          tokens: The request's tokens.
          num_full: Leading blocks that are full of computed tokens.
          own: The only cached blocks that may replace the row's own; any if absent.
        """
        if not self._may_cache(request, seq_id):
            return None
        block_ids = self._pool.queries.seq_blocks(seq_id)
        # Only leases hold cached blocks: so it is known which ones can be evicted.
        num_full = min(num_full, self._pool.queries.num_unshared(block_ids, lease.num_blocks))
        tokens = tokens[: num_full * self._pool.counts.block_size]
        plan = self.cache.plan_commit(lease, tokens, block_ids, self._clock(), own)
        self._release_blocks(plan.evicted)
        return plan

    def recache(self, request: LiveRequest, seq_id: int) -> Lease:
        """Caches the blocks of a request again, after its bytes were copied into a new row.

        The row keeps its own bytes: of equal tokens that another request has cached meanwhile,
        nothing is adopted. The retention of the request's commits holds again, unless all of these
        tokens are cached: then the last request that committed them has set it.

        Args:
          request: The request.
          seq_id: The new row.

        Returns:
          The lease of the new row, for the request to keep or for `undo_acquire`.
        """
        known, size, now = request.known, self._pool.counts.block_size, self._clock()
        lease = self._empty_lease(request)
        try:
            num_retained = min(known.num_retained, known.num_computed) // size
            tokens = known.tokens[: num_retained * size]
            found = self.cache.forest.find(lease.key, tokens, len(tokens), now)
            retention = known.retention if found.num_tokens < len(tokens) else None
            num_full = known.num_computed // size
            if num_full:
                own = [block for block, count in request.blocks_away if block.num_fills == count]
                plan = self._plan(request, lease, seq_id, known.tokens, num_full, own)
                if plan is not None:
                    self._pool.cache_blocks(seq_id, plan)
                    self.cache.apply_commit(lease, plan, now, retention, num_retained)
        except BaseException:
            self.undo_acquire(lease)
            raise
        return lease

    # Sharing.

    def share(self, source: LiveRequest, target: LiveRequest, num_tokens: int) -> None:
        """Puts the first blocks of a request into another one's row; waits for the device."""
        counts, lease, num_leased = self._pool.counts, target.lease, target.lease.num_blocks
        if num_tokens <= num_leased * counts.block_size:
            return  # The target holds cached blocks with these tokens.
        seq_ids = source.seq_id, target.seq_id
        num_shared = min(source.lease.num_blocks, num_tokens // counts.block_size)
        released = [max(pair) for pair in zip(*map(counts.released, seq_ids), strict=True)]
        kept = _held_ids(lease.blocks[num_shared:], [first - num_shared for first in released])
        self._pool.share(seq_ids, num_tokens, num_shared, kept)
        longer = source.lease.node if num_shared >= num_leased else lease.node
        first_window = self.cache.groups.first_window(released)
        self.cache.cover(lease, longer, max(num_shared, num_leased), first_window)
        target.known.share(source.known, num_tokens, num_leased * counts.block_size)
        self._pool.device_state.settle()

    def cover(self, request: LiveRequest, blocks: Sequence[TreeBlock]) -> None:
        """Makes a request's lease cover the cached blocks with which its row begins."""
        seq_id, lease = request.seq_id, request.lease
        last = blocks[-1].node if blocks else lease.node.root
        first_window = self.cache.groups.first_window(self._pool.counts.released(seq_id))
        self.cache.cover(lease, last, len(blocks), first_window)
        self._pool.counts.set_cached(seq_id, len(blocks))

    def note_passed(self, requests: Iterable[LiveRequest]) -> None:
        """Releases cached blocks that the windows of extended requests have passed."""
        if self._pool.counts.has_windows:
            for request in requests:
                self.cache.advance(request.lease, self._pool.counts.released(request.seq_id))

    def detach(self, request: LiveRequest) -> None:
        """Replaces a request's lease by an empty one: its row no longer holds cached blocks."""
        self.release(request.lease)
        request.renew_lease(self._empty_lease(request))

    # Reports.

    def explain(self, prompt: TokenIds, salt: str | None) -> LookupReport:
        """Returns how far a prompt is cached, and why not further."""
        report = explain_lookup(self.cache, prompt, salt, self._clock())
        if report.group is None:
            return report
        name = self._pool.group_names[report.group]
        return dataclasses.replace(report, group_name=name)

    def check(self, residents: Sequence[LiveRequest]) -> None:
        """Raises AssertionError unless the cache agrees with all requests that have a row."""
        self.cache.check(request.lease for request in residents)
        counts = self._pool.counts
        for request in residents:
            lease, seq_id, num = request.lease, request.seq_id, request.lease.num_blocks
            released = counts.released(seq_id)
            first_window = min(self.cache.groups.first_window(released), num)
            counted = int(counts.num_cached_blocks[seq_id]), first_window
            is_counted = counted == (num, lease.first_window)
            if not is_counted or len(request.known.tokens) > request.num_tokens:
                raise AssertionError(f"What is cached of {request.request_id!r} is miscounted.")
            rows, leased = self._pool.queries.seq_blocks(seq_id), _held_ids(lease.blocks, released)
            others = [i for row in rows for i in row[num:] if self.cache.block(i) is not None]
            if [row[:num] for row in rows] != leased or others:
                raise AssertionError(
                    f"Request {request.request_id!r} holds blocks {rows}, and its lease covers "
                    f"{leased}; {others} are cached too."
                )

    def _empty_lease(self, request: LiveRequest) -> Lease:
        return self.cache.empty_lease(request.lease.key)


def first_length(request: AllocationRequest, match: Match) -> int:
    """Returns how many tokens a request's row has room for at first: more than were found."""
    num_prompt, num_found = len(request.prompt_token_ids or ()), match.num_tokens
    if num_prompt <= request.initial_tokens:
        return request.initial_tokens
    num_new = max(request.initial_tokens, 1 if num_found else 0)
    return min(num_prompt, num_found + num_new)


def _held_ids(blocks: Sequence[TreeBlock], num_released: Sequence[int]) -> list[list[BlockId]]:
    """Returns the ids of cached blocks in each group, `NULL_BLOCK` for the released first ones."""
    return [
        [NULL_BLOCK if i < first else block.block_ids[group] for i, block in enumerate(blocks)]
        for group, first in enumerate(num_released)
    ]
