"""Placement of entries: which tier stores an entry, and which entries move to disk for it."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Size:
    """Size of an entry in each tier.

    Attributes:
      host_bytes: Bytes in host memory: those of its blocks.
      file_bytes: Bytes on disk: those of its file.
    """

    host_bytes: int
    file_bytes: int


class Space:
    """Room in both tiers, counted as if each placed entry were stored.

    Args:
      host: Sizes of the entries in host memory, the oldest first.
      host_budget_bytes: Maximum bytes of the blocks there.
      disk_left_bytes: Bytes that further files may have; infinite if only the disk limits them.
    """

    def __init__(self, host: Mapping[str, Size], host_budget_bytes: int, disk_left_bytes: float):
        self._host, self._host_budget_bytes = dict(host), host_budget_bytes
        self._disk_left_bytes = disk_left_bytes

    def place(self, key: str, size: Size) -> dict[str, Size] | None:
        """Places one more entry.

        It goes to host memory if the entries that it displaces fit on disk, otherwise to disk.

        Args:
          key: Key of the entry, not in use.
          size: Size of the entry.

        Returns:
          The entries to write to disk, perhaps including the new one. None if there is no room;
          then nothing is changed.
        """
        displaced = self._displaced_by(size.host_bytes)
        if size.host_bytes <= self._host_budget_bytes and self._fits_on_disk(displaced):
            written = displaced
        elif self._fits_on_disk({key: size}):
            written = {key: size}
        else:
            return None
        self._disk_left_bytes -= _file_bytes(written)
        self._host = {
            name: known for name, known in {**self._host, key: size}.items() if name not in written
        }
        return written

    def _displaced_by(self, num_bytes: int) -> dict[str, Size]:
        """Returns the oldest entries that must leave host memory so that `num_bytes` fit.

        All of them if the budget itself is smaller. Entries without bytes are left out, since
        they would make no room.
        """
        used = sum(size.host_bytes for size in self._host.values())
        displaced, missing = {}, used + num_bytes - self._host_budget_bytes
        for key, size in self._host.items():
            if missing <= 0:
                break
            if size.host_bytes:
                displaced[key] = size
                missing -= size.host_bytes
        return displaced

    def _fits_on_disk(self, entries: Mapping[str, Size]) -> bool:
        return not entries or _file_bytes(entries) <= self._disk_left_bytes


def _file_bytes(entries: Mapping[str, Size]) -> int:
    return sum(size.file_bytes for size in entries.values())
