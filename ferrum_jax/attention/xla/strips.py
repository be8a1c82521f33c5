"""Strips: runs of a few consecutive tokens of one row, and how a call is cut into them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.softmax import LOWEST, is_seen, soft_capped
from ferrum_jax.encoding import decode_f32

# Measured on two Zen 4 cores, 16k tokens of 3 KV heads by 64 in float32, of which copying the
# strips together takes half: that runs at the speed of memory, so the sizes matter little.
_MIN_STRIP_TOKENS = 16  # A 16-token strip of 64 numbers is 4 KiB, one memory page.
_ITEM_TOKENS = 128  # On average, half of it is wasted at the end of a row.
_MAX_TURN_ITEMS = 16  # 256, 512, 1024 and 2048 tokens a turn took 3.2, 3.1, 2.8 and 2.8 ms.
_TURN_BYTES = 4 << 20  # Bounds the temporaries of wide models and of chunks.

NEVER = jnp.iinfo(jnp.int32).max
"""Position of a key that no query sees."""


@dataclasses.dataclass(frozen=True)
class Strips:
    """The strips of a call, S tokens each, and how they are divided into items and turns.

    Attributes:
      call: Checked arguments.
      size: S, a divisor of the block size; the whole block if the rows are compressed.
      item_strips: C, strips per item.
      turn_items: I, items per turn.
      is_guarded: bool[]. Whether `gather` guards values that are not finite; None if it never does.
    """

    call: AttentionCall
    size: int
    item_strips: int
    turn_items: int
    is_guarded: jax.Array | None = None

    @property
    def sees_unevenly(self) -> bool:
        """Whether tokens may be read that some queries of a row see and others do not."""
        return self.call.q.shape[1] > 1 or self.call.sliding_window is not None

    @property
    def precision(self) -> lax.Precision:
        """Precision of the products.

        By default, a TPU rounds float32 to 8 bits and a GPU to 11. That is enough where neither
        queries nor pool have more than 8 bits.
        """
        dtypes = self.call.q.dtype, self.call.pool.dtype
        is_wide = any(dtype.itemsize > 2 or dtype == jnp.float16 for dtype in dtypes)
        return lax.Precision.HIGHEST if is_wide else lax.Precision.DEFAULT

    def before_last(self) -> tuple[jax.Array, jax.Array]:
        """Returns the strips that the queries of each row see, without the row's last strip.

        Returns:
          i32[R] and i32[R]: the first strip, and one past the last, which is the row's last strip.
          Blocks before the first strip are not read: the table may have no ids for them.
        """
        positions = self.call.positions
        lowest = jnp.min(jnp.where(positions < 0, NEVER, positions), axis=1)
        end = jnp.maximum(self.call.held_lens - 1, 0) // self.size
        window = self.call.sliding_window or NEVER
        first = jnp.where(lowest < window, 0, lowest - window + 1) // self.size
        return jnp.where(lowest == NEVER, end, first), end  # Without queries nothing is read.

    def gather(
        self, row: jax.Array, strip: jax.Array, wanted: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Reads runs of strips.

        Args:
          row: i32[n]. Row of each run.
          strip: i32[n, C]. Indices of the run's strips in the row.
          wanted: bool[]. Whether to read at all; zeros are returned otherwise.

        Returns:
          Keys and values, each f32[n, H, C * S, D].
        """
        if not self.call.is_native:
            read = functools.partial(self._gather_blocks, row, strip)
            if self.is_guarded is None:
                return read()
            return lax.cond(self.is_guarded, lambda: _guard(*read()), read)
        pool = self.call.pool
        strips_per_block = pool.block_size // self.size
        block_ids = self.call.block_ids[row[:, None], strip // strips_per_block]
        layer = jnp.clip(self.call.layer, 0, pool.num_layers - 1)
        block_ids = jnp.clip(block_ids, 0, pool.num_blocks - 1) * pool.num_layers + layer
        heads = jnp.arange(pool.num_kv_heads, dtype=jnp.int32)[None, :, None]
        index = block_ids[:, None, :] * pool.num_kv_heads + heads
        index = (index * strips_per_block + (strip % strips_per_block)[:, None, :]).reshape(-1)
        width = self.size * pool.head_dim

        def read() -> tuple[jax.Array, ...]:
            strips = (x.reshape(-1, width) for x in pool.payload.split(pool.arrays))
            taken = (
                x.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)
                for x in strips
            )
            return tuple(decode_f32(x, pool.dtype) for x in taken)

        # XLA would fold the reshape below into the gather and then compute an address for every
        # `head_dim` numbers: 4.1 against 1.6 ms for 16k tokens. It does not look into a branch.
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
        """Reads runs of compressed blocks, each a strip; arguments and result as of `gather`."""
        pool = self.call.pool
        block_ids = jnp.maximum(self.call.block_ids[row[:, None], strip], 0)
        halves = (
            array.at[block_ids, self.call.layer].get(mode="clip", wrap_negative_indices=False)
            for array in pool.payload.split(pool.arrays)
        )
        k_half, v_half = (half.swapaxes(1, 2) for half in halves)
        k, v = self.call.codec.decode(k_half, v_half)
        shape = (row.size, pool.num_kv_heads, -1, pool.head_dim)
        return k.reshape(shape), v.reshape(shape)

    def logits(
        self, q: jax.Array, k: jax.Array, positions: jax.Array, key_positions: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the masked logits of queries on keys, and the largest of each query.

        Args:
          q: f32[n, H, T * G, D]. Queries, scaled.
          k: f32[n, H, K, D]. Keys.
          positions: i32[n, T]. Positions of the queries; negative for padding.
          key_positions: i32[n, K]. Positions of the keys; `NEVER` for keys to leave out.

        Returns:
          f32[n, H, T * G, K] and f32[n, H, T * G].
        """
        options = self.call.options
        num_queries, group = self.call.q.shape[1], self.call.q.shape[3]
        logits = jnp.einsum("nhmd,nhkd->nhmk", q, k, precision=self.precision)
        if options.float32_soft_cap is not None:
            logits = soft_capped(logits, options.float32_soft_cap)
        window = self.call.sliding_window
        seen = is_seen(key_positions[:, None, :], positions[:, :, None], window)
        shape = (*logits.shape[:2], num_queries, group, logits.shape[-1])
        logits = jnp.where(seen[:, None, :, None, :], logits.reshape(shape), -jnp.inf)
        logits = logits.reshape(*shape[:2], num_queries * group, shape[-1])
        return logits, jnp.max(logits, axis=-1, initial=LOWEST)


def _guard(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Replaces values that are not finite by zeros, and their keys by NaN; both f32[..., D].

    A mask keeps a key from queries that do not see it, but not a value: zero times NaN is NaN.
    """
    is_finite = jnp.isfinite(v)
    is_good = jnp.all(is_finite, axis=-1, keepdims=True)
    return jnp.where(is_good, k, jnp.nan), jnp.where(is_finite, v, 0.0)


def _guard_strips(kv: tuple[jax.Array, ...], head_dim: int) -> tuple[jax.Array, ...]:
    """Guards strips like `_guard`; keys and values are f32[n, S * D]."""
    k, v = (x.reshape(-1, head_dim) for x in kv)
    return tuple(x.reshape(kv[0].shape) for x in _guard(k, v))


def cut(call: AttentionCall) -> Strips:
    """Chooses the sizes of strips, items and turns."""
    block_size, table_width = call.tokens_per_block, call.block_ids.shape[1]
    rows, num_queries, num_kv_heads, group, head_dim = call.q.shape
    sizes = range(_MIN_STRIP_TOKENS, block_size) if call.is_native else ()
    size = next((s for s in sizes if block_size % s == 0), block_size)
    row_strips = table_width * block_size // size
    item_strips = max(1, min(_ITEM_TOKENS // size, row_strips))
    token_bytes = 4 * num_kv_heads * (2 * head_dim + 2 * num_queries * group)
    turn_items = _TURN_BYTES // (token_bytes * item_strips * size)
    all_items = rows * ceil_div(row_strips, item_strips)
    turn_items = max(1, min(turn_items, all_items, max(4, rows), _MAX_TURN_ITEMS))
    return Strips(call, size, item_strips, turn_items)
