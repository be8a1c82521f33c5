"""The disk tier: a directory with one file per entry.

A file is written under a temporary name, synchronized, then renamed. A directory belongs to one
tier at a time: a lock, which the operating system removes when its process ends, keeps others out.
A tier deletes all files of its kind when it opens a directory, and when it is closed, since no
later process knows their requests.
"""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import math
import os
import pathlib
import weakref
from collections.abc import Callable, Iterator
from typing import TypeAlias, cast

from ferrum_jax.checks import check_path
from ferrum_jax.errors import CorruptFileError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockArrays, BlockPayload, ChunkStream
from ferrum_jax.tiers.files import EntryFile

_logger = logging.getLogger("ferrum_jax")

_SUFFIX = ".kvblocks"
_UNFINISHED = ".unfinished"

OpenFile: TypeAlias = Callable[[pathlib.Path, str], io.BufferedIOBase]


def open_private(path: pathlib.Path, mode: str) -> io.BufferedIOBase:
    """Opens a binary file, readable by its owner only if new, since it holds conversations."""
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))
    return cast(io.BufferedIOBase, file)


class DiskTier:
    """Entries in the files of a directory. Not thread-safe.

    A file that cannot be deleted with its entry is logged and no longer counted; `close` tries to
    delete it again.

    Args:
      directory: Path of the directory, made if absent; for this tier alone.
      budget_bytes: Maximum bytes of all files; None for no limit but the disk's.
      open_file: Function that opens a binary file, `(path, mode) -> file`; replaced in tests.

    Attributes:
      budget_bytes: As given.

    Raises:
      ValueError: The directory cannot be created or read, is in use, or its lock is a symbolic
        link, which may point to another program's file.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        budget_bytes: int | None = None,
        open_file: OpenFile = open_private,
    ):
        check_path("disk_directory", directory)
        self.budget_bytes = budget_bytes
        # Absolute, so that it stays valid when the process changes its working directory.
        self._directory = pathlib.Path(directory).absolute()
        self._open = open_file
        self._files: dict[str, EntryFile] = {}
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _lock(self._directory)
            self._release = weakref.finalize(self, _release, self._directory, lock, os.getpid())
            _delete_files(self._directory)
        except OSError as error:
            raise ValueError(f"disk_directory {directory} cannot be used: {error}.") from error

    @property
    def used_bytes(self) -> int:
        """Bytes of the files of all entries."""
        return sum(file.num_bytes for file in self._files.values())

    @property
    def left_bytes(self) -> float:
        """Bytes that further files may have; infinite without a budget."""
        return math.inf if self.budget_bytes is None else self.budget_bytes - self.used_bytes

    def __contains__(self, key: str) -> bool:
        """Returns whether there is an entry, without reading its file."""
        return key in self._files

    def __len__(self) -> int:
        """Returns the number of entries."""
        return len(self._files)

    def put(self, key: str, payload: BlockPayload) -> None:
        """Writes an entry; waits for its blocks, and for the disk.

        Args:
          key: Key of the entry, not in use.
          payload: Blocks of the entry.

        Raises:
          OutOfHostMemoryError: The file cannot be written. No part of it is left.
        """
        entry = EntryFile(key, payload.block_shape, payload.num_blocks)
        path = self._path_of(key)
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            try:
                with self._open(unfinished, "xb") as file:
                    entry.write(file, payload)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(unfinished, path)
                _synchronize(self._directory)
            except BaseException:
                _delete(unfinished)
                _delete(path)
                raise
        except OSError as error:
            raise OutOfHostMemoryError(
                f"Entry {key!r} of {payload.num_bytes} bytes cannot be written to "
                f"{self._directory}: {error}. Make room on that disk, or free a swapped request."
            ) from error
        self._files[key] = entry

    def stream(self, key: str) -> BlockPayload:
        """Returns an entry's blocks as a stream, which reads the file chunk by chunk.

        Args:
          key: Key of the entry.

        Returns:
          The blocks. Iterating their chunks raises CorruptFileError at an altered block.

        Raises:
          CorruptFileError: The file cannot be read, or its length or header is not what was
            written. The entry stays until it is discarded.
        """
        entry = self._files[key]
        with self._reading(key) as (file, path):
            entry.check(file, path)
        chunks = ChunkStream(entry.num_blocks, functools.partial(self._read_chunks, key))
        return BlockPayload(entry.block_shape, chunks)

    def discard(self, key: str) -> None:
        """Removes an entry, and deletes its file, corrupt or not."""
        del self._files[key]
        _delete(self._path_of(key))

    def close(self) -> None:
        """Deletes all files and unlocks the directory. No other call may follow."""
        self._release()

    def _read_chunks(self, key: str) -> Iterator[BlockArrays]:
        with self._reading(key) as (file, path):
            yield from self._files[key].read_chunks(file, path)

    @contextlib.contextmanager
    def _reading(self, key: str) -> Iterator[tuple[io.BufferedIOBase, str]]:
        """Opens an entry's file for reading, and yields the file and its path."""
        path = self._path_of(key)
        try:
            with self._open(path, "rb") as file:
                yield file, str(path)
        except OSError as error:
            raise CorruptFileError(str(path), str(error)) from error

    def _path_of(self, key: str) -> pathlib.Path:
        return self._directory / _name_of(key)


def _name_of(key: str) -> str:
    """Returns the file name of a key: a digest, so that no key can name another directory."""
    return (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() + _SUFFIX
    )


def _delete(path: pathlib.Path) -> None:
    """Deletes a file if it exists; a failure is logged."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _logger.exception("File %s of the disk tier cannot be removed. Remove it by hand.", path)


def _delete_files(directory: pathlib.Path) -> None:
    """Deletes all files that any tier has written to a directory."""
    for ending in (_SUFFIX, _SUFFIX + _UNFINISHED):
        for path in directory.glob(f"*{ending}"):
            _delete(path)


def _release(directory: pathlib.Path, lock: int, owner: int) -> None:
    """Deletes a tier's files and unlocks its directory.

    Args:
      directory: The directory.
      lock: File descriptor that holds the lock.
      owner: Id of the process that made the tier. A forked child exits with the same finalizers,
        and must not delete the files.
    """
    if os.getpid() == owner:
        _delete_files(directory)
    os.close(lock)


def _lock(directory: pathlib.Path) -> int:
    """Locks a directory, and returns the file descriptor that holds the lock until closed."""
    import fcntl  # Not on all platforms; only this tier needs it.

    path = directory / "lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP and path.is_symlink():
            raise ValueError(
                f"disk_directory {directory} has a lock that is a symbolic link, which is not "
                "followed. Remove the link, or use a directory that only this cache writes to."
            ) from error
        raise
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"disk_directory {directory} is in use by another cache, of this process or another. "
            "Use another directory, or close that one first."
        ) from None
    return lock


def _synchronize(directory: pathlib.Path) -> None:
    """Waits until the directory's entries are on the disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
