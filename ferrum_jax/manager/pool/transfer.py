"""Blocks on their way into a pool, from host memory, files or another device's pool."""

from collections.abc import Iterator, Sequence

import jax
import numpy as np

import ferrum_jax.manager.pool.reads as reads
from ferrum_jax.ops.transfer import (
    BlockArrays,
    BlockPayload,
    BlockShape,
    ChunkStream,
    import_blocks,
)
from ferrum_jax.state import BlockPool, CacheState, PageTables


def import_chunks(
    pool: BlockPool, tables: PageTables, seq_id: int, payload: BlockPayload
) -> Iterator[BlockPool]:
    """Writes a payload into a sequence's blocks, in the order of `PoolQueries.stream_seq`.

    Args:
      pool: The pool, which is donated.
      tables: The tables of that pool.
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
        block_ids = reads.part_of_seq(tables.block_ids, seq, start, part.num_blocks, tables.windows)
        pool = import_blocks(pool, block_ids, part)
        yield pool
        first += part.num_blocks
        if payload.is_stream:  # So that its chunks do not wait for the device side by side.
            jax.block_until_ready(pool)


def stored_for(state: CacheState, payloads: Sequence[BlockPayload]) -> list[BlockPayload]:
    """Returns the blocks of each pool as another device's pools of equal geometry store them.

    Each chunk is waited for when it is asked for, and then lies in plain memory of the host, which
    no device owns. The bits stay the same, though one platform may call them bfloat16 and another
    uint16.

    Args:
      state: The cache with the pools that will receive the blocks.
      payloads: The blocks for each pool.
    """
    return [_stored_in(*pair) for pair in zip(state.pools, payloads, strict=True)]


def _stored_in(pool: BlockPool, payload: BlockPayload) -> BlockPayload:
    block_shape = BlockShape.of(pool)
    stored = dict(block_shape.arrays)

    def store(chunk: BlockArrays) -> BlockArrays:
        rows = jax.device_get(dict(chunk))
        return {name: np.asarray(array).view(stored[name].dtype) for name, array in rows.items()}

    chunks = ChunkStream(payload.num_blocks, lambda: map(store, payload.chunks))
    return BlockPayload(block_shape, chunks)
