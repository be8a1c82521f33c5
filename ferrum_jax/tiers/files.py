"""The file of one entry: what is written, and the refusal of whatever reads otherwise.

Little-endian, one after the other: `MAGIC`, version and header length (uint32 each); the header,
JSON; the header's digest; then for each block its digest and its bytes, array by array as the
header lists them. Digests are BLAKE2b of 16 bytes. That of the header covers all before it. That
of a block covers its bytes, its index and the header's digest, so that blocks cannot change
places, within a file or between files. They find accidents, not an attacker who computes them
anew: nothing in a file is ever executed, or believed about a size before the file has that size.
"""

import dataclasses
import hashlib
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ferrum_jax.checks import check_count, check_type
from ferrum_jax.errors import CorruptFileError
from ferrum_jax.ops.transfer import BlockArrays, BlockPayload, BlockShape, chunk_sizes, empty_arrays

MAGIC = b"FERRUMKV"
VERSION = 1

_START = struct.Struct("<8sII")
_DIGEST_BYTES = 16


@dataclasses.dataclass(frozen=True)
class _Header:
    """The beginning of a file, found unaltered.

    Attributes:
      key: Name of the entry.
      block_format: What each block is, as `_describe` has it.
      num_blocks: Blocks that follow.
      metadata: What belongs to the entry.
      num_bytes: Length of all that stands before the blocks.
      digest: Digest of it.
    """

    key: str
    block_format: Mapping[str, Any]
    num_blocks: int
    metadata: dict[str, Any]
    num_bytes: int
    digest: bytes

    def __post_init__(self) -> None:
        """Checks what was read before it is computed with."""
        check_type("key", self.key, str)
        check_count("num_blocks", self.num_blocks, minimum=0)
        check_type("metadata", self.metadata, dict)


def file_bytes(
    key: str, block_shape: BlockShape, num_blocks: int, metadata: Mapping[str, Any]
) -> int:
    """Returns how long the file of an entry is, which need not be there yet."""
    start = _start_of(key, block_shape, num_blocks, metadata)
    return len(start) + _DIGEST_BYTES + _blocks_bytes(num_blocks, block_shape)


def write_entry(
    file: io.BufferedIOBase, key: str, payload: BlockPayload, metadata: Mapping[str, Any]
) -> None:
    """Writes one entry; waits for its blocks if they are still on their way.

    Args:
      file: An empty file, open for writing.
      key: Name of the entry.
      payload: Its blocks.
      metadata: What belongs to it; JSON.

    Raises:
      OSError: The file cannot be written.
    """
    start = _start_of(key, payload.block_shape, payload.num_blocks, metadata)
    digest = _digest([start])
    file.write(start)
    file.write(digest)
    for index, rows in enumerate(_blocks_of(payload)):
        file.write(_block_digest(rows, index, digest))
        for row in rows:
            file.write(row)


def read_metadata(file: io.BufferedIOBase, path: str) -> tuple[str, dict[str, Any]]:
    """Reads the beginning of a file: whose it is, and what belongs to it.

    Args:
      file: The file, open for reading at its beginning.
      path: Its name, for the error.

    Returns:
      `(key, metadata)`.

    Raises:
      CorruptFileError: The beginning is not what `write_entry` writes.
      OSError: The file cannot be read.
    """
    header = _read_header(file, path)
    return header.key, header.metadata


def read_start(
    file: io.BufferedIOBase, path: str, key: str, block_shape: BlockShape
) -> tuple[int, dict[str, Any]]:
    """Reads the beginning of one entry's file, and checks how long the file is.

    Args:
      file: The file, open for reading at its beginning.
      path: Its name, for the error.
      key: The entry that it must hold.
      block_shape: What its blocks must be.

    Returns:
      `(num_blocks, metadata)`.

    Raises:
      CorruptFileError: The beginning is not what `write_entry` writes for this key and format.
      OSError: The file cannot be read.
    """
    header = _read_header_of(file, path, key, block_shape)
    return header.num_blocks, header.metadata


def read_chunks(
    file: io.BufferedIOBase, path: str, key: str, block_shape: BlockShape
) -> Iterator[BlockArrays]:
    """Reads one entry's blocks chunk by chunk, and checks every byte before it is given.

    Args:
      file: The file, open for reading at its beginning.
      path: Its name, for the error.
      key: The entry that it must hold.
      block_shape: What its blocks must be.

    Yields:
      The chunks, in NumPy arrays.

    Raises:
      CorruptFileError: The file is not, byte for byte, what `write_entry` writes for this key and
        this format.
      OSError: The file cannot be read.
    """
    header, first = _read_header_of(file, path, key, block_shape), 0
    for size in chunk_sizes(header.num_blocks, block_shape.block_bytes):
        arrays = empty_arrays(block_shape, size)
        for index, rows in enumerate(_rows_of(arrays.values()), first):
            digest = file.read(_DIGEST_BYTES)
            num_read = sum(file.readinto(row) for row in rows)
            is_whole = num_read == block_shape.block_bytes
            if not is_whole or digest != _block_digest(rows, index, header.digest):
                raise CorruptFileError(path, f"block {index} of {header.num_blocks} was altered")
        yield arrays
        first += size


def _start_of(
    key: str, block_shape: BlockShape, num_blocks: int, metadata: Mapping[str, Any]
) -> bytes:
    """Returns all that stands before the header's digest."""
    header = {
        "key": key,
        "block_format": _describe(block_shape),
        "num_blocks": num_blocks,
        "metadata": dict(metadata),
    }
    text = json.dumps(header, allow_nan=False).encode()
    return _START.pack(MAGIC, VERSION, len(text)) + text


def _read_header(file: io.BufferedIOBase, path: str) -> _Header:
    start = file.read(_START.size)
    if start[: len(MAGIC)] != MAGIC or len(start) < _START.size:
        raise CorruptFileError(path, "it is no file of a disk tier, or its beginning is lost")
    _, version, text_bytes = _START.unpack(start)
    if version != VERSION:
        raise CorruptFileError(path, f"it is of version {version} instead of {VERSION}")
    text, digest = b"", b""
    if text_bytes <= _length_of(file):
        text, digest = file.read(text_bytes), file.read(_DIGEST_BYTES)
    if digest != _digest([start, text]):
        raise CorruptFileError(path, "its header was altered, or its end is lost")
    try:
        header = _Header(
            **json.loads(text), num_bytes=len(start + text) + _DIGEST_BYTES, digest=digest
        )
    except (ValueError, TypeError) as error:
        raise CorruptFileError(path, f"its header is none that is written here: {error}") from error
    return header


def _read_header_of(
    file: io.BufferedIOBase, path: str, key: str, block_shape: BlockShape
) -> _Header:
    """Reads the header of a file that must hold an entry, and is as long as it says."""
    header = _read_header(file, path)
    if header.key != key:
        raise CorruptFileError(path, f"it holds {header.key!r} instead of {key!r}")
    if header.block_format != _describe(block_shape):
        raise CorruptFileError(
            path, f"its blocks are {header.block_format}, those of this cache {block_shape}"
        )
    needed = header.num_bytes + _blocks_bytes(header.num_blocks, block_shape)
    length = _length_of(file)
    if length != needed:  # Found before memory is taken for what the file claims to hold.
        raise CorruptFileError(path, f"it has {length} bytes instead of {needed}")
    return header


def _describe(block_shape: BlockShape) -> dict[str, Any]:
    """Returns a format as JSON has it, so that one read can be compared with one expected."""
    arrays = [[name, row.dtype.name, list(row.shape)] for name, row in block_shape.arrays]
    return {"dtype": block_shape.dtype.name, "arrays": arrays}


def _blocks_bytes(num_blocks: int, block_shape: BlockShape) -> int:
    """Returns the length of all that stands behind the header's digest."""
    return num_blocks * (_DIGEST_BYTES + block_shape.block_bytes)


def _length_of(file: io.BufferedIOBase) -> int:
    return os.fstat(file.fileno()).st_size


def _blocks_of(payload: BlockPayload) -> Iterator[list[memoryview]]:
    """Yields each block's bytes, array by array as the format lists them."""
    for rows in payload.chunks:
        arrays = [np.ascontiguousarray(rows[name]) for name, _ in payload.block_shape.arrays]
        yield from _rows_of(arrays)


def _rows_of(arrays: Iterable[np.ndarray]) -> Iterator[list[memoryview]]:
    """Yields the bytes of each block in contiguous arrays, which they share memory with."""
    rows = [
        array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8) for array in arrays
    ]
    for block in zip(*rows, strict=True):
        yield [memoryview(row) for row in block]


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _block_digest(rows: Iterable[memoryview], index: int, header_digest: bytes) -> bytes:
    digest = hashlib.blake2b(
        digest_size=_DIGEST_BYTES, key=header_digest, salt=index.to_bytes(8, "little")
    )
    for row in rows:
        digest.update(row)
    return digest.digest()
