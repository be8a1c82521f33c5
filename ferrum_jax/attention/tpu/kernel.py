"""Paged attention on a TPU: a Pallas kernel for Mosaic.

Each step of the grid takes some queries of one row and some KV heads, and passes once over the
tokens that they see. Blocks are copied from the pool in HBM into one of two buffers, a tile of
several at a time, while the step computes with the other one; the last turn of a step fetches the
first tile of the next step. Steps therefore run one after the other, on one core.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.softmax import Softmax
from ferrum_jax.attention.tpu.step import Operands, Scalars, Scratch, Step, share_of
from ferrum_jax.attention.tpu.tiling import Sizes, Tiling, sizes_of


def attend_tiles(call: AttentionCall, tiling: Tiling) -> jax.Array:
    """Computes attention in steps; each passes once over the tokens that its queries see.

    Args:
      call: Checked arguments; letters as in `AttentionCall`.
      tiling: Sizes of tiles.

    Returns:
      [R, H, T * G, D], dtype of the queries. Zero where a query sees no token.

    References:
      Dao, FlashAttention-2 (2023), algorithm 1.
    """
    sizes = sizes_of(call, tiling)
    rows, heads, members = sizes.rows, sizes.num_kv_heads, sizes.num_queries * sizes.group
    q = call.q.swapaxes(1, 2).reshape(rows, heads, members, sizes.head_dim)
    sinks = call.sinks
    if sinks is not None:
        sinks = jnp.tile(sinks, (1, tiling.tile_queries))[:, :, None]
    k, v = call.pool.payload.split(call.pool.arrays)
    if sizes.tokens_last:  # XLA stores them in this order already: no number moves.
        k, v = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    block_ids = call.block_ids[:, None, :]
    scalars = Scalars(call.layer.reshape(1), call.held_lens, call.q_lens)
    operands = Operands(block_ids, block_ids, q, sinks, k, v)
    return pl.pallas_call(
        functools.partial(_attend_tile, sizes=sizes),
        grid_spec=_grid(operands, sizes),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Each step uses the tile that the step before it fetched.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="attend_tiles",
    )(scalars, operands)


def _grid(operands: Operands, sizes: Sizes) -> pltpu.PrefetchScalarGridSpec:
    """Returns the part of each array that a step is given, and the memory between steps."""
    heads, members, head_dim = sizes.tiling.tile_heads, sizes.tile_members, sizes.head_dim

    def block_ids(step: jax.Array, _: Scalars) -> tuple[jax.Array, int, int]:
        return sizes.place(step)[0], 0, 0

    def next_block_ids(step: jax.Array, _: Scalars) -> tuple[jax.Array, int, int]:
        return sizes.place(jnp.minimum(step + 1, sizes.num_steps - 1))[0], 0, 0

    def queries(step: jax.Array, _: Scalars) -> tuple[jax.Array, ...]:
        return *sizes.place(step), jnp.zeros((), jnp.int32)

    def sinks(step: jax.Array, _: Scalars) -> tuple[jax.Array, int, int]:
        return sizes.place(step)[1], 0, 0

    row = (None, 1, sizes.max_blocks)
    q_tile = pl.BlockSpec((None, heads, members, head_dim), queries)
    sinks_tile = pl.BlockSpec((heads, members, 1), sinks)
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    tile = (sizes.tile_tokens, head_dim)
    tiles = (2, heads, *(reversed(tile) if sizes.tokens_last else tile))
    scratch = Scratch(
        k=pltpu.VMEM(tiles, operands.k.dtype),
        v=pltpu.VMEM(tiles, operands.v.dtype),
        semaphores=pltpu.SemaphoreType.DMA((2,)),
        buffer=pltpu.SMEM((1,), jnp.int32),
        softmax=Softmax(
            peak=pltpu.VMEM((heads, members, 1), jnp.float32),
            total=pltpu.VMEM((heads, members, 1), jnp.float32),
            acc=pltpu.VMEM((heads, members, head_dim), jnp.float32),
        ),
    )
    in_specs = Operands(
        block_ids=pl.BlockSpec(row, block_ids, memory_space=pltpu.SMEM),
        next_block_ids=pl.BlockSpec(row, next_block_ids, memory_space=pltpu.SMEM),
        q=q_tile,
        sinks=None if operands.sinks is None else sinks_tile,
        k=whole,
        v=whole,
    )
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(sizes.num_steps,),
        in_specs=(in_specs,),
        out_specs=q_tile,
        scratch_shapes=(scratch,),
    )


def _attend_tile(
    scalars: Scalars, operands: Operands, out: Any, scratch: Scratch, *, sizes: Sizes
) -> None:
    """One step of `attend_tiles`."""
    number = pl.program_id(0)
    zero = jnp.zeros_like(number)
    is_last = number + 1 == sizes.num_steps
    step = Step(scalars, operands, scratch, sizes)
    share = share_of(number, scalars, operands.block_ids, sizes)
    is_some = share.end > 0
    next_number = jnp.minimum(number + 1, sizes.num_steps - 1)
    next_share = share_of(next_number, scalars, operands.next_block_ids, sizes)

    @pl.when(number == 0)
    def _() -> None:
        scratch.buffer[0] = zero
        step.start(share, zero, zero)

    step.begin()

    def take_turn(turn: jax.Array, buffer: jax.Array) -> jax.Array:
        other = 1 - buffer
        is_end = turn + 1 == share.turns

        @pl.when(~is_end)
        def _() -> None:
            step.start(share, turn + 1, other)

        @pl.when(is_end & ~is_last)
        def _() -> None:
            step.start(next_share, zero, other)

        step.wait(share, turn, buffer)

        @pl.when(is_end & is_some)
        def _() -> None:
            step.clear_beyond(share, turn, buffer)

        if sizes.sees_unevenly:

            @pl.when(is_some & ~step.is_even(share, turn))
            def _() -> None:
                step.guard_values(share, turn, buffer)

        @pl.when(is_some)
        def _() -> None:
            step.add_tile(share, turn, buffer)

        return other

    scratch.buffer[0] = lax.fori_loop(0, share.turns, take_turn, scratch.buffer[0])
    step.finish(share, out)
