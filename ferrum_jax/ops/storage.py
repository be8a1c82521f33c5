"""What the blocks hold: writing tokens into a pool, reading them back, copying blocks."""

import dataclasses
import functools
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ferrum_jax.encoding import decode, encode
from ferrum_jax.ops.indexing import columns, index_or_end, read
from ferrum_jax.ops.tables import BlockCopies
from ferrum_jax.state import BlockPool, CacheState
from ferrum_jax.types import NULL_BLOCK

Ids: TypeAlias = jax.Array | np.ndarray


def write(
    pool: BlockPool, layer: ArrayLike, slots: ArrayLike, k: ArrayLike, v: ArrayLike
) -> BlockPool:
    """Writes tokens into one layer of a pool; donates the pool.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      layer: i32[]. Layer to write. One outside the pool drops everything.
      slots: i32[...]. Where each token goes: `block_id * block_size + offset`. A slot outside
        the pool is dropped. Two tokens for one slot: which one stays is undefined.
      k: [..., H, D]. Keys, rounded to the pool's dtype.
      v: [..., H, D]. Values.

    Returns:
      The pool with the tokens in it.

    Raises:
      AssertionError: The shapes do not fit each other or the pool.
    """
    slots = as_ids(slots)
    chex.assert_shape([k, v], (*slots.shape, pool.num_kv_heads, pool.head_dim))
    return _write(pool, as_ids(layer), slots, k, v)


def gather(state: CacheState, layer: ArrayLike, seq_id: ArrayLike) -> tuple[jax.Array, jax.Array]:
    """Returns one sequence's keys and values of one layer, contiguous.

    Args:
      state: The cache.
      layer: i32[]. Layer to read.
      seq_id: i32[]. Row to read.

    Returns:
      `(k, v)`, each [M * B, H, D] in the pool's dtype: the sequence's tokens, then zeros. All
      zeros for a row that is free, and for a row or layer out of range.
    """
    return _gather(state, as_ids(layer), as_ids(seq_id))


def copy_blocks(pool: BlockPool, sources: ArrayLike, targets: ArrayLike) -> BlockPool:
    """Copies whole blocks, all layers of them; donates the pool.

    All are read before any is written, so a target may be another pair's source.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      sources: i32[P]. Blocks to read.
      targets: i32[P]. Blocks to write, no two alike. A pair with an id outside the pool
        (`NULL_BLOCK`, say) is ignored.

    Returns:
      The pool with the copies in it.

    Raises:
      AssertionError: The two are not vectors of one length.
    """
    return _copy_blocks(pool, *as_pairs(sources, targets))


def zero_blocks(pool: BlockPool, block_ids: jax.Array) -> BlockPool:
    """Zeroes blocks (i32[P], out of range for none), at the cost of those it zeroes."""
    block_ids = jnp.sort(index_or_end(block_ids, pool.num_blocks))  # Those to skip come last.
    num_zeroed = jnp.sum(block_ids < pool.num_blocks, dtype=jnp.int32)
    zeros = jnp.zeros((1, *pool.k.shape[1:]), pool.k.dtype)

    def zero(i: jax.Array, pool: BlockPool) -> BlockPool:
        k, v = (
            lax.dynamic_update_slice_in_dim(array, zeros, block_ids[i], axis=0)
            for array in (pool.k, pool.v)
        )
        return dataclasses.replace(pool, k=k, v=v)

    return lax.fori_loop(0, num_zeroed, zero, pool)


def apply_copies(pool: BlockPool, copies: BlockCopies) -> BlockPool:
    """Moves the bytes that changed tables ask for, if any."""
    return _copy_if_any(pool, copies)


def _copy(pool: BlockPool, copies: BlockCopies) -> BlockPool:
    is_source = columns(pool.block_size) < copies.num_tokens[:, None]
    is_source = is_source[:, None, None, :, None]

    def copied(array: jax.Array) -> jax.Array:
        sources = array.at[copies.sources].get(mode="clip", wrap_negative_indices=False)
        behind = array.at[copies.backgrounds].get(mode="clip", wrap_negative_indices=False)
        blocks = jnp.where(is_source, sources, behind)
        return array.at[copies.targets].set(blocks, mode="drop", wrap_negative_indices=False)

    return dataclasses.replace(pool, k=copied(pool.k), v=copied(pool.v))


@jax.custom_batching.custom_vmap
def _copy_if_any(pool: BlockPool, copies: BlockCopies) -> BlockPool:
    # Most cuts of a row need no copy, and a block of all layers is large.
    is_any = jnp.any(copies.targets < pool.num_blocks)
    return lax.cond(is_any, _copy, lambda pool, _: pool, pool, copies)


@_copy_if_any.def_vmap
def _copy_in_each(
    axis_size: int, is_batched: list, pool: BlockPool, copies: BlockCopies
) -> tuple[BlockPool, BlockPool]:
    # Under `vmap` a choice between two pools would read and write both of them whole.
    axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(is_batched))
    pools = jax.vmap(_copy, in_axes=axes, axis_size=axis_size)(pool, copies)
    return pools, jax.tree.map(lambda _: True, pools)


def as_pairs(sources: ArrayLike, targets: ArrayLike) -> tuple[Ids, Ids]:
    """Returns both as int32 vectors; raises AssertionError unless they are of one length."""
    sources, targets = as_ids(sources), as_ids(targets)
    chex.assert_rank([sources, targets], 1)
    chex.assert_equal_shape([sources, targets])
    return sources, targets


def as_ids(ids: ArrayLike) -> Ids:
    """Returns ids, or counts, as an int32 array, on the device if they are there already.

    Raises:
      AssertionError: A device array does not hold integers.
      ValueError: A number is no integer or does not fit, so that it would turn into another.
    """
    if isinstance(ids, jax.Array):
        chex.assert_type(ids, int)
        return ids if ids.dtype == jnp.int32 else ids.astype(jnp.int32)
    given = np.asarray(ids)
    ids = given.astype(np.int32)
    if not np.array_equal(ids, given):
        raise ValueError(f"Ids and counts must be integers within int32, got {given}.")
    return ids


@functools.partial(jax.jit, donate_argnames="pool")
def _write(
    pool: BlockPool, layer: jax.Array, slots: jax.Array, k: jax.Array, v: jax.Array
) -> BlockPool:
    block_ids, offsets = slots // pool.block_size, slots % pool.block_size

    def scatter(array: jax.Array, tokens: jax.Array) -> jax.Array:
        # A slot below zero has a block below zero, which is outside too.
        place = array.at[block_ids, layer, :, offsets]
        stored = encode(tokens, pool.dtype, array.dtype)
        return place.set(stored, mode="drop", wrap_negative_indices=False)

    return dataclasses.replace(pool, k=scatter(pool.k, k), v=scatter(pool.v, v))


@jax.jit
def _gather(state: CacheState, layer: jax.Array, seq_id: jax.Array) -> tuple[jax.Array, jax.Array]:
    pool, tables = state.pool, state.tables
    row = index_or_end(seq_id, tables.max_seqs)
    block_ids = read(tables.block_ids, row, NULL_BLOCK)
    num_tokens = read(tables.seq_lens, row, 0)
    num_tokens = jnp.where((layer >= 0) & (layer < pool.num_layers), num_tokens, 0)
    is_held = jnp.arange(block_ids.size * pool.block_size, dtype=jnp.int32) < num_tokens

    def tokens(array: jax.Array) -> jax.Array:
        blocks = decode(array.at[block_ids, layer].get(mode="clip"), pool.dtype)
        flat = blocks.swapaxes(1, 2).reshape(-1, pool.num_kv_heads, pool.head_dim)
        return jnp.where(is_held[:, None, None], flat, jnp.zeros((), pool.dtype))

    return tokens(pool.k), tokens(pool.v)


@functools.partial(jax.jit, donate_argnames="pool")
def _copy_blocks(pool: BlockPool, sources: jax.Array, targets: jax.Array) -> BlockPool:
    sources = index_or_end(sources, pool.num_blocks)
    targets = index_or_end(targets, pool.num_blocks)
    targets = jnp.where(sources < pool.num_blocks, targets, pool.num_blocks)
    num_tokens = jnp.full(sources.shape, pool.block_size, jnp.int32)
    return apply_copies(pool, BlockCopies(sources, sources, targets, num_tokens))
