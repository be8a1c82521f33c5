"""The file of one entry of the disk tier: its layout, and the checks when it is read back.

A file is `MAGIC` and a header (JSON: key, block format, number of blocks); then for each block its
digest and its bytes, array by array as the header lists them. A digest is BLAKE2b of 16 bytes over
the block's bytes, its index and the header. So blocks cannot change places, within a file or
between files. Digests detect accidents, not an attacker who computes them again. The reader knows
the header and the length that a file must have, so nothing in a file is executed or trusted.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator

import numpy as np

from ferrum_jax.errors import CorruptFileError
from ferrum_jax.ops.transfer import BlockArrays, BlockPayload, BlockShape, chunk_sizes, empty_arrays

MAGIC = b"FERRUMKV"

_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True)
class EntryFile:
    """What the file of an entry contains.

    Attributes:
      key: Key of the entry.
      block_shape: Format of its blocks.
      num_blocks: Number of its blocks.
    """

    key: str
    block_shape: BlockShape
    num_blocks: int

    @functools.cached_property
    def header(self) -> bytes:
        """All bytes before the first block."""
        arrays = [[name, row.dtype.name, list(row.shape)] for name, row in self.block_shape.arrays]
        header = {
            "key": self.key,
            "block_format": {"dtype": self.block_shape.dtype.name, "arrays": arrays},
            "num_blocks": self.num_blocks,
        }
        return MAGIC + json.dumps(header).encode()

    @functools.cached_property
    def num_bytes(self) -> int:
        """Length of the file."""
        block_bytes = _DIGEST_BYTES + self.block_shape.block_bytes
        return len(self.header) + self.num_blocks * block_bytes

    def write(self, file: io.BufferedIOBase, payload: BlockPayload) -> None:
        """Writes the entry; waits for blocks that are still being copied.

        Args:
          file: Empty file, open for writing.
          payload: Blocks of the entry.

        Raises:
          OSError: The file cannot be written.
        """
        file.write(self.header)
        for index, parts in enumerate(_blocks_of(payload)):
            file.write(self._digest(parts, index))
            for part in parts:
                file.write(part)

    def check(self, file: io.BufferedIOBase, path: str) -> None:
        """Checks the length and the header; leaves the file at its first block.

        Args:
          file: File, open for reading at its beginning.
          path: Path of the file, for the error.

        Raises:
          CorruptFileError: The length or the header is not what was written.
          OSError: The file cannot be read.
        """
        num_bytes = os.fstat(file.fileno()).st_size
        if num_bytes != self.num_bytes:
            raise CorruptFileError(path, f"it has {num_bytes} bytes instead of {self.num_bytes}")
        if file.read(len(self.header)) != self.header:
            raise CorruptFileError(path, f"its header is not that of entry {self.key!r}")

    def read_chunks(self, file: io.BufferedIOBase, path: str) -> Iterator[BlockArrays]:
        """Reads the blocks chunk by chunk, and checks each block before its chunk is returned.

        Args:
          file: File, open for reading at its beginning.
          path: Path of the file, for the error.

        Yields:
          Chunks of NumPy arrays.

        Raises:
          CorruptFileError: A byte of the file is not what was written.
          OSError: The file cannot be read.
        """
        self.check(file, path)
        first, block_bytes = 0, self.block_shape.block_bytes
        for size in chunk_sizes(self.num_blocks, block_bytes):
            arrays = empty_arrays(self.block_shape, size)
            for index, parts in enumerate(_parts_of(arrays.values()), first):
                digest = file.read(_DIGEST_BYTES)
                num_read = sum(file.readinto(part) for part in parts)
                if num_read != block_bytes or digest != self._digest(parts, index):
                    raise CorruptFileError(path, f"block {index} of {self.num_blocks} was altered")
            yield arrays
            first += size

    def _digest(self, parts: Iterable[memoryview], index: int) -> bytes:
        digest = self._header_hash.copy()
        digest.update(index.to_bytes(8, "little"))
        for part in parts:
            digest.update(part)
        return digest.digest()

    @functools.cached_property
    def _header_hash(self) -> hashlib.blake2b:
        return hashlib.blake2b(self.header, digest_size=_DIGEST_BYTES)


def _blocks_of(payload: BlockPayload) -> Iterator[list[memoryview]]:
    """Yields each block's bytes, array by array in the order of the format."""
    for rows in payload.chunks:
        arrays = [np.ascontiguousarray(rows[name]) for name, _ in payload.block_shape.arrays]
        yield from _parts_of(arrays)


def _parts_of(arrays: Iterable[np.ndarray]) -> Iterator[list[memoryview]]:
    """Yields the bytes of each block in contiguous arrays [blocks, ...], without a copy."""
    rows = [
        array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8) for array in arrays
    ]
    for block in zip(*rows, strict=True):
        yield [memoryview(row) for row in block]
