"""Stores of two tiers on one directory, and payloads whose bits can be compared."""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

import numpy as np

import ferrum_jax as fj
from ferrum_jax.ops.transfer import BlockPayload, BlockShape
from ferrum_jax.tiers import TieredStore
from ferrum_jax.tiers.disk import open_private
from ferrum_jax.tiers.files import EntryFile
from tests.support.caches import tiny_spec

FORMAT = BlockShape.of(fj.init(tiny_spec(dtype="bfloat16")).pool)
BLOCK = FORMAT.block_bytes


def payload_of(num_blocks: int, seed: int = 0, block_shape: BlockShape = FORMAT) -> BlockPayload:
    """Blocks of random bits."""
    rng = np.random.default_rng(seed)
    arrays = {
        name: np.frombuffer(
            rng.bytes(num_blocks * row.dtype.itemsize * int(np.prod(row.shape))), row.dtype
        ).reshape(num_blocks, *row.shape)
        for name, row in block_shape.arrays
    }
    return BlockPayload.of_arrays(block_shape, arrays)


def bits(payload: BlockPayload) -> list[bytes]:
    parts: dict[str, list[bytes]] = {name: [] for name, _ in payload.block_shape.arrays}
    for chunk in payload.chunks:
        for name, part in parts.items():
            part.append(np.asarray(chunk[name]).tobytes())
    return [b"".join(part) for part in parts.values()]


def file_size(key: str, num_blocks: int, block_shape: BlockShape = FORMAT) -> int:
    return EntryFile(key, block_shape, num_blocks).num_bytes


def picture(store: TieredStore, directory: pathlib.Path):
    """Everything stored: bits in host memory, in order, and files."""
    host = [(key, bits(entry.payload)) for key, entry in store._host.items()]
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    return host, files, store.disk_used_bytes


def file_of(directory: pathlib.Path) -> pathlib.Path:
    (path,) = directory.glob("*.kvblocks")
    return path


def open_full(path: pathlib.Path, mode: str):
    """Opens a file on a disk that is full."""
    path.touch()
    return open("/dev/full", "wb") if mode == "xb" else open_private(path, mode)


class LimitedDisk:
    """Opens files on a disk with room for `room` more bytes, in `num_files` more files."""

    def __init__(self, room: float = float("inf"), num_files: float = float("inf")):
        self.room, self.num_files = room, num_files

    def __call__(self, path: pathlib.Path, mode: str):
        if mode != "xb":
            return open_private(path, mode)
        self.num_files -= 1
        if self.num_files < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return _LimitedFile(open_private(path, mode), self)


class _LimitedFile:
    def __init__(self, file, disk: LimitedDisk):
        self._file, self._disk = file, disk

    def write(self, data):
        self._disk.room -= len(data)
        if self._disk.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@contextlib.contextmanager
def stores_on(directory: pathlib.Path) -> Iterator:
    """A function that opens stores, all on one directory; they are closed at the end."""
    stores = []

    def open_store(host_blocks=0, disk_bytes=None, block_shape=FORMAT, **options) -> TieredStore:
        store = TieredStore(
            [block_shape],
            host_blocks * BLOCK,
            disk_directory=directory,
            disk_budget_bytes=disk_bytes,
            **options,
        )
        stores.append(store)
        return store

    yield open_store
    for store in stores:
        store.close()
