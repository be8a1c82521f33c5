"""Prefix keys of recently evicted blocks, with which a block policy notices returns."""

from __future__ import annotations

import collections


class GhostList:
    """Prefix keys of evicted blocks, oldest first, at most `capacity` of them.

    Args:
      capacity: Maximum number of keys; adding one more discards the oldest.

    Example:
      >>> ghosts = GhostList(capacity=2)
      >>> for key in (7, 8, 9):
      ...     ghosts.add(key)
      >>> ghosts.pop(7), ghosts.pop(8), len(ghosts)
      (False, True, 1)
    """

    def __init__(self, capacity: int):
        self._capacity = capacity
        self._keys: collections.OrderedDict[int, None] = collections.OrderedDict()

    def __len__(self) -> int:
        """Returns the number of keys."""
        return len(self._keys)

    def add(self, prefix_key: int) -> None:
        """Adds a key as the newest."""
        self._keys[prefix_key] = None
        self._keys.move_to_end(prefix_key)
        if len(self._keys) > self._capacity:
            self.discard_oldest()

    def pop(self, prefix_key: int) -> bool:
        """Removes a key, and returns whether it was in the list."""
        if prefix_key not in self._keys:
            return False
        del self._keys[prefix_key]
        return True

    def discard_oldest(self) -> None:
        """Removes the key that was added longest ago."""
        self._keys.popitem(last=False)
