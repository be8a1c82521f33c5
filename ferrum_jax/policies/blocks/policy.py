"""The interface of a block policy, and the cached blocks that it ranks.

The prefix cache decides which blocks *can* be evicted: those that no request uses and no cached
block follows. A policy chooses among them. It sees blocks, never tokens or requests.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

from ferrum_jax.checks import check_count, check_flag, check_number, check_type
from ferrum_jax.types import BlockId, Priority


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """How long to keep a cached prefix, as requested by the user.

    Attributes:
      priority: Rank in the "priority" policy, which evicts the lowest first.
      ttl_seconds: Time to live without use, above 0; the cache's `prefix_ttl_seconds` if None.
      is_pinned: Whether the prefix is neither evicted nor expired, until a later commit with
        another retention unpins it.

    Raises:
      ValueError: A field has the wrong type, or `ttl_seconds` is not above 0.
    """

    priority: Priority = Priority.Normal
    ttl_seconds: float | None = None
    is_pinned: bool = False

    def __post_init__(self) -> None:
        """Checks each field."""
        check_type("priority", self.priority, Priority)
        check_flag("is_pinned", self.is_pinned)
        if self.ttl_seconds is not None and check_number("ttl_seconds", self.ttl_seconds) <= 0:
            raise ValueError(f"ttl_seconds must be above 0, got {self.ttl_seconds}.")


@dataclasses.dataclass(slots=True, eq=False)
class CachedBlock:
    """One full block of a cached prefix. Compared by identity, so it can be a dictionary key.

    Attributes:
      block_id: Index of the block in the pool; changes when the pool is defragmented.
      logical_index: Index of the block in its sequence, from 0.
      prefix_key: Hash of all tokens up to the block's end: the same number when these tokens are
        cached again. Two prefixes may have an equal key.
      retention: Retention of the last request that committed the block.
    """

    block_id: BlockId
    logical_index: int
    prefix_key: int
    retention: Retention


class BlockEvictionPolicy(abc.ABC):
    """Chooses which cached block to evict next. Host code, called under the manager's lock.

    Blocks are passed deepest first: the last block of a prefix before the first one. So a policy
    that ranks by recency evicts the end of a prefix before its beginning.

    Order of the calls: a commit calls `insert` with the request's new blocks, then `touch` with
    the cached blocks before them, without another call between the two. The `touch` is omitted
    when this request's blocks were touched before. So a policy can tell which blocks belong to
    one request; "return_rate" depends on it. `evict` must be correct after any order of calls.

    Args:
      capacity: Maximum number of blocks in the pool.

    Raises:
      ValueError: `capacity` is not a positive integer.
    """

    def __init__(self, capacity: int):
        check_count("capacity", capacity)

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Name of the policy, for logs."""

    @abc.abstractmethod
    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Adds blocks that were cached.

        Args:
          blocks: Blocks that the policy does not hold, deepest first.
        """

    @abc.abstractmethod
    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Records that a request used cached blocks.

        Args:
          blocks: Blocks that the policy holds, deepest first.
        """

    @abc.abstractmethod
    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Removes blocks that left the cache other than by `evict`, such as expired ones.

        Args:
          blocks: Blocks that the policy holds, deepest first.
        """

    @abc.abstractmethod
    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Chooses the next block to evict, and removes it from the policy.

        A policy may remember the block's `prefix_key` (a ghost), to notice when it is cached again.

        Args:
          can_evict: Returns whether a block can be evicted. One that cannot is in use, or cached
            blocks follow it; it may be passed again later.

        Returns:
          A block that the policy holds and that can be evicted; None only if there is none.
        """
