"""Attention through pages on a TPU: a Pallas kernel for Mosaic.

Each step of the grid takes some queries of one row and some KV heads, and passes once over the
tokens they see. Blocks are copied from where the pool lies in HBM into one half of a buffer, a
tile of several at a time, while the other half is computed with; the last turn of a step fetches
the first tile of the next one. Steps therefore run one after the other, on one core.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ferrum_jax.attention.arithmetic import LOWEST, divide_up, multiply_heads, soft_capped
from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.attention.tpu_tiling import Sizes, Tiling, sizes_of


class _Scalars(NamedTuple):
    """What the kernel reads from scalar memory at any step.

    Attributes:
      layer: i32[1].
      held_lens: i32[R].
      q_lens: i32[R].
    """

    layer: Any
    held_lens: Any
    q_lens: Any


class _Operands(NamedTuple):
    """What else the kernel reads, as arrays outside of it and as references to tiles inside.

    h heads and Q queries a tile, the heads of a group counted each.

    Attributes:
      block_ids: i32[R, 1, M]; inside, i32[1, M] of the row.
      next_block_ids: The same array; inside, i32[1, M] of the next step's row.
      q: [R, H, T * G, D]; inside, [h, Q, D].
      sinks: f32[H, Q, 1] or None; inside, f32[h, Q, 1].
      k: [N, L, H, B, D], or [N, L, H, D, B] if tokens come last; all of it inside, too.
      v: As `k`.
    """

    block_ids: Any
    next_block_ids: Any
    q: Any
    sinks: Any
    k: Any
    v: Any


class _Scratch(NamedTuple):
    """Memory that outlives a step; h heads, Q queries and K tokens a tile.

    Attributes:
      k: [2, h, K, D], or [2, h, D, K] if tokens come last. Keys of two tiles.
      v: As `k`. Their values.
      semaphores: [2]. One for each of the two.
      half: i32[1]. Which of the two the step begins with.
      peak: f32[h, Q, 1]. Largest logit so far.
      total: f32[h, Q, 1]. Sum of `exp(logit - peak)`.
      acc: f32[h, Q, D]. Values, weighted alike.
    """

    k: Any
    v: Any
    semaphores: Any
    half: Any
    peak: Any
    total: Any
    acc: Any


def attend_tiles(inputs: AttentionInputs, tiling: Tiling) -> jax.Array:
    """Computes attention in steps, each one pass over the tokens that its queries see.

    Args:
      inputs: Checked arguments; letters as there.
      tiling: Sizes of tiles.

    Returns:
      [R, H, T * G, D], dtype of the queries. Zero where a query sees no token.

    References:
      Dao, FlashAttention-2 (2023), algorithm 1.
    """
    sizes = sizes_of(inputs, tiling)
    rows, heads, members = sizes.rows, sizes.num_kv_heads, sizes.num_queries * sizes.group
    q = inputs.q.swapaxes(1, 2).reshape(rows, heads, members, sizes.head_dim)
    sinks = inputs.sinks
    if sinks is not None:
        sinks = jnp.tile(sinks, (1, tiling.tile_queries))[:, :, None]
    k, v = inputs.pool.k, inputs.pool.v
    if sizes.tokens_last:  # They lie so already: no number moves.
        k, v = k.swapaxes(-1, -2), v.swapaxes(-1, -2)
    block_ids = inputs.block_ids[:, None, :]
    scalars = _Scalars(inputs.layer.reshape(1), inputs.held_lens, inputs.q_lens)
    operands = _Operands(block_ids, block_ids, q, sinks, k, v)
    return pl.pallas_call(
        functools.partial(_attend_tile, sizes=sizes),
        grid_spec=_grid(operands, sizes),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Each step finds what the one before it fetched.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        name="attend_tiles",
    )(scalars, operands)


def _grid(operands: _Operands, sizes: Sizes) -> pltpu.PrefetchScalarGridSpec:
    """Says which part of each array a step is given, and what memory outlives it."""
    heads, members, head_dim = sizes.tiling.tile_heads, sizes.tile_members, sizes.head_dim

    def block_ids(step: jax.Array, _: _Scalars) -> tuple[jax.Array, int, int]:
        return sizes.place(step)[0], 0, 0

    def next_block_ids(step: jax.Array, _: _Scalars) -> tuple[jax.Array, int, int]:
        return sizes.place(jnp.minimum(step + 1, sizes.num_steps - 1))[0], 0, 0

    def queries(step: jax.Array, _: _Scalars) -> tuple[jax.Array, ...]:
        return *sizes.place(step), jnp.zeros((), jnp.int32)

    def sinks(step: jax.Array, _: _Scalars) -> tuple[jax.Array, int, int]:
        return sizes.place(step)[1], 0, 0

    row = (None, 1, sizes.max_blocks)
    q_tile = pl.BlockSpec((None, heads, members, head_dim), queries)
    sinks_tile = pl.BlockSpec((heads, members, 1), sinks)
    whole = pl.BlockSpec(memory_space=pltpu.HBM)
    tile = (sizes.tile_tokens, head_dim)
    tiles = (2, heads, *(reversed(tile) if sizes.tokens_last else tile))
    scratch = _Scratch(
        k=pltpu.VMEM(tiles, operands.k.dtype),
        v=pltpu.VMEM(tiles, operands.v.dtype),
        semaphores=pltpu.SemaphoreType.DMA((2,)),
        half=pltpu.SMEM((1,), jnp.int32),
        peak=pltpu.VMEM((heads, members, 1), jnp.float32),
        total=pltpu.VMEM((heads, members, 1), jnp.float32),
        acc=pltpu.VMEM((heads, members, head_dim), jnp.float32),
    )
    in_specs = _Operands(
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


class _Share(NamedTuple):
    """The tokens that a step passes over.

    Attributes:
      block_ids: i32[1, M]. Blocks of the row.
      head: First of the heads.
      num_live: Queries, from the step's first on, that are not padding; may be negative.
      position: Where the first query is, if it is not padding.
      first_block: Logical index of the first block.
      end: One past the last token.
      turns: Tiles to read; at least one, perhaps of no block.
    """

    block_ids: Any
    head: jax.Array
    num_live: jax.Array
    position: jax.Array
    first_block: jax.Array
    end: jax.Array
    turns: jax.Array


def _share(step: jax.Array, scalars: _Scalars, block_ids: Any, sizes: Sizes) -> _Share:
    """Returns what a step has to read, given the blocks of its row."""
    row, head_tile, query_tile = sizes.place(step)
    query = query_tile * sizes.tiling.tile_queries
    num_live = scalars.q_lens[row] - query
    # More tokens than blocks are a caller's mistake: a wrong result, not a wild address.
    held = jnp.minimum(scalars.held_lens[row], sizes.max_blocks * sizes.block_size)
    position = held - num_live
    end = jnp.maximum(position + jnp.minimum(num_live, sizes.tiling.tile_queries), 0)
    end = jnp.where(num_live > 0, end, 0)
    first_block = jnp.zeros_like(end)
    if sizes.sliding_window is not None:
        first_block = jnp.maximum(position - sizes.sliding_window + 1, 0) // sizes.block_size
    num_blocks = divide_up(end, sizes.block_size) - first_block
    return _Share(
        block_ids=block_ids,
        head=head_tile * sizes.tiling.tile_heads,
        num_live=num_live,
        position=position,
        first_block=first_block,
        end=end,
        turns=jnp.maximum(divide_up(num_blocks, sizes.tiling.tile_blocks), 1),
    )


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of the grid: what it is given, and what it does with it."""

    scalars: _Scalars
    operands: _Operands
    scratch: _Scratch
    sizes: Sizes

    def start(self, share: _Share, turn: jax.Array, half: jax.Array) -> None:
        """Begins to copy a share's tile of tokens into one half of the buffers."""
        self._for_each_copy(share, turn, half, lambda copy: copy.start())

    def wait(self, share: _Share, turn: jax.Array, half: jax.Array) -> None:
        """Waits until what `start` began is done."""
        self._for_each_copy(share, turn, half, lambda copy: copy.wait())

    def _for_each_copy(
        self, share: _Share, turn: jax.Array, half: jax.Array, act: Callable[[Any], None]
    ) -> None:
        sizes, scratch = self.sizes, self.scratch
        first = share.first_block + turn * sizes.tiling.tile_blocks
        last = jnp.minimum(first + sizes.tiling.tile_blocks, divide_up(share.end, sizes.block_size))
        heads = pl.ds(share.head, sizes.tiling.tile_heads)
        num_blocks, num_layers = self.operands.k.shape[:2]
        layer = jnp.clip(self.scalars.layer[0], 0, num_layers - 1)

        @pl.loop(0, jnp.maximum(last - first, 0))
        def _(i: jax.Array) -> None:
            # So are `NULL_BLOCK` among the tokens, and what the pool does not have.
            block_id = jnp.clip(share.block_ids[0, first + i], 0, num_blocks - 1)
            tokens = pl.ds(pl.multiple_of(i * sizes.block_size, sizes.block_size), sizes.block_size)
            place = (slice(None), tokens) if sizes.tokens_last else (tokens, slice(None))
            for pool, tiles in ((self.operands.k, scratch.k), (self.operands.v, scratch.v)):
                source = pool.at[block_id, layer, heads]
                target = tiles.at[(half, slice(None), *place)]
                act(pltpu.make_async_copy(source, target, scratch.semaphores.at[half]))

    def begin(self) -> None:
        """Sets the softmax to its state before the first token."""
        scratch, sinks = self.scratch, self.operands.sinks
        scratch.acc[...] = jnp.zeros(scratch.acc.shape, jnp.float32)
        if sinks is None:
            scratch.peak[...] = jnp.full(scratch.peak.shape, LOWEST, jnp.float32)
            scratch.total[...] = jnp.zeros(scratch.total.shape, jnp.float32)
        else:  # A sink counts like a token with that logit, and no value.
            peak = jnp.maximum(sinks[...], LOWEST)
            scratch.peak[...] = peak
            scratch.total[...] = jnp.exp(sinks[...] - peak)

    def guard_values(self, share: _Share, turn: jax.Array, half: jax.Array) -> None:
        """Keeps values that are not finite from queries that do not see them.

        Where a tile has such values, the sums of the queries that see them become NaN, and the
        values zero.
        """
        sizes, scratch = self.sizes, self.scratch
        v = scratch.v[half]
        token_axis = 2 if sizes.tokens_last else 1
        held = self._tokens(share, turn, v.shape, token_axis) < share.end
        is_bad = (held & ~(jnp.abs(v.astype(jnp.float32)) < jnp.inf)).astype(sizes.dtype)

        @pl.when(jnp.max(is_bad.astype(jnp.float32)) > 0)
        def _() -> None:
            shape = (v.shape[0], sizes.tile_members, sizes.tile_tokens)
            seen = jnp.broadcast_to(self._seen(share, turn, shape[1:])[None], shape)
            count = multiply_heads(seen.astype(sizes.dtype), is_bad, token_axis)
            scratch.acc[...] = jnp.where(count > 0, jnp.nan, scratch.acc[...])
            scratch.v[half] = jnp.where(is_bad > 0, jnp.zeros_like(v), v)

    def clear_beyond(self, share: _Share, turn: jax.Array, half: jax.Array) -> None:
        """Zeroes the values beyond a share's end: there may be garbage, and 0 * NaN is NaN."""
        v = self.scratch.v[half]
        token_axis = 2 if self.sizes.tokens_last else 1
        held = self._tokens(share, turn, v.shape, token_axis) < share.end
        self.scratch.v[half] = jnp.where(held, v, jnp.zeros_like(v))

    def add_tile(self, share: _Share, turn: jax.Array, half: jax.Array) -> None:
        """Adds a tile of tokens to the softmax."""
        sizes, scratch = self.sizes, self.scratch
        q = self.operands.q[...].astype(sizes.dtype)
        k, v = (x[half].astype(sizes.dtype) for x in (scratch.k, scratch.v))
        token_axis, dim_axis = (2, 1) if sizes.tokens_last else (1, 2)
        logits = _cap(multiply_heads(q, k, dim_axis), sizes)
        logits = jnp.where(self._seen(share, turn, logits.shape[1:])[None], logits, -jnp.inf)
        peak = jnp.maximum(scratch.peak[...], jnp.max(logits, axis=2, keepdims=True))
        decay = jnp.exp(scratch.peak[...] - peak)
        weights = jnp.exp(logits - peak)
        scratch.peak[...] = peak
        scratch.total[...] = scratch.total[...] * decay + jnp.sum(weights, axis=2, keepdims=True)
        added = multiply_heads(weights.astype(sizes.dtype), v, token_axis)
        scratch.acc[...] = scratch.acc[...] * decay + added

    def is_even(self, share: _Share, turn: jax.Array) -> jax.Array:
        """Returns whether all of a step's queries see all of a tile's tokens."""
        sizes = self.sizes
        first = share.first_block * sizes.block_size + turn * sizes.tile_tokens
        is_even = first + sizes.tile_tokens <= share.position + 1
        if sizes.sliding_window is not None:
            is_even &= share.end - sizes.sliding_window <= first
        return is_even

    def _seen(self, share: _Share, turn: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns bool[Q, K], which of a tile's tokens a query sees."""
        group, window = self.sizes.group, self.sizes.sliding_window
        member = lax.broadcasted_iota(jnp.int32, shape, 0)
        # Member m is query m // group; multiplying the other side spares vectors a division.
        distance = (self._tokens(share, turn, shape, 1) - share.position) * group
        seen = (distance <= member) & (member < share.num_live * group)
        if window is not None:
            seen &= distance + window * group > member
        return seen

    def _tokens(
        self, share: _Share, turn: jax.Array, shape: tuple[int, ...], axis: int
    ) -> jax.Array:
        """Returns i32[shape], the position in the row of each of a tile's tokens along `axis`."""
        first = share.first_block * self.sizes.block_size + turn * self.sizes.tile_tokens
        return first + lax.broadcasted_iota(jnp.int32, shape, axis)

    def finish(self, share: _Share, out: Any) -> None:
        """Writes the softmax's result; zero for padding, whose sums may hold NaN."""
        total = self.scratch.total[...]
        result = self.scratch.acc[...] / jnp.where(total == 0, 1.0, total)
        if self.sizes.tiling.tile_queries > 1:
            member = lax.broadcasted_iota(jnp.int32, result.shape, 1)
            result = jnp.where(member < share.num_live * self.sizes.group, result, 0.0)
        out[...] = result.astype(out.dtype)


def _cap(logits: jax.Array, sizes: Sizes) -> jax.Array:
    """Scales logits and caps them."""
    logits = logits * sizes.scale
    return logits if sizes.soft_cap is None else soft_capped(logits, sizes.soft_cap)


def _attend_tile(
    scalars: _Scalars, operands: _Operands, out: Any, scratch: _Scratch, *, sizes: Sizes
) -> None:
    """One step of `attend_tiles`."""
    number = pl.program_id(0)
    zero = jnp.zeros_like(number)
    is_last = number + 1 == sizes.num_steps
    step = _Step(scalars, operands, scratch, sizes)
    share = _share(number, scalars, operands.block_ids, sizes)
    is_some = share.end > 0
    next_number = jnp.minimum(number + 1, sizes.num_steps - 1)
    next_share = _share(next_number, scalars, operands.next_block_ids, sizes)

    @pl.when(number == 0)
    def _() -> None:
        scratch.half[0] = zero
        step.start(share, zero, zero)

    step.begin()

    def take_turn(turn: jax.Array, half: jax.Array) -> jax.Array:
        other = 1 - half
        is_end = turn + 1 == share.turns

        @pl.when(~is_end)
        def _() -> None:
            step.start(share, turn + 1, other)

        @pl.when(is_end & ~is_last)
        def _() -> None:
            step.start(next_share, zero, other)

        step.wait(share, turn, half)

        @pl.when(is_end & is_some)
        def _() -> None:
            step.clear_beyond(share, turn, half)

        if sizes.sees_unevenly:

            @pl.when(is_some & ~step.is_even(share, turn))
            def _() -> None:
                step.guard_values(share, turn, half)

        @pl.when(is_some)
        def _() -> None:
            step.add_tile(share, turn, half)

        return other

    scratch.half[0] = lax.fori_loop(0, share.turns, take_turn, scratch.half[0])
    step.finish(share, out)
