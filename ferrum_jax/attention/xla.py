"""Attention through pages in plain XLA operations, reading live blocks only.

The tokens of one head of a block lie together and are read as *strips*: rows of a few consecutive
tokens. The last strip of each sequence may be half full. These strips are taken first, of all
rows at once, and there alone are unwritten slots met. The full strips before them are cut into
*items*, runs of strips of one row, and a loop takes several items a turn, whichever rows they
come from. Its trip count is the number of items on hand, so the time follows the tokens that are
read: neither the width of the table nor the longest row.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.attention.arithmetic import LOWEST, soft_capped
from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.encoding import decode_f32
from ferrum_jax.types import TokenFormat

# Measured on two Zen 4 cores, 16k tokens of 3 KV heads by 64 in float32, of which copying the
# strips together takes half: that runs at the speed of memory, so the sizes matter little.
_MIN_STRIP_TOKENS = 16  # A 16-token strip of 64 numbers is a memory page.
_ITEM_TOKENS = 128  # Half of it is wasted at the end of a row, on average.
_MAX_TURN_ITEMS = 16  # 256, 512, 1024 and 2048 tokens a turn took 3.2, 3.1, 2.8 and 2.8 ms.
_TURN_BYTES = 4 << 20  # Bounds the temporaries of wide models and of chunks.
_STATE_BYTES = 1 << 20

_NEVER = jnp.iinfo(jnp.int32).max


@functools.partial(jax.jit, static_argnames="token_format")
def xla_attention(
    inputs: AttentionInputs, token_format: TokenFormat = TokenFormat.Native
) -> jax.Array:
    """Computes attention with an online softmax over the strips that the rows hold.

    Args:
      inputs: Checked arguments; letters as there.
      token_format: How the rows' tokens are written (static). What is rotated stays so.

    Returns:
      [R, T, H, G, D], dtype `inputs.out_dtype`. Zero where a query sees no token.
    """
    if 0 in (inputs.q.size, inputs.block_ids.size, inputs.pool.k.size):
        # Nobody asks, or there is nothing to read.
        return jnp.zeros(inputs.q.shape, inputs.out_dtype(token_format))
    # Every turn passes over the softmax state of all rows, so a large state (long chunks) is
    # cheaper taken row by row.
    if inputs.q.shape[0] == 1 or inputs.q.size * 4 <= _STATE_BYTES:
        return _attend_if_any(inputs, token_format)

    def attend_row(row: tuple[jax.Array, ...]) -> jax.Array:
        q, block_ids, held_lens, q_lens = (x[None] for x in row)
        alone = dataclasses.replace(
            inputs, q=q, block_ids=block_ids, held_lens=held_lens, q_lens=q_lens
        )
        return _attend_if_any(alone, token_format)[0]

    return lax.map(attend_row, (inputs.q, inputs.block_ids, inputs.held_lens, inputs.q_lens))


class _Softmax(NamedTuple):
    """A softmax under way, for any leading axes X.

    Attributes:
      peak: f32[X]. Largest logit so far, at least `LOWEST`.
      total: f32[X]. Sum of `exp(logit - peak)`.
      acc: f32[X, D]. Values, weighted alike.
    """

    peak: jax.Array
    total: jax.Array
    acc: jax.Array


@dataclasses.dataclass(frozen=True)
class _Strips:
    """The strips of a call, S tokens each, and how they are shared out.

    Attributes:
      inputs: The call's arguments.
      size: S, a divisor of the block size; all of it if the rows are compressed.
      item_strips: C, strips an item.
      turn_items: I, items a turn.
      token_format: How the rows' tokens are written.
      is_guarded: bool[]. Whether `gather` guards values; None if it never has to.
    """

    inputs: AttentionInputs
    size: int
    item_strips: int
    turn_items: int
    token_format: TokenFormat
    is_guarded: jax.Array | None = None

    @property
    def sees_unevenly(self) -> bool:
        """Whether tokens may be read that some queries of a row see and others do not."""
        inputs = self.inputs
        return inputs.q.shape[1] > 1 or inputs.options.sliding_window is not None

    @property
    def precision(self) -> lax.Precision:
        """How exactly to multiply. A TPU rounds float32 to 8 bits, a GPU to 11, unless told not to.

        Where neither queries nor pool have more than 8, as in the kernels, that is good enough.
        """
        dtypes = self.inputs.q.dtype, self.inputs.pool.dtype
        is_wide = any(dtype.itemsize > 2 or dtype == jnp.float16 for dtype in dtypes)
        return lax.Precision.HIGHEST if is_wide else lax.Precision.DEFAULT

    def gather(
        self, row: jax.Array, strip: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Reads runs of strips.

        Args:
          row: i32[n]. Row of each run.
          strip: i32[n, C]. Positions of its strips in the row.
          wanted: bool[]. Whether anything is wanted; zeros are returned otherwise.

        Returns:
          Keys and values, each f32[n, H, C * S, D].
        """
        if self.token_format != TokenFormat.Native:
            read = functools.partial(self._gather_blocks, row, strip)
            if self.is_guarded is None:
                return read()
            return lax.cond(self.is_guarded, lambda: _guard(*read()), read)
        pool = self.inputs.pool
        strips_per_block = pool.block_size // self.size
        block_ids = self.inputs.block_ids[row[:, None], strip // strips_per_block]
        layer = jnp.clip(self.inputs.layer, 0, pool.num_layers - 1)
        block_ids = jnp.clip(block_ids, 0, pool.num_blocks - 1) * pool.num_layers + layer
        heads = jnp.arange(pool.num_kv_heads, dtype=jnp.int32)[None, :, None]
        index = block_ids[:, None, :] * pool.num_kv_heads + heads
        index = (index * strips_per_block + (strip % strips_per_block)[:, None, :]).reshape(-1)
        width = self.size * pool.head_dim

        def read() -> tuple[jax.Array, ...]:
            strips = (x.reshape(-1, width) for x in (pool.k, pool.v))
            taken = (
                x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
                for x in strips
            )
            return tuple(decode_f32(x, pool.dtype) for x in taken)

        # XLA would fold the reshape below into the gather and then address every `head_dim`
        # numbers afresh: 4.1 against 1.6 ms for 16k tokens. It does not look into a branch.
        zeros = jnp.zeros((index.size, width), jnp.float32)
        branches = [lambda: (zeros, zeros), read]
        branch = wanted.astype(jnp.int32)
        if self.is_guarded is not None:
            branches.append(lambda: _guard_strips(read(), pool.head_dim))
            branch += (wanted & self.is_guarded).astype(jnp.int32)
        k, v = lax.switch(branch, branches)
        shape = (row.size, pool.num_kv_heads, -1, pool.head_dim)
        return k.reshape(shape), v.reshape(shape)

    def _gather_blocks(self, row: jax.Array, strip: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Reads runs of compressed blocks, each of them a strip; see `gather`."""
        pool = self.inputs.pool
        block_ids = jnp.maximum(self.inputs.block_ids[row[:, None], strip], 0)
        halves = (
            array.at[block_ids, self.inputs.layer].get(mode="clip", wrap_negative_indices=False)
            for array in (pool.k, pool.v)
        )
        k_half, v_half = (half.swapaxes(1, 2) for half in halves)
        k, v = pool.layout(self.token_format).decode(k_half, v_half)
        shape = (row.size, pool.num_kv_heads, -1, pool.head_dim)
        return k.reshape(shape), v.reshape(shape)

    def logits(
        self, q: jax.Array, k: jax.Array, positions: jax.Array, key_positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the masked logits of queries on keys, and their largest.

        Args:
          q: f32[n, H, T * G, D]. Queries, scaled.
          k: f32[n, H, K, D]. Keys.
          positions: i32[n, T]. Where the queries are; negative for padding.
          key_positions: i32[n, K]. Where the keys are; `_NEVER` for those to be left out.

        Returns:
          f32[n, H, T * G, K] and f32[n, H, T * G].
        """
        options = self.inputs.options
        num_queries, group = self.inputs.q.shape[1], self.inputs.q.shape[3]
        logits = jnp.einsum("nhmd,nhkd->nhmk", q, k, precision=self.precision)
        if options.float32_soft_cap is not None:
            logits = soft_capped(logits, options.float32_soft_cap)
        seen = key_positions[:, None, :] <= positions[:, :, None]
        if options.sliding_window is not None:
            seen &= key_positions[:, None, :] > positions[:, :, None] - options.sliding_window
        shape = (*logits.shape[:2], num_queries, group, logits.shape[-1])
        logits = jnp.where(seen[:, None, :, None, :], logits.reshape(shape), -jnp.inf)
        logits = logits.reshape(*shape[:2], num_queries * group, shape[-1])
        return logits, jnp.max(logits, axis=-1, initial=LOWEST)


def _guard(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes zeros of values that are not finite, and NaN of their keys; both f32[..., D].

    A key is left out where it is not seen. A value is not: zero times NaN is NaN.
    """
    is_finite = jnp.isfinite(v)
    is_good = jnp.all(is_finite, axis=-1, keepdims=True)
    return jnp.where(is_good, k, jnp.nan), jnp.where(is_finite, v, 0.0)


def _guard_strips(kv: tuple[jax.Array, ...], head_dim: int) -> tuple[jax.Array, ...]:
    """Does as `_guard` with strips, f32[n, S * D]."""
    k, v = (x.reshape(-1, head_dim) for x in kv)
    return tuple(x.reshape(kv[0].shape) for x in _guard(k, v))


def _attend_if_any(inputs: AttentionInputs, token_format: TokenFormat) -> jax.Array:
    """Computes attention of rows, unless all are empty: as those of other formats are made."""
    attend = functools.partial(_attend_rows, token_format=token_format)
    if token_format == TokenFormat.Native:
        return attend(inputs)

    def see_nothing(inputs: AttentionInputs) -> jax.Array:
        return jnp.zeros(inputs.q.shape, inputs.out_dtype(token_format))

    return lax.cond(jnp.any(inputs.held_lens > 0), attend, see_nothing, inputs)


def _attend_rows(inputs: AttentionInputs, token_format: TokenFormat) -> jax.Array:
    """Computes attention of all rows together; see `xla_attention`."""
    # More tokens than blocks are a caller's mistake, which must not become a loop without end.
    held_lens = jnp.minimum(inputs.held_lens, inputs.reach(token_format))
    inputs = dataclasses.replace(inputs, held_lens=held_lens)
    strips = _cut(inputs, token_format)
    rows, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    q = inputs.q.astype(jnp.float32) * inputs.options.scale_for(head_dim)
    q = q.transpose(0, 2, 1, 3, 4).reshape(rows, num_kv_heads, num_queries * group, head_dim)

    peak, total, acc = _take_strips(strips, q)
    if inputs.sinks is not None:
        sinks = jnp.tile(inputs.sinks, (1, num_queries))[None]
        new_peak = jnp.maximum(peak, sinks)
        decay = jnp.exp(peak - new_peak)
        total = total * decay + jnp.exp(sinks - new_peak)
        acc = acc * decay[..., None]
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    out = out.reshape(rows, num_kv_heads, num_queries, group, head_dim).transpose(0, 2, 1, 3, 4)
    return out.astype(inputs.out_dtype(token_format))


def _cut(inputs: AttentionInputs, token_format: TokenFormat) -> _Strips:
    """Chooses the sizes of strips, items and turns."""
    block_size = inputs.pool.tokens_per_block(token_format)
    table_width = inputs.block_ids.shape[1]
    rows, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    is_native = token_format == TokenFormat.Native
    sizes = range(_MIN_STRIP_TOKENS, block_size) if is_native else ()
    size = next((s for s in sizes if block_size % s == 0), block_size)
    row_strips = table_width * block_size // size
    item_strips = max(1, min(_ITEM_TOKENS // size, row_strips))
    token_bytes = 4 * num_kv_heads * (2 * head_dim + 2 * num_queries * group)
    turn_items = _TURN_BYTES // (token_bytes * item_strips * size)
    all_items = rows * math.ceil(row_strips / item_strips)
    turn_items = max(1, min(turn_items, all_items, max(4, rows), _MAX_TURN_ITEMS))
    return _Strips(inputs, size, item_strips, turn_items, token_format)


def _take_strips(strips: _Strips, q: jax.Array) -> _Softmax:
    """Attends to all strips: twice where a value that is not finite was met, guarded then."""

    def attend(is_guarded: jax.Array | None) -> _Softmax:
        guarded = dataclasses.replace(strips, is_guarded=is_guarded)
        return _loop_over_items(guarded, q, _last_strips(guarded, q))

    if not strips.sees_unevenly:
        return attend(None)

    def is_unfinished(tries: tuple[jax.Array, _Softmax]) -> jax.Array:
        number, state = tries
        is_fine = ~jnp.any(jnp.isnan(state.total)) & jnp.all(jnp.isfinite(state.acc))
        return (number == 0) | ((number == 1) & ~is_fine)

    def try_again(tries: tuple[jax.Array, _Softmax]) -> tuple[jax.Array, _Softmax]:
        number, _ = tries
        return number + 1, attend(number > 0)

    nothing = jnp.zeros(q.shape[:-1], jnp.float32)
    start = jnp.zeros((), jnp.int32), _Softmax(nothing, nothing, jnp.zeros_like(q))
    return lax.while_loop(is_unfinished, try_again, start)[1]


def _last_strips(strips: _Strips, q: jax.Array) -> _Softmax:
    """Attends to the last strip of each row, which alone may hold unwritten slots."""
    inputs, size = strips.inputs, strips.size
    last = jnp.maximum(inputs.held_lens - 1, 0) // size
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    k, v = strips.gather(rows, last[:, None], jnp.any(inputs.held_lens > 0))
    positions = (last * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    held = positions < inputs.held_lens[:, None]
    v = jnp.where(held[:, None, :, None], v, 0.0)  # A weight of 0 does not undo NaN.
    key_positions = jnp.where(held, positions, _NEVER)
    logits, peak = strips.logits(q, k, inputs.positions, key_positions)
    weights = jnp.exp(logits - peak[..., None])
    acc = jnp.einsum("nhmk,nhkd->nhmd", weights, v, precision=strips.precision)
    return _Softmax(peak, jnp.sum(weights, axis=-1), acc)


def _loop_over_items(strips: _Strips, q: jax.Array, state: _Softmax) -> _Softmax:
    """Attends to all strips before the last ones."""
    inputs, size = strips.inputs, strips.size
    item_strips, turn_items = strips.item_strips, strips.turn_items
    query_positions = inputs.positions
    live = jnp.where(query_positions < 0, _NEVER, query_positions)
    end = jnp.maximum(inputs.held_lens - 1, 0) // size
    lowest = jnp.min(live, axis=1)
    window = inputs.options.sliding_window or _NEVER
    first = jnp.where(lowest < window, 0, lowest - window + 1) // size
    first = jnp.where(lowest == _NEVER, end, first)  # Nothing to do without queries.
    num_items = (jnp.maximum(end - first, 0) + item_strips - 1) // item_strips
    item_ends = jnp.cumsum(num_items)
    all_items = item_ends[-1]
    row_ids = jnp.arange(q.shape[0], dtype=jnp.int32)

    def take_turn(turn: jax.Array, state: _Softmax) -> _Softmax:
        item = turn * turn_items + jnp.arange(turn_items, dtype=jnp.int32)
        on_hand = item < all_items
        item = jnp.minimum(item, all_items - 1)
        row = jnp.sum(item[:, None] >= item_ends[None, :], axis=1, dtype=jnp.int32)
        start = first[row] + (item - (item_ends - num_items)[row]) * item_strips
        strip = start[:, None] + jnp.arange(item_strips, dtype=jnp.int32)[None, :]
        full = (strip < end[row][:, None]) & on_hand[:, None]
        # Strips beyond the row's repeat one of its own, so that no other's garbage is read.
        k, v = strips.gather(row, jnp.minimum(strip, end[row][:, None] - 1), all_items > 0)
        offsets = jnp.arange(size, dtype=jnp.int32)[None, None, :]
        key_positions = jnp.where(full[..., None], strip[..., None] * size + offsets, _NEVER)
        key_positions = key_positions.reshape(turn_items, item_strips * size)
        logits, peak = strips.logits(q[row], k, query_positions[row], key_positions)
        owner = (row[:, None] == row_ids[None, :]) & on_hand[:, None]
        return _add_items(strips, state, logits, peak, v, row, owner)

    turns = (all_items + turn_items - 1) // turn_items
    return lax.fori_loop(0, turns, take_turn, state)


def _add_items(
    strips: _Strips,
    state: _Softmax,
    logits: jax.Array,
    peak: jax.Array,
    v: jax.Array,
    row: jax.Array,
    owner: jax.Array,
) -> _Softmax:
    """Adds items to the softmax of their rows.

    Args:
      strips: Whose items they are.
      state: Of R rows, each [H, T * G].
      logits: f32[I, H, T * G, K].
      peak: f32[I, H, T * G]. Largest of each.
      v: f32[I, H, K, D].
      row: i32[I]. Row of each item.
      owner: bool[I, R]. Which row each item counts for.
    """
    owner = owner[:, :, None, None]
    row_peak = jnp.max(jnp.where(owner, peak[:, None], LOWEST), axis=0)
    new_peak = jnp.maximum(state.peak, row_peak)
    decay = jnp.exp(state.peak - new_peak)
    weights = jnp.exp(logits - new_peak[row][..., None])
    acc = jnp.einsum("ihmk,ihkd->ihmd", weights, v, precision=strips.precision)
    # A row that went bad must not reach the others through the product with zeros below: its
    # numbers are left out and its total says so.
    good = jnp.all(jnp.isfinite(acc), axis=-1)
    total = jnp.where(good, jnp.sum(weights, axis=-1), jnp.nan)
    acc = jnp.where(good[..., None], acc, 0.0)
    total = jnp.sum(jnp.where(owner, total[:, None], 0.0), axis=0)
    owner = owner[..., 0, 0].astype(jnp.float32)
    acc = jnp.einsum("ir,ihmd->rhmd", owner, acc, precision=lax.Precision.HIGHEST)  # A sum.
    return _Softmax(new_peak, state.total * decay + total, state.acc * decay[..., None] + acc)
