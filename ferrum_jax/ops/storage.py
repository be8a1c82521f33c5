"""Writes tokens into a pool, reads them, and copies and zeroes blocks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count, check_live
from ferrum_jax.codecs import CODECS, format_of
from ferrum_jax.encoding import encode, round_to
from ferrum_jax.meshes import on_each_device
from ferrum_jax.ops.arguments import as_ids, as_padded_rows, as_scalars
from ferrum_jax.ops.compressed import read_blocks, write_tokens
from ferrum_jax.ops.indexing import columns, index_or_end, read
from ferrum_jax.ops.rows import rows_of
from ferrum_jax.ops.tables import BlockCopies
from ferrum_jax.ops.writing import write_numbers
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.state import BlockPool, CacheState, PageTables
from ferrum_jax.types import NULL_BLOCK, IdsLike, TokenFormat


def write(
    pool: BlockPool,
    layer: ArrayLike,
    slots: IdsLike,
    k: ArrayLike,
    v: ArrayLike,
    formats: IdsLike | None = None,
    *,
    backend: str | None = None,
) -> BlockPool:
    """Writes tokens into one layer of a pool; donates the pool.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      layer: i32[]. Layer to write. If the pool does not have it, nothing is written.
      slots: i32[...]. Slot of each token: `block_id * pool.slots_per_block + offset`. A token for a
        slot outside the pool is dropped. Of two tokens for one slot, either may be stored. It is
        fastest if the last axis is consecutive tokens of a row, since compressed blocks are written
        as a whole.
      k: [..., H, D]. Keys, rounded to the nearest number of the pool's dtype (see
        `encoding.round_to`), or compressed. A NumPy array is copied first, and may be overwritten
        as soon as this returns. (A NumPy argument of the caller's own `jit` is not copied: JAX may
        read its memory until the result is ready.)
      v: [..., H, D]. Values, likewise.
      formats: i32[...]. `TokenFormat` of each token's block; native if absent. A token with another
        number, or a format that the pool has not enabled, is dropped. A pool that has enabled no
        format writes all tokens as native.
      backend: "xla" for XLA's operations alone, as a program needs that is exported for a CPU
        (`jax.export`); None for the fastest form of the platform.

    Returns:
      The pool with the tokens in it.

    Raises:
      AssertionError: The shapes do not fit each other or the pool.
      ValueError: The pool was consumed before.
      ValueError: An id is not an integer, or does not fit in an int32; or the backend is unknown.
    """
    check_live("pool", pool)
    if backend not in (None, "xla"):
        raise ValueError(f'backend must be "xla" or None, got {backend!r}.')
    (layer,), slots = as_scalars(layer=layer), as_ids(slots)
    k, v = (_as_tokens(name, x, slots.shape, pool) for name, x in (("k", k), ("v", v)))
    if len(pool.formats) == 1:
        return _write(pool, layer, slots, k, v, backend)
    formats = np.zeros(slots.shape, np.int32) if formats is None else as_ids(formats)
    if formats.shape != slots.shape:
        raise AssertionError(
            f"formats must be of the shape of slots, {slots.shape}, got {formats.shape}."
        )
    return _write_each(pool, layer, slots, formats, k, v, backend)


def gather(
    state: CacheState,
    layer: ArrayLike,
    seq_id: ArrayLike,
    token_format: TokenFormat = TokenFormat.Native,
    *,
    max_blocks: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values of one row in one layer, contiguous.

    The shape depends on `max_blocks`, not on the row's length: a program is compiled for each
    format and each `max_blocks`.

    Args:
      state: The cache.
      layer: i32[]. The model's number of the layer; an integer on the host where there are several
        layer groups.
      seq_id: i32[]. Sequence to read.
      token_format: Format of the row (static).
      max_blocks: Blocks to read, the row's first ones (static); all M if absent or above M.

    Returns:
      `(k, v)`, each [P * B, H, D] in the pool's dtype, for P blocks read and B tokens per block of
      the format: the row's tokens, then zeros. All zeros for a row that is free or has another
      format, and for a row or layer out of range. Zeros where a sliding window has passed.

    Raises:
      AssertionError: The layer or the row is not a single number.
      ValueError: The state was consumed before; an id is not an integer, or does not fit in an
        int32; there is no such format for the pool; or `max_blocks` is not a positive integer.
    """
    check_live("state", state)
    group = 0
    if not state.layers.is_single:
        group, layer = state.layers.find(layer)
    place = state.layers.places[group]
    layer, seq_id = as_scalars(layer=layer, seq_id=seq_id)
    pool, tables = state.pools[place.pool], state.page_tables[place.pool]
    size = tables.max_blocks_per_seq
    if max_blocks is not None:
        size = min(size, check_count("max_blocks", max_blocks))
    return _gather(pool, tables, layer, seq_id, place.index, format_of(token_format), size)


def copy_blocks(pool: BlockPool, sources: IdsLike, targets: IdsLike) -> BlockPool:
    """Copies whole blocks, all layers of them; donates the pool.

    All sources are read before any target is written, so a target may be another pair's source.

    Args:
      pool: The pool. Called outside `jit`, this consumes it: use the one returned.
      sources: i32[P], or i32[] for all targets. Blocks to read.
      targets: i32[P]. Blocks to write, all different. A pair with an id outside the pool, such as
        `NULL_BLOCK`, is ignored.

    Returns:
      The pool with the copies in it.

    Raises:
      AssertionError: The shapes of `sources` and `targets` do not fit.
      ValueError: The pool was consumed before.
      ValueError: An id is not an integer, or does not fit in an int32.
    """
    check_live("pool", pool)
    targets, sources = as_padded_rows(targets=targets, sources=sources)
    return _copy_blocks(pool, sources, targets)


def zero_blocks(pool: BlockPool, block_ids: jax.Array) -> BlockPool:
    """Zeroes blocks (i32[P], out of range for none); the cost depends on the blocks named."""
    block_ids = jnp.sort(index_or_end(block_ids, pool.num_blocks))  # Ids to skip come last.
    num_zeroed = jnp.sum(block_ids < pool.num_blocks, dtype=jnp.int32)

    def zero_each(array: jax.Array, block_ids: jax.Array, num_zeroed: jax.Array) -> jax.Array:
        zeros = jnp.zeros((1, *array.shape[1:]), array.dtype)

        def zero(i: jax.Array, array: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(array, zeros, block_ids[i], axis=0)

        return lax.fori_loop(0, num_zeroed, zero, array)

    def zeroed(array: jax.Array) -> jax.Array:
        args = {
            "pool": (array, pool.heads_at(2)),
            "block_ids": (block_ids, PartitionSpec()),
            "num_zeroed": (num_zeroed, PartitionSpec()),
        }
        return on_each_device(zero_each, pool.mesh, args, pool.heads_at(2))

    return jax.tree.map(zeroed, pool)


def _copy(pool: BlockPool, copies: BlockCopies) -> BlockPool:
    is_source = columns(pool.block_size) < copies.num_tokens[:, None]
    is_source = is_source[:, None, None, :, None]

    def copied(array: jax.Array) -> jax.Array:
        sources = array.at[copies.sources].get(mode="clip", wrap_negative_indices=False)
        behind = array.at[copies.backgrounds].get(mode="clip", wrap_negative_indices=False)
        blocks = jnp.where(is_source, sources, behind)
        return array.at[copies.targets].set(blocks, mode="drop", wrap_negative_indices=False)

    return jax.tree.map(copied, pool)


@jax.custom_batching.custom_vmap
def apply_copies(pool: BlockPool, copies: BlockCopies) -> BlockPool:
    """Copies within the pool what changed tables require, if anything."""
    # Most cuts of a row need no copy, and a block of all layers is large.
    is_any = jnp.any(copies.targets < pool.num_blocks)
    return lax.cond(is_any, _copy, lambda pool, _: pool, pool, copies)


@apply_copies.def_vmap
def _copy_in_each(
    axis_size: int, is_batched: list, pool: BlockPool, copies: BlockCopies
) -> tuple[BlockPool, BlockPool]:
    # Under `vmap` a `cond` becomes a select, which would read and write two whole pools.
    axes = jax.tree.map(lambda batched: 0 if batched else None, tuple(is_batched))
    pools = jax.vmap(_copy, in_axes=axes, axis_size=axis_size)(pool, copies)
    return pools, jax.tree.map(lambda _: True, pools)


def _as_tokens(
    name: str, tokens: ArrayLike, slots_shape: tuple[int, ...], pool: BlockPool
) -> jax.Array | np.ndarray:
    """Returns keys or values as [*slots_shape, H, D]; AssertionError if they have another shape."""
    if not isinstance(tokens, jax.Array):
        # A copy, since JAX may read the memory of a NumPy argument after the call has returned.
        tokens = np.array(tokens)
    want = (*slots_shape, pool.num_kv_heads, pool.head_dim)
    if tokens.shape != want:
        raise AssertionError(
            f"{name} must have shape {want}: that of the slots, {slots_shape}, then num_kv_heads "
            f"({pool.num_kv_heads}) and head_dim ({pool.head_dim}) of the pool; got "
            f"{tokens.shape}. Make the cache with the model's own num_kv_heads and head_dim "
            "(CacheSpec), or pass one key and one value per head and slot."
        )
    return tokens


@functools.partial(jax.jit, donate_argnames="pool", static_argnames="backend")
def _write(
    pool: BlockPool,
    layer: jax.Array,
    slots: jax.Array,
    k: jax.Array,
    v: jax.Array,
    backend: str | None,
) -> BlockPool:
    def write_one(
        array: jax.Array, layer: jax.Array, slots: jax.Array, tokens: jax.Array
    ) -> jax.Array:
        tokens = encode(tokens, pool.dtype, array.dtype)
        return write_numbers(array, layer, slots, tokens, backend)

    def write_named(name: str, array: jax.Array, tokens: jax.Array) -> jax.Array:
        # Each device writes its own heads. Without this, XLA may exchange tokens between devices.
        args = {
            "pool": (array, pool.heads_at(2)),
            "layer": (layer, PartitionSpec()),
            "slots": (slots, PartitionSpec()),
            name: (tokens, pool.heads_at(tokens.ndim - 2)),
        }
        return on_each_device(write_one, pool.mesh, args, pool.heads_at(2))

    keys, values = pool.payload.split(pool.arrays)
    keys, values = write_named("k", keys, k), write_named("v", values, v)
    return dataclasses.replace(pool, arrays=pool.payload.join(keys, values))


@functools.partial(jax.jit, donate_argnames="pool", static_argnames="backend")
def _write_each(
    pool: BlockPool,
    layer: jax.Array,
    slots: jax.Array,
    formats: jax.Array,
    k: jax.Array,
    v: jax.Array,
    backend: str | None,
) -> BlockPool:
    """Writes tokens of several formats; see `write`."""
    block_ids = index_or_end(slots // pool.slots_per_block, pool.num_blocks)
    offsets = slots % pool.slots_per_block
    for token_format in pool.formats:
        is_meant = (formats == token_format) & (offsets < pool.tokens_per_block(token_format))
        blocks = jnp.where(is_meant, block_ids, pool.num_blocks)
        if CODECS[token_format].is_native:
            native_slots = jnp.where(is_meant, blocks * pool.block_size + offsets, -1)
            pool = _write(pool, layer, native_slots, k, v, backend)
        else:
            kv = KeysAndValues(k, v)
            pool = write_tokens(pool, layer, blocks, offsets, kv, token_format)
    return pool


@functools.partial(jax.jit, static_argnames=("group", "token_format", "max_blocks"))
def _gather(
    pool: BlockPool,
    tables: PageTables,
    layer: jax.Array,
    seq_id: jax.Array,
    group: int,
    token_format: TokenFormat,
    max_blocks: int,
) -> tuple[jax.Array, jax.Array]:
    row = rows_of(tables, seq_id[None])[group]
    block_ids = read(tables.block_ids, row, NULL_BLOCK)[:max_blocks]
    num_tokens = read(tables.held_lens, row, 0)
    is_here = (layer >= 0) & (layer < pool.num_layers)
    is_here &= read(tables.token_formats, row, 0) == token_format
    num_tokens = jnp.where(is_here, num_tokens, 0)
    room = block_ids.size * pool.tokens_per_block(token_format)
    place = jnp.arange(room, dtype=jnp.int32)
    num_passed = read(tables.num_released, row, 0) * tables.block_size
    is_held = (place >= num_passed) & (place < num_tokens)

    def tokens(x: jax.Array) -> jax.Array:
        flat = round_to(x, pool.dtype).swapaxes(0, 1)
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
