"""The prefix cache: which blocks of prompts are kept, used and evicted.

Host data only. The cache holds one reference to each cached block. It returns the ids of blocks
to which the caller has to add or release references on the device.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Hashable, Iterable, Mapping, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.blocks import BlockEvictionPolicy, Retention
from ferrum_jax.prefix.commit import BlockIds, CommitPlan, adopt
from ferrum_jax.prefix.forest import Forest
from ferrum_jax.prefix.groups import LayerGroups
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.removal import BlockRemoval
from ferrum_jax.prefix.retaining import retain, set_retention
from ferrum_jax.prefix.tree import Match, Node, TreeBlock, TreeKey, blocks_from, find
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK, BlockId


class PrefixCache(BlockRemoval):
    """Cached prefixes by salt, with the blocks of layer groups. Not thread-safe.

    An id names one block of all pools.

    Args:
      config: Which prefixes are kept, and for how long; None to keep none.
      block_size: Tokens per block.
      policy: Policy that chooses the blocks to evict.
      windows: Sliding window of each layer group, in tokens; None for a group that keeps all.
      pools: Index of each group's pool; one pool if absent.

    Attributes:
      config: As given, or the latest given to `configure`.
      groups: The layer groups.
    """

    def __init__(
        self,
        config: PrefixCacheConfig | None,
        block_size: int,
        policy: BlockEvictionPolicy,
        windows: Sequence[int | None] = (None,),
        pools: Sequence[int] | None = None,
    ):
        self.groups = LayerGroups(block_size, windows, pools or [0] * len(windows))
        super().__init__(Forest(self.groups), policy)
        self.config: PrefixCacheConfig | None = None
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
        """Number of cached ids: a cached block has one in each layer group that has kept it."""
        return len(self.forest.blocks)

    @property
    def num_idle_blocks(self) -> PerPool:
        """Number of cached ids that could be evicted: neither in use nor pinned."""
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

        It ends where every window group still has the blocks that the next token can see.

        Args:
          tokens: The prompt.
          salt: Salt of the request; prefixes are shared only under an equal one.
          now: Seconds of the clock.

        Returns:
          The match, valid until the cache changes. It has 0 tokens if fewer than
          `min_prefix_length` match.
        """
        limit = max(0, len(tokens) - 1) if self.shares(salt) else 0
        match = self.forest.find(self.key_of(salt), tokens, limit, now)
        if not self.groups.is_single:
            match = self.groups.usable_part(match)
        if self._is_long_enough(match.num_tokens):
            return match
        return Match(match.start, match.start, 0, [], None, self.groups.none_released)

    def key_of(self, salt: Hashable) -> TreeKey:
        """Returns the key of prompts under the present version of the weights.

        Args:
          salt: Salt of the prompts.
        """
        return TreeKey(salt, self.forest.version)

    def acquire(self, match: Match) -> Lease:
        """Adds a user to a match's full blocks.

        If there are window groups, a shorter match may be unusable, so the lease covers the tail
        too: once the row has a copy of it, call `cover` with the number of full blocks.

        Args:
          match: Result of `lookup`; the cache has not changed since.

        Returns:
          The lease of the request. Release it once.
        """
        last, num_blocks, first_window = match.node, len(match.blocks), 0
        if self.groups.windowed:
            first_window = self.groups.first_window(match.num_released)
            if match.tail is not None:
                last, num_blocks = match.tail.node, num_blocks + 1
        node = self.forest.ending_at(last, num_blocks * self.block_size)
        self.forest.hold(node, first_window)
        return Lease(node.root.key, node, num_blocks, first_window)

    def empty_lease(self, key: TreeKey) -> Lease:
        """Returns the lease of a request that holds no cached block.

        Args:
          key: Salt and version of the request.
        """
        root = self.forest.find(key, TokenIds(()), 0, -math.inf).node
        self.forest.hold(root, 0)
        return Lease(key, root, 0)

    def copy_lease(self, lease: Lease) -> Lease:
        """Adds a user to the blocks that a lease covers.

        Args:
          lease: Lease of a request.

        Returns:
          The lease of another request. Release it once, or undo it by `undo_acquire`.
        """
        self.forest.hold(lease.node, lease.first_window)
        return dataclasses.replace(lease, is_counted=False)

    def undo_acquire(self, lease: Lease) -> None:
        """Undoes `acquire`, as if there had been no use.

        Args:
          lease: Lease that `acquire` returned; it is not used afterwards.
        """
        self.forest.release(lease.node, lease.first_window)

    def advance(self, lease: Lease, num_released: Sequence[int]) -> None:
        """Releases the window ids that a lease's row has released.

        Args:
          lease: Lease of a request.
          num_released: Leading blocks that the row has released in each layer group.
        """
        first = self.groups.first_window(num_released)
        num_passed = min(first, lease.num_blocks) - lease.first_window
        if num_passed > 0:
            passed = blocks_from(lease.node, lease.first_window)[:num_passed]
            self.forest.window_ids.release(passed)
            lease.first_window += num_passed

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

    def cover(
        self, lease: Lease, other: Node, num_blocks: int, first_window: int | None = None
    ) -> None:
        """Makes a lease cover other blocks.

        Args:
          lease: Lease of a request; the blocks that it covered are released.
          other: Node of the same or another tree.
          num_blocks: Number of first blocks of the path to `other` to cover.
          first_window: Logical index of the first block that the row holds in any window group;
            as before if None.
        """
        first = lease.first_window if first_window is None else first_window
        first = min(first, num_blocks)
        node = self.forest.ending_at(other, num_blocks * self.block_size)
        self.forest.hold(node, first)
        self.forest.release(lease.node, lease.first_window)
        lease.node, lease.num_blocks, lease.first_window = node, num_blocks, first

    def plan_commit(
        self,
        lease: Lease,
        tokens: TokenIds,
        row_blocks: Sequence[Sequence[BlockId]],
        now: float,
        own: Sequence[TreeBlock] | None = None,
    ) -> CommitPlan:
        """Plans the caching of a request's full blocks; evicts prefixes above `max_prefixes`.

        Args:
          lease: Lease of the request. Its blocks hold the first ones of `tokens`.
          tokens: Computed tokens of the request.
          row_blocks: Ids of the request's blocks in each layer group, in order; `NULL_BLOCK` where
            the row has released the block.
          now: Seconds of the clock.
          own: Cached blocks that may replace the row's own; all cached blocks may if None.

        Returns:
          The plan, valid until the cache changes.
        """
        first, num_full = lease.num_blocks, len(tokens) // self.block_size
        tokens = tokens[: num_full * self.block_size]
        match = self._find_computed(lease, tokens)
        is_wanted = self.shares(lease.key.salt) and self._is_long_enough(len(tokens))
        if self.config is None or num_full < max(first, 1) or not is_wanted:
            return CommitPlan(first, tokens, None, first, [[] for _ in row_blocks])
        evicted, is_full = list[BlockId](), self.forest.num_prefixes >= self.config.max_prefixes
        if is_full and match.num_tokens < len(tokens) and self.forest.would_add_prefix(match):
            evicted = self._evict_prefixes(self.config.max_prefixes - 1, now)
            match = self._find_computed(lease, tokens)
        blocks, num_found = match.blocks, first + len(match.blocks)
        if own is not None:
            pairs = zip(blocks, own[first:], strict=False)
            num_same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] is pair[1], pairs))
            blocks = blocks[:num_same]
        adopted, filled, added = adopt(blocks, row_blocks, first)
        new: Sequence[BlockIds] = ()
        is_below = self.forest.num_prefixes < self.config.max_prefixes
        may_add = is_below or not self.forest.would_add_prefix(match)
        if may_add and len(blocks) == len(match.blocks):
            ends = [row[num_found:num_full] for row in row_blocks]
            new = list(zip(*ends, strict=True))
            for end in ends:
                added += [block_id for block_id in end if block_id != NULL_BLOCK]
        num, held = first + len(blocks) + len(new), self.groups.first_held(row_blocks)
        return CommitPlan(first, tokens, match, num, adopted, new, filled, added, evicted, held)

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
        match, added, num_blocks = plan.match, list[TreeBlock](), plan.num_blocks
        if self.groups.windowed:  # Before its node may grow.
            self.forest.release(lease.node, lease.first_window, until=lease.node)
        for block, block_ids in plan.filled:
            self.forest.set_ids(block, block_ids)
            block.num_fills += 1
        if plan.new:
            added = self.forest.append(match, plan.tokens, plan.new, lease.node)
        last = added[-1].node if added else match.node
        node = self.forest.ending_at(last, num_blocks * self.block_size)
        first_window = min(plan.first_window, num_blocks)
        self.forest.hold(node, first_window, until=lease.node)
        lease.node, lease.num_blocks, lease.first_window = node, num_blocks, first_window
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
        self.forest.release(lease.node, lease.first_window)

    def num_idle_without(self, leases: Iterable[Lease]) -> PerPool:
        """Returns how many more ids would be idle after some releases.

        Args:
          leases: Leases that would be released.

        Returns:
          The number that `num_idle_blocks` would grow by.
        """
        return self.forest.num_idle_without(lease.hold for lease in leases)

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
        self.forest.check(lease.hold for lease in leases)
        for lease in leases:
            if lease.node.end != lease.num_blocks * self.block_size:
                raise AssertionError("A lease does not cover whole blocks.")
            if not 0 <= lease.first_window <= lease.num_blocks:
                raise AssertionError("A lease holds window ids of blocks that it does not cover.")

    def block(self, block_id: BlockId) -> TreeBlock | None:
        """Returns the cached block with an id, in whichever layer group.

        Args:
          block_id: Id of a block of the pool.

        Returns:
          The block; None if it is not cached.
        """
        return self.forest.blocks.get(block_id)

    def block_ids(self) -> list[BlockId]:
        """Returns the ids of all cached blocks, in all layer groups."""
        return list(self.forest.blocks)

    def _is_long_enough(self, num_tokens: int) -> bool:
        return self.config is not None and num_tokens >= self.config.min_prefix_length

    def _find_computed(self, lease: Lease, tokens: TokenIds) -> Match:
        # Expired blocks that were computed again count as cached: their time to live restarts.
        return find(lease.node, tokens, len(tokens), self.block_size, -math.inf)

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
