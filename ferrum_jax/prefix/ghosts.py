"""What the prefix cache remembers of prefixes that are gone: when they went, and why."""

from __future__ import annotations

import collections
import enum
from typing import NamedTuple


class Reason(enum.Enum):
    """Why a cached block went."""

    EVICTED = "evicted for want of room"
    EXPIRED = "expired"
    RESET = "dropped by reset_prefixes"


class Ghost(NamedTuple):
    """A block that is gone.

    Attributes:
      reason: Why.
      gone_at: When, in seconds of the clock.
    """

    reason: Reason
    gone_at: float


class Ghosts:
    """The latest blocks that went, by prefix key.

    Args:
      capacity: How many are remembered.
    """

    def __init__(self, capacity: int = 1 << 16):
        self._capacity = capacity
        self._ghosts: collections.OrderedDict[int, Ghost] = collections.OrderedDict()

    def add(self, prefix_key: int, ghost: Ghost) -> None:
        """Remembers a block, in place of the oldest one if too many are remembered."""
        self._ghosts[prefix_key] = ghost
        self._ghosts.move_to_end(prefix_key)
        if len(self._ghosts) > self._capacity:
            self._ghosts.popitem(last=False)

    def get(self, prefix_key: int) -> Ghost | None:
        """Returns what is remembered of a prefix, if anything."""
        return self._ghosts.get(prefix_key)
