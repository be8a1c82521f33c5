"""What a block policy remembers of blocks that are gone: their prefix keys, the latest only."""

from __future__ import annotations

import collections


class GhostList:
    """Prefix keys of blocks that went, oldest first.

    Args:
      capacity: Keys remembered; one more, and the oldest is forgotten.

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
        """Returns how many keys are remembered."""
        return len(self._keys)

    def add(self, prefix_key: int) -> None:
        """Remembers a key as the latest."""
        self._keys[prefix_key] = None
        self._keys.move_to_end(prefix_key)
        if len(self._keys) > self._capacity:
            self.forget_oldest()

    def pop(self, prefix_key: int) -> bool:
        """Forgets a key, and returns whether it was remembered."""
        if prefix_key not in self._keys:
            return False
        del self._keys[prefix_key]
        return True

    def forget_oldest(self) -> None:
        """Forgets the key that was added longest ago."""
        self._keys.popitem(last=False)
