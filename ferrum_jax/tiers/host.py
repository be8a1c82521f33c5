"""The upper tier: entries in host memory, the least recently used first, within a byte budget."""

import dataclasses
from typing import Any

from ferrum_jax.ops.transfer import BlockPayload


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a tier keeps under one key.

    Attributes:
      payload: The blocks.
      metadata: What belongs to them; JSON.
    """

    payload: BlockPayload
    metadata: dict[str, Any]


class HostTier:
    """Entries in host memory. Not thread-safe; callers ask for room before they `put`.

    Args:
      budget_bytes: The most bytes of blocks that it holds.

    Attributes:
      budget_bytes: As given.
      used_bytes: Bytes of the blocks that it holds.
    """

    def __init__(self, budget_bytes: int):
        self.budget_bytes, self.used_bytes = budget_bytes, 0
        self._entries: dict[str, Entry] = {}  # The least recently used first.

    def __contains__(self, key: str) -> bool:
        """Says whether there is an entry."""
        return key in self._entries

    def __len__(self) -> int:
        """Returns how many entries there are."""
        return len(self._entries)

    def keys(self) -> list[str]:
        """Returns the keys, the least recently used first."""
        return list(self._entries)

    def put(self, key: str, entry: Entry) -> None:
        """Adds an entry."""
        self._entries[key] = entry
        self.used_bytes += entry.payload.num_bytes

    def get(self, key: str) -> Entry:
        """Returns an entry, and counts it as used."""
        self._entries[key] = self._entries.pop(key)
        return self._entries[key]

    def peek(self, key: str) -> Entry:
        """Returns an entry without counting it as used."""
        return self._entries[key]

    def drop(self, key: str) -> None:
        """Forgets an entry."""
        self.used_bytes -= self._entries.pop(key).payload.num_bytes

    def clear(self) -> None:
        """Forgets all entries."""
        self._entries.clear()
        self.used_bytes = 0

    def displaced_by(self, num_bytes: int) -> list[str]:
        """Returns the least recently used entries that must leave for so many bytes to fit.

        All of them are named where the budget itself is smaller.
        """
        displaced, missing = [], self.used_bytes + num_bytes - self.budget_bytes
        for key, entry in self._entries.items():
            if missing <= 0:
                break
            displaced.append(key)
            missing -= entry.payload.num_bytes
        return displaced
