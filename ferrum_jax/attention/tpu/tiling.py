"""How an attention call is cut into steps of a TPU kernel.

The sizes follow from the vector memory of a core: with them the compiler (jax 0.10.2, libtpu
0.0.42) stays below 16 MiB for heads of up to 512 numbers, and mostly below 6. No TPU was available
to measure them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.state import BlockPool

LANES = 128
"""Numbers that a vector register holds side by side."""

SUBLANES = 8
"""Numbers of 32 bits that a vector register holds one above the other."""

MAX_TILE_BYTES = 1 << 20
"""Bytes of a tile of keys. Two tiles of keys and two of values are in memory at a time."""

MAX_TILE_TOKENS = 512
"""Tokens of a tile, unless a single block has more."""

_MAX_MEMBERS = 512  # A float32 for each member and token takes 1 MiB.
_MEMBERS_MULTIPLE = 2 * SUBLANES  # Numbers of 16 bits are packed in pairs.


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of tiles.

    Attributes:
      tile_queries: Queries per step: T, or a number that times the group is a multiple of 16.
      tile_heads: KV heads per step, a divisor of H.
      tile_blocks: Blocks that are read at a time.
    """

    tile_queries: int
    tile_heads: int
    tile_blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes and options that are static in the kernel; letters as in `AttentionCall`.

    Attributes:
      rows: R.
      num_queries: T.
      num_kv_heads: H.
      group: G.
      head_dim: D.
      block_size: B.
      max_blocks: M.
      tokens_last: Value of `has_tokens_last`.
      scale: Factor on the logits.
      soft_cap: Bound on the logits, or None.
      sliding_window: Tokens that a query sees, or None if it sees all that the table can hold.
      dtype: Dtype of both factors of the products.
      tiling: Sizes of tiles.
    """

    rows: int
    num_queries: int
    num_kv_heads: int
    group: int
    head_dim: int
    block_size: int
    max_blocks: int
    tokens_last: bool
    scale: float
    soft_cap: float | None
    sliding_window: int | None
    dtype: np.dtype
    tiling: Tiling

    @property
    def tile_members(self) -> int:
        """Queries per step, the heads of a group counted each."""
        return self.tiling.tile_queries * self.group

    @property
    def tile_tokens(self) -> int:
        """Tokens that are read at a time."""
        return self.tiling.tile_blocks * self.block_size

    @property
    def sees_unevenly(self) -> bool:
        """Whether a step may read tokens that only some of its queries see."""
        return self.tiling.tile_queries > 1 or self.sliding_window is not None

    @property
    def num_head_tiles(self) -> int:
        """Tiles into which a row's heads are divided."""
        return self.num_kv_heads // self.tiling.tile_heads

    @property
    def num_query_tiles(self) -> int:
        """Tiles into which a row's queries are divided."""
        return ceil_div(self.num_queries, self.tiling.tile_queries)

    @property
    def num_steps(self) -> int:
        """Steps of the whole grid."""
        return self.rows * self.num_head_tiles * self.num_query_tiles

    def place(self, step: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns a step's row, tile of heads and tile of queries."""
        return (
            step // (self.num_head_tiles * self.num_query_tiles),
            step // self.num_query_tiles % self.num_head_tiles,
            step % self.num_query_tiles,
        )


def has_tokens_last(pool: BlockPool) -> bool:
    """Returns whether the kernel takes the pool as [N, L, H, D, B].

    XLA lays out an array in tiles of 8 by 128 numbers, and orders its dimensions so that the least
    memory is wasted. Heads of a multiple of 128 numbers stay last. Other heads would be padded
    (heads of 64 to twice the memory), so if the tokens of a block are a multiple of 128, the tokens
    come last instead. The kernel takes the array in this order, and nothing is copied or padded.
    """
    return pool.head_dim % LANES != 0


def tiling_for(call: AttentionCall) -> Tiling:
    """Chooses sizes for a call, by its shapes alone."""
    _, num_queries, num_kv_heads, group, head_dim = call.q.shape
    block_size = call.pool.block_size
    tile_queries = num_queries
    if num_queries * group > _MAX_MEMBERS:
        multiple = math.lcm(_MEMBERS_MULTIPLE, group) // group
        tile_queries = max(_MAX_MEMBERS // group // multiple, 1) * multiple
    block_bytes = block_size * head_dim * call.pool.stored_dtype.itemsize
    most = min(_MAX_MEMBERS // (tile_queries * group), MAX_TILE_BYTES // block_bytes)
    tile_heads = max((n for n in range(1, most + 1) if num_kv_heads % n == 0), default=1)
    tile_blocks = min(
        MAX_TILE_TOKENS // block_size,
        MAX_TILE_BYTES // (tile_heads * block_bytes),
        call.block_ids.shape[1],
    )
    return Tiling(tile_queries=tile_queries, tile_heads=tile_heads, tile_blocks=max(tile_blocks, 1))


def sizes_of(call: AttentionCall, tiling: Tiling) -> Sizes:
    """Returns the sizes and options of a call."""
    rows, num_queries, num_kv_heads, group, head_dim = call.q.shape
    max_blocks, block_size = call.block_ids.shape[1], call.pool.block_size
    is_narrow = call.q.dtype == call.pool.dtype == jnp.bfloat16
    return Sizes(
        rows=rows,
        num_queries=num_queries,
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        block_size=block_size,
        max_blocks=max_blocks,
        tokens_last=has_tokens_last(call.pool),
        scale=call.options.scale_for(head_dim),
        soft_cap=call.options.float32_soft_cap,
        sliding_window=call.sliding_window,
        dtype=np.dtype(jnp.bfloat16 if is_narrow else jnp.float32),
        tiling=tiling,
    )
