"""Blocks on their way into a pool, from host memory, files or another device's pool."""

from collections.abc import Iterator

import jax
import numpy as np

import ferrum_jax.manager.pool.programs as programs
from ferrum_jax.ops.transfer import (
    BlockArrays,
    BlockPayload,
    BlockShape,
    ChunkStream,
    import_blocks,
)
from ferrum_jax.state import BlockPool, PageTables


def import_chunks(
    pool: BlockPool, tables: PageTables, seq_id: int, payload: BlockPayload
) -> Iterator[BlockPool]:
    """Writes a payload into a sequence's blocks, in the order of `PoolQueries.stream_seq`.

    Args:
      pool: The pool, which is donated.
      tables: The tables of the same cache.
      seq_id: The sequence, which holds as many blocks as the payload.
      payload: The blocks, of the pool's format.

    Yields:
      The pool after each chunk, to be kept at once: a later chunk may fail, and the pool before
      this one is consumed.
    """
    seq, first = np.asarray(seq_id, np.int32), 0
    for chunk in payload.chunks:
        part = BlockPayload(payload.block_shape, (chunk,))
        start = np.asarray(first, np.int32)
        block_ids = programs.part_of_seq(
            tables.block_ids, seq, start, part.num_blocks, tables.windows
        )
        pool = import_blocks(pool, block_ids, part)
        yield pool
        first += part.num_blocks
        if payload.is_stream:  # So that its chunks do not wait for the device side by side.
            jax.block_until_ready(pool)


def stored_for(pool: BlockPool, payload: BlockPayload) -> BlockPayload:
    """Returns blocks of an equal geometry as another device's pool stores them.

    Each chunk is waited for when it is asked for, and then lies in plain memory of the host, which
    no device owns. The bits stay the same, though one platform may call them bfloat16 and another
    uint16.

    Args:
      pool: The pool that will receive the blocks.
      payload: The blocks.
    """
    block_shape = BlockShape.of(pool)
    stored = dict(block_shape.arrays)

    def store(chunk: BlockArrays) -> BlockArrays:
        rows = jax.device_get(dict(chunk))
        return {name: np.asarray(array).view(stored[name].dtype) for name, array in rows.items()}

    chunks = ChunkStream(payload.num_blocks, lambda: map(store, payload.chunks))
    return BlockPayload(block_shape, chunks)
