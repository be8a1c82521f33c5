"""What a model sees of the cache in one step: some rows, and their newest tokens."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.checks import check_live
from ferrum_jax.ops import write
from ferrum_jax.ops.arguments import as_rows
from ferrum_jax.ops.indexing import index_or_end, newest_positions, read, token_slots
from ferrum_jax.state import BlockPool, CacheState
from ferrum_jax.types import NULL_BLOCK


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PagedBatch:
    """Rows of a cache with up to T new tokens each, for the layers of a model to pass along.

    R rows, M blocks a row. A layer writes its keys and values, then attends; since writing
    comes first, several rows of a batch may be consecutive chunks of one sequence.

    Attributes:
      pool: The blocks, changed by `write`.
      block_ids: i32[R, M]. Each row's blocks.
      seq_lens: i32[R]. Tokens in the blocks of each row, those of this step included.
      q_lens: i32[R]. Tokens of this step in each row, at most T; the rest is padding.
      formats: i32[R]. How each row's tokens are written, a `TokenFormat`.
      num_pruned: i32[R]. Tokens of each row's sequence that were dropped.
      num_tokens: T (static).

    Example:
      >>> import ferrum_jax as fj
      >>> spec = fj.CacheSpec(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                     num_blocks=4, block_size=4, max_seqs=2, max_blocks_per_seq=4)
      >>> state, _ = fj.allocate(fj.init(spec), [0, 1], [5, 3])
      >>> batch = PagedBatch.of(state, [0, 1], q_lens=[2, 3], num_tokens=3)
      >>> batch.positions.tolist()
      [[3, 4, -1], [0, 1, 2]]
    """

    pool: BlockPool
    block_ids: jax.Array
    seq_lens: jax.Array
    q_lens: jax.Array
    formats: jax.Array
    num_pruned: jax.Array
    num_tokens: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls,
        state: CacheState,
        seq_ids: ArrayLike,
        q_lens: ArrayLike,
        *,
        num_tokens: int,
        seq_lens: ArrayLike | None = None,
    ) -> "PagedBatch":
        """Takes rows out of a state.

        Args:
          state: The cache, with room for the new tokens already (`allocate`, `extend`).
          seq_ids: i32[R]. Rows; `NULL_SEQ` is a row without tokens.
          q_lens: i32[R], or i32[] for all rows. New tokens of each row. On the device, a number
            below 0 or above `num_tokens` is taken as 0.
          num_tokens: T, the most new tokens of a row (static).
          seq_lens: i32[R], or i32[]. Where each row's new tokens end, those that were dropped
            counted too; at the end of the sequence if absent or beyond it. Smaller while a prompt
            is worked off in chunks.

        Returns:
          The batch.

        Raises:
          AssertionError: The arguments' shapes do not fit each other.
          ValueError: A row has more than `num_tokens` new tokens, or less than none, as far as the
            host knows; an id or a count is no integer within int32;
            or the state was consumed by an earlier call.
        """
        check_live("state", state)
        tables = state.tables
        seq_ids, q_lens = as_rows(seq_ids=seq_ids, q_lens=q_lens)
        is_possible = (q_lens >= 0) & (q_lens <= num_tokens)
        if isinstance(is_possible, np.ndarray) and not is_possible.all():
            raise ValueError(
                f"q_lens must be from 0 to num_tokens ({num_tokens}), got {q_lens}. Raise "
                "num_tokens, or take a prompt in chunks, as `prefill` does."
            )
        rows = index_or_end(jnp.asarray(seq_ids), tables.max_seqs)
        held = read(tables.seq_lens, rows, 0)
        num_pruned = read(tables.num_pruned, rows, 0)
        ends = held
        if seq_lens is not None:
            _, ends = as_rows(seq_ids=seq_ids, seq_lens=seq_lens)
            ends = jnp.clip(jnp.maximum(ends, 0) - num_pruned, 0, held)
        return cls(
            pool=state.pool,
            block_ids=read(tables.block_ids, rows, NULL_BLOCK),
            seq_lens=ends,
            q_lens=jnp.where(is_possible, jnp.minimum(q_lens, ends), 0),
            formats=read(tables.formats, rows, 0),
            num_pruned=num_pruned,
            num_tokens=num_tokens,
        )

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Position of each token in its sequence; -1 for padding."""
        seq_lens = self.seq_lens + self.num_pruned
        return newest_positions(seq_lens, self.q_lens, self.num_tokens)

    @property
    def slots(self) -> jax.Array:
        """i32[R, T]. Where in the pool each token goes; out of range for padding."""
        pool = self.pool
        places = newest_positions(self.seq_lens, self.q_lens, self.num_tokens)
        if len(pool.formats) == 1:
            return token_slots(self.block_ids, places, pool.num_blocks, pool.block_size)
        sizes = jnp.asarray(pool.block_sizes, jnp.int32)[self.formats][:, None]
        slots = pool.slots_per_block
        return token_slots(self.block_ids, places, pool.num_blocks, sizes, slots)

    def last(self, x: jax.Array) -> jax.Array:
        """Picks each row's last new token, the one whose logits are wanted.

        Args:
          x: [R, T, ...]. Something of every new token.

        Returns:
          [R, ...]. That of the last one; of the first place where a row has no new token.
        """
        index = jnp.maximum(self.q_lens - 1, 0)
        return x[jnp.arange(x.shape[0]), index]

    def write(self, layer: jax.Array | int, k: jax.Array, v: jax.Array) -> "PagedBatch":
        """Stores new keys and values in one layer; donates the pool.

        Called outside `jit`, this consumes the pool, also of the state that it came from.

        Args:
          layer: i32[]. Layer to write.
          k: [R, T, H, D]. Keys of the new tokens, rounded to the pool's dtype as `ops.write` does.
            A NumPy array is copied first; one that a caller's own `jit` takes is not, and must not
            be overwritten until the result is ready.
          v: [R, T, H, D]. Values, likewise.

        Returns:
          The batch with the pool so changed.

        Raises:
          AssertionError: The shapes are not those of the batch and of the pool's heads.
          ValueError: The pool was consumed before.
          ValueError: The pool has no such layer, as far as the host knows.
        """
        self._require_layer(layer)
        slots = self.slots
        formats = jnp.broadcast_to(self.formats[:, None], slots.shape)
        pool = write(self.pool, layer, slots, k, v, formats)
        return dataclasses.replace(self, pool=pool)

    def attend(
        self, layer: jax.Array | int, q: jax.Array, options: AttentionOptions | None = None
    ) -> jax.Array:
        """Lets the new tokens see their sequences, causally.

        Args:
          layer: i32[]. Layer to read.
          q: [R, T, Hq, D]. Queries of the new tokens.
          options: Scale, window, soft cap and sinks; plain attention if absent.

        Returns:
          [R, T, Hq, D], zero for padding.

        Raises:
          ValueError: The pool has no such layer, as far as the host knows.
        """
        self._require_layer(layer)
        return paged_attention(
            q,
            self.pool,
            layer,
            options=options or AttentionOptions(),
            block_ids=self.block_ids,
            seq_lens=self.seq_lens,
            q_lens=self.q_lens,
            formats=self.formats,
        )

    def _require_layer(self, layer: jax.Array | int) -> None:
        num_layers = self.pool.num_layers
        if isinstance(layer, (int, np.integer)) and not 0 <= layer < num_layers:
            raise ValueError(
                f"Layer {layer} was asked for; the pool has {num_layers}, counted from 0. Make it "
                "with the num_layers of the model."
            )


Rotary: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""A rotary embedding: `(x [R, T, H, D], positions i32[R, T]) -> x`, -1 for padding."""


def attend_new(
    batch: PagedBatch,
    layer: jax.Array | int,
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    *,
    rotary: Rotary | None = None,
    options: AttentionOptions | None = None,
) -> tuple[jax.Array, PagedBatch]:
    """Does a layer's part on the cache: turns, stores and attends.

    Any attention adopts the cache by this call in place of its own: project queries, keys and
    values, hand them over, and project `out`.

    Args:
      batch: The rows.
      layer: i32[]. Layer of the cache.
      qkv: Queries [R, T, Hq, D], keys and values [R, T, H, D] of the new tokens.
      rotary: Applied to queries and keys, if given.
      options: Scale, window, soft cap and sinks; plain attention if absent.

    Returns:
      `(out, batch)`: out is [R, T, Hq, D], zero for padding.
    """
    q, k, v = qkv
    if rotary is not None:
        q, k = rotary(q, batch.positions), rotary(k, batch.positions)
    batch = batch.write(layer, k, v)
    return batch.attend(layer, q, options), batch
