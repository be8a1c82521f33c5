"""The online softmax over the strips of rows."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.softmax import LOWEST, Softmax
from ferrum_jax.attention.xla.strips import NEVER, Strips, cut


def attend_rows(call: AttentionCall) -> jax.Array:
    """Computes attention of all rows together; [R, T, H, G, D], dtype `call.out_dtype`."""
    # A length beyond the row's blocks is a caller's mistake; without the bound the loop would
    # never end.
    call = dataclasses.replace(call, held_lens=jnp.minimum(call.held_lens, call.reach))
    strips = cut(call)
    rows, num_queries, num_kv_heads, group, head_dim = call.q.shape
    q = call.q.astype(jnp.float32) * call.options.scale_for(head_dim)
    q = q.transpose(0, 2, 1, 3, 4).reshape(rows, num_kv_heads, num_queries * group, head_dim)

    peak, total, acc = _take_strips(strips, q)
    if call.sinks is not None:
        sinks = jnp.tile(call.sinks, (1, num_queries))[None]
        new_peak = jnp.maximum(peak, sinks)
        decay = jnp.exp(peak - new_peak)
        total = total * decay + jnp.exp(sinks - new_peak)
        acc = acc * decay[..., None]
    out = acc / jnp.where(total == 0, 1.0, total)[..., None]
    out = out.reshape(rows, num_kv_heads, num_queries, group, head_dim).transpose(0, 2, 1, 3, 4)
    return out.astype(call.out_dtype)


def _take_strips(strips: Strips, q: jax.Array) -> Softmax:
    """Attends to all strips; a second time, guarded, if a value that is not finite was read."""

    def attend(is_guarded: jax.Array | None) -> Softmax:
        guarded = dataclasses.replace(strips, is_guarded=is_guarded)
        return _loop_over_items(guarded, q, _last_strips(guarded, q))

    if not strips.sees_unevenly:
        return attend(None)

    def is_unfinished(tries: tuple[jax.Array, Softmax]) -> jax.Array:
        number, state = tries
        is_fine = ~jnp.any(jnp.isnan(state.total)) & jnp.all(jnp.isfinite(state.acc))
        return (number == 0) | ((number == 1) & ~is_fine)

    def try_again(tries: tuple[jax.Array, Softmax]) -> tuple[jax.Array, Softmax]:
        number, _ = tries
        return number + 1, attend(number > 0)

    nothing = jnp.zeros(q.shape[:-1], jnp.float32)
    start = jnp.zeros((), jnp.int32), Softmax(nothing, nothing, jnp.zeros_like(q))
    return lax.while_loop(is_unfinished, try_again, start)[1]


def _last_strips(strips: Strips, q: jax.Array) -> Softmax:
    """Attends to the last strip of each row, the only one that may have unwritten slots."""
    call, size = strips.call, strips.size
    last = jnp.maximum(call.held_lens - 1, 0) // size
    rows = jnp.arange(q.shape[0], dtype=jnp.int32)
    k, v = strips.gather(rows, last[:, None], jnp.any(call.held_lens > 0))
    positions = (last * size)[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
    held = positions < call.held_lens[:, None]
    v = jnp.where(held[:, None, :, None], v, 0.0)  # A weight of 0 does not undo NaN.
    key_positions = jnp.where(held, positions, NEVER)
    logits, peak = strips.logits(q, k, call.positions, key_positions)
    weights = jnp.exp(logits - peak[..., None])
    acc = jnp.einsum("nhmk,nhkd->nhmd", weights, v, precision=strips.precision)
    return Softmax(peak, jnp.sum(weights, axis=-1), acc)


def _loop_over_items(strips: Strips, q: jax.Array, state: Softmax) -> Softmax:
    """Attends to all strips before the last one of each row."""
    call, size = strips.call, strips.size
    item_strips, turn_items = strips.item_strips, strips.turn_items
    query_positions = call.positions
    first, end = strips.before_last()
    num_items = ceil_div(jnp.maximum(end - first, 0), item_strips)
    item_ends = jnp.cumsum(num_items)
    all_items = item_ends[-1]
    row_ids = jnp.arange(q.shape[0], dtype=jnp.int32)

    def take_turn(turn: jax.Array, state: Softmax) -> Softmax:
        item = turn * turn_items + jnp.arange(turn_items, dtype=jnp.int32)
        exists = item < all_items
        item = jnp.minimum(item, all_items - 1)
        row = jnp.sum(item[:, None] >= item_ends[None, :], axis=1, dtype=jnp.int32)
        start = first[row] + (item - (item_ends - num_items)[row]) * item_strips
        strip = start[:, None] + jnp.arange(item_strips, dtype=jnp.int32)[None, :]
        full = (strip < end[row][:, None]) & exists[:, None]
        # An index past the row's strips reads the row's last full strip instead: the blocks of
        # other rows may hold garbage.
        k, v = strips.gather(row, jnp.minimum(strip, end[row][:, None] - 1), all_items > 0)
        offsets = jnp.arange(size, dtype=jnp.int32)[None, None, :]
        key_positions = jnp.where(full[..., None], strip[..., None] * size + offsets, NEVER)
        key_positions = key_positions.reshape(turn_items, item_strips * size)
        logits, peak = strips.logits(q[row], k, query_positions[row], key_positions)
        owner = (row[:, None] == row_ids[None, :]) & exists[:, None]
        return _add_items(strips, state, logits, peak, v, row, owner)

    turns = ceil_div(all_items, turn_items)
    return lax.fori_loop(0, turns, take_turn, state)


def _add_items(
    strips: Strips,
    state: Softmax,
    logits: jax.Array,
    peak: jax.Array,
    v: jax.Array,
    row: jax.Array,
    owner: jax.Array,
) -> Softmax:
    """Adds items to the softmax of their rows.

    Args:
      strips: The strips that the items are cut from.
      state: State of R rows, X is [R, H, T * G].
      logits: f32[I, H, T * G, K].
      peak: f32[I, H, T * G]. Largest logit of each query and item.
      v: f32[I, H, K, D].
      row: i32[I]. Row of each item.
      owner: bool[I, R]. Whether an item belongs to a row.
    """
    owner = owner[:, :, None, None]
    row_peak = jnp.max(jnp.where(owner, peak[:, None], LOWEST), axis=0)
    new_peak = jnp.maximum(state.peak, row_peak)
    decay = jnp.exp(state.peak - new_peak)
    weights = jnp.exp(logits - new_peak[row][..., None])
    acc = jnp.einsum("ihmk,ihkd->ihmd", weights, v, precision=strips.precision)
    # A row with numbers that are not finite must not reach other rows through the product with
    # zeros below: its numbers are left out, and its total becomes NaN.
    good = jnp.all(jnp.isfinite(acc), axis=-1)
    total = jnp.where(good, jnp.sum(weights, axis=-1), jnp.nan)
    acc = jnp.where(good[..., None], acc, 0.0)
    total = jnp.sum(jnp.where(owner, total[:, None], 0.0), axis=0)
    owner = owner[..., 0, 0].astype(jnp.float32)
    acc = jnp.einsum("ir,ihmd->rhmd", owner, acc, precision=lax.Precision.HIGHEST)  # A sum.
    return Softmax(new_peak, state.total * decay + total, state.acc * decay[..., None] + acc)
