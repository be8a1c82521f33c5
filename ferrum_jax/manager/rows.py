"""The blocks of one row, on their way out of a device's cache and into another one, or back."""

import functools

import jax
import numpy as np
from jax import lax

from ferrum_jax.manager.counts import RowShape
from ferrum_jax.manager.device_cache import DeviceCache
from ferrum_jax.manager.programs import one_row
from ferrum_jax.ops.transfer import (
    BlockArrays,
    BlockPayload,
    BlockShape,
    ChunkStream,
    import_blocks,
    stream_blocks,
)
from ferrum_jax.state import CacheState


def export_row(cache: DeviceCache, seq_id: int) -> BlockPayload:
    """Copies a row's blocks into host memory; does not wait for the device."""
    return stream_row(cache, seq_id).gathered()


def stream_row(cache: DeviceCache, seq_id: int) -> BlockPayload:
    """Returns a row's blocks, each chunk copied as it is asked for, until the cache changes."""
    tables, num_blocks = cache.state.tables, int(cache.num_blocks_held[seq_id])
    row = one_row(tables.block_ids, np.asarray(seq_id, np.int32))
    return stream_blocks(cache.state.pool, row, num_blocks)


def restore_row(
    cache: DeviceCache, shape: RowShape, payload: BlockPayload, *, waits: bool = False
) -> int:
    """Starts a sequence with the blocks of another one, or changes nothing.

    Args:
      cache: Where. There is room.
      shape: How much it holds, and how.
      payload: Its blocks, of the cache's format.
      waits: Whether to return only when the blocks have arrived.

    Returns:
      Its row.
    """
    seq_id = cache.allocate_like(shape)
    row, first = np.asarray(seq_id, np.int32), 0
    with cache.or_free(seq_id):
        for chunk in payload.chunks:
            part = BlockPayload(payload.block_shape, (chunk,))
            tables = cache.state.tables
            block_ids = _part_of_row(
                tables.block_ids, row, np.asarray(first, np.int32), part.num_blocks
            )
            # Kept at once: a later chunk may fail, and the pool before this one is no more.
            cache.state = CacheState(import_blocks(cache.state.pool, block_ids, part), tables)
            first += part.num_blocks
            if payload.is_stream:  # So that its chunks do not wait for the device side by side.
                jax.block_until_ready(cache.state.pool)
        if waits:
            jax.block_until_ready(cache.state.pool)
    return seq_id


def stored_for(cache: DeviceCache, payload: BlockPayload) -> BlockPayload:
    """Returns blocks of an equal geometry as another device's pool stores them.

    As they are asked for, they are waited for, and then lie in plain memory of the host, which no
    device owns. The bits stay the same, though one platform may call them bfloat16 and another
    uint16.
    """
    block_shape = BlockShape.of(cache.state.pool)
    stored = dict(block_shape.arrays)

    def store(chunk: BlockArrays) -> BlockArrays:
        rows = jax.device_get(dict(chunk))
        return {name: np.asarray(array).view(stored[name].dtype) for name, array in rows.items()}

    chunks = ChunkStream(payload.num_blocks, lambda: map(store, payload.chunks))
    return BlockPayload(block_shape, chunks)


@functools.partial(jax.jit, static_argnames="size")
def _part_of_row(block_ids: jax.Array, seq_id: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return lax.dynamic_slice(block_ids, (seq_id, first), (1, size))[0]
