"""What a model sees of the cache in one step: some rows, and their newest tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.ops import write
from ferrum_jax.ops.indexing import columns, index_or_end, read, token_slots
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
      seq_lens: i32[R]. Tokens of each row, those of this step included.
      q_lens: i32[R]. Tokens of this step in each row, at most T; the rest is padding.
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
          q_lens: i32[R]. New tokens of each row.
          num_tokens: T, the most new tokens of a row (static).
          seq_lens: i32[R]. Where each row's new tokens end; at the end of the sequence if
            absent. Smaller while a prompt is worked off in chunks.
        """
        tables = state.tables
        rows = index_or_end(jnp.asarray(seq_ids, jnp.int32), tables.max_seqs)
        held = read(tables.seq_lens, rows, 0)
        ends = held if seq_lens is None else jnp.minimum(jnp.asarray(seq_lens, jnp.int32), held)
        return cls(
            pool=state.pool,
            block_ids=read(tables.block_ids, rows, NULL_BLOCK),
            seq_lens=ends,
            q_lens=jnp.minimum(jnp.asarray(q_lens, jnp.int32), ends),
            num_tokens=num_tokens,
        )

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Position of each token in its sequence; -1 for padding."""
        token = columns(self.num_tokens)
        first = (self.seq_lens - self.q_lens)[:, None]
        return jnp.where(token < self.q_lens[:, None], first + token, -1)

    @property
    def slots(self) -> jax.Array:
        """i32[R, T]. Where in the pool each token goes; out of range for padding."""
        pool = self.pool
        return token_slots(self.block_ids, self.positions, pool.num_blocks, pool.block_size)

    def write(self, layer: ArrayLike, k: jax.Array, v: jax.Array) -> "PagedBatch":
        """Stores the new tokens' keys and values, each [R, T, H, D], in one layer."""
        return dataclasses.replace(self, pool=write(self.pool, layer, self.slots, k, v))

    def attend(
        self, layer: ArrayLike, q: jax.Array, options: AttentionOptions | None = None
    ) -> jax.Array:
        """Lets the new tokens see their sequences, causally.

        Args:
          layer: i32[]. Layer to read.
          q: [R, T, Hq, D]. Queries of the new tokens.
          options: Scale, window, soft cap and sinks; plain attention if absent.

        Returns:
          [R, T, Hq, D], zero for padding.
        """
        options = options or AttentionOptions()
        if self.num_tokens == 1:
            seq_lens = jnp.where(self.q_lens > 0, self.seq_lens, 0)
            one = paged_attention(q[:, 0], self.pool, layer, self.block_ids, seq_lens, None, options)
            return one[:, None]
        return paged_attention(
            q, self.pool, layer, self.block_ids, self.seq_lens, self.q_lens, options
        )
