"""What the blocks hold: writing tokens into a pool, reading them back, copying blocks."""

import dataclasses
import functools
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count
from ferrum_jax.encoding import encode
from ferrum_jax.formats import KeysAndValues
from ferrum_jax.ops.buckets import pad_host_ids
from ferrum_jax.ops.compressed import read_blocks, write_tokens
from ferrum_jax.ops.indexing import columns, index_or_end, read
from ferrum_jax.ops.pages import Pages, change_blocks, newest_tokens
from ferrum_jax.ops.platforms import traced_platforms
from ferrum_jax.ops.tables import BlockCopies
from ferrum_jax.state import BlockPool, CacheState
from ferrum_jax.types import NULL_BLOCK, TokenFormat

Ids: TypeAlias = jax.Array | np.ndarray

# A TPU keeps numbers in tiles of 128 wide.
_TPU_LANES = 128


def write(
    pool: BlockPool,
    layer: ArrayLike,
    slots: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    formats: ArrayLike | None = None,
) -> BlockPool:
    """Writes tokens into one layer of a pool; donates the pool.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      layer: i32[]. Layer to write. One outside the pool drops everything.
      slots: i32[...]. Where each token goes: `block_id * pool.slots_per_block + offset`. A slot
        outside the pool is dropped. Two tokens for one slot: which one stays is undefined. The
        last axis is best of one row's consecutive tokens: compressed blocks are written whole.
      k: [..., H, D]. Keys, rounded to the pool's dtype, or compressed.
      v: [..., H, D]. Values.
      formats: i32[...]. The `TokenFormat` of each token's block; native if absent.

    Returns:
      The pool with the tokens in it.

    Raises:
      AssertionError: The shapes do not fit each other or the pool.
    """
    slots = as_ids(slots)
    chex.assert_shape([k, v], (*slots.shape, pool.num_kv_heads, pool.head_dim))
    if len(pool.formats) == 1:
        return _write(pool, as_ids(layer), slots, k, v)
    formats = np.zeros(slots.shape, np.int32) if formats is None else as_ids(formats)
    chex.assert_equal_shape([slots, formats])
    return _write_each(pool, as_ids(layer), (slots, formats), k, v)


def gather(
    state: CacheState,
    layer: ArrayLike,
    seq_id: ArrayLike,
    token_format: TokenFormat = TokenFormat.Native,
    *,
    max_blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns one sequence's keys and values of one layer, contiguous.

    The shape follows `max_blocks`, never the sequence's length: a program is compiled for each
    format and each `max_blocks`.

    Args:
      state: The cache.
      layer: i32[]. Layer to read.
      seq_id: i32[]. Row to read.
      token_format: How the row's tokens are written (static).
      max_blocks: Blocks to read, the row's first ones (static); all M if absent or above M.

    Returns:
      `(k, v)`, each [P * B, H, D] in the pool's dtype, P blocks read, B tokens per block of the
      format: the sequence's tokens, then zeros. All zeros for a row that is free or in another
      format, and for a row or layer out of range.

    Raises:
      ValueError: `max_blocks` is not a positive integer.
    """
    size = state.tables.max_blocks_per_seq
    if max_blocks is not None:
        check_count("max_blocks", max_blocks)
        size = min(size, max_blocks)
    return _gather(state, as_ids(layer), as_ids(seq_id), token_format, size)


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
    """Returns both as int32 vectors; raises AssertionError unless they are of one length.

    What the host names is padded with `NULL_BLOCK` to a power of two.
    """
    sources, targets = as_ids(sources), as_ids(targets)
    chex.assert_rank([sources, targets], 1)
    chex.assert_equal_shape([sources, targets])
    sources, targets = pad_host_ids(sources, targets)
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
    on_tpu = _write_heads if pool.head_dim % _TPU_LANES == 0 else _write_whole_blocks

    def write_one(
        array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        args = array, layer, slots, encode(tokens, pool.dtype, array.dtype)
        if "tpu" not in traced_platforms():
            return _write_tokens(*args)
        return lax.platform_dependent(*args, tpu=on_tpu, default=_write_tokens)

    if pool.sharding is not None:
        # Each device writes its own heads: left to itself, XLA may exchange tokens before.
        heads, everywhere = pool.sharding.spec, PartitionSpec()
        its_tokens = PartitionSpec(*[None] * (k.ndim - 2), pool.mesh_axis)
        write_one = jax.shard_map(
            write_one,
            mesh=pool.sharding.mesh,
            in_specs=(heads, everywhere, everywhere, its_tokens),
            out_specs=heads,
            check_vma=False,
        )
    return dataclasses.replace(
        pool, k=write_one(pool.k, layer, slots, k), v=write_one(pool.v, layer, slots, v)
    )


def _write_tokens(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Writes all heads of each token at once (array [N, L, H, B, D], tokens [..., H, D])."""
    block_size = array.shape[3]
    # A slot below zero has a block below zero, which is outside too.
    place = array.at[slots // block_size, layer, :, slots % block_size]
    return place.set(tokens, mode="drop", wrap_negative_indices=False)


def _write_heads(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Does as `_write_tokens`, one row of D numbers at a time.

    To write all heads of a token, XLA for TPU wants them side by side, and brings the whole pool
    into that order and back in each layer.
    """
    num_heads, block_size, head_dim = array.shape[2:]
    slots = slots.reshape(-1, 1)
    place = array.at[slots // block_size, layer, columns(num_heads), slots % block_size]
    rows = tokens.reshape(-1, num_heads, head_dim)
    return place.set(rows, mode="drop", wrap_negative_indices=False)


def _write_whole_blocks(
    array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
) -> jax.Array:
    """Does as `_write_tokens`, by reading the blocks, changing them and writing them back.

    On a TPU the tokens of such heads come last (`attention.tpu_tiling.has_tokens_last`): a token's
    numbers lie far from each other, and XLA would turn the whole pool round to write some. Blocks
    it writes where they are.
    """
    num_heads, block_size, head_dim = array.shape[2:]
    block_ids = slots // block_size
    slots, tokens = slots.reshape(-1), tokens.reshape(-1, num_heads, head_dim)

    def change(block_ids: jax.Array, pages: Pages) -> Pages:
        sources = newest_tokens(slots, block_ids, block_size)
        new = tokens.at[sources].get(mode="clip", wrap_negative_indices=False).swapaxes(1, 2)
        return (jnp.where((sources >= 0)[:, None, :, None], new, pages[0]),)

    (array,) = change_blocks((array,), layer, block_ids, change)
    return array


@functools.partial(jax.jit, donate_argnames="pool")
def _write_each(
    pool: BlockPool,
    layer: jax.Array,
    places: tuple[jax.Array, jax.Array],
    k: jax.Array,
    v: jax.Array,
) -> BlockPool:
    """Writes tokens of several formats; see `write`."""
    slots, formats = places
    block_ids = index_or_end(slots // pool.slots_per_block, pool.num_blocks)
    offsets = slots % pool.slots_per_block
    for token_format in pool.formats:
        is_meant = (formats == token_format) & (offsets < pool.tokens_per_block(token_format))
        blocks = jnp.where(is_meant, block_ids, pool.num_blocks)
        if token_format == TokenFormat.Native:
            native_slots = jnp.where(is_meant, blocks * pool.block_size + offsets, -1)
            pool = _write(pool, layer, native_slots, k, v)
        else:
            pool = write_tokens(pool, layer, (blocks, offsets), KeysAndValues(k, v), token_format)
    return pool


@functools.partial(jax.jit, static_argnames=("token_format", "max_blocks"))
def _gather(
    state: CacheState,
    layer: jax.Array,
    seq_id: jax.Array,
    token_format: TokenFormat,
    max_blocks: int,
) -> tuple[jax.Array, jax.Array]:
    pool, tables = state.pool, state.tables
    row = index_or_end(seq_id, tables.max_seqs)
    block_ids = read(tables.block_ids, row, NULL_BLOCK)[:max_blocks]
    num_tokens = read(tables.seq_lens, row, 0)
    is_here = (layer >= 0) & (layer < pool.num_layers)
    is_here &= read(tables.formats, row, 0) == token_format
    num_tokens = jnp.where(is_here, num_tokens, 0)
    room = block_ids.size * pool.tokens_per_block(token_format)
    is_held = jnp.arange(room, dtype=jnp.int32) < num_tokens

    def tokens(x: jax.Array) -> jax.Array:
        flat = x.astype(pool.dtype).swapaxes(0, 1)
        return jnp.where(is_held[:, None, None], flat, jnp.zeros((), pool.dtype))

    k, v = read_blocks(pool, layer, block_ids, token_format)
    return tokens(k), tokens(v)


@functools.partial(jax.jit, donate_argnames="pool")
def _copy_blocks(pool: BlockPool, sources: jax.Array, targets: jax.Array) -> BlockPool:
    sources = index_or_end(sources, pool.num_blocks)
    targets = index_or_end(targets, pool.num_blocks)
    targets = jnp.where(sources < pool.num_blocks, targets, pool.num_blocks)
    num_tokens = jnp.full(sources.shape, pool.block_size, jnp.int32)
    return apply_copies(pool, BlockCopies(sources, sources, targets, num_tokens))
