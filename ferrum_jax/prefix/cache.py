"""The prefix cache: which prompts' blocks are kept, who uses them, and which go.

Host data only. The cache knows block ids and says which references to take or drop; counts and
bytes on the device are its caller's part. Every cached block has one reference that is the
cache's own.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.blocks import BlockEvictionPolicy, CachedBlock, Retention
from ferrum_jax.prefix.forest import Forest, blocks_below
from ferrum_jax.prefix.ghosts import Ghost, Ghosts, Reason
from ferrum_jax.prefix.lease import CommitPlan, Lease
from ferrum_jax.prefix.retaining import retain, set_retention, unpin
from ferrum_jax.prefix.tree import Match, Node, TreeBlock, find
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId

_logger = logging.getLogger("ferrum_jax")


class PrefixCache:
    """Cached prefixes by salt. Not thread-safe.

    Args:
      config: What is kept, and for how long; None for nothing.
      block_size: Tokens of a block.
      policy: Which block goes when room is short.

    Attributes:
      config: As given, or configured since.
      forest: The prefixes themselves.
      ghosts: What went, when and why.
      num_evicted: Blocks that went for want of room.
      num_expired: Blocks that went because nobody used them for too long.
    """

    def __init__(
        self, config: PrefixCacheConfig | None, block_size: int, policy: BlockEvictionPolicy
    ):
        self.config: PrefixCacheConfig | None = None
        self.forest, self.ghosts = Forest(block_size), Ghosts()
        self.num_evicted = self.num_expired = 0
        self._policy = policy
        if config is not None:
            self.configure(config)

    def configure(self, config: PrefixCacheConfig) -> None:
        """Goes by another configuration from now on; what is cached already stays as it is."""
        self.config = config
        self.forest.ttl_seconds = config.prefix_ttl_seconds

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.forest.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks cached."""
        return self.forest.num_blocks

    @property
    def num_idle_blocks(self) -> int:
        """Blocks cached that could go: no request uses them, and they are not pinned."""
        return self.forest.num_idle_blocks

    def shares(self, salt: Hashable) -> bool:
        """Says whether requests of a salt share anything with each other."""
        if self.config is None:
            return False
        return salt is not None or self.config.enable_cross_request_sharing

    # Use.

    def lookup(self, tokens: TokenIds, salt: Hashable, now: float) -> Match:
        """Finds the longest cached prefix that leaves at least one token to compute.

        Args:
          tokens: A prompt.
          salt: Whose; only what was committed under an equal one is found.
          now: Seconds of the clock.

        Returns:
          The match, valid until the cache changes; one of 0 tokens if it is shorter than
          `min_prefix_length`.
        """
        limit = max(0, len(tokens) - 1) if self.shares(salt) else 0
        match = self.forest.find(salt, tokens, limit, now)
        if self._is_long_enough(match.num_tokens):
            return match
        return Match(match.start, match.start, 0, [], None)

    def acquire(self, match: Match, salt: Hashable) -> Lease:
        """Takes hold of a match's full blocks, for one request.

        Args:
          match: What `lookup` returned just now.
          salt: As given to `lookup`.

        Returns:
          The lease, to be released once.
        """
        num_blocks = len(match.blocks)
        node = self.forest.ending_at(match.node, num_blocks * self.block_size)
        self.forest.hold(node)
        return Lease(salt, node, num_blocks)

    def cancel(self, lease: Lease) -> None:
        """Takes an `acquire` back, as if it had not been."""
        self.forest.let_go(lease.node)

    def shorten(self, lease: Lease, num_blocks: int, now: float) -> None:
        """Lets go of what a lease covers behind its first `num_blocks`, if anything."""
        if num_blocks < lease.num_blocks:
            retain(lease.node, now)
            self.cover(lease, lease.node, num_blocks)

    def cover(self, lease: Lease, other: Node, num_blocks: int) -> None:
        """Lets a lease cover the first blocks on the path to another node, and no more."""
        node = self.forest.ending_at(other, num_blocks * self.block_size)
        self.forest.hold(node)
        self.forest.let_go(lease.node)
        lease.node, lease.num_blocks = node, num_blocks

    def commit(
        self,
        lease: Lease,
        tokens: TokenIds,
        block_ids: Sequence[BlockId],
        now: float,
        retention: Retention | None = None,
    ) -> CommitPlan:
        """Caches a request's full blocks: makes a plan, and applies it at once.

        Returns:
          The plan: what is to be done to the row and the references.
        """
        plan = self.plan_commit(lease, tokens, block_ids, now)
        self.apply_commit(lease, plan, now, retention)
        return plan

    def plan_commit(
        self,
        lease: Lease,
        tokens: TokenIds,
        block_ids: Sequence[BlockId],
        now: float,
        own: Sequence[TreeBlock] | None = None,
    ) -> CommitPlan:
        """Says what caching a request's full blocks does; evicts prefixes that are too many.

        Args:
          lease: The request's lease; the blocks that it covers begin with `tokens`.
          tokens: The request's tokens, as far as they are computed.
          block_ids: The request's blocks, in order.
          now: Seconds of the clock.
          own: The only cached blocks that the row may hold in place of its own; any if absent.

        Returns:
          The plan, valid until the cache changes.
        """
        first, num_full = lease.num_blocks, len(tokens) // self.block_size
        tokens = tokens[: num_full * self.block_size]
        match = self._find_computed(lease, tokens)
        is_wanted = self.shares(lease.salt) and self._is_long_enough(len(tokens))
        if num_full < max(first, 1) or not is_wanted:
            return CommitPlan(first, tokens, None)
        evicted: list[BlockId] = []
        if match.num_tokens < len(tokens) and self.forest.adds_prefix(match):
            evicted = self._make_room_for_prefix(now)
            match = self._find_computed(lease, tokens)
        adopted, num_found = match.blocks, first + len(match.blocks)
        if own is not None:
            pairs = zip(adopted, own[first:], strict=False)
            num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))
            adopted = adopted[:num_same]
        added: list[BlockId] = []
        if len(adopted) == len(match.blocks) and self._has_room_for(match):
            added = list(block_ids[num_found:num_full])
        ids = [block.block_id for block in adopted]
        return CommitPlan(first, tokens, match, ids, added, evicted)

    def apply_commit(
        self,
        lease: Lease,
        plan: CommitPlan,
        now: float,
        retention: Retention | None = None,
        num_retained: int | None = None,
    ) -> None:
        """Caches what a plan says, and extends the lease over it.

        Args:
          lease: The request's lease.
          plan: What `plan_commit` returned just now.
          now: Seconds of the clock.
          retention: How long the cached blocks are kept. If absent, what is cached stays as it
            is, and what is new gets the default.
          num_retained: Blocks, the first ones, that `retention` is about; all if absent.
        """
        if plan.match is None:
            return
        match, added = plan.match, list[TreeBlock]()
        if plan.added:
            added = self.forest.append(match, plan.tokens, plan.added, lease.node)
        num_blocks = plan.first + len(plan.adopted) + len(added)
        last = added[-1].node if added else match.node
        node = self.forest.ending_at(last, num_blocks * self.block_size)
        self.forest.hold(node, until=lease.node)
        lease.node, lease.num_blocks = node, num_blocks
        if retention is not None:
            kept = num_blocks if num_retained is None else min(num_retained, num_blocks)
            set_retention(
                self.forest, self.forest.ending_at(node, kept * self.block_size), retention
            )
        retain(lease.node, now)
        self._tell(self._policy.insert, added[::-1])
        self._count(lease, but=len(added), again=retention is not None)

    def release(self, lease: Lease, now: float) -> None:
        """Ends a lease.

        Args:
          lease: What `acquire` returned.
          now: Seconds of the clock, from which a prefix's time to live counts.
        """
        self._count(lease)
        retain(lease.node, now)
        self.forest.let_go(lease.node)

    # Going.

    def following(self, block: TreeBlock) -> list[TreeBlock]:
        """Returns a block and all that follow it, in an order in which they can go."""
        node = block.node
        below = [gone for child in node.children.values() for gone in blocks_below(child)]
        return below + node.blocks[node.blocks.index(block) :][::-1]

    def discard(self, blocks: Sequence[TreeBlock], reason: Reason, now: float) -> None:
        """Removes blocks whose references were dropped, pinned or not.

        Args:
          blocks: What `following` returned; no lease covers any of it.
          reason: Why they go.
          now: Seconds of the clock.
        """
        for node in {block.node: None for block in blocks}:
            unpin(self.forest, node)
        self._tell(self._policy.remove, list(blocks))
        for block in blocks:
            self._drop(block, Ghost(reason, now))
        self.num_evicted += len(blocks) if reason is Reason.EVICTED else 0
        self.forest.trim()

    def evict(self, num_blocks: int, now: float) -> list[BlockId]:
        """Lets blocks go: those that have expired, then as many more as are asked for.

        Args:
          num_blocks: How many are wanted.
          now: Seconds of the clock.

        Returns:
          Blocks whose reference is to be dropped; fewer than wanted when no more could go.
        """
        freed = self.expire(now)
        while len(freed) < num_blocks and self.num_idle_blocks:
            freed.append(self._evict(self._choose_victim(), now))
        self.forest.trim()
        return freed

    def expire(self, now: float) -> list[BlockId]:
        """Lets go what nobody has used for too long.

        Args:
          now: Seconds of the clock.

        Returns:
          Blocks whose reference is to be dropped.
        """
        freed: list[BlockId] = []
        for node in self.forest.pop_expired(now):
            # Nothing below a node outlives it.
            gone = blocks_below(node)
            self._tell(self._policy.remove, gone)
            for block in gone:
                self._drop(block, Ghost(Reason.EXPIRED, block.node.expires_at))
            freed += [block.block_id for block in gone]
            self.num_expired += len(gone)
        self.forest.trim()
        return freed

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Follows blocks that have moved in the pool.

        Args:
          new_ids: The new id of each block that moved.
        """
        self.forest.renumber(new_ids)

    def check(self, leases: Iterable[Lease]) -> None:
        """Raises AssertionError unless all that is known of prefixes holds.

        Args:
          leases: All that were acquired and not released.
        """
        leases = list(leases)
        self.forest.check(lease.node for lease in leases)
        for lease in leases:
            if lease.node.end != lease.num_blocks * self.block_size:
                raise AssertionError("A lease does not cover whole blocks.")

    def block_ids(self) -> list[BlockId]:
        """Returns every cached block."""
        return list(self.forest.blocks)

    def _is_long_enough(self, num_tokens: int) -> bool:
        return self.config is not None and num_tokens >= self.config.min_prefix_length

    def _find_computed(self, lease: Lease, tokens: TokenIds) -> Match:
        # What has expired, but is computed anew, lives on.
        return find(lease.node, tokens, len(tokens), self.block_size, -math.inf)

    def _has_room_for(self, match: Match) -> bool:
        """Says whether what follows a match may be kept."""
        return not self.forest.adds_prefix(match) or self._num_prefixes_left > 0

    @property
    def _num_prefixes_left(self) -> int:
        most = 0 if self.config is None else self.config.max_prefixes
        return most - self.forest.num_prefixes

    def _make_room_for_prefix(self, now: float) -> list[BlockId]:
        """Lets whole prefixes go until one more may be kept, if that many can."""
        freed: list[BlockId] = []
        while self._num_prefixes_left < 1 and self.num_idle_blocks:
            victim = self._choose_victim()
            branch = list(victim.node.path())
            freed.append(self._evict(victim, now))
            for node in branch:
                while self._num_prefixes_left < 1 and node.blocks and node.blocks[-1].can_go:
                    last = node.blocks[-1]
                    self._tell(self._policy.remove, [last])
                    freed.append(self._evict(last, now))
        self.forest.trim()
        return freed

    def _choose_victim(self) -> TreeBlock:
        """Returns a block that can go: the policy's, or any if the policy fails."""
        name = self._policy.name
        try:
            block = self._policy.evict(_can_go)
            if isinstance(block, TreeBlock) and block.can_go and self.forest.has(block):
                return block
            _logger.error("Block policy %s chose %r, which cannot go.", name, block)
        except Exception:
            _logger.exception("Block policy %s failed to choose a block.", name)
        block = self.forest.any_that_can_go()
        assert block is not None
        self._tell(self._policy.remove, [block])
        return block

    def _evict(self, block: TreeBlock, now: float) -> BlockId:
        self._drop(block, Ghost(Reason.EVICTED, now))
        self.num_evicted += 1
        return block.block_id

    def _drop(self, block: TreeBlock, ghost: Ghost) -> None:
        """Takes a block out: the one place where a cached block goes."""
        self.forest.remove(block)
        self.ghosts.add(block.prefix_key, ghost)

    def _count(self, lease: Lease, *, but: int = 0, again: bool = False) -> None:
        """Tells the policy, once a lease, of the blocks used, all but the deepest `but`."""
        if lease.is_counted and not again:
            return
        lease.is_counted = True
        used = [block for node in lease.node.path() for block in reversed(node.blocks)]
        self._tell(self._policy.touch, used[but:])

    def _tell(self, what: Callable[[Sequence[CachedBlock]], None], blocks: list[TreeBlock]) -> None:
        """Tells the policy something; a failure of it is logged, and costs only its judgement."""
        if not blocks:
            return
        try:
            what(blocks)
        except Exception:
            _logger.exception("Block policy %s failed.", self._policy.name)


def _can_go(block: CachedBlock) -> bool:
    return isinstance(block, TreeBlock) and block.can_go
