"""Writes tokens into compressed blocks one by one, and reads whole blocks."""

import dataclasses
from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ferrum_jax.checks import INT32_LIMIT
from ferrum_jax.codecs import CODECS, unrotate
from ferrum_jax.meshes import on_each_device
from ferrum_jax.ops.block_updates import LayerBlocks, change_blocks, newest_tokens
from ferrum_jax.ops.indexing import index_or_end
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.state import BlockPool, CacheState
from ferrum_jax.types import TokenFormat


def enable_formats(
    state: CacheState, formats: Iterable[TokenFormat], max_blocks: int | None = None
) -> CacheState:
    """Allows rows to use more token formats; no array changes.

    Programs that take the cache are compiled again, for these formats.

    Args:
      state: The cache.
      formats: Formats to enable.
      max_blocks: Number of blocks to which the pool may grow; its present number if absent.

    Returns:
      The same cache, with the formats enabled.

    Raises:
      ValueError: The pool's geometry does not allow a format, or it would have 2**31 slots.
    """
    enabled = tuple(sorted({*state.pool.formats, *formats}))
    pool = dataclasses.replace(state.pool, formats=enabled)
    _check_slots("Blocks of the pool", max_blocks or pool.num_blocks, pool)
    _check_slots("max_blocks_per_seq", state.tables.max_blocks_per_seq, pool)
    tables = dataclasses.replace(state.tables, block_sizes=pool.block_sizes)
    return state.with_pools([pool]).with_tables([tables])


def _check_slots(name: str, num_blocks: int, pool: BlockPool) -> None:
    """Raises ValueError if int32 cannot count the slots."""
    if num_blocks * pool.slots_per_block >= INT32_LIMIT:
        names = ", ".join(f.name for f in pool.formats if not CODECS[f].is_native)
        raise ValueError(
            f"{name} times tokens per block must be below 2**31 (slots are int32): a block of "
            f"{pool.block_size} native tokens holds up to {pool.slots_per_block} in {names}, and "
            f"there are {num_blocks} blocks. Use fewer blocks, or a format of more bits."
        )


def write_tokens(
    pool: BlockPool,
    layer: jax.Array,
    block_ids: jax.Array,
    offsets: jax.Array,
    kv: KeysAndValues,
    token_format: TokenFormat,
) -> BlockPool:
    """Writes tokens into blocks of a format that is not native.

    Args:
      pool: The pool.
      layer: i32[]. Layer to write.
      block_ids: i32[..., T]. Block of each token; a token for a block outside the pool is dropped.
      offsets: i32[..., T]. Offset of each token in its block.
      kv: Keys and values, each [..., H, D].
      token_format: Format of the blocks (static).

    Returns:
      The pool with the tokens in it.
    """
    codec = pool.codec(token_format)
    block_ids = index_or_end(block_ids, pool.num_blocks)

    def write_all(
        arrays: LayerBlocks,
        layer: jax.Array,
        block_ids: jax.Array,
        offsets: jax.Array,
        kv: KeysAndValues,
    ) -> LayerBlocks:
        slots = (block_ids * codec.num_tokens + offsets).reshape(-1)
        packed = codec.pack(*(x.astype(jnp.float32).reshape(-1, *x.shape[-2:]) for x in kv))

        def change(block_ids: jax.Array, halves: LayerBlocks) -> LayerBlocks:
            sources = newest_tokens(slots, block_ids, codec.num_tokens)
            tokens = jnp.maximum(sources, 0)
            new = jax.tree.map(lambda words: words[tokens].swapaxes(1, 2), packed)
            k_half, v_half = halves
            return codec.replace(k_half, v_half, new, (sources >= 0)[:, None, :])

        return change_blocks(arrays, layer, block_ids, change)

    heads = pool.heads_at(2)
    args = {
        "pool": (tuple(pool.payload.split(pool.arrays)), heads),
        "layer": (layer, PartitionSpec()),
        "block_ids": (block_ids, PartitionSpec()),
        "offsets": (offsets, PartitionSpec()),
        "tokens": (kv, pool.heads_at(block_ids.ndim)),
    }
    arrays = on_each_device(write_all, pool.mesh, args, heads)
    return dataclasses.replace(pool, arrays=pool.payload.join(*arrays))


def read_blocks(
    pool: BlockPool, layer: jax.Array, block_ids: jax.Array, token_format: TokenFormat
) -> KeysAndValues:
    """Reads one layer of whole blocks, as numbers.

    Args:
      pool: The pool.
      layer: i32[]. Layer to read, clipped to the pool's layers.
      block_ids: i32[P]. Blocks, clipped to the pool's blocks.
      token_format: Format of the blocks (static).

    Returns:
      Keys and values, each [H, P * T, D] for T tokens per block, including slots that were never
      written; in the pool's dtype if native, else float32.
    """
    blocks = {name: x.at[block_ids, layer].get(mode="clip") for name, x in pool.arrays.items()}
    return decode_blocks(pool, pool.payload.split(blocks), token_format)


def decode_blocks(
    pool: BlockPool, halves: KeysAndValues, token_format: TokenFormat
) -> KeysAndValues:
    """Returns the tokens of blocks (halves, each [P, H, B, D] as stored) as `read_blocks` does."""
    codec = pool.codec(token_format)
    k, v = codec.decode(*halves)
    k = unrotate(k, pool.dtype) if codec.rotates_keys else k
    v = unrotate(v, pool.dtype) if codec.rotates_values else v
    shape = pool.num_kv_heads, -1, pool.head_dim
    return KeysAndValues(*(x.swapaxes(0, 1).reshape(shape) for x in (k, v)))


def encode_blocks(pool: BlockPool, kv: KeysAndValues, token_format: TokenFormat) -> KeysAndValues:
    """Encodes tokens (each f32[H, P * T, D]) as whole blocks; the inverse of `decode_blocks`."""
    size = pool.tokens_per_block(token_format)
    shape = pool.num_kv_heads, -1, size, pool.head_dim
    k, v = (x.reshape(shape).swapaxes(0, 1) for x in kv)
    return pool.codec(token_format).encode(k, v, pool.stored_dtype)
