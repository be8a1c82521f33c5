"""One step of the TPU kernel: what it reads, and how it adds a tile of tokens to its softmax."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention.softmax import LOWEST, Softmax, soft_capped
from ferrum_jax.attention.tpu.tiling import Sizes


class Scalars(NamedTuple):
    """Operands that every step reads from scalar memory.

    Attributes:
      layer: i32[1].
      held_lens: i32[R].
      q_lens: i32[R].
    """

    layer: Any
    held_lens: Any
    q_lens: Any


class Operands(NamedTuple):
    """The other operands: arrays outside of the kernel, references to tiles inside.

    h heads and Q queries a tile, the heads of a group counted each.

    Attributes:
      block_ids: i32[R, 1, M]; inside, i32[1, M] of the row.
      next_block_ids: The same array; inside, i32[1, M] of the next step's row.
      q: [R, H, T * G, D]; inside, [h, Q, D].
      sinks: f32[H, Q, 1] or None; inside, f32[h, Q, 1].
      k: [N, L, H, B, D], or [N, L, H, D, B] if tokens come last; inside, the whole array.
      v: Like `k`.
    """

    block_ids: Any
    next_block_ids: Any
    q: Any
    sinks: Any
    k: Any
    v: Any


class Scratch(NamedTuple):
    """Memory that persists between steps; h heads, Q queries and K tokens per tile.

    Attributes:
      k: [2, h, K, D], or [2, h, D, K] if tokens come last. Two buffers of keys.
      v: Like `k`, for values.
      semaphores: [2]. One for each buffer.
      buffer: i32[1]. Index of the buffer that the step begins with.
      softmax: Softmax of the step's queries; peak and total are [h, Q, 1], acc is [h, Q, D].
    """

    k: Any
    v: Any
    semaphores: Any
    buffer: Any
    softmax: Softmax


class Share(NamedTuple):
    """The tokens that a step passes over.

    Attributes:
      block_ids: i32[1, M]. Blocks of the row.
      head: First KV head.
      num_live: Queries of the row, from the step's first on, that are not padding; may be negative.
      position: Position of the first query, if it is not padding.
      first_block: Logical index of the first block.
      end: One past the last token.
      turns: Tiles to read; at least one, which may have no block.
    """

    block_ids: Any
    head: jax.Array
    num_live: jax.Array
    position: jax.Array
    first_block: jax.Array
    end: jax.Array
    turns: jax.Array


def share_of(step: jax.Array, scalars: Scalars, block_ids: Any, sizes: Sizes) -> Share:
    """Returns the tokens that a step reads, given the blocks of its row."""
    row, head_tile, query_tile = sizes.place(step)
    query = query_tile * sizes.tiling.tile_queries
    num_live = scalars.q_lens[row] - query
    # A length beyond the row's blocks is a caller's mistake: a wrong result, not a wild address.
    held = jnp.minimum(scalars.held_lens[row], sizes.max_blocks * sizes.block_size)
    position = held - num_live
    end = jnp.maximum(position + jnp.minimum(num_live, sizes.tiling.tile_queries), 0)
    end = jnp.where(num_live > 0, end, 0)
    first_block = jnp.zeros_like(end)
    if sizes.sliding_window is not None:
        first_block = jnp.maximum(position - sizes.sliding_window + 1, 0) // sizes.block_size
    num_blocks = ceil_div(end, sizes.block_size) - first_block
    return Share(
        block_ids=block_ids,
        head=head_tile * sizes.tiling.tile_heads,
        num_live=num_live,
        position=position,
        first_block=first_block,
        end=end,
        turns=jnp.maximum(ceil_div(num_blocks, sizes.tiling.tile_blocks), 1),
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the grid: its operands, and the parts of its computation."""

    scalars: Scalars
    operands: Operands
    scratch: Scratch
    sizes: Sizes

    def start(self, share: Share, turn: jax.Array, buffer: jax.Array) -> None:
        """Starts to copy a share's tile of tokens into one of the two buffers."""
        self._for_each_copy(share, turn, buffer, lambda copy: copy.start())

    def wait(self, share: Share, turn: jax.Array, buffer: jax.Array) -> None:
        """Waits for the copies that `start` started."""
        self._for_each_copy(share, turn, buffer, lambda copy: copy.wait())

    def _for_each_copy(
        self, share: Share, turn: jax.Array, buffer: jax.Array, act: Callable[[Any], None]
    ) -> None:
        """Calls a function on the copy of each block of a tile."""
        sizes, scratch = self.sizes, self.scratch
        first = share.first_block + turn * sizes.tiling.tile_blocks
        last = jnp.minimum(first + sizes.tiling.tile_blocks, ceil_div(share.end, sizes.block_size))
        heads = pl.ds(share.head, sizes.tiling.tile_heads)
        num_blocks, num_layers = self.operands.k.shape[:2]
        layer = jnp.clip(self.scalars.layer[0], 0, num_layers - 1)

        @pl.loop(0, jnp.maximum(last - first, 0))
        def _(i: jax.Array) -> None:
            # `NULL_BLOCK` and ids out of range are read as the nearest block of the pool.
            block_id = jnp.clip(share.block_ids[0, first + i], 0, num_blocks - 1)
            tokens = pl.ds(pl.multiple_of(i * sizes.block_size, sizes.block_size), sizes.block_size)
            place = (slice(None), tokens) if sizes.tokens_last else (tokens, slice(None))
            for pool, tiles in ((self.operands.k, scratch.k), (self.operands.v, scratch.v)):
                source = pool.at[block_id, layer, heads]
                target = tiles.at[(buffer, slice(None), *place)]
                act(pltpu.make_async_copy(source, target, scratch.semaphores.at[buffer]))

    def begin(self) -> None:
        """Sets the softmax to its state before the first token."""
        softmax, sinks = self.scratch.softmax, self.operands.sinks
        softmax.acc[...] = jnp.zeros(softmax.acc.shape, jnp.float32)
        if sinks is None:
            softmax.peak[...] = jnp.full(softmax.peak.shape, LOWEST, jnp.float32)
            softmax.total[...] = jnp.zeros(softmax.total.shape, jnp.float32)
        else:  # A sink counts like a token with its logit and the value zero.
            peak = jnp.maximum(sinks[...], LOWEST)
            softmax.peak[...] = peak
            softmax.total[...] = jnp.exp(sinks[...] - peak)

    def guard_values(self, share: Share, turn: jax.Array, buffer: jax.Array) -> None:
        """Keeps values that are not finite from queries that do not see them.

        If a tile has such values, the sums of the queries that see them become NaN, and the values
        zero.
        """
        sizes, scratch, softmax = self.sizes, self.scratch, self.scratch.softmax
        v = scratch.v[buffer]
        token_axis = 2 if sizes.tokens_last else 1
        held = self._tokens(share, turn, v.shape, token_axis) < share.end
        is_bad = (held & ~(jnp.abs(v.astype(jnp.float32)) < jnp.inf)).astype(sizes.dtype)

        @pl.when(jnp.max(is_bad.astype(jnp.float32)) > 0)
        def _() -> None:
            shape = (v.shape[0], sizes.tile_members, sizes.tile_tokens)
            seen = jnp.broadcast_to(self._seen(share, turn, shape[1:])[None], shape)
            count = _multiply_heads(seen.astype(sizes.dtype), is_bad, token_axis)
            softmax.acc[...] = jnp.where(count > 0, jnp.nan, softmax.acc[...])
            scratch.v[buffer] = jnp.where(is_bad > 0, jnp.zeros_like(v), v)

    def clear_beyond(self, share: Share, turn: jax.Array, buffer: jax.Array) -> None:
        """Zeroes the values past a share's end: there may be garbage, and 0 * NaN is NaN."""
        v = self.scratch.v[buffer]
        token_axis = 2 if self.sizes.tokens_last else 1
        held = self._tokens(share, turn, v.shape, token_axis) < share.end
        self.scratch.v[buffer] = jnp.where(held, v, jnp.zeros_like(v))

    def add_tile(self, share: Share, turn: jax.Array, buffer: jax.Array) -> None:
        """Adds a tile of tokens to the softmax."""
        sizes, scratch, softmax = self.sizes, self.scratch, self.scratch.softmax
        q = self.operands.q[...].astype(sizes.dtype)
        k, v = (x[buffer].astype(sizes.dtype) for x in (scratch.k, scratch.v))
        token_axis, dim_axis = (2, 1) if sizes.tokens_last else (1, 2)
        logits = _cap(_multiply_heads(q, k, dim_axis), sizes)
        logits = jnp.where(self._seen(share, turn, logits.shape[1:])[None], logits, -jnp.inf)
        peak = jnp.maximum(softmax.peak[...], jnp.max(logits, axis=2, keepdims=True))
        decay = jnp.exp(softmax.peak[...] - peak)
        weights = jnp.exp(logits - peak)
        softmax.peak[...] = peak
        softmax.total[...] = softmax.total[...] * decay + jnp.sum(weights, axis=2, keepdims=True)
        added = _multiply_heads(weights.astype(sizes.dtype), v, token_axis)
        softmax.acc[...] = softmax.acc[...] * decay + added

    def is_even(self, share: Share, turn: jax.Array) -> jax.Array:
        """Returns bool[], whether each of a step's queries sees each of a tile's tokens."""
        sizes = self.sizes
        first = share.first_block * sizes.block_size + turn * sizes.tile_tokens
        is_even = first + sizes.tile_tokens <= share.position + 1
        if sizes.sliding_window is not None:
            is_even &= share.end - sizes.sliding_window <= first
        return is_even

    def _seen(self, share: Share, turn: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Returns bool[Q, K], whether a query sees a token of a tile."""
        group, window = self.sizes.group, self.sizes.sliding_window
        member = lax.broadcasted_iota(jnp.int32, shape, 0)
        # Member m is query m // group. The other side is multiplied: a vector division is slow.
        distance = (self._tokens(share, turn, shape, 1) - share.position) * group
        seen = (distance <= member) & (member < share.num_live * group)
        if window is not None:
            seen &= distance + window * group > member
        return seen

    def _tokens(
        self, share: Share, turn: jax.Array, shape: tuple[int, ...], axis: int
    ) -> jax.Array:
        """Returns i32[shape], the position in the row of each of a tile's tokens along `axis`."""
        first = share.first_block * self.sizes.block_size + turn * self.sizes.tile_tokens
        return first + lax.broadcasted_iota(jnp.int32, shape, axis)

    def finish(self, share: Share, out: Any) -> None:
        """Writes the result of the softmax; zero for padding, where sums may be NaN."""
        total = self.scratch.softmax.total[...]
        result = self.scratch.softmax.acc[...] / jnp.where(total == 0, 1.0, total)
        if self.sizes.tiling.tile_queries > 1:
            member = lax.broadcasted_iota(jnp.int32, result.shape, 1)
            result = jnp.where(member < share.num_live * self.sizes.group, result, 0.0)
        out[...] = result.astype(out.dtype)


def _cap(logits: jax.Array, sizes: Sizes) -> jax.Array:
    """Scales logits and caps them."""
    logits = logits * sizes.scale
    return logits if sizes.soft_cap is None else soft_capped(logits, sizes.soft_cap)


def _multiply_heads(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Returns f32[h, Q, ...], x [h, Q, n] times y head by head, where n is y's axis `axis`."""
    return lax.dot_general(
        x,
        y,
        (((2,), (axis,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
