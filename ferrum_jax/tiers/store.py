"""Both tiers as one: blocks go to host memory, and from there to disk when it is short."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from ferrum_jax.checks import check_count, check_type
from ferrum_jax.errors import GeometryMismatchError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockPayload, BlockShape
from ferrum_jax.tiers.disk import DiskTier, OpenFile, open_private
from ferrum_jax.tiers.files import file_bytes
from ferrum_jax.tiers.host import Entry, HostTier
from ferrum_jax.tiers.space import Size, Space


@dataclasses.dataclass(frozen=True)
class TierStats:
    """What the tiers hold.

    Attributes:
      host_entries: Entries in host memory.
      host_used_bytes: Bytes of their blocks.
      host_budget_bytes: The most that these may be.
      disk_entries: Entries on disk.
      disk_used_bytes: Bytes of their files.
      disk_budget_bytes: The most that these may be; None where only the disk sets a limit, 0
        where there is no disk tier.
      num_spilled: Entries that went from host memory to disk so far.
    """

    host_entries: int
    host_used_bytes: int
    host_budget_bytes: int
    disk_entries: int
    disk_used_bytes: int
    disk_budget_bytes: int | None
    num_spilled: int


class TieredStore:
    """Keeps blocks by key, in host memory and on disk. Not thread-safe: its owner holds a lock.

    What raises changes nothing. Only the disk is waited for, and blocks that are to be written
    to it.

    Args:
      block_shape: What the blocks of every entry are.
      host_budget_bytes: The most bytes of blocks in host memory; 0 keeps all on disk.
      disk_directory: Where files may be written, for this store alone; None for no disk tier.
        Entries that an earlier store left there are found again.
      disk_budget_bytes: The most bytes of files; None for what the disk has.
      open_file: Opens a file for bytes; for tests.
      keeps_files: Whether the files stay when the store is closed, dropped, or ended by the exit
        of the process.

    Raises:
      ValueError: A budget is negative or has no directory, or the directory cannot be used.

    Example:
      >>> from ferrum_jax import CacheSpec, init
      >>> from ferrum_jax.ops.transfer import export_blocks
      >>> pool = init(CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                       num_blocks=8, block_size=4, max_seqs=2,
      ...                       max_blocks_per_seq=3)).pool
      >>> store = TieredStore(BlockShape.of(pool), host_budget_bytes=1024)
      >>> store.put("chat-1", export_blocks(pool, [3, 5]), {"num_tokens": 7})
      >>> payload, metadata = store.pop("chat-1")
      >>> payload.num_blocks, metadata
      (2, {'num_tokens': 7})
    """

    def __init__(
        self,
        block_shape: BlockShape,
        host_budget_bytes: int,
        *,
        disk_directory: str | os.PathLike[str] | None = None,
        disk_budget_bytes: int | None = None,
        open_file: OpenFile = open_private,
        keeps_files: bool = True,
    ):
        host_budget_bytes = check_count("host_budget_bytes", host_budget_bytes, minimum=0)
        if disk_budget_bytes is not None:
            disk_budget_bytes = check_count("disk_budget_bytes", disk_budget_bytes, minimum=0)
            if disk_directory is None:
                raise ValueError("disk_directory must be given when disk_budget_bytes is.")
        self._format = block_shape
        self._host = HostTier(host_budget_bytes)
        self._disk = None
        if disk_directory is not None:
            self._disk = DiskTier(
                disk_directory, block_shape, disk_budget_bytes, open_file, keeps_files=keeps_files
            )
        self._num_spilled = 0

    def __contains__(self, key: str) -> bool:
        """Says whether there is an entry; on disk, not whether its file is sound."""
        return key in self._host or (self._disk is not None and key in self._disk)

    def __len__(self) -> int:
        """Returns how many entries there are, whether or not their files are sound."""
        return len(self._host) + (len(self._disk) if self._disk is not None else 0)

    def keys(self) -> list[str]:
        """Returns the keys of all entries, but for files whose beginning cannot be read.

        It reads the beginning of every file.
        """
        return self._host.keys() + (self._disk.keys() if self._disk else [])

    def put(self, key: str, payload: BlockPayload, metadata: Mapping[str, Any]) -> None:
        """Stores blocks in host memory; what was used least recently moves to disk for them.

        Args:
          key: A name that is not in use.
          payload: The blocks. Of a stream, host memory holds them all only if they stay there: on
            their way to disk, it holds a chunk or two.
          metadata: What belongs to them: what JSON can hold. It comes back as JSON has it, from
            host memory too: a tuple as a list.

        Raises:
          OutOfHostMemoryError: Neither host memory nor the disk has room, or writing failed.
          GeometryMismatchError: The blocks are of another format than the store's.
          ValueError: The key is in use, or the metadata is no JSON.
        """
        check_type("key", key, str)
        if key in self:
            raise ValueError(f"key {key!r} is in use. Pop or drop its entry, or use another key.")
        if payload.block_shape != self._format:
            raise GeometryMismatchError(
                f"The payload's blocks are {payload.block_shape}, the store's {self._format}. Use "
                "one store for each geometry."
            )
        kept = _as_json(metadata)
        entry = Entry(payload, kept, self._size_of(key, payload.num_blocks, kept))
        names = self._space().place(key, entry.size)
        if names is None:
            raise self._out_of_memory(key, payload.num_bytes)
        if key not in names:
            entry = dataclasses.replace(entry, payload=payload.gathered())
        displaced = [name for name in names if name != key]
        self._write({name: entry if name == key else self._host.peek(name) for name in names})
        for name in displaced:
            self._host.drop(name)
        self._num_spilled += len(displaced)
        if key not in names:
            self._host.put(key, entry)

    def has_room_for(self, asked: Mapping[str, tuple[int, Mapping[str, Any]]]) -> bool:
        """Says whether `put` has room for entries, one after the other; reads no file.

        Where the disk has no budget, only trying shows what there is on it.

        Args:
          asked: How many blocks, and which metadata, by key: names that are not in use.
        """
        space = self._space()
        return all(
            space.place(key, self._size_of(key, num_blocks, metadata)) is not None
            for key, (num_blocks, metadata) in asked.items()
        )

    def get(self, key: str) -> tuple[BlockPayload, dict[str, Any]]:
        """Returns an entry's blocks and metadata; it stays where it is, and counts as used.

        Raises:
          KeyError: There is no such entry.
          CorruptFileError: Its file is not what was written. The entry stays until dropped.
        """
        if key in self._host:
            self._host.touch(key)
        return self.peek(key)

    def peek(self, key: str) -> tuple[BlockPayload, dict[str, Any]]:
        """Returns what `get` does, and does not count it as used; raises as `get` does."""
        payload, metadata = self.stream(key)
        return payload.gathered(), metadata

    def stream(self, key: str) -> tuple[BlockPayload, dict[str, Any]]:
        """Returns what `peek` does; but of a file, blocks are read only as they are asked for.

        Then they are checked too, so that iterating the payload's chunks raises CorruptFileError.
        It can be read as long as the entry stays.
        """
        if key in self._host:
            entry = self._host.peek(key)
            return entry.payload, entry.metadata
        return self._on_disk(key).get(key)

    def metadata(self, key: str) -> dict[str, Any]:
        """Returns an entry's metadata without its blocks; raises as `get` does."""
        if key in self._host:
            return self._host.peek(key).metadata
        return self._on_disk(key).metadata(key)

    def pop(self, key: str) -> tuple[BlockPayload, dict[str, Any]]:
        """Returns what `get` does, and forgets the entry; raises as `get` does."""
        entry = self.peek(key)
        self.drop(key)
        return entry

    def drop(self, key: str) -> None:
        """Forgets an entry, and deletes its file, sound or not; raises KeyError if unknown.

        A file that cannot be deleted is logged, and is as good as gone until `clear`.
        """
        if key in self._host:
            self._host.drop(key)
        else:
            self._on_disk(key).drop(key)

    def clear(self) -> None:
        """Forgets all entries, and deletes all their files, those that cannot be read included."""
        self._host.clear()
        if self._disk is not None:
            self._disk.clear()

    def stats(self) -> TierStats:
        """Returns what the tiers hold at this moment."""
        host, disk = self._host, self._disk
        return TierStats(
            host_entries=len(host),
            host_used_bytes=host.used_bytes,
            host_budget_bytes=host.budget_bytes,
            disk_entries=len(disk) if disk is not None else 0,
            disk_used_bytes=disk.used_bytes if disk is not None else 0,
            disk_budget_bytes=disk.budget_bytes if disk is not None else 0,
            num_spilled=self._num_spilled,
        )

    def close(self) -> None:
        """Gives the directory back, with its files if they are kept; no other call may follow."""
        if self._disk is not None:
            self._disk.close()

    def _on_disk(self, key: str) -> DiskTier:
        """Returns the disk tier if it has the entry."""
        if self._disk is None or key not in self._disk:
            raise KeyError(f"There is no entry {key!r}. It was never put, or is dropped already.")
        return self._disk

    def _space(self) -> Space:
        """Returns what there is room for now."""
        left_bytes = self._disk.left_bytes if self._disk is not None else 0
        return Space(self._host.sizes(), self._host.budget_bytes, left_bytes)

    def _size_of(self, key: str, num_blocks: int, metadata: Mapping[str, Any]) -> Size:
        host_bytes = num_blocks * self._format.block_bytes
        return Size(host_bytes, file_bytes(key, self._format, num_blocks, metadata))

    def _write(self, entries: Mapping[str, Entry]) -> None:
        """Writes entries to disk: all of them, or none."""
        if self._disk is None:
            return
        written = []
        try:
            for key, entry in entries.items():
                self._disk.put(key, entry)
                written.append(key)
        except BaseException:
            for key in written:
                self._disk.drop(key)
            raise

    def _out_of_memory(self, key: str, num_bytes: int) -> OutOfHostMemoryError:
        host, disk = self._host, self._disk
        there = f"host memory holds {host.used_bytes} of {host.budget_bytes} bytes"
        if disk is None:
            remedy = "raise host_budget_bytes, or name a disk_directory"
        else:
            there += f", the disk {disk.used_bytes} of {disk.budget_bytes}"
            remedy = "raise host_budget_bytes or disk_budget_bytes"
        return OutOfHostMemoryError(
            f"Entry {key!r} asks for {num_bytes} bytes; {there}. Free a swapped request, {remedy}."
        )


def _as_json(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy as JSON has it."""
    try:
        return json.loads(json.dumps(dict(metadata), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"metadata must be what JSON can hold: {error}.") from error
