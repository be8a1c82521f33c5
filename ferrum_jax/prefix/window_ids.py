"""Cached ids of window groups: which of them are in use, and which are evicted first."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence

from ferrum_jax.prefix.groups import LayerGroups
from ferrum_jax.prefix.tree import TreeBlock
from ferrum_jax.types import BlockId


class WindowIds:
    """Users and eviction order of the window ids of cached blocks.

    The window ids of one block are used and evicted together. Those that were idle for longest
    are examined first: ids that no boundary needs are evicted before any block of a full group,
    the others only with their block, or when nothing else can be evicted.

    Args:
      groups: The layer groups.

    Attributes:
      num_idle: Number of window ids without users, in each pool.
    """

    def __init__(self, groups: LayerGroups):
        self.num_idle, self._groups = groups.none, groups
        self._idle: collections.OrderedDict[TreeBlock, None] = collections.OrderedDict()
        self._needed: collections.OrderedDict[TreeBlock, None] = collections.OrderedDict()

    def hold(self, blocks: Iterable[TreeBlock]) -> None:
        """Adds a user to the window ids of each block."""
        for block in blocks:
            if not block.window_users:
                self._set_used(block)
            block.window_users += 1

    def release(self, blocks: Iterable[TreeBlock]) -> None:
        """Removes a user from the window ids of each block."""
        for block in blocks:
            block.window_users -= 1
            if not block.window_users:
                self._set_idle(block)

    def add(self, blocks: Iterable[TreeBlock]) -> None:
        """Adds new blocks, in the order in which to evict their window ids."""
        for block in blocks:
            self._set_idle(block)

    def replace(self, block: TreeBlock, block_ids: Sequence[BlockId]) -> None:
        """Replaces the ids of a block."""
        self._set_used(block)
        block.set_ids(block_ids, self._groups.lead)
        if not block.window_users:
            self._set_idle(block)

    def remove(self, block: TreeBlock) -> None:
        """Removes a block that leaves the cache; its window ids have no users."""
        self._set_used(block)

    def next_victim(self, *, may_be_needed: bool) -> TreeBlock | None:
        """Returns the block of the window ids to evict next, if any.

        Args:
          may_be_needed: Whether to return ids that a boundary needs if there are no others.
        """
        while self._idle:
            block = next(iter(self._idle))
            if not self._is_needed(block):
                return block
            del self._idle[block]
            self._needed[block] = None
        return next(iter(self._needed), None) if may_be_needed else None

    def check(self, users: dict[TreeBlock, int], blocks: Sequence[TreeBlock]) -> bool:
        """Returns whether users, order and counts of window ids are as they should be.

        Args:
          users: Number of users of each block's window ids; blocks without users may be absent.
          blocks: All cached blocks.
        """
        num_ids = {b: self._groups.num_window_ids(b) for b in blocks if not b.window_users}
        listed = [*self._idle, *self._needed]
        return (
            all(block.window_users == users.get(block, 0) for block in blocks)
            and set(listed) == {block for block, count in num_ids.items() if any(count)}
            and len(listed) == len(set(listed))
            and self.num_idle == sum(num_ids.values(), self._groups.none)
        )

    def _set_idle(self, block: TreeBlock) -> None:
        """Makes the window ids of a block evictable, if it has any."""
        num_ids = self._groups.num_window_ids(block)
        if any(num_ids):
            self._idle[block] = None
            self.num_idle += num_ids

    def _set_used(self, block: TreeBlock) -> None:
        """Makes the window ids of a block no longer evictable, if they are."""
        for order in (self._idle, self._needed):
            if block in order:
                del order[block]
                self.num_idle -= self._groups.num_window_ids(block)

    def _is_needed(self, block: TreeBlock) -> bool:
        """Returns whether a prefix ends, or several part, where the widest window has the block."""
        size, node = self._groups.block_size, block.node
        last = (block.logical_index + 1) * size + self._groups.widest - 2
        while node.end <= last:
            if len(node.children) != 1:
                return True
            (node,) = node.children.values()
        return False
