"""The lower tier: a directory with one file an entry, which only whole and checked files enter.

A file is written under another name, synchronized and then renamed, so that whatever stops the
process leaves either the whole file or one that the next start removes. The directory belongs to
one tier at a time: a lock, which the system lifts when its process ends, keeps a second one out,
since neither would know what the other one writes or drops. What a directory holds is there again
for the next tier that opens it.
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
from typing import Any, TypeAlias, cast

from ferrum_jax.checks import check_path
from ferrum_jax.errors import CorruptFileError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockArrays, BlockPayload, BlockShape, ChunkStream
from ferrum_jax.tiers.files import read_chunks, read_metadata, read_start, write_entry
from ferrum_jax.tiers.host import Entry

_logger = logging.getLogger("ferrum_jax")

_SUFFIX = ".kvblocks"
_UNFINISHED = ".unfinished"

OpenFile: TypeAlias = Callable[[pathlib.Path, str], io.BufferedIOBase]


def open_private(path: pathlib.Path, mode: str) -> io.BufferedIOBase:
    """Opens a binary file that, if it is made, only its owner may read: it holds conversations."""
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags, 0o600))
    return cast(io.BufferedIOBase, file)


class DiskTier:
    """Entries in the files of a directory. Not thread-safe.

    What it holds is what it remembers: a file that cannot be removed when its entry goes is
    logged, and neither known nor counted from then on. `clear` tries again to remove it; without
    that, whoever opens the directory next finds it.

    Args:
      directory: Where; made if absent. No other tier, of this process or another, may use it.
      block_shape: What the blocks of every entry are.
      budget_bytes: The most bytes that its files may have together; None for what the disk has.
      open_file: Opens a file for bytes; for tests.
      keeps_files: Whether the files stay when the tier is closed, for the next one that opens the
        directory. If not, they are deleted then, or when the tier is dropped without `close`, or
        at the latest when the process exits.

    Attributes:
      budget_bytes: As given.
      used_bytes: Bytes of the files that it holds.

    Raises:
      ValueError: The directory cannot be made or read, or is in use, or its lock is a symbolic
        link: what that points to belongs to something else.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        block_shape: BlockShape,
        budget_bytes: int | None = None,
        open_file: OpenFile = open_private,
        *,
        keeps_files: bool = True,
    ):
        check_path("disk_directory", directory)
        self.budget_bytes = budget_bytes
        # Absolute, so that it stays the same one when the process changes its directory.
        self._directory, self._format = pathlib.Path(directory).absolute(), block_shape
        self._open = open_file
        owner = None if keeps_files else os.getpid()
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _lock(self._directory)
            self._release = weakref.finalize(self, _release, self._directory, lock, owner)
            self._sizes = self._find()  # Bytes of each file, by its name.
        except OSError as error:
            raise ValueError(f"disk_directory {directory} cannot be used: {error}.") from error

    @property
    def used_bytes(self) -> int:
        """Bytes of the files that it holds."""
        return sum(self._sizes.values())

    @property
    def left_bytes(self) -> float:
        """Bytes that its files may still grow by; infinite without a budget."""
        return math.inf if self.budget_bytes is None else self.budget_bytes - self.used_bytes

    def __contains__(self, key: str) -> bool:
        """Says whether there is a file for an entry; not whether it is sound."""
        return _name_of(key) in self._sizes

    def __len__(self) -> int:
        """Returns how many files there are."""
        return len(self._sizes)

    def keys(self) -> list[str]:
        """Returns the keys of the entries whose files have a sound beginning."""
        keys = []
        for name in self._sizes:
            try:
                with self._reading(name) as (file, path):
                    key, _ = read_metadata(file, path)
            except CorruptFileError:
                continue
            if _name_of(key) == name:  # Else it is another entry's file, renamed.
                keys.append(key)
        return keys

    def put(self, key: str, entry: Entry) -> None:
        """Writes an entry; waits for its blocks, and for the disk.

        Raises:
          OutOfHostMemoryError: The file cannot be written. Nothing of it is left.
        """
        name = _name_of(key)
        path = self._directory / name
        unfinished = self._directory / (name + _UNFINISHED)
        try:
            try:
                with self._open(unfinished, "xb") as file:
                    write_entry(file, key, entry.payload, entry.metadata)
                    file.flush()
                    os.fsync(file.fileno())
                    size = file.tell()
                os.replace(unfinished, path)
                _synchronize(self._directory)
            except BaseException:
                _remove(unfinished)
                _remove(path)
                raise
        except OSError as error:
            raise OutOfHostMemoryError(
                f"Entry {key!r} of {entry.payload.num_bytes} bytes cannot be written to "
                f"{self._directory}: {error}. Make room on that disk, or free a swapped request."
            ) from error
        self._sizes[name] = size

    def get(self, key: str) -> tuple[BlockPayload, dict[str, Any]]:
        """Returns an entry's blocks, to be read chunk by chunk, and what belongs to them.

        Raises:
          CorruptFileError: Its file does not begin as it was written; reading the blocks raises
            it too, if these are not what was written. It stays until it is dropped.
        """
        with self._reading(_name_of(key)) as (file, path):
            num_blocks, metadata = read_start(file, path, key, self._format)
        chunks = functools.partial(self._read_chunks, key)
        return BlockPayload(self._format, ChunkStream(num_blocks, chunks)), metadata

    def metadata(self, key: str) -> dict[str, Any]:
        """Reads what belongs to an entry's blocks; raises CorruptFileError as `get` does."""
        with self._reading(_name_of(key)) as (file, path):
            return read_metadata(file, path)[1]

    def drop(self, key: str) -> None:
        """Forgets an entry, and deletes its file, sound or not."""
        name = _name_of(key)
        del self._sizes[name]
        _remove(self._directory / name)

    def clear(self) -> None:
        """Forgets all entries, and deletes all files that any tier has written here."""
        self._sizes = {}
        _clear(self._directory)

    def close(self) -> None:
        """Gives the directory back, with its files if these are kept. No other call may follow."""
        self._release()

    def _find(self) -> dict[str, int]:
        """Removes what a crash left unfinished, and returns the sizes of the files there are."""
        for path in self._directory.glob(f"*{_SUFFIX}{_UNFINISHED}"):
            path.unlink()
        return {path.name: path.stat().st_size for path in self._directory.glob(f"*{_SUFFIX}")}

    def _read_chunks(self, key: str) -> Iterator[BlockArrays]:
        with self._reading(_name_of(key)) as (file, path):
            yield from read_chunks(file, path, key, self._format)

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[tuple[io.BufferedIOBase, str]]:
        """Opens a file for reading, and yields it with its path."""
        path = self._directory / name
        try:
            with self._open(path, "rb") as file:
                yield file, str(path)
        except OSError as error:
            raise CorruptFileError(str(path), str(error)) from error


def _name_of(key: str) -> str:
    """Returns a file name that depends on the key, and can be nothing else but a file name."""
    return (
        hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest() + _SUFFIX
    )


def _remove(path: pathlib.Path) -> None:
    """Deletes a file if it can; nothing hangs on a file that nobody remembers."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        _logger.exception("File %s of the disk tier cannot be removed. Remove it by hand.", path)


def _clear(directory: pathlib.Path) -> None:
    """Deletes all files that any tier has written to a directory."""
    for ending in (_SUFFIX, _SUFFIX + _UNFINISHED):
        for path in directory.glob(f"*{ending}"):
            _remove(path)


def _release(directory: pathlib.Path, lock: int, owner: int | None) -> None:
    """Gives a directory back.

    Args:
      directory: The directory.
      lock: The descriptor that holds its lock.
      owner: The process that deletes the files; None if they are kept. A child that was forked
        from it exits with the same finalizers, and must leave the files alone.
    """
    if os.getpid() == owner:
        _clear(directory)
    os.close(lock)


def _lock(directory: pathlib.Path) -> int:
    """Returns a descriptor that holds the directory's lock until it is closed."""
    import fcntl  # Where there is none, only this tier is missing.

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
            "Give each its own directory, or close that one first."
        ) from None
    return lock


def _synchronize(directory: pathlib.Path) -> None:
    """Waits until the disk knows the directory's names."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
