"""Which cached block goes when room is short: what every block policy must offer.

The prefix cache decides what *can* go (a block that nobody uses and nothing cached follows) and
asks a policy which of these *should*. A policy sees blocks, never tokens or requests.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence

from ferrum_jax.checks import check_count, check_flag, check_number, check_type
from ferrum_jax.types import BlockId, Priority


@dataclasses.dataclass(frozen=True, kw_only=True)
class Retention:
    """How long a cached prefix is worth keeping, as its user says.

    Attributes:
      priority: What the "priority" policy goes by.
      ttl_seconds: How long it is kept unused, in place of the cache's own `prefix_ttl_seconds`.
      is_pinned: Whether it stays until a later commit says otherwise: never evicted or expired.
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
    """One full block of a cached prefix. Compared by identity, so it can be a key.

    Attributes:
      block_id: Where it lies in the pool; changes when the pool is defragmented.
      logical_index: Its place in its sequence, from 0.
      prefix_key: Names all tokens up to its end: the same number when they are cached again. Only
        a hint, since two prefixes may have the same one.
      retention: What the last request that committed it said.
    """

    block_id: BlockId
    logical_index: int
    prefix_key: int
    retention: Retention


class BlockEvictionPolicy(abc.ABC):
    """Decides which cached block goes first. Host code, called under the manager's lock.

    Every batch of blocks comes deepest first, so that a policy which goes by recency lets the
    end of a prefix go before its beginning.

    When a request caches blocks, `insert` with the new ones is followed by `touch` with those
    before them, which were found, unless these were touched for that request already; there is no
    other call between the two. A policy may read from this which blocks belong to one request.
    `evict` keeps its promise after any order of calls.

    Args:
      capacity: Blocks that the pool may have.
    """

    def __init__(self, capacity: int):
        check_count("capacity", capacity)

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The policy's name."""

    @abc.abstractmethod
    def insert(self, blocks: Sequence[CachedBlock]) -> None:
        """Notes that blocks are cached from now on.

        Args:
          blocks: Blocks that are not known, deepest first.
        """

    @abc.abstractmethod
    def touch(self, blocks: Sequence[CachedBlock]) -> None:
        """Notes that cached blocks were found by a request.

        Args:
          blocks: Known ones, deepest first.
        """

    @abc.abstractmethod
    def remove(self, blocks: Sequence[CachedBlock]) -> None:
        """Notes that blocks went without being asked for, as when they expire.

        Args:
          blocks: Known ones, deepest first.
        """

    @abc.abstractmethod
    def evict(self, can_evict: Callable[[CachedBlock], bool]) -> CachedBlock | None:
        """Chooses the block that goes next, and forgets it (but for what a ghost remembers).

        Args:
          can_evict: Says whether a block can go. One that cannot is in use, or cached blocks
            follow it; it may be asked about again.

        Returns:
          A known block that can go. None if there is none, and only then.
        """
