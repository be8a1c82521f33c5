"""Moving whole blocks between a pool and host memory, as the bits that the pool stores.

From an accelerator, a program copies them to pinned memory of the host, and nobody waits for it:
whatever is written to the pool afterwards, donated or not, is ordered behind its reading. A pool
on CPU is in host memory already, and NumPy copies its blocks at once: three times as fast, since
NumPy asks for huge pages where a program takes fresh memory page by page.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import jax
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ferrum_jax.checks import check_live
from ferrum_jax.errors import GeometryMismatchError
from ferrum_jax.ops.arguments import Ids, as_rows
from ferrum_jax.ops.indexing import read
from ferrum_jax.state import BlockPool

CHUNK_BYTES = 16 * 2**20
"""The most that one program moves, unless one block is larger: the extra room on the device."""

_HOST_MEMORY = "pinned_host"
_ALIGNMENT = 64

BlockArrays: TypeAlias = Mapping[str, jax.Array | np.ndarray]
"""Some blocks: each array of a pool by its name, its rows being only these blocks."""


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """What one block is made of. Blocks move only between pools of the same format.

    Attributes:
      dtype: The numbers' dtype.
      arrays: Name, shape and stored dtype of each array's part of one block.

    Example:
      >>> from ferrum_jax import CacheSpec, init
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                  num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
      >>> block_shape = BlockShape.of(init(spec).pool)
      >>> print(block_shape, "is", block_shape.block_bytes, "bytes a block")
      float32 as k float32[2, 1, 4, 4], v float32[2, 1, 4, 4] is 256 bytes a block
    """

    dtype: np.dtype
    arrays: tuple[tuple[str, jax.ShapeDtypeStruct], ...]

    @classmethod
    def of(cls, pool: BlockPool) -> "BlockShape":
        """Returns the format of a pool's blocks."""
        arrays = _arrays_of(pool).items()
        return cls(
            dtype=pool.dtype,
            arrays=tuple((name, jax.ShapeDtypeStruct(x.shape[1:], x.dtype)) for name, x in arrays),
        )

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return sum(math.prod(row.shape) * row.dtype.itemsize for _, row in self.arrays)

    def __str__(self) -> str:
        """Returns the dtype, and how each array of a block stores it."""
        arrays = (f"{name} {row.dtype.name}{list(row.shape)}" for name, row in self.arrays)
        return f"{self.dtype.name} as {', '.join(arrays)}"


@dataclasses.dataclass(frozen=True)
class ChunkStream:
    """Chunks that are made one after the other, anew each time that they are asked for.

    Whoever drops each before the next has no more in memory than one, and one that is being made.

    Attributes:
      num_blocks: Blocks in all of them.
      begin: Returns the chunks.
    """

    num_blocks: int
    begin: Callable[[], Iterator[BlockArrays]]

    def __iter__(self) -> Iterator[BlockArrays]:
        """Makes the chunks."""
        return self.begin()


@dataclasses.dataclass(frozen=True)
class BlockPayload:
    """Whole blocks outside their pool, in host memory. They may still be on their way.

    Attributes:
      block_shape: What each block is made of.
      chunks: The blocks in order, some in each chunk: arrays [blocks, *shape of the format].
    """

    block_shape: BlockShape
    chunks: tuple[BlockArrays, ...] | ChunkStream

    @classmethod
    def of_arrays(cls, block_shape: BlockShape, arrays: Mapping[str, np.ndarray]) -> "BlockPayload":
        """Returns arrays [P, *shape of the format], of P blocks, as a payload; no copy."""
        num_blocks = min(len(array) for array in arrays.values())
        chunks, start = [], 0
        for size in chunk_sizes(num_blocks, block_shape.block_bytes):
            chunks.append({name: array[start : start + size] for name, array in arrays.items()})
            start += size
        return cls(block_shape, tuple(chunks))

    @property
    def num_blocks(self) -> int:
        """Blocks that it holds."""
        if isinstance(self.chunks, ChunkStream):
            return self.chunks.num_blocks
        return sum(map(_num_rows, self.chunks))

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds; none of them is padding."""
        return self.num_blocks * self.block_shape.block_bytes

    @property
    def is_stream(self) -> bool:
        """Whether its blocks come into host memory only as they are asked for."""
        return isinstance(self.chunks, ChunkStream)

    def gathered(self) -> "BlockPayload":
        """Returns the same blocks, all of them in host memory or on their way."""
        return dataclasses.replace(self, chunks=tuple(self.chunks))


def export_blocks(
    pool: BlockPool, block_ids: ArrayLike, num_blocks: int | None = None
) -> BlockPayload:
    """Copies whole blocks, all layers of them, from a pool into host memory.

    The blocks may be freed, overwritten, or their pool donated, as soon as this returns: the copy
    is of the pool as it is now. Does not wait for an accelerator (but for one that cannot address
    pinned memory of the host); on CPU, waits and copies.

    Args:
      pool: The pool; stays usable.
      block_ids: i32[P]. Blocks, in the order in which the payload holds them; for one outside
        the pool the payload holds zeros. May lie on the device, such as a row of the tables.
      num_blocks: How many of `block_ids`, from the first on; all if absent.

    Returns:
      The blocks.

    Raises:
      AssertionError: `block_ids` is no vector, or shorter than `num_blocks`.
      ValueError: The pool was consumed before.
      ValueError: An id is not an integer, or does not fit in an int32.
    """
    return stream_blocks(pool, block_ids, num_blocks).gathered()


def stream_blocks(
    pool: BlockPool, block_ids: ArrayLike, num_blocks: int | None = None
) -> BlockPayload:
    """Returns what `export_blocks` does, but copies each chunk only as it is asked for.

    Args:
      pool: The pool. Neither it nor the blocks may change as long as the payload is read.
      block_ids: i32[P]. As in `export_blocks`.
      num_blocks: As in `export_blocks`.
    """
    check_live("pool", pool)
    (ids,) = as_rows(block_ids=block_ids)
    num_blocks = ids.size if num_blocks is None else num_blocks
    _require_ids(ids, num_blocks)
    chunks = functools.partial(_copy_chunks, pool, ids, num_blocks)
    return BlockPayload(BlockShape.of(pool), ChunkStream(num_blocks, chunks))


def import_blocks(pool: BlockPool, block_ids: ArrayLike, payload: BlockPayload) -> BlockPool:
    """Puts exported blocks back into a pool, bit for bit; donates the pool.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      block_ids: i32[P]. Where the payload's blocks go, in its order and no two alike; P may be
        more than it holds. A block for an id outside the pool is dropped.
      payload: The blocks; stays usable.

    Returns:
      The pool with the blocks in it.

    Raises:
      GeometryMismatchError: The payload's blocks are of another format than the pool's.
      AssertionError: `block_ids` is no vector, or shorter than the payload.
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
            "them into a pool of the geometry that they were exported from."
        )
    start = 0
    for rows in payload.chunks:
        size = _num_rows(rows)
        pool = _scatter_rows(pool, _part(ids, start, size), dict(rows))
        start += size
    return pool


def chunk_sizes(num_blocks: int, block_bytes: int) -> list[int]:
    """Returns sizes that add up to `num_blocks`, powers of two: few programs, and no padding."""
    largest = 1 << max(0, (CHUNK_BYTES // block_bytes).bit_length() - 1)
    rest = num_blocks % largest
    powers = [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]
    return [largest] * (num_blocks // largest) + powers


def empty_arrays(block_shape: BlockShape, num_blocks: int) -> dict[str, np.ndarray]:
    """Returns memory for blocks, by array, to be filled: each [num_blocks, *shape].

    It begins where JAX on CPU asks arrays to begin, who then reads it without a copy of its own.
    """
    arrays = {}
    for name, row in block_shape.arrays:
        num_bytes = num_blocks * math.prod(row.shape) * row.dtype.itemsize
        memory = np.empty(num_bytes + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        memory = memory[start : start + num_bytes].view(row.dtype)
        arrays[name] = memory.reshape(num_blocks, *row.shape)
    return arrays


def _arrays_of(pool: BlockPool) -> dict[str, jax.Array]:
    """Returns a pool's arrays by name: all that is not static."""
    fields = dataclasses.fields(pool)
    return {f.name: getattr(pool, f.name) for f in fields if not f.metadata.get("static")}


def _num_rows(rows: BlockArrays) -> int:
    return min(array.shape[0] for array in rows.values())


def _require_ids(ids: Ids, num_blocks: int) -> None:
    if not 0 <= num_blocks <= ids.size:
        raise AssertionError(f"{num_blocks} blocks need as many block_ids, got {ids.size}.")


def _part(ids: Ids, start: int, size: int) -> Ids:
    """Returns some of the ids, without a program for each `start` where they are on the device."""
    if size == ids.size:
        return ids
    if isinstance(ids, np.ndarray):
        return ids[start : start + size]
    return lax.dynamic_slice_in_dim(ids, np.int32(start), size)


def _is_in_host_memory(pool: BlockPool) -> bool:
    """Says whether NumPy can read the pool where it is."""
    devices = pool.k.sharding.device_set
    return len(devices) == 1 and all(device.platform == "cpu" for device in devices)


def _has_host_memory(pool: BlockPool) -> bool:
    """Says whether programs of the pool's devices can write to pinned memory of the host."""
    return all(
        _HOST_MEMORY in {memory.kind for memory in device.addressable_memories()}
        for device in pool.k.sharding.addressable_devices
    )


def _copy_chunks(pool: BlockPool, ids: Ids, num_blocks: int) -> Iterator[BlockArrays]:
    """Copies blocks chunk by chunk; waits for those of a pool that is in host memory itself."""
    is_here, start = _is_in_host_memory(pool), 0
    if is_here:
        ids = np.asarray(ids)
    for size in chunk_sizes(num_blocks, BlockShape.of(pool).block_bytes):
        part = _part(ids, start, size)
        yield _take_rows(pool, np.asarray(part)) if is_here else _send_rows(pool, part)
        start += size


def _send_rows(pool: BlockPool, block_ids: Ids) -> BlockArrays:
    has_host_memory = _has_host_memory(pool)
    rows = _gather_rows(pool, block_ids, to_host=has_host_memory)
    return rows if has_host_memory else jax.device_get(rows)


def _take_rows(pool: BlockPool, block_ids: np.ndarray) -> BlockArrays:
    rows = empty_arrays(BlockShape.of(pool), block_ids.size)
    is_outside = (block_ids < 0) | (block_ids >= pool.num_blocks)
    for name, array in jax.block_until_ready(_arrays_of(pool)).items():
        # Not `np.asarray`: JAX keeps that view with the array, and while there is a view of a
        # pool, a program that donates the pool copies it instead.
        np.take(np.from_dlpack(array), block_ids, axis=0, out=rows[name], mode="clip")
        rows[name][is_outside] = 0
    return rows


@functools.partial(jax.jit, static_argnames="to_host")
def _gather_rows(pool: BlockPool, block_ids: jax.Array, *, to_host: bool) -> dict[str, jax.Array]:
    rows = {name: read(array, block_ids, 0) for name, array in _arrays_of(pool).items()}
    # Inside the program, so that the blocks gathered on the device are its scratch, which the next
    # program has again, however far the host runs ahead.
    return jax.device_put(rows, jax.memory.Space.Host) if to_host else rows


@functools.partial(jax.jit, donate_argnames="pool")
def _scatter_rows(pool: BlockPool, block_ids: jax.Array, rows: dict[str, jax.Array]) -> BlockPool:
    rows = jax.device_put(rows, jax.memory.Space.Device)
    arrays = {
        name: array.at[block_ids].set(rows[name], mode="drop", wrap_negative_indices=False)
        for name, array in _arrays_of(pool).items()
    }
    return dataclasses.replace(pool, **arrays)
