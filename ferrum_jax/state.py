"""Immutable cache state: a pool of blocks, and page tables that map sequences to blocks."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from ferrum_jax.codecs import CODECS, Codec, codec_for
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.layers import LayerMap
from ferrum_jax.memory import use_huge_pages
from ferrum_jax.payload import KeyValue
from ferrum_jax.spec import CacheSpec, PoolSpec
from ferrum_jax.types import NULL_BLOCK, JaxDevice, TokenFormat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPool:
    """What the tokens of every block leave behind.

    N blocks, L layers, H KV heads, B tokens per block, D head dimension. One block of all layers is
    contiguous in memory, so that a block is copied, swapped or moved as one piece.

    Attributes:
      arrays: Arrays by name, each [N, L, H, B, D], in the dtype that `encoding.storage_dtype`
        returns: the bits of the cached numbers, perhaps as integers.
      payload: What the arrays are (static): keys and values, their heads and their dtype.
      sharding: How the heads are divided among the devices of a mesh (static); None without a mesh.
      formats: Token formats that rows may use (static), the native one first. A program that reads
        or writes tokens is compiled for these; `ops.compressed.enable_formats` adds to them.
    """

    arrays: dict[str, jax.Array]
    payload: KeyValue = dataclasses.field(metadata={"static": True})
    sharding: NamedSharding | None = dataclasses.field(default=None, metadata={"static": True})
    formats: tuple[TokenFormat, ...] = dataclasses.field(
        default=(TokenFormat.Native,), metadata={"static": True}
    )

    @property
    def _shape(self) -> tuple[int, ...]:
        """[N, L, H, B, D] of each array; on one device of a mesh, H is the number of its heads."""
        return next(iter(self.arrays.values())).shape[-5:]

    @property
    def dtype(self) -> np.dtype:
        """Dtype of the cached numbers."""
        return np.dtype(self.payload.dtype)

    @property
    def stored_dtype(self) -> np.dtype:
        """Dtype of the arrays."""
        return next(iter(self.arrays.values())).dtype

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self._shape[0]

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return self._shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads."""
        return self._shape[2]

    @property
    def block_size(self) -> int:
        """Tokens per native block."""
        return self._shape[3]

    @property
    def head_dim(self) -> int:
        """Numbers per head."""
        return self._shape[4]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens per block of each `TokenFormat`; `block_size` for a format that is not in use."""
        return tuple(
            self.tokens_per_block(f) if f in self.formats else self.block_size for f in CODECS
        )

    @property
    def slots_per_block(self) -> int:
        """Slots per block: the most tokens that a block of any format in use holds."""
        return max(self.block_sizes)

    @property
    def mesh(self) -> Mesh | AbstractMesh | None:
        """The devices that hold the pool together; None without a mesh."""
        return None if self.sharding is None else self.sharding.mesh

    @property
    def mesh_axis(self) -> str | None:
        """Mesh axis that divides the heads; None if each device has all heads."""
        spec = () if self.sharding is None else self.sharding.spec
        return next((name for name in spec if name is not None), None)

    def heads_at(self, axis: int) -> PartitionSpec:
        """Returns the partition specs of an array with the pool's heads at an axis."""
        return PartitionSpec(*[None] * axis, self.mesh_axis)

    def tokens_per_block(self, token_format: TokenFormat) -> int:
        """Returns how many tokens a block holds.

        Args:
          token_format: Format of the tokens; it need not be in use.

        Raises:
          ValueError: The pool's geometry does not allow the format.
        """
        return self.codec(token_format).num_tokens

    def codec(self, token_format: TokenFormat) -> Codec:
        """Returns the codec of a format's blocks.

        Args:
          token_format: Format of the tokens; it need not be in use.

        Raises:
          ValueError: The pool's geometry does not allow the format.
        """
        return codec_for(token_format, self.payload, self.block_size)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """Which blocks of a pool hold the tokens of which sequence.

    S sequences, G layer groups that draw from the pool, M blocks per row, N blocks in the pool. A
    sequence has one row per group: row g * S + s belongs to sequence s in group g. A row that holds
    no block is free.

    Attributes:
      block_ids: i32[G * S, M]. Block at each logical index, or `NULL_BLOCK`.
      held_lens: i32[G * S]. Tokens that each row's blocks hold, or held before the row's sliding
        window had passed them.
      num_blocks_held: i32[G * S]. Blocks of each row; they may have room for more than `held_lens`.
      num_released: i32[G * S]. Leading blocks that the sliding window has passed, and that the row
        has released. The row's blocks are at the logical indices that follow.
      free_blocks: i32[N]. A stack: the first `num_free` entries are the ids of the free blocks; the
        last of these is taken next. Entries above are meaningless.
      num_free: i32[]. Number of free blocks.
      ref_counts: i32[N]. References to each block; 0 means free.
      token_formats: i32[G * S]. `TokenFormat` of each row; 0 (native) for a free row.
      num_pruned: i32[G * S]. Tokens that were dropped from each row.
      block_sizes: Tokens per block of each `TokenFormat` (static); the native number for a format
        that is not in use.
      windows: Sliding window of each group (static); None for a group that keeps all tokens.
    """

    block_ids: jax.Array
    held_lens: jax.Array
    num_blocks_held: jax.Array
    num_released: jax.Array
    free_blocks: jax.Array
    num_free: jax.Array
    ref_counts: jax.Array
    token_formats: jax.Array
    num_pruned: jax.Array
    block_sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    windows: tuple[int | None, ...] = dataclasses.field(default=(None,), metadata={"static": True})

    @property
    def seq_lens(self) -> jax.Array:
        """i32[S]. Length of each sequence, dropped tokens included: its next token's position."""
        return (self.held_lens + self.num_pruned)[..., : self.max_seqs]

    @property
    def block_size(self) -> int:
        """Tokens per native block."""
        return self.block_sizes[TokenFormat.Native]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.ref_counts.shape[-1]

    @property
    def num_groups(self) -> int:
        """Layer groups that draw from the pool."""
        return len(self.windows)

    @property
    def has_windows(self) -> bool:
        """Whether a group has a sliding window, so that rows may release blocks."""
        return any(window is not None for window in self.windows)

    @property
    def num_rows(self) -> int:
        """Rows: one per group and sequence."""
        return self.block_ids.shape[-2]

    @property
    def max_seqs(self) -> int:
        """Number of sequences."""
        return self.num_rows // self.num_groups

    @property
    def max_blocks_per_seq(self) -> int:
        """Most blocks that a row holds."""
        return self.block_ids.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheState:
    """A cache: its blocks, and the tables that map sequences to them.

    Attributes:
      pools: Blocks. Layer groups of equal geometry draw from one pool.
      page_tables: Tables of each pool.
      layers: Which layer is in which group (static).
    """

    pools: tuple[BlockPool, ...]
    page_tables: tuple[PageTables, ...]
    layers: LayerMap = dataclasses.field(metadata={"static": True})

    @property
    def pool(self) -> BlockPool:
        """The pool, if there is only one.

        Raises:
          ValueError: There are several; see `pools`.
        """
        if len(self.pools) != 1:
            raise self._several_pools("pool", "pools")
        return self.pools[0]

    @property
    def tables(self) -> PageTables:
        """The page tables of the pool, if there is only one.

        Raises:
          ValueError: There are several; see `page_tables`.
        """
        if len(self.pools) != 1:
            raise self._several_pools("tables", "page_tables")
        return self.page_tables[0]

    @property
    def seq_lens(self) -> jax.Array:
        """i32[S]. Length of each sequence, dropped tokens included: its next token's position."""
        return self.page_tables[0].seq_lens

    @property
    def max_seqs(self) -> int:
        """Number of sequences."""
        return self.page_tables[0].max_seqs

    def with_pools(self, pools: Sequence[BlockPool]) -> "CacheState":
        """Returns the cache with other pools, such as those that a model has written.

        Args:
          pools: As many as the cache has, in their order.

        Returns:
          The cache, with the tables as they are.
        """
        return CacheState(tuple(pools), self.page_tables, self.layers)

    def with_tables(self, page_tables: Sequence[PageTables]) -> "CacheState":
        """Returns the cache with other page tables.

        Args:
          page_tables: One for each pool, in their order.

        Returns:
          The cache, with the pools as they are.
        """
        return CacheState(self.pools, tuple(page_tables), self.layers)

    def part(self, pool: int) -> "CacheState":
        """Returns the cache of the layer groups of one pool.

        Args:
          pool: Index of the pool.

        Returns:
          The cache; the state itself if it has no other pool.
        """
        if len(self.pools) == 1:
            return self
        layers = self.layers.part(pool)
        return CacheState((self.pools[pool],), (self.page_tables[pool],), layers)

    def with_part(self, pool: int, part: "CacheState") -> "CacheState":
        """Returns the cache with another pool, and other tables, in place of one.

        Args:
          pool: Index of the pool.
          part: What `part` returned, changed.
        """
        pools, page_tables = list(self.pools), list(self.page_tables)
        pools[pool], page_tables[pool] = part.pool, part.tables
        return CacheState(tuple(pools), tuple(page_tables), self.layers)

    def _several_pools(self, name: str, instead: str) -> ValueError:
        return ValueError(
            f"This cache has {len(self.pools)} pools, for layer groups of different geometry. "
            f"Use `{instead}` instead of `{name}`."
        )


def init(spec: CacheSpec, device: JaxDevice | Mesh | NamedSharding | None = None) -> CacheState:
    """Returns an empty cache; its pools are zero.

    If the model's parameters are on a mesh, even of a single device, pass that mesh: a program that
    takes such parameters returns the cache on their mesh. A cache that was created elsewhere has
    another sharding in the second call than in the first, which compiles the program again.

    Args:
      spec: Layer groups, sizes and dtypes.
      device: Device of the arrays; the default device if absent. With a `Mesh`, each device has the
        whole cache (`sharding.init_sharded` divides the heads among them). A `NamedSharding` is
        used for the pools; each device of its mesh then has all tables.

    Returns:
      The cache: all blocks and rows free.

    Example:
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                  num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
      >>> state = init(spec)
      >>> state.pool.num_blocks, int(state.tables.num_free)
      (8, 8)
    """
    if isinstance(device, Mesh):
        device = NamedSharding(device, PartitionSpec())
    everywhere = device
    if isinstance(device, NamedSharding):
        everywhere = NamedSharding(device.mesh, PartitionSpec())
    return CacheState(
        pools=tuple(_init_pool(pool, device) for pool in spec.pools),
        page_tables=tuple(init_tables(spec, pool, everywhere) for pool in spec.pools),
        layers=spec.layer_map,
    )


def _init_pool(spec: PoolSpec, device: JaxDevice | NamedSharding | None) -> BlockPool:
    """Returns a pool of zeros."""
    payload, sharding = spec.payload, None
    if isinstance(device, NamedSharding):
        sharding, platform = device, next(iter(device.device_set)).platform
    else:
        platform = device.platform if device else jax.default_backend()
    storage = storage_dtype(payload.dtype, platform)
    arrays = {
        name: jnp.zeros(
            (spec.num_blocks, spec.num_layers, heads, spec.block_size, size), storage, device=device
        )
        for name, (heads, size) in payload.features.items()
    }
    return BlockPool(use_huge_pages(arrays), payload, sharding=sharding)


def init_tables(
    spec: CacheSpec, pool: PoolSpec, device: JaxDevice | NamedSharding | None = None
) -> PageTables:
    """Returns tables in which every block is free; the lowest block id is taken first.

    Args:
      spec: Sizes.
      pool: The pool of the tables.
      device: Device or sharding of the arrays; the default device if absent.
    """
    rows = len(pool.windows) * spec.max_seqs
    tables = PageTables(
        block_ids=jnp.full((rows, spec.max_blocks_per_seq), NULL_BLOCK, jnp.int32),
        held_lens=jnp.zeros(rows, jnp.int32),
        num_blocks_held=jnp.zeros(rows, jnp.int32),
        num_released=jnp.zeros(rows, jnp.int32),
        free_blocks=jnp.arange(pool.num_blocks - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.asarray(pool.num_blocks, jnp.int32),
        ref_counts=jnp.zeros(pool.num_blocks, jnp.int32),
        token_formats=jnp.zeros(rows, jnp.int32),
        num_pruned=jnp.zeros(rows, jnp.int32),
        block_sizes=(spec.block_size,) * len(CODECS),
        windows=pool.windows,
    )
    return tables if device is None else jax.device_put(tables, device)
