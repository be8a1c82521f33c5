"""Which tier takes the next entry, and what leaves host memory for it: the one rule of both."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Size:
    """What an entry takes of a tier.

    Attributes:
      host_bytes: In host memory: bytes of its blocks.
      file_bytes: On disk: bytes of its file.
    """

    host_bytes: int
    file_bytes: int


class Space:
    """What both tiers have room for, counted as if each entry that is placed were stored.

    Args:
      host: Sizes of the entries in host memory, the least recently used first.
      host_budget_bytes: The most bytes of blocks there.
      disk_left_bytes: Bytes that the files may still grow by; infinite where only trying shows.
    """

    def __init__(self, host: Mapping[str, Size], host_budget_bytes: int, disk_left_bytes: float):
        self._host, self._host_budget_bytes = dict(host), host_budget_bytes
        self._disk_left_bytes = disk_left_bytes

    def place(self, key: str, size: Size) -> dict[str, Size] | None:
        """Places one more entry: in host memory if what it displaces fits on disk, else on disk.

        Args:
          key: Its name, which no other entry has.
          size: What it takes.

        Returns:
          What has to be written to disk for it, perhaps itself; None if there is no room, and
          then nothing is changed.
        """
        displaced = self._displaced_by(size.host_bytes)
        if size.host_bytes <= self._host_budget_bytes and self._fit_on_disk(displaced):
            written = displaced
        elif self._fit_on_disk({key: size}):
            written = {key: size}
        else:
            return None
        self._disk_left_bytes -= _file_bytes(written)
        self._host = {
            name: known for name, known in {**self._host, key: size}.items() if name not in written
        }
        return written

    def _displaced_by(self, num_bytes: int) -> dict[str, Size]:
        """Returns the least recently used entries that must leave for so many bytes to fit.

        All of them are named where the budget itself is smaller, but for those without bytes:
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

    def _fit_on_disk(self, entries: Mapping[str, Size]) -> bool:
        return not entries or _file_bytes(entries) <= self._disk_left_bytes


def _file_bytes(entries: Mapping[str, Size]) -> int:
    return sum(size.file_bytes for size in entries.values())
