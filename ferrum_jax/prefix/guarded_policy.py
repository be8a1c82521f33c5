"""Calls a block policy, which may be a user's: what it raises is logged."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ferrum_jax.policies.blocks import BlockEvictionPolicy, CachedBlock
from ferrum_jax.prefix.forest import Forest
from ferrum_jax.prefix.tree import TreeBlock

_logger = logging.getLogger("ferrum_jax")


class GuardedPolicy:
    """A block policy for the blocks of one forest. Its methods raise nothing.

    Args:
      policy: The policy.
      forest: Trees of the blocks that the policy orders.
    """

    def __init__(self, policy: BlockEvictionPolicy, forest: Forest):
        self._policy, self._forest = policy, forest

    def insert(self, blocks: Sequence[TreeBlock]) -> None:
        """Calls the policy's `insert` for new blocks, the deepest first."""
        self._call(self._policy.insert, blocks)

    def touch(self, blocks: Sequence[TreeBlock]) -> None:
        """Calls the policy's `touch` for used blocks, the deepest first."""
        self._call(self._policy.touch, blocks)

    def remove(self, blocks: Sequence[TreeBlock]) -> None:
        """Calls the policy's `remove` for blocks that it has not chosen to evict."""
        self._call(self._policy.remove, blocks)

    def choose_victim(self) -> TreeBlock:
        """Returns the policy's choice, or any evictable block if it fails; one must exist."""
        name = self._policy.name
        try:
            block = self._policy.evict(_can_evict)
            if isinstance(block, TreeBlock) and self._forest.can_evict(block):
                return block
            _logger.error("Block policy %s chose %r, which cannot be evicted.", name, block)
        except Exception:
            _logger.exception("Block policy %s failed to choose a block.", name)
        block = self._forest.any_evictable()
        assert block is not None
        self.remove([block])
        return block

    def _call(
        self, method: Callable[[Sequence[CachedBlock]], None], blocks: Sequence[TreeBlock]
    ) -> None:
        """Calls a method of the policy, unless there are no blocks; logs what it raises."""
        if not blocks:
            return
        try:
            method(blocks)
        except Exception:
            _logger.exception("Block policy %s failed.", self._policy.name)


def _can_evict(block: CachedBlock) -> bool:
    return isinstance(block, TreeBlock) and block.can_evict
