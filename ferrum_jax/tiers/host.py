"""The upper tier: entries in host memory, the least recently used first, within a byte budget."""

import dataclasses
from typing import Any

from ferrum_jax.ops.transfer import BlockPayload
from ferrum_jax.tiers.space import Size


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a tier keeps under one key.

    Attributes:
      payload: The blocks.
      metadata: What belongs to them; JSON.
      size: What both take of a tier.
    """

    payload: BlockPayload
    metadata: dict[str, Any]
    size: Size


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

    def sizes(self) -> dict[str, Size]:
        """Returns what each entry takes, the least recently used first."""
        return {key: entry.size for key, entry in self._entries.items()}

    def put(self, key: str, entry: Entry) -> None:
        """Adds an entry."""
        self._entries[key] = entry
        self.used_bytes += entry.size.host_bytes

    def touch(self, key: str) -> None:
        """Counts an entry as used."""
        self._entries[key] = self._entries.pop(key)

    def peek(self, key: str) -> Entry:
        """Returns an entry without counting it as used."""
        return self._entries[key]

    def drop(self, key: str) -> None:
        """Forgets an entry."""
        self.used_bytes -= self._entries.pop(key).size.host_bytes

    def clear(self) -> None:
        """Forgets all entries."""
        self._entries.clear()
        self.used_bytes = 0
