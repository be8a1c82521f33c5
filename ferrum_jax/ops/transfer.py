"""Copies whole blocks between a pool and host memory, bit for bit.

From an accelerator, a program copies blocks to pinned host memory, without waiting: later writes to
the pool, donated or not, are ordered after the program's reads. A pool on CPU is in host memory
already, and NumPy copies its blocks at once: three times as fast, since NumPy asks for huge pages,
and a program is given fresh memory in small ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import jax
import numpy as np
from jax import lax

from ferrum_jax.checks import check_live
from ferrum_jax.errors import GeometryMismatchError
from ferrum_jax.ops.arguments import Ids, as_rows
from ferrum_jax.ops.indexing import read
from ferrum_jax.state import BlockPool
from ferrum_jax.types import IdsLike

CHUNK_BYTES = 16 * 2**20
"""Most bytes that one program copies, unless a block is larger: scratch memory on the device."""

_HOST_MEMORY = "pinned_host"
_ALIGNMENT = 64

BlockArrays: TypeAlias = Mapping[str, jax.Array | np.ndarray]
"""P blocks: each array of a pool by name, [P, L, H, B, D]."""


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """Shape and dtype of a block. Blocks move only between pools with equal block shapes.

    Attributes:
      dtype: Dtype of the cached numbers.
      arrays: Name of each array of a pool, and shape and stored dtype of one block in it.

    Example:
      >>> from ferrum_jax import CacheSpec, init
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                  num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
      >>> block_shape = BlockShape.of(init(spec).pool)
      >>> print(block_shape, "is", block_shape.block_bytes, "bytes per block")
      float32 as k float32[2, 1, 4, 4], v float32[2, 1, 4, 4] is 256 bytes per block
    """

    dtype: np.dtype
    arrays: tuple[tuple[str, jax.ShapeDtypeStruct], ...]

    @classmethod
    def of(cls, pool: BlockPool) -> "BlockShape":
        """Returns the shape of a pool's blocks."""
        arrays = pool.arrays.items()
        return cls(
            dtype=pool.dtype,
            arrays=tuple((name, jax.ShapeDtypeStruct(x.shape[1:], x.dtype)) for name, x in arrays),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(math.prod(part.shape) * part.dtype.itemsize for _, part in self.arrays)

    def __str__(self) -> str:
        """Returns the dtype, and the stored dtype and shape of each array."""
        arrays = (f"{name} {part.dtype.name}{list(part.shape)}" for name, part in self.arrays)
        return f"{self.dtype.name} as {', '.join(arrays)}"


@dataclasses.dataclass(frozen=True)
class ChunkStream:
    """Chunks of blocks that are created one after the other, again for each iteration.

    A reader that drops each chunk before it takes the next has at most two in memory.

    Attributes:
      num_blocks: Blocks in all chunks.
      begin: Returns a new iterator over the chunks.
    """

    num_blocks: int
    begin: Callable[[], Iterator[BlockArrays]]

    def __iter__(self) -> Iterator[BlockArrays]:
        """Yields the chunks."""
        return self.begin()


@dataclasses.dataclass(frozen=True)
class BlockPayload:
    """Whole blocks in host memory, outside of a pool. A copy may still be under way.

    Attributes:
      block_shape: Shape of each block.
      chunks: The blocks in order, some in each chunk: arrays [blocks, *shape of a block].
    """

    block_shape: BlockShape
    chunks: tuple[BlockArrays, ...] | ChunkStream

    @classmethod
    def of_arrays(cls, block_shape: BlockShape, arrays: Mapping[str, np.ndarray]) -> "BlockPayload":
        """Returns P blocks as a payload, without a copy.

        Args:
          block_shape: Shape of each block.
          arrays: Each array of a pool by name, [P, *shape of a block].
        """
        num_blocks = min(len(array) for array in arrays.values())
        chunks, start = [], 0
        for size in chunk_sizes(num_blocks, block_shape.block_bytes):
            chunks.append({name: array[start : start + size] for name, array in arrays.items()})
            start += size
        return cls(block_shape, tuple(chunks))

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        if isinstance(self.chunks, ChunkStream):
            return self.chunks.num_blocks
        return sum(map(_num_blocks, self.chunks))

    @property
    def num_bytes(self) -> int:
        """Bytes of the blocks; there is no padding."""
        return self.num_blocks * self.block_shape.block_bytes

    @property
    def is_stream(self) -> bool:
        """Whether blocks are copied to host memory only when the chunks are read."""
        return isinstance(self.chunks, ChunkStream)

    def gathered(self) -> "BlockPayload":
        """Returns the same blocks, each copied to host memory or about to be."""
        return dataclasses.replace(self, chunks=tuple(self.chunks))


def export_blocks(
    pool: BlockPool, block_ids: IdsLike, num_blocks: int | None = None
) -> BlockPayload:
    """Copies whole blocks, with all layers, from a pool to host memory.

    The blocks may be freed or overwritten, and the pool donated, as soon as this returns: the copy
    is of the pool as it is now. Does not wait for an accelerator (except one that cannot address
    pinned host memory); on CPU, waits and copies.

    Args:
      pool: The pool; stays usable.
      block_ids: i32[P]. Blocks, in the order of the payload; a block outside the pool is zeros. May
        be on the device, such as a row of the tables.
      num_blocks: How many of `block_ids` to copy, the first ones; all if absent.

    Returns:
      The blocks.

    Raises:
      AssertionError: `block_ids` is not a vector, or is shorter than `num_blocks`.
      ValueError: The pool was consumed before.
      ValueError: An id is not an integer, or does not fit in an int32.
    """
    return stream_blocks(pool, block_ids, num_blocks).gathered()


def stream_blocks(
    pool: BlockPool, block_ids: IdsLike, num_blocks: int | None = None
) -> BlockPayload:
    """Like `export_blocks`, except that each chunk is copied only when it is read.

    Args:
      pool: The pool. Neither the pool nor the blocks may change while the payload is read.
      block_ids: i32[P]. As in `export_blocks`.
      num_blocks: As in `export_blocks`.

    Returns:
      The blocks, as a stream.

    Raises:
      AssertionError: As in `export_blocks`.
      ValueError: As in `export_blocks`.
    """
    check_live("pool", pool)
    (ids,) = as_rows(block_ids=block_ids)
    num_blocks = ids.size if num_blocks is None else num_blocks
    _require_ids(ids, num_blocks)
    chunks = functools.partial(_copy_chunks, pool, ids, num_blocks)
    return BlockPayload(BlockShape.of(pool), ChunkStream(num_blocks, chunks))


def import_blocks(pool: BlockPool, block_ids: IdsLike, payload: BlockPayload) -> BlockPool:
    """Copies exported blocks into a pool, bit for bit; donates the pool.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      block_ids: i32[P]. Ids for the payload's blocks, in its order and all different. There may be
        more ids than blocks. A block for an id outside the pool is dropped.
      payload: The blocks; stays usable.

    Returns:
      The pool with the blocks in it.

    Raises:
      GeometryMismatchError: The payload's blocks have another shape than the pool's.
      AssertionError: `block_ids` is not a vector, or is shorter than the payload.
      ValueError: The pool was consumed before.
      ValueError: An id is not an integer, or does not fit in an int32.
    """
    check_live("pool", pool)
    (ids,) = as_rows(block_ids=block_ids)
    _require_ids(ids, payload.num_blocks)
    block_shape = BlockShape.of(pool)
    if payload.block_shape != block_shape:
        raise GeometryMismatchError(
            f"The payload's blocks are {payload.block_shape}; the pool's are {block_shape}. Import "
            "them into a pool of the geometry from which they were exported."
        )
    start = 0
    for chunk in payload.chunks:
        size = _num_blocks(chunk)
        pool = _scatter_blocks(pool, _part(ids, start, size), dict(chunk))
        start += size
    return pool


def chunk_sizes(num_blocks: int, block_bytes: int) -> list[int]:
    """Returns powers of two that add up to `num_blocks`: few programs, and no padding."""
    largest = 1 << max(0, (CHUNK_BYTES // block_bytes).bit_length() - 1)
    rest = num_blocks % largest
    powers = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [largest] * (num_blocks // largest) + powers


def empty_arrays(block_shape: BlockShape, num_blocks: int) -> dict[str, np.ndarray]:
    """Returns uninitialised arrays for blocks, by name: each [num_blocks, *shape of a block].

    They are aligned such that JAX on CPU reads them without a copy.
    """
    arrays = {}
    for name, part in block_shape.arrays:
        num_bytes = num_blocks * math.prod(part.shape) * part.dtype.itemsize
        memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        memory = memory[start : start + num_bytes].view(part.dtype)
        arrays[name] = memory.reshape(num_blocks, *part.shape)
    return arrays


def _num_blocks(blocks: BlockArrays) -> int:
    return min(array.shape[0] for array in blocks.values())


def _require_ids(ids: Ids, num_blocks: int) -> None:
    if not 0 <= num_blocks <= ids.size:
        raise AssertionError(f"{num_blocks} blocks need as many block_ids, got {ids.size}.")


def _part(ids: Ids, start: int, size: int) -> Ids:
    """Returns `ids[start : start + size]`; on the device, without a program per `start`."""
    if size == ids.size:
        return ids
    if isinstance(ids, np.ndarray):
        return ids[start : start + size]
    return lax.dynamic_slice_in_dim(ids, np.int32(start), size)


def _is_in_host_memory(pool: BlockPool) -> bool:
    """Returns whether NumPy can read the pool in place."""
    devices = _sharding_of(pool).device_set
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def _has_host_memory(pool: BlockPool) -> bool:
    """Returns whether programs on the pool's devices can write to pinned host memory."""
    return all(
        _HOST_MEMORY in {memory.kind for memory in device.addressable_memories()}
        for device in _sharding_of(pool).addressable_devices
    )


def _sharding_of(pool: BlockPool) -> jax.sharding.Sharding:
    """Returns the sharding of the arrays, which have the same one."""
    return next(iter(pool.arrays.values())).sharding


def _copy_chunks(pool: BlockPool, ids: Ids, num_blocks: int) -> Iterator[BlockArrays]:
    """Yields copies of blocks, chunk by chunk; waits if the pool is in host memory."""
    on_host, start = _is_in_host_memory(pool), 0
    if on_host:
        ids = np.asarray(ids)
    for size in chunk_sizes(num_blocks, BlockShape.of(pool).block_bytes):
        part = _part(ids, start, size)
        yield _take_blocks(pool, np.asarray(part)) if on_host else _send_blocks(pool, part)
        start += size


def _send_blocks(pool: BlockPool, block_ids: Ids) -> BlockArrays:
    to_host = _has_host_memory(pool)
    blocks = _gather_blocks(pool, block_ids, to_host=to_host)
    return blocks if to_host else jax.device_get(blocks)


def _take_blocks(pool: BlockPool, block_ids: np.ndarray) -> BlockArrays:
    blocks = empty_arrays(BlockShape.of(pool), block_ids.size)
    is_outside = (block_ids < 0) | (block_ids >= pool.num_blocks)
    for name, array in jax.block_until_ready(pool.arrays).items():
        # Not `np.asarray`: JAX keeps that view with the array, and while a view exists, a program
        # that donates the pool copies it instead.
        np.take(np.from_dlpack(array), block_ids, axis=0, out=blocks[name], mode="clip")
        blocks[name][is_outside] = 0
    return blocks


@functools.partial(jax.jit, static_argnames="to_host")
def _gather_blocks(pool: BlockPool, block_ids: jax.Array, *, to_host: bool) -> dict[str, jax.Array]:
    blocks = {name: read(array, block_ids, 0) for name, array in pool.arrays.items()}
    # Inside the program, so that the gathered blocks are scratch memory of the program, which the
    # next program reuses, however far the host runs ahead.
    return jax.device_put(blocks, jax.memory.Space.Host) if to_host else blocks


@functools.partial(jax.jit, donate_argnames="pool")
def _scatter_blocks(
    pool: BlockPool, block_ids: jax.Array, blocks: dict[str, jax.Array]
) -> BlockPool:
    blocks = jax.device_put(blocks, jax.memory.Space.Device)
    arrays = {
        name: array.at[block_ids].set(blocks[name], mode="drop", wrap_negative_indices=False)
        for name, array in pool.arrays.items()
    }
    return dataclasses.replace(pool, arrays=arrays)
