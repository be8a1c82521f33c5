"""The prefix cache of a manager, kept in step with the blocks on its device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ferrum_jax.manager.device_cache import DeviceCache
from ferrum_jax.manager.handle import Entry
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.report import LookupReport, explain_lookup
from ferrum_jax.prefix.tree import Match
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds


class Prefixes:
    """Lets requests begin with cached blocks, and keeps theirs. Not thread-safe.

    Args:
      blocks: Where the blocks are.
      cache: Which of them are cached.
      clock: Returns seconds that only grow.

    Attributes:
      cache: As given.
      num_prompt_tokens: Tokens of all prompts that were looked up.
      num_reused_tokens: Those of them that were found.
    """

    def __init__(self, blocks: DeviceCache, cache: PrefixCache, clock: Callable[[], float]):
        self.cache, self._blocks, self._clock = cache, blocks, clock
        self.num_prompt_tokens = self.num_reused_tokens = 0

    @property
    def hit_rate(self) -> float:
        """Tokens found over tokens looked up."""
        return self.num_reused_tokens / max(1, self.num_prompt_tokens)

    def acquire(self, request: AllocationRequest) -> tuple[Match, Lease]:
        """Finds what is cached of a request's prompt, and holds it until released or cancelled."""
        prompt = TokenIds(request.prompt_token_ids or ())
        match = self.cache.lookup(prompt, request.cache_salt, self._clock())
        return match, self.cache.acquire(match, request.cache_salt)

    def start(self, request: AllocationRequest, match: Match) -> tuple[int, int]:
        """Starts a request's row with the blocks that it holds.

        Args:
          request: It.
          match: What is cached of its prompt. There is room for the rest.

        Returns:
          `(seq_id, num_cached_tokens)`.
        """
        tail, num_tail = match.tail, match.num_tokens % self._blocks.block_size
        if tail is None or not tail.is_cached:
            tail, num_tail = None, 0  # It went while room was made.
        num_cached = len(match.blocks) * self._blocks.block_size + num_tail
        if request.prompt_token_ids and self.cache.config is not None:
            self.num_prompt_tokens += len(request.prompt_token_ids)
            self.num_reused_tokens += num_cached
        if not num_cached:
            return self._blocks.allocate(request.initial_tokens), 0
        seq_id = self._blocks.attach(
            request.initial_tokens,
            match.block_ids,
            None if tail is None else tail.block_id,
            num_tail,
        )
        return seq_id, num_cached

    def commit(
        self, entry: Entry, retention: Retention | None = None, num_tokens: int | None = None
    ) -> None:
        """Caches the full blocks of a request's computed tokens; waits for the device.

        Those of a compressed request are not what a prompt's prefill computes: they stay its own.

        Args:
          entry: The request.
          retention: How long all of it is kept; as configured, or as it is, if absent.
          num_tokens: How many of its tokens, all of them computed; every computed one if absent.
        """
        num_tokens = entry.num_computed_tokens if num_tokens is None else num_tokens
        num_full = num_tokens // self._blocks.block_size
        if num_full <= entry.lease.num_blocks and retention is None:
            return
        if entry.shape.is_compressed or not self.cache.shares(entry.lease.salt):
            return
        block_ids = self._blocks.row_blocks(entry.seq_id)
        # What is cached has no holders but those with a lease: so it is known what can go.
        num_full = min(num_full, self._blocks.num_unshared(block_ids, entry.lease.num_blocks))
        tokens = entry.tokens[: num_full * self._blocks.block_size]
        done = self.cache.commit(entry.lease, tokens, block_ids, self._clock(), retention)
        if done.adopted:
            self._blocks.adopt(entry.seq_id, done.first, done.adopted)
        if done.added:
            self._blocks.keep(entry.seq_id, done.added)
        self._drop(done.evicted)

    def follow(self, entry: Entry) -> None:
        """Forgets the tokens behind a request's end, after a step that may have cut it."""
        entry.tokens = entry.tokens[: entry.num_tokens]
        entry.num_computed_tokens = min(entry.num_computed_tokens, len(entry.tokens))
        entry.num_retained_tokens = min(entry.num_retained_tokens, len(entry.tokens))
        num_full = entry.num_tokens // self._blocks.block_size
        self.cache.shorten(entry.lease, num_full, self._clock())

    def share(self, source: Entry, target: Entry, num_tokens: int) -> None:
        """Lets a request hold another one's first tokens; waits for the device."""
        size, num_leased = self._blocks.block_size, target.lease.num_blocks
        if num_tokens <= num_leased * size:
            return  # It holds cached blocks with these tokens.
        num_shared = min(source.lease.num_blocks, num_tokens // size)
        self._blocks.share(source.seq_id, target.seq_id, num_tokens, num_shared)
        if num_shared < num_leased:
            block_ids = target.lease.block_ids[num_shared:]
            self._blocks.adopt(target.seq_id, num_shared, block_ids)
        else:
            self.cache.cover(target.lease, source.lease, num_shared)
        if source.num_computed_tokens < num_tokens:
            num_computed = max(source.num_computed_tokens, num_leased * size)
            target.num_computed_tokens = min(target.num_computed_tokens, num_computed)

    def renew(self, entry: Entry) -> None:
        """Caches again, from the beginning, what a request without a lease has.

        What its commits said of retention holds again, unless all of that is cached: then whoever
        committed it last has said how long it is kept.
        """
        self._start_anew(entry)
        size = self._blocks.block_size
        num_retained = min(entry.num_retained_tokens, entry.num_computed_tokens) // size * size
        tokens = entry.tokens[:num_retained]
        salt, now = entry.request.cache_salt, self._clock()
        if self.cache.forest.find(salt, tokens, num_retained, now).num_tokens < num_retained:
            self.commit(entry, entry.retention, num_retained)
        self.commit(entry)

    def num_held_alone(self, entry: Entry) -> int:
        """Returns how many cached blocks, its last ones, a request holds and nobody else."""
        return self.cache.forest.num_idle_without([entry.lease.node])

    def forgo(self, entry: Entry, num_blocks: int) -> None:
        """Lets a request's last cached blocks be its own alone; nobody else may hold them."""
        if not num_blocks:
            return
        own = entry.lease.block_ids[-num_blocks:]
        gone = self.cache.forgo(entry.lease, num_blocks, self._clock())
        self._blocks.drop_last_kept(entry.seq_id, own)
        self._drop([block_id for block_id in gone if block_id not in own])

    def leave(self, entry: Entry) -> None:
        """Ends a request's hold on cached blocks that its row has let go of."""
        self.release(entry)
        self._start_anew(entry)

    def release(self, entry: Entry) -> None:
        """Ends a request's hold; its row must be freed, or let go of, at once."""
        self.cache.release(entry.lease, self._clock())

    def evict(self, num_blocks: int) -> None:
        """Lets cached blocks go until `num_blocks` more are free, or no more can go."""
        self._drop(self.cache.evict(num_blocks, self._clock()))

    def expire(self) -> None:
        """Lets go what nobody has used for too long."""
        self._drop(self.cache.expire(self._clock()))

    def explain(self, prompt: TokenIds, salt: str | None) -> LookupReport:
        """Says how far a prompt is cached, and why not further."""
        return explain_lookup(self.cache, prompt, salt, self._clock())

    def check(self, entries: Sequence[Entry]) -> None:
        """Raises AssertionError unless all that is known of prefixes holds.

        Args:
          entries: All requests that have a row.
        """
        self.cache.check(entry.lease for entry in entries)
        for entry in entries:
            covered = entry.lease.num_blocks, len(entry.tokens) <= entry.num_tokens
            if covered != (int(self._blocks.num_cached_blocks[entry.seq_id]), True):
                raise AssertionError(f"What is cached of {entry.request_id!r} is miscounted.")

    def _start_anew(self, entry: Entry) -> None:
        root = self.cache.lookup(TokenIds(()), entry.request.cache_salt, self._clock())
        entry.lease = self.cache.acquire(root, entry.request.cache_salt)

    def _drop(self, block_ids: Sequence[int]) -> None:
        if block_ids:
            self._blocks.drop_kept(block_ids)
