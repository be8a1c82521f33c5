"""Removes blocks from the prefix cache: expired ones, evicted ones, and others on request."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.policies.blocks import BlockEvictionPolicy
from ferrum_jax.prefix.forest import Forest
from ferrum_jax.prefix.ghosts import Ghost, Ghosts, Reason
from ferrum_jax.prefix.guarded_policy import GuardedPolicy
from ferrum_jax.prefix.retaining import unpin
from ferrum_jax.prefix.tree import TreeBlock, blocks_below
from ferrum_jax.types import BlockId


class BlockRemoval:
    """The part of a prefix cache that removes blocks, and records why. Not thread-safe.

    Args:
      forest: Trees of the cached prefixes.
      policy: Policy that chooses the blocks to evict.

    Attributes:
      forest: As given.
      ghosts: Records of blocks that left the cache.
      num_evicted: Number of ids evicted so far.
      num_expired: Number of ids expired so far.
    """

    def __init__(self, forest: Forest, policy: BlockEvictionPolicy):
        self.forest, self.ghosts = forest, Ghosts()
        self.num_evicted = self.num_expired = 0
        self._missing = forest.groups.none  # Ids that the eviction under way has yet to remove.
        self._policy = GuardedPolicy(policy, forest)

    def set_version(self, version: Hashable) -> None:
        """Makes prefixes of other versions of the weights outdated: not found, and evicted first.

        They lose their pins. Those of this version that are still cached are found again.

        Args:
          version: The version of the weights from now on.
        """
        self.forest.set_version(version)
        for node in list(self.forest.nodes()):
            if node.is_pinned and node.root.key.version != version:
                unpin(self.forest, node)

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
        ids = [block_id for block in blocks for block_id in self._remove(block, reason, now)]
        self.num_evicted += len(ids) if reason is Reason.EVICTED else 0
        self.forest.shorten_leaves()

    def evict(self, num_blocks: PerPool, now: float) -> list[BlockId]:
        """Removes all expired blocks, then evicts blocks until `num_blocks` ids are removed.

        Blocks of other versions of the weights are evicted first. Then window ids that no boundary
        needs, then blocks with all of their ids as the policy says, then other window ids; each
        only where a pool that lacks blocks has some.

        Args:
          num_blocks: Number of ids wanted in each pool.
          now: Seconds of the clock.

        Returns:
          The removed ids; the caller releases their references. Fewer than wanted if no more can
          be evicted, more if more have expired, or the last block had several.
        """
        self._missing = num_blocks
        removed, forest, window_ids = self.expire(now), self.forest, self.forest.window_ids
        while self._missing.any_positive:
            if (block := forest.next_outdated()) is not None:
                removed += self._evict_chosen(block, now)
                continue
            may_evict = forest.num_unused > 0 and forest.groups.num_evicted.helps(self._missing)
            if forest.groups.windowed and window_ids.num_idle.helps(self._missing):
                block = window_ids.next_victim(may_be_needed=not may_evict)
            if block is not None:
                removed += self._evict_window(block)
            elif may_evict:
                removed += self._evict(self._policy.choose_victim(), now)
            else:
                break
        forest.shorten_leaves()
        return removed

    def expire(self, now: float) -> list[BlockId]:
        """Removes all blocks that are unused and past their time to live.

        Args:
          now: Seconds of the clock.

        Returns:
          The removed ids; the caller releases their references.
        """
        removed: list[BlockId] = []
        if not self.forest.may_have_expired(now):
            return removed
        for node in self.forest.pop_expired(now):
            expired = blocks_below(node)  # A node does not expire before those below it.
            self._policy.remove(expired)
            for block in expired:
                removed += self._remove(block, Reason.EXPIRED, block.node.expires_at)
        self.num_expired += len(removed)
        self.forest.shorten_leaves()
        return removed

    def _evict_prefixes(self, num_prefixes: int, now: float) -> list[BlockId]:
        """Evicts whole prefixes until at most `num_prefixes` are left, or no block is unused."""
        evicted, forest = list[BlockId](), self.forest
        while forest.num_prefixes > num_prefixes and (block := forest.next_outdated()) is not None:
            evicted += self._evict_chosen(block, now)
        while self.forest.num_prefixes > num_prefixes and self.forest.num_unused:
            victim = self._policy.choose_victim()
            branch = list(victim.node.path())
            evicted += self._evict(victim, now)
            for node in branch:
                while (
                    self.forest.num_prefixes > num_prefixes
                    and node.blocks
                    and node.blocks[-1].can_evict
                ):
                    evicted += self._evict_chosen(node.blocks[-1], now)
        self.forest.shorten_leaves()
        return evicted

    def _evict_window(self, block: TreeBlock) -> list[BlockId]:
        self._missing -= self.forest.groups.num_window_ids(block)
        ids = self.forest.strip(block)
        self.num_evicted += len(ids)
        return ids

    def _evict_chosen(self, block: TreeBlock, now: float) -> list[BlockId]:
        """Evicts a block that the policy has not chosen."""
        self._policy.remove([block])
        return self._evict(block, now)

    def _evict(self, block: TreeBlock, now: float) -> list[BlockId]:
        ids = self._remove(block, Reason.EVICTED, now)
        self.num_evicted += len(ids)
        return ids

    def _remove(self, block: TreeBlock, reason: Reason, at: float) -> list[BlockId]:
        """Removes a block, records why and when, and returns its ids: the only place that does."""
        self.ghosts.add(block.prefix_key, Ghost(reason, at, block.node.root.key.version))
        self._missing -= self.forest.groups.num_ids(block.block_ids)
        return self.forest.remove(block)
