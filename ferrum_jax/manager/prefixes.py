"""The prefix cache of a manager, kept in step with the blocks on its device."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

import ferrum_jax.manager.kinship as kinship
from ferrum_jax.manager.handle import Entry
from ferrum_jax.manager.pool import DevicePool, RowShape
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.forest import root_of
from ferrum_jax.prefix.ghosts import Reason
from ferrum_jax.prefix.lease import CommitPlan, Lease
from ferrum_jax.prefix.report import LookupReport, explain_lookup
from ferrum_jax.prefix.tree import Match, TreeBlock
from ferrum_jax.records import AllocationRequest
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


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
      dropped: Blocks that the cache has dropped, and the device has yet to release.
    """

    def __init__(self, blocks: DevicePool, cache: PrefixCache, clock: Callable[[], float]):
        self.cache, self._blocks, self._clock = cache, blocks, clock
        self.num_prompt_tokens = self.num_reused_tokens = 0
        self.dropped: list[BlockId] = []

    @property
    def num_idle_blocks(self) -> int:
        """Blocks that are released on demand, because no request uses them."""
        return self.cache.num_idle_blocks + len(self.dropped)

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
        tail, num_tail = match.tail, match.num_tokens % self._blocks.counts.block_size
        if tail is None or not tail.is_cached:
            tail, num_tail = None, 0  # It went while room was made.
        num_cached = len(match.blocks) * self._blocks.counts.block_size + num_tail
        if num_cached:
            seq_id = self._blocks.attach(
                request.initial_tokens,
                match.block_ids,
                None if tail is None else tail.block_id,
                num_tail,
            )
        else:
            seq_id = self._blocks.allocate(RowShape(request.initial_tokens))
        if request.prompt_token_ids and self.cache.config is not None:
            self.num_prompt_tokens += len(request.prompt_token_ids)
            self.num_reused_tokens += num_cached
        return seq_id, num_cached

    def num_computed(self, entry: Entry, num_tokens: int) -> tuple[int, int]:
        """Returns how many of a request's first tokens are computed, as far as can be known.

        It waits for the device where that could add blocks to the prefix cache.

        Args:
          entry: The request.
          num_tokens: Tokens to look at.

        Returns:
          `(num_computed, num_sure)`: tokens that may be taken as computed now, and those of them
          that may be later too, since they were looked at, or are in cached blocks.
        """
        known = entry.num_computed_tokens
        bound = max(min(num_tokens, entry.max_computed_tokens), min(num_tokens, known))
        is_wanted = bound // self._blocks.counts.block_size > entry.lease.num_blocks
        if not is_wanted or not self._may_cache(entry, entry.seq_id):
            return bound, min(bound, entry.lease.num_blocks * self._blocks.counts.block_size)
        num_written = self._blocks.queries.num_written(entry.seq_id, min(known, bound), bound)
        return num_written, num_written

    def _may_cache(self, entry: Entry, seq_id: int) -> bool:
        """Says whether a request's blocks may join the prefix cache."""
        is_plain = not self._blocks.counts.row_shape(seq_id).is_compressed
        return is_plain and entry.may_be_cached and self.cache.shares(entry.lease.salt)

    def commit(self, entry: Entry, retention: Retention | None = None) -> None:
        """Caches the full blocks of a request's computed tokens; waits for the device.

        Those of a compressed request are not what a prompt's prefill computes: they stay its own.

        Args:
          entry: The request.
          retention: How long all of it is kept; as configured, or as it is, if absent.
        """
        plan = self._plan(entry, entry.seq_id, retention is not None)
        if plan is not None:
            self._blocks.cache_blocks(entry.seq_id, plan.adopted, plan.added)
            self.cache.apply_commit(entry.lease, plan, self._clock(), retention)

    def _plan(
        self,
        entry: Entry,
        seq_id: int,
        is_wanted: bool,
        own: Sequence[TreeBlock] | None = None,
    ) -> CommitPlan | None:
        """Returns what caching a request's computed tokens does; None for nothing.

        Args:
          entry: The request, with its lease.
          seq_id: Its row.
          is_wanted: Whether there is something to do even if it has no more full blocks.
          own: The only cached blocks that it may hold in place of its own; any if absent.
        """
        lease = entry.lease
        num_full = entry.num_computed_tokens // self._blocks.counts.block_size
        if num_full <= lease.num_blocks and not is_wanted:
            return None
        if not self._may_cache(entry, seq_id):
            return None
        block_ids = self._blocks.queries.row_blocks(seq_id)
        # What is cached has no holders but those with a lease: so it is known what can go.
        num_full = min(num_full, self._blocks.queries.num_unshared(block_ids, lease.num_blocks))
        tokens = entry.tokens[: num_full * self._blocks.counts.block_size]
        plan = self.cache.plan_commit(lease, tokens, block_ids, self._clock(), own)
        self._drop(plan.evicted)
        return plan

    def renew(self, entry: Entry, seq_id: int) -> None:
        """Caches again what a request has whose bytes have come back into a row.

        The row keeps its own bytes: of equal tokens that another request has cached meanwhile,
        nothing is adopted. What its commits said of retention holds again, unless all of that is
        cached: then the last request that committed it has said how long it is kept.

        Args:
          entry: The request, whose lease is renewed.
          seq_id: The row.
        """
        old, size, now = entry.lease, self._blocks.counts.block_size, self._clock()
        self._start_anew(entry)
        try:
            num_retained = min(entry.num_retained_tokens, entry.num_computed_tokens) // size
            tokens = entry.tokens[: num_retained * size]
            found = self.cache.forest.find(entry.lease.salt, tokens, len(tokens), now)
            retention = entry.retention if found.num_tokens < len(tokens) else None
            plan = self._plan(entry, seq_id, False, entry.blocks_away)
            if plan is not None:
                self._blocks.cache_blocks(seq_id, plan.adopted, plan.added)
                self.cache.apply_commit(entry.lease, plan, now, retention, num_retained)
        except BaseException:
            self.cache.cancel(entry.lease)
            entry.lease = old
            raise
        entry.blocks_away = ()

    def follow(
        self, entries: Sequence[Entry], residents: Sequence[Entry], were_empty: Sequence[Entry]
    ) -> None:
        """Adapts what is known of requests to their rows, after a step that may have changed these.

        Cached blocks that a row got to hold by a `fork` or `share` are covered by its lease. Where
        that cannot be, since they were cached under another salt or are not the row's first ones,
        they are removed from the prefix cache. Waits for the device where blocks may be shared.

        Args:
          entries: The requests of the step.
          residents: All requests that have a row.
          were_empty: Those of the step that had no tokens before it.
        """
        rows = self._blocks.queries.all_row_blocks() if self.cache.num_blocks else {}
        loose = [b for e in entries for b in self._follow(e, rows.get(e.seq_id, []))]
        if loose:
            self.uncache(loose, residents, Reason.EVICTED)
        if not all(entry.may_be_cached for entry in entries):
            # A fork of fewer tokens than a block leaves no trace but that a row has begun.
            for entry in were_empty:
                entry.may_be_cached &= not entry.num_tokens
        self._blocks.counts.note_sharing()
        if self._blocks.counts.may_share:
            rows = rows or self._blocks.queries.all_row_blocks()
            kinship.link_sharing(entries, residents, rows, self._blocks.counts.block_size)

    def _follow(self, entry: Entry, row: Sequence[BlockId]) -> list[TreeBlock]:
        """Adapts one request; returns the cached blocks of its row that its lease cannot cover."""
        length, size = entry.num_tokens, self._blocks.counts.block_size
        kinship.cut(entry, length)
        entry.tokens = entry.tokens[:length]
        entry.num_computed_tokens = min(entry.num_computed_tokens, len(entry.tokens))
        entry.num_retained_tokens = min(entry.num_retained_tokens, len(entry.tokens))
        entry.max_computed_tokens = min(entry.max_computed_tokens, length)
        self.cache.shorten(entry.lease, length // size, self._clock())
        held = [self.cache.forest.blocks.get(block_id) for block_id in row]
        num_first = held.index(None) if None in held else len(held)
        path = [block for block in held[:num_first] if block is not None]
        if path and not self._is_path(path, entry.lease.salt):
            path = []
        if path != entry.lease.blocks:
            last = path[-1].node if path else root_of(entry.lease.node)
            self.cache.cover(entry.lease, last, len(path))
            self._blocks.counts.set_cached(entry.seq_id, len(path))
            if last.end > len(entry.known_tokens):
                entry.inherited_tokens = entry.lease.tokens
        return [block for block in held[len(path) :] if block is not None]

    def uncache(
        self, blocks: Sequence[TreeBlock], entries: Iterable[Entry], reason: Reason
    ) -> None:
        """Removes cached blocks and all that follow them, though requests hold them.

        The requests go on with them as their own; blocks that no request holds are freed.

        Args:
          blocks: Cached blocks.
          entries: All requests that have a row.
          reason: Why they go.
        """
        gone = list(dict.fromkeys(b for first in blocks for b in self.cache.following(first)))
        gone.sort(key=lambda block: block.logical_index, reverse=True)
        is_gone = {block.block_id for block in gone}
        left = {}
        for entry in entries:
            covered = entry.lease.block_ids
            num_left = next((i for i, b in enumerate(covered) if b in is_gone), len(covered))
            if num_left < len(covered):
                left[entry] = num_left
        if gone:
            rows = {entry.seq_id: num_left for entry, num_left in left.items()}
            self._blocks.uncache(rows, [block.block_id for block in gone])
        for entry, num_left in left.items():
            self.cache.cover(entry.lease, entry.lease.node, num_left)
        self.cache.discard(gone, reason, self._clock())

    def _is_path(self, blocks: Sequence[TreeBlock], salt: Hashable) -> bool:
        """Says whether blocks are the first ones of a prefix that is cached under a salt."""
        nodes = list(blocks[-1].node.path())
        before = [block for node in nodes[::-1] for block in node.blocks]
        return root_of(nodes[0]).salt == salt and before[: len(blocks)] == list(blocks)

    def share(self, source: Entry, target: Entry, num_tokens: int) -> None:
        """Lets a request hold another one's first tokens; waits for the device."""
        size, num_leased = self._blocks.counts.block_size, target.lease.num_blocks
        if num_tokens <= num_leased * size:
            return  # It holds cached blocks with these tokens.
        num_shared = min(source.lease.num_blocks, num_tokens // size)
        kept = target.lease.block_ids[num_shared:]
        self._blocks.share((source.seq_id, target.seq_id), num_tokens, num_shared, kept)
        if num_shared >= num_leased:
            self.cache.cover(target.lease, source.lease.node, num_shared)
        num_sure = num_leased * size
        for bound in ("num_computed_tokens", "max_computed_tokens"):
            given, had = getattr(source, bound), getattr(target, bound)
            if given < num_tokens:
                setattr(target, bound, min(had, max(given, num_sure)))
        if source.max_computed_tokens >= num_tokens:
            target.max_computed_tokens = max(target.max_computed_tokens, num_tokens)
        target.may_be_cached &= source.may_be_cached
        kinship.link(source, target, num_tokens)
        self._blocks.settling.settle()

    def num_held_alone(self, entry: Entry) -> int:
        """Returns how many cached blocks, its last ones, a request holds and nobody else."""
        return self.cache.forest.num_idle_without([entry.lease.node])

    def forgo(self, entry: Entry, num_blocks: int) -> None:
        """Lets a request's last cached blocks be its own alone; nobody else may hold them."""
        if num_blocks:
            first = entry.lease.blocks[-num_blocks]
            self.uncache([first], [entry], Reason.EVICTED)

    def leave(self, entry: Entry) -> None:
        """Ends a request's hold on cached blocks that its row has let go of."""
        self.release(entry)
        self._start_anew(entry)

    def release(self, entry: Entry) -> None:
        """Ends a request's hold; its row must be freed, or let go of, at once."""
        self.cache.release(entry.lease, self._clock())

    def evict(self, num_blocks: int) -> None:
        """Lets cached blocks go until `num_blocks` more are free, or no more can go."""
        self._drop(self.cache.evict(num_blocks - len(self.dropped), self._clock()))

    def expire(self) -> None:
        """Lets go what nobody has used for too long."""
        self._drop(self.cache.expire(self._clock()))

    def reset(self, salt: Hashable | None, entries: Iterable[Entry]) -> None:
        """Removes what is cached, though requests hold it.

        Args:
          salt: The salt under which it is cached; None for every one, and for no salt.
          entries: All requests that have a row.
        """
        forest = self.cache.forest
        salts = forest.salts() if salt is None else [salt]
        blocks = [block for each in salts for block in forest.subtree_of(each)]
        firsts = [block for block in blocks if not block.logical_index]
        self.uncache(firsts, entries, Reason.RESET)

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Follows blocks that have moved in the pool, by the new id of each."""
        self.cache.renumber(new_ids)
        self.dropped = [new_ids.get(block_id, block_id) for block_id in self.dropped]

    def kept_blocks(self) -> list[BlockId]:
        """Returns every block of which the prefix cache has a reference."""
        return [*self.cache.block_ids(), *self.dropped]

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
            if covered != (int(self._blocks.counts.num_cached_blocks[entry.seq_id]), True):
                raise AssertionError(f"What is cached of {entry.request_id!r} is miscounted.")
            row = self._blocks.queries.row_blocks(entry.seq_id)
            held = [block_id for block_id in row if block_id in self.cache.forest.blocks]
            if held != entry.lease.block_ids or held != row[: len(held)]:
                raise AssertionError(
                    f"Request {entry.request_id!r} holds cached blocks {held}, and its lease "
                    f"covers {entry.lease.block_ids}."
                )

    def _start_anew(self, entry: Entry) -> None:
        root = self.cache.lookup(TokenIds(()), entry.request.cache_salt, self._clock())
        entry.lease = self.cache.acquire(root, entry.request.cache_salt)

    def _drop(self, block_ids: Sequence[BlockId]) -> None:
        self.dropped += block_ids
        if self.dropped:
            self._blocks.release_cached(self.dropped)  # Where that fails, it is done next time.
            self.dropped = []
