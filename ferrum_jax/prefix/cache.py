"""The prefix cache: which blocks of prompts are kept, used and evicted.

Host data only. The cache holds one reference to each cached block. It returns the ids of blocks
to which the caller has to add or release references on the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.blocks import BlockEvictionPolicy, Retention
from ferrum_jax.prefix.forest import Forest, blocks_below
from ferrum_jax.prefix.ghosts import Ghost, Ghosts, Reason
from ferrum_jax.prefix.guarded_policy import GuardedPolicy
from ferrum_jax.prefix.lease import CommitPlan, Lease
from ferrum_jax.prefix.retaining import retain, set_retention, unpin
from ferrum_jax.prefix.tree import Match, Node, TreeBlock, find
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId


class PrefixCache:
    """Cached prefixes by salt. Not thread-safe.

    Args:
      config: Which prefixes are kept, and for how long; None to keep none.
      block_size: Tokens per block.
      policy: Policy that chooses the blocks to evict.

    Attributes:
      config: As given, or the latest given to `configure`.
      forest: Trees of the cached prefixes.
      ghosts: Records of blocks that left the cache.
      num_evicted: Number of blocks evicted so far.
      num_expired: Number of blocks expired so far.
    """

    def __init__(
        self, config: PrefixCacheConfig | None, block_size: int, policy: BlockEvictionPolicy
    ):
        self.config: PrefixCacheConfig | None = None
        self.forest, self.ghosts = Forest(block_size), Ghosts()
        self.num_evicted = self.num_expired = 0
        self._policy = GuardedPolicy(policy, self.forest)
        if config is not None:
            self.configure(config)

    def configure(self, config: PrefixCacheConfig) -> None:
        """Replaces the configuration; entries that are cached keep their time to live.

        Args:
          config: The new configuration.
        """
        self.config = config
        self.forest.ttl_seconds = config.prefix_ttl_seconds

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.forest.block_size

    @property
    def num_blocks(self) -> int:
        """Number of cached blocks."""
        return self.forest.num_blocks

    @property
    def num_idle_blocks(self) -> int:
        """Number of cached blocks that could be evicted: neither in use nor pinned."""
        return self.forest.num_idle_blocks

    def shares(self, salt: Hashable) -> bool:
        """Returns whether requests share prefixes with each other.

        Args:
          salt: Salt of the requests; None for requests without one.

        Returns:
          False for every salt while there is no configuration.
        """
        if self.config is None:
            return False
        return salt is not None or self.config.enable_cross_request_sharing

    def lookup(self, tokens: TokenIds, salt: Hashable, now: float) -> Match:
        """Finds the longest cached prefix that leaves at least one token to compute.

        Args:
          tokens: The prompt.
          salt: Salt of the request; prefixes are shared only under an equal one.
          now: Seconds of the clock.

        Returns:
          The match, valid until the cache changes. It has 0 tokens if fewer than
          `min_prefix_length` match.
        """
        limit = max(0, len(tokens) - 1) if self.shares(salt) else 0
        match = self.forest.find(salt, tokens, limit, now)
        if self._is_long_enough(match.num_tokens):
            return match
        return Match(match.start, match.start, 0, [], None)

    def acquire(self, match: Match, salt: Hashable) -> Lease:
        """Adds a user to a match's full blocks.

        Args:
          match: Result of `lookup`; the cache has not changed since.
          salt: Salt given to `lookup`.

        Returns:
          The lease of the request. Release it once.
        """
        num_blocks = len(match.blocks)
        node = self.forest.ending_at(match.node, num_blocks * self.block_size)
        self.forest.hold(node)
        return Lease(salt, node, num_blocks)

    def undo_acquire(self, lease: Lease) -> None:
        """Undoes `acquire`, as if there had been no use.

        Args:
          lease: Lease that `acquire` returned; it is not used afterwards.
        """
        self.forest.release(lease.node)

    def truncate_lease(self, lease: Lease, num_blocks: int, now: float) -> None:
        """Releases the last blocks of a lease.

        Args:
          lease: Lease of a request.
          num_blocks: Number of first blocks that stay leased. If the lease covers no more than
            these, nothing changes.
          now: Seconds of the clock; the time to live of the prefix begins again.
        """
        if num_blocks < lease.num_blocks:
            retain(lease.node, now)
            self.cover(lease, lease.node, num_blocks)

    def cover(self, lease: Lease, other: Node, num_blocks: int) -> None:
        """Makes a lease cover other blocks.

        Args:
          lease: Lease of a request; the blocks that it covered are released.
          other: Node of the same or another tree.
          num_blocks: Number of first blocks of the path to `other` to cover.
        """
        node = self.forest.ending_at(other, num_blocks * self.block_size)
        self.forest.hold(node)
        self.forest.release(lease.node)
        lease.node, lease.num_blocks = node, num_blocks

    def plan_commit(
        self,
        lease: Lease,
        tokens: TokenIds,
        block_ids: Sequence[BlockId],
        now: float,
        own: Sequence[TreeBlock] | None = None,
    ) -> CommitPlan:
        """Plans the caching of a request's full blocks; evicts prefixes above `max_prefixes`.

        Args:
          lease: Lease of the request. Its blocks hold the first ones of `tokens`.
          tokens: Computed tokens of the request.
          block_ids: Ids of the request's blocks, in order.
          now: Seconds of the clock.
          own: Cached blocks that may replace the row's own; all cached blocks may if None.

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
        if match.num_tokens < len(tokens) and self.forest.would_add_prefix(match):
            evicted = self._make_room_for_prefix(now)
            match = self._find_computed(lease, tokens)
        adopted, num_found = match.blocks, first + len(match.blocks)
        if own is not None:
            pairs = zip(adopted, own[first:], strict=False)
            num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))
            adopted = adopted[:num_same]
        added: list[BlockId] = []
        may_add = self._num_prefixes_left > 0 or not self.forest.would_add_prefix(match)
        if may_add and len(adopted) == len(match.blocks):
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
        """Caches the blocks of a plan, and extends the lease over them.

        Args:
          lease: Lease of the request.
          plan: Result of `plan_commit`; the cache has not changed since.
          now: Seconds of the clock.
          retention: Retention of the request's cached blocks. If None, blocks that were cached
            keep theirs, and new ones get the default.
          num_retained: Number of first blocks to which `retention` applies; all if None.
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
        self._policy.insert(added[::-1])
        self._count_use(lease, num_excluded=len(added), recount=retention is not None)

    def release(self, lease: Lease, now: float) -> None:
        """Releases a lease, and counts it as a use of its blocks.

        Args:
          lease: Lease of a request; it is not used afterwards.
          now: Seconds of the clock; the time to live of the prefix begins again.
        """
        self._count_use(lease)
        retain(lease.node, now)
        self.forest.release(lease.node)

    def with_followers(self, block: TreeBlock) -> list[TreeBlock]:
        """Returns a block and all cached blocks that follow it, the deepest first.

        Args:
          block: A cached block.

        Returns:
          The blocks, each after those that follow it.
        """
        node = block.node
        below = [after for child in node.children.values() for after in blocks_below(child)]
        return below + node.blocks[node.blocks.index(block) :][::-1]

    def discard(self, blocks: Sequence[TreeBlock], reason: Reason, now: float) -> None:
        """Removes blocks, pinned or not. The caller has released the cache's references to them.

        Args:
          blocks: Result of `with_followers`; no lease covers any of these blocks.
          reason: Reason to record.
          now: Seconds of the clock.
        """
        for node in {block.node: None for block in blocks}:
            unpin(self.forest, node)
        self._policy.remove(list(blocks))
        for block in blocks:
            self._remove(block, Ghost(reason, now))
        self.num_evicted += len(blocks) if reason is Reason.EVICTED else 0
        self.forest.shorten_leaves()

    def evict(self, num_blocks: int, now: float) -> list[BlockId]:
        """Removes all expired blocks, then evicts blocks until `num_blocks` are removed.

        Args:
          num_blocks: Number of blocks wanted.
          now: Seconds of the clock.

        Returns:
          Ids of the removed blocks; the caller releases their references. Fewer than wanted if no
          more can be evicted, more if more have expired.
        """
        removed = self.expire(now)
        while len(removed) < num_blocks and self.num_idle_blocks:
            removed.append(self._evict(self._policy.choose_victim(), now))
        self.forest.shorten_leaves()
        return removed

    def expire(self, now: float) -> list[BlockId]:
        """Removes all blocks that are unused and past their time to live.

        Args:
          now: Seconds of the clock.

        Returns:
          Ids of the removed blocks; the caller releases their references.
        """
        removed: list[BlockId] = []
        for node in self.forest.pop_expired(now):
            expired = blocks_below(node)  # A node does not expire before those below it.
            self._policy.remove(expired)
            for block in expired:
                self._remove(block, Ghost(Reason.EXPIRED, block.node.expires_at))
            removed += [block.block_id for block in expired]
            self.num_expired += len(expired)
        self.forest.shorten_leaves()
        return removed

    def renumber(self, new_ids: Mapping[BlockId, BlockId]) -> None:
        """Updates the ids of blocks that have moved in the pool.

        Args:
          new_ids: New ids by old ids, of the blocks that have moved.
        """
        self.forest.renumber(new_ids)

    def check(self, leases: Iterable[Lease]) -> None:
        """Checks that trees, counts and leases agree.

        Args:
          leases: All leases that are not released.

        Raises:
          AssertionError: They do not agree.
        """
        leases = list(leases)
        self.forest.check(lease.node for lease in leases)
        for lease in leases:
            if lease.node.end != lease.num_blocks * self.block_size:
                raise AssertionError("A lease does not cover whole blocks.")

    def block(self, block_id: BlockId) -> TreeBlock | None:
        """Returns the cached block with an id.

        Args:
          block_id: Id of a block of the pool.

        Returns:
          The block; None if it is not cached.
        """
        return self.forest.blocks.get(block_id)

    def block_ids(self) -> list[BlockId]:
        """Returns the ids of all cached blocks."""
        return list(self.forest.blocks)

    def _is_long_enough(self, num_tokens: int) -> bool:
        return self.config is not None and num_tokens >= self.config.min_prefix_length

    def _find_computed(self, lease: Lease, tokens: TokenIds) -> Match:
        # Expired blocks that were computed again count as cached: their time to live restarts.
        return find(lease.node, tokens, len(tokens), self.block_size, -math.inf)

    @property
    def _num_prefixes_left(self) -> int:
        max_prefixes = 0 if self.config is None else self.config.max_prefixes
        return max_prefixes - self.forest.num_prefixes

    def _make_room_for_prefix(self, now: float) -> list[BlockId]:
        """Evicts whole prefixes until one more may be kept, or no block can be evicted."""
        evicted: list[BlockId] = []
        while self._num_prefixes_left < 1 and self.num_idle_blocks:
            victim = self._policy.choose_victim()
            branch = list(victim.node.path())
            evicted.append(self._evict(victim, now))
            for node in branch:
                while self._num_prefixes_left < 1 and node.blocks and node.blocks[-1].can_evict:
                    last = node.blocks[-1]
                    self._policy.remove([last])
                    evicted.append(self._evict(last, now))
        self.forest.shorten_leaves()
        return evicted

    def _evict(self, block: TreeBlock, now: float) -> BlockId:
        self._remove(block, Ghost(Reason.EVICTED, now))
        self.num_evicted += 1
        return block.block_id

    def _remove(self, block: TreeBlock, ghost: Ghost) -> None:
        """Removes a block from the cache, and records why: the only place that does."""
        self.forest.remove(block)
        self.ghosts.add(block.prefix_key, ghost)

    def _count_use(self, lease: Lease, *, num_excluded: int = 0, recount: bool = False) -> None:
        """Calls the policy's `touch` for a lease's blocks, once per lease unless `recount`.

        Args:
          lease: The lease.
          num_excluded: Number of deepest blocks to leave out.
          recount: Whether to call it again.
        """
        if lease.is_counted and not recount:
            return
        lease.is_counted = True
        used = [block for node in lease.node.path() for block in reversed(node.blocks)]
        self._policy.touch(used[num_excluded:])
