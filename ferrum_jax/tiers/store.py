"""Both tiers as one store: entries in host memory, moved to disk when its budget is used up."""

import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ferrum_jax.checks import check_count, check_type
from ferrum_jax.errors import GeometryMismatchError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockPayload, BlockShape
from ferrum_jax.tiers.disk import DiskTier, OpenFile, open_private
from ferrum_jax.tiers.files import EntryFile
from ferrum_jax.tiers.space import Size, Space


class _HostEntry(NamedTuple):
    """Blocks in host memory, and their size in each tier."""

    payload: BlockPayload
    size: Size


class TieredStore:
    """Blocks by key, in host memory and on disk. Not thread-safe: the owner holds a lock.

    A method that raises changes nothing. Methods wait only for the disk, and for blocks that are
    written to it.

    Args:
      block_shapes: Formats that the blocks of an entry may have.
      host_budget_bytes: Maximum bytes of blocks in host memory; 0 keeps all entries on disk.
      disk_directory: Directory for files, for this store alone; None for no disk tier. Files of
        an earlier store there are deleted.
      disk_budget_bytes: Maximum bytes of all files; None for no limit but the disk's.
      open_file: Function that opens a binary file, `(path, mode) -> file`; replaced in tests.

    Attributes:
      block_shapes: As given.

    Raises:
      ValueError: A budget is negative, `disk_budget_bytes` is given without a directory, or the
        directory cannot be used.

    Example:
      >>> from ferrum_jax import CacheSpec, init
      >>> from ferrum_jax.ops.transfer import export_blocks
      >>> pool = init(CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                       num_blocks=8, block_size=4, max_seqs=2,
      ...                       max_blocks_per_seq=3)).pool
      >>> store = TieredStore([BlockShape.of(pool)], host_budget_bytes=1024)
      >>> store.put("chat-1", export_blocks(pool, [3, 5]))
      >>> store.stream("chat-1").num_blocks, store.host_used_bytes
      (2, 256)
    """

    def __init__(
        self,
        block_shapes: Sequence[BlockShape],
        host_budget_bytes: int,
        *,
        disk_directory: str | os.PathLike[str] | None = None,
        disk_budget_bytes: int | None = None,
        open_file: OpenFile = open_private,
    ):
        if disk_budget_bytes is not None:
            disk_budget_bytes = check_count("disk_budget_bytes", disk_budget_bytes, minimum=0)
            if disk_directory is None:
                raise ValueError("disk_directory must be given when disk_budget_bytes is.")
        self.block_shapes = tuple(block_shapes)
        self._host_budget_bytes = check_count("host_budget_bytes", host_budget_bytes, minimum=0)
        self._host: dict[str, _HostEntry] = {}  # The oldest first.
        self._disk = None
        if disk_directory is not None:
            self._disk = DiskTier(disk_directory, disk_budget_bytes, open_file)

    @property
    def host_used_bytes(self) -> int:
        """Bytes of the blocks in host memory."""
        return sum(entry.size.host_bytes for entry in self._host.values())

    @property
    def disk_used_bytes(self) -> int:
        """Bytes of the files on disk."""
        return 0 if self._disk is None else self._disk.used_bytes

    def __contains__(self, key: str) -> bool:
        """Returns whether there is an entry, without reading a file."""
        return key in self._host or (self._disk is not None and key in self._disk)

    def __len__(self) -> int:
        """Returns the number of entries in both tiers."""
        return len(self._host) + (0 if self._disk is None else len(self._disk))

    def put(self, key: str, payload: BlockPayload) -> None:
        """Stores blocks in host memory, or on disk if host memory has no room.

        The oldest entries of host memory move to disk for it, where that makes room.

        Args:
          key: Key that is not in use.
          payload: Blocks to store. A stream is read into host memory as a whole only if it stays
            there; on its way to disk, one or two chunks at a time are.

        Raises:
          OutOfHostMemoryError: Neither tier has room, or a file cannot be written.
          GeometryMismatchError: The blocks have another format than the store's.
          ValueError: The key is in use.
        """
        check_type("key", key, str)
        if key in self:
            raise ValueError(f"key {key!r} is in use. Discard its entry, or use another key.")
        if payload.block_shape not in self.block_shapes:
            formats = ", or ".join(map(str, self.block_shapes))
            raise GeometryMismatchError(
                f"The payload's blocks are {payload.block_shape}, the store's {formats}. "
                "Use one store for each geometry."
            )
        size = _size_of(key, payload.block_shape, payload.num_blocks)
        written = self._space().place(key, size)
        if written is None:
            raise self._out_of_memory(key, payload.num_bytes)
        if key not in written:
            payload = payload.gathered()
        displaced = [name for name in written if name != key]
        self._write({n: payload if n == key else self._host[n].payload for n in written})
        for name in displaced:
            del self._host[name]
        if key not in written:
            self._host[key] = _HostEntry(payload, size)

    def has_room_for(self, entries: Mapping[str, tuple[BlockShape, int]]) -> bool:
        """Returns whether `put` has room for entries, one after the other; reads no file.

        Without a disk budget, the disk is assumed to have room.

        Args:
          entries: Format and number of blocks by key. The keys are not in use.
        """
        space = self._space()
        sizes = {key: _size_of(key, *blocks) for key, blocks in entries.items()}
        return all(space.place(key, size) is not None for key, size in sizes.items())

    def stream(self, key: str) -> BlockPayload:
        """Returns an entry's blocks; those on disk are read chunk by chunk, as they are used.

        Args:
          key: Key of the entry.

        Returns:
          The blocks, valid until the entry is discarded. Iterating the chunks of a file raises
          CorruptFileError at a block that is not what was written.

        Raises:
          KeyError: There is no such entry.
          CorruptFileError: The beginning or the length of the file is not what was written. The
            entry stays until it is discarded.
        """
        if key in self._host:
            return self._host[key].payload
        return self._disk_with(key).stream(key)

    def discard(self, key: str) -> None:
        """Removes an entry, and deletes its file, corrupt or not.

        A file that cannot be deleted is logged; `close` tries again.

        Args:
          key: Key of the entry.

        Raises:
          KeyError: There is no such entry.
        """
        if self._host.pop(key, None) is None:
            self._disk_with(key).discard(key)

    def close(self) -> None:
        """Discards all entries, deletes their files, and unlocks the directory.

        No other call may follow.
        """
        self._host.clear()
        if self._disk is not None:
            self._disk.close()

    def _disk_with(self, key: str) -> DiskTier:
        """Returns the disk tier if it has an entry, or raises KeyError."""
        if self._disk is None or key not in self._disk:
            raise KeyError(f"There is no entry {key!r}. It was never put, or is discarded already.")
        return self._disk

    def _space(self) -> Space:
        """Returns the room that both tiers have now."""
        left_bytes = 0 if self._disk is None else self._disk.left_bytes
        sizes = {key: entry.size for key, entry in self._host.items()}
        return Space(sizes, self._host_budget_bytes, left_bytes)

    def _write(self, payloads: Mapping[str, BlockPayload]) -> None:
        """Writes entries to disk: all of them, or none."""
        if self._disk is None:
            return
        written = []
        try:
            for key, payload in payloads.items():
                self._disk.put(key, payload)
                written.append(key)
        except BaseException:
            for key in written:
                self._disk.discard(key)
            raise

    def _out_of_memory(self, key: str, num_bytes: int) -> OutOfHostMemoryError:
        held = f"host memory holds {self.host_used_bytes} of {self._host_budget_bytes} bytes"
        if self._disk is None:
            remedy = "raise host_budget_bytes, or name a disk_directory"
        else:
            held += f", the disk {self._disk.used_bytes} of {self._disk.budget_bytes}"
            remedy = "raise host_budget_bytes or disk_budget_bytes"
        return OutOfHostMemoryError(
            f"Entry {key!r} asks for {num_bytes} bytes; {held}. Free a swapped request, {remedy}."
        )


def _size_of(key: str, block_shape: BlockShape, num_blocks: int) -> Size:
    """Returns the size of an entry in each tier."""
    file_bytes = EntryFile(key, block_shape, num_blocks).num_bytes
    return Size(num_blocks * block_shape.block_bytes, file_bytes)
