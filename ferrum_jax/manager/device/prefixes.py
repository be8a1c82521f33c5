"""The prefix cache of one device, kept in step with the blocks of its pool."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.manager.pool import DevicePool, RowShape
from ferrum_jax.manager.refusals import (
    require_as_known,
    require_computed,
    require_prefix_caching,
)
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.commit import CommitPlan
from ferrum_jax.prefix.ghosts import Reason
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.report import LookupReport, explain_lookup
from ferrum_jax.prefix.tree import Match, TreeBlock
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


class Prefixes:
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
        self.cache, self._pool, self._clock = cache, pool, clock
        self.num_prompt_tokens = self.num_reused_tokens = 0
        self._unreleased: list[BlockId] = []  # The cache has removed these, and the pool has not.

    @property
    def num_idle_blocks(self) -> int:
        """Cached blocks that no request uses: they are released on demand."""
        return self.cache.num_idle_blocks + len(self._unreleased)

    @property
    def hit_rate(self) -> float:
        """Tokens found over tokens looked up."""
        return self.num_reused_tokens / max(1, self.num_prompt_tokens)

    def configure(self, config: PrefixCacheConfig) -> None:
        """Enables prefix caching, or replaces its configuration; cached entries stay.

        Raises:
          ValueError: If the cache has several layer groups, or a sliding window.
        """
        require_prefix_caching(self._pool)
        self.cache.configure(config)

    # A request's start.

    def acquire(self, request: AllocationRequest) -> tuple[Match, Lease]:
        """Finds the cached prefix of a request's prompt, and holds it.

        Returns:
          `(match, lease)`. The lease is given back by `undo_acquire`, or kept by the request.
        """
        prompt = TokenIds(request.prompt_token_ids or ())
        match = self.cache.lookup(prompt, request.cache_salt, self._clock())
        return match, self.cache.acquire(match, request.cache_salt)

    def undo_acquire(self, lease: Lease) -> None:
        """Undoes `acquire` or `recache`, as if the lease had never been held."""
        self.cache.undo_acquire(lease)

    def start_row(self, request: AllocationRequest, match: Match) -> tuple[int, int]:
        """Allocates a request's row, which begins with the cached blocks.

        Args:
          request: The request to start.
          match: The cached prefix of its prompt. There is room for the rest.

        Returns:
          `(seq_id, num_cached_tokens)`.
        """
        tail, num_tail = match.tail, match.num_tokens % self._pool.counts.block_size
        if tail is None or not tail.is_cached:
            tail, num_tail = None, 0  # It was evicted while room was made.
        num_cached = len(match.blocks) * self._pool.counts.block_size + num_tail
        if num_cached:
            seq_id = self._pool.attach(
                request.initial_tokens,
                match.block_ids,
                None if tail is None else tail.block_id,
                num_tail,
            )
        else:
            seq_id = self._pool.allocate(RowShape(request.initial_tokens))
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
                self._pool.cache_blocks(request.seq_id, plan.adopted[0], plan.added)
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
        block_ids = self._pool.queries.row_blocks(seq_id)
        # Only leases hold cached blocks: so it is known which ones can be evicted.
        num_full = min(num_full, self._pool.queries.num_unshared(block_ids, lease.num_blocks))
        tokens = tokens[: num_full * self._pool.counts.block_size]
        plan = self.cache.plan_commit(lease, tokens, [block_ids], self._clock(), own)
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
            found = self.cache.forest.find(lease.salt, tokens, len(tokens), now)
            retention = known.retention if found.num_tokens < len(tokens) else None
            num_full = known.num_computed // size
            if num_full:
                plan = self._plan(
                    request, lease, seq_id, known.tokens, num_full, request.blocks_away
                )
                if plan is not None:
                    self._pool.cache_blocks(seq_id, plan.adopted[0], plan.added)
                    self.cache.apply_commit(lease, plan, now, retention, num_retained)
        except BaseException:
            self.undo_acquire(lease)
            raise
        return lease

    # Sharing.

    def share(self, source: LiveRequest, target: LiveRequest, num_tokens: int) -> None:
        """Puts the first blocks of a request into another one's row; waits for the device."""
        size, num_leased = self._pool.counts.block_size, target.lease.num_blocks
        if num_tokens <= num_leased * size:
            return  # The target holds cached blocks with these tokens.
        num_shared = min(source.lease.num_blocks, num_tokens // size)
        kept = target.lease.block_ids[num_shared:]
        self._pool.share((source.seq_id, target.seq_id), num_tokens, num_shared, kept)
        if num_shared >= num_leased:
            self.cache.cover(target.lease, source.lease.node, num_shared)
        target.known.share(source.known, num_tokens, num_leased * size)
        self._pool.device_state.settle()

    # Removal.

    def num_idle_without(self, requests: Iterable[LiveRequest]) -> int:
        """Returns how many more cached blocks no request would use if these ended."""
        return self.cache.num_idle_without(request.lease for request in requests)

    def truncate_lease(self, lease: Lease, num_tokens: int) -> None:
        """Releases the blocks that a lease covers past a row's first `num_tokens`."""
        self.cache.truncate_lease(lease, num_tokens // self._pool.counts.block_size, self._clock())

    def release(self, lease: Lease) -> None:
        """Ends a lease: its row is freed at once, or no longer holds the blocks."""
        self.cache.release(lease, self._clock())

    def detach(self, request: LiveRequest) -> None:
        """Replaces a request's lease by an empty one: its row no longer holds cached blocks."""
        self.release(request.lease)
        request.renew_lease(self._empty_lease(request))

    def uncache_tail(self, request: LiveRequest, num_blocks: int) -> None:
        """Removes a request's last cached blocks, held by no other, from the prefix cache."""
        if num_blocks:
            first = request.lease.blocks[-num_blocks]
            self.uncache([first], [request], Reason.EVICTED)

    def uncache(
        self, blocks: Sequence[TreeBlock], requests: Iterable[LiveRequest], reason: Reason
    ) -> None:
        """Removes blocks and all that follow them from the prefix cache, in use or not.

        The requests keep them as blocks of their own; blocks that no request holds are freed.

        Args:
          blocks: Cached blocks.
          requests: All requests that have a row.
          reason: Why they are removed.
        """
        removed = list(
            dict.fromkeys(b for first in blocks for b in self.cache.with_followers(first))
        )
        removed.sort(key=lambda block: block.logical_index, reverse=True)
        ids = {block.block_id for block in removed}
        left = {}
        for request in requests:
            covered = request.lease.block_ids
            num_left = next((i for i, b in enumerate(covered) if b in ids), len(covered))
            if num_left < len(covered):
                left[request] = num_left
        if removed:
            rows = {request.seq_id: num_left for request, num_left in left.items()}
            self._pool.uncache(rows, [block.block_id for block in removed])
        for request, num_left in left.items():
            self.cache.cover(request.lease, request.lease.node, num_left)
        self.cache.discard(removed, reason, self._clock())

    def evict(self, num_blocks: int) -> None:
        """Evicts cached blocks until `num_blocks` more are free, or no more can be evicted."""
        self._release_blocks(self.cache.evict(num_blocks - len(self._unreleased), self._clock()))

    def expire(self) -> None:
        """Evicts cached blocks after their time to live."""
        self._release_blocks(self.cache.expire(self._clock()))

    def reset(
        self, salt: Hashable | None, requests: Iterable[LiveRequest], residents: list[LiveRequest]
    ) -> None:
        """Removes cached prefixes, though requests use them; live requests cache no more.

        Args:
          salt: The salt under which they are cached; None for every salt, and for none.
          requests: All live requests.
          residents: Those of them that have a row.
        """
        forest = self.cache.forest
        salts = forest.salts() if salt is None else [salt]
        blocks = [block for each in salts for block in forest.subtree_of(each)]
        firsts = [block for block in blocks if not block.logical_index]
        self.uncache(firsts, residents, Reason.RESET)
        for request in requests:
            if salt in (None, request.allocation.cache_salt):
                request.known.forbid_caching()
                request.discard_blocks_away()

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Replaces the ids of blocks that have moved in the pool by their new ones."""
        self.cache.renumber(new_ids)
        self._unreleased = [new_ids.get(block_id, block_id) for block_id in self._unreleased]

    def _release_blocks(self, block_ids: Sequence[BlockId]) -> None:
        """Releases the cache's references to blocks that it has removed."""
        self._unreleased += block_ids
        if self._unreleased:
            self._pool.release_cached(self._unreleased)  # Where that fails, it is done next time.
            self._unreleased = []

    # Reports.

    def referenced_blocks(self) -> list[BlockId]:
        """Returns every block to which the prefix cache has a reference."""
        return [*self.cache.block_ids(), *self._unreleased]

    def explain(self, prompt: TokenIds, salt: str | None) -> LookupReport:
        """Returns how far a prompt is cached, and why not further."""
        return explain_lookup(self.cache, prompt, salt, self._clock())

    def check(self, residents: Sequence[LiveRequest]) -> None:
        """Raises AssertionError unless the cache agrees with all requests that have a row."""
        self.cache.check(request.lease for request in residents)
        for request in residents:
            lease, seq_id = request.lease, request.seq_id
            is_counted = lease.num_blocks == self._pool.counts.num_cached_blocks[seq_id]
            if not is_counted or len(request.known.tokens) > request.num_tokens:
                raise AssertionError(f"What is cached of {request.request_id!r} is miscounted.")
            row = self._pool.queries.row_blocks(seq_id)
            held = [block_id for block_id in row if self.cache.block(block_id) is not None]
            if held != lease.block_ids or held != row[: len(held)]:
                raise AssertionError(
                    f"Request {request.request_id!r} holds cached blocks {held}, and its lease "
                    f"covers {lease.block_ids}."
                )

    def _empty_lease(self, request: LiveRequest) -> Lease:
        salt = request.allocation.cache_salt
        return self.cache.acquire(self.cache.lookup(TokenIds(()), salt, self._clock()), salt)
