"""Records of blocks that left the prefix cache: when, and why."""

from __future__ import annotations

import collections
import enum
from collections.abc import Hashable
from typing import NamedTuple


class Reason(enum.Enum):
    """Why a block left the prefix cache."""

    EVICTED = "evicted to make room"
    EXPIRED = "expired"
    RESET = "removed by reset_prefixes"


class Ghost(NamedTuple):
    """A block that left the prefix cache.

    Attributes:
      reason: Why the block left.
      removed_at: Time at which it left, in seconds of the clock.
      version: Version of the weights that computed it.
    """

    reason: Reason
    removed_at: float
    version: Hashable


class Ghosts:
    """Ghosts of the blocks that left most recently, by prefix key: one for all versions.

    Args:
      capacity: Maximum number of ghosts.
    """

    def __init__(self, capacity: int = 1 << 16):
        self._capacity = capacity
        self._ghosts: collections.OrderedDict[int, Ghost] = collections.OrderedDict()

    def add(self, prefix_key: int, ghost: Ghost) -> None:
        """Adds a ghost; discards the oldest one above the capacity."""
        self._ghosts[prefix_key] = ghost
        self._ghosts.move_to_end(prefix_key)
        if len(self._ghosts) > self._capacity:
            self._ghosts.popitem(last=False)

    def get(self, prefix_key: int) -> Ghost | None:
        """Returns the ghost with a prefix key, if any."""
        return self._ghosts.get(prefix_key)
