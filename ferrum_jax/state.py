"""The cache as one immutable value: a pool of blocks, and tables that say whose they are."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ferrum_jax.config import CacheSpec
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.formats import BlockLayout, block_layout
from ferrum_jax.types import NULL_BLOCK, JaxDevice, TokenFormat


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockPool:
    """The bytes of the cache: keys and values of every block.

    N blocks, L layers, H KV heads, B tokens a block, D head dimension. One block of all layers
    is one contiguous row, so copying, swapping and moving blocks moves rows.

    Attributes:
      k: [N, L, H, B, D]. Keys, stored as `encoding.storage_dtype` says.
      v: [N, L, H, B, D]. Values.
      dtype: The numbers' dtype (static). The arrays may hold its bits.
      sharding: How the heads lie over the devices of a mesh (static); None without a mesh.
      formats: Formats that rows may be in (static), the native one first. A program that reads or
        writes tokens is compiled for these; `ops.compressed.enable_formats` adds to them.
    """

    k: jax.Array
    v: jax.Array
    dtype: np.dtype = dataclasses.field(metadata={"static": True})
    sharding: NamedSharding | None = dataclasses.field(default=None, metadata={"static": True})
    formats: tuple[TokenFormat, ...] = dataclasses.field(
        default=(TokenFormat.Native,), metadata={"static": True}
    )

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.k.shape[0]

    @property
    def num_layers(self) -> int:
        """Layers that each block holds."""
        return self.k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Heads that are cached."""
        return self.k.shape[2]

    @property
    def block_size(self) -> int:
        """Tokens a native block."""
        return self.k.shape[3]

    @property
    def head_dim(self) -> int:
        """Numbers a head."""
        return self.k.shape[4]

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Tokens a block of every `TokenFormat`; `block_size` for one that is not in use."""
        return tuple(
            self.tokens_per_block(f) if f in self.formats else self.block_size for f in TokenFormat
        )

    @property
    def slots_per_block(self) -> int:
        """Slots a block: the most tokens that one may hold."""
        return max(self.block_sizes)

    @property
    def mesh_axis(self) -> str | None:
        """The mesh axis over which the heads lie; None if every device has all of them."""
        assert self.sharding is not None
        return next((name for name in self.sharding.spec if name is not None), None)

    def tokens_per_block(self, token_format: TokenFormat) -> int:
        """Returns how many tokens a block of a format holds."""
        if token_format == TokenFormat.Native:
            return self.block_size
        return self.layout(token_format).num_tokens

    def layout(self, token_format: TokenFormat) -> BlockLayout:
        """Returns how the blocks of a compressed format are laid out; see `block_layout`."""
        return block_layout(
            token_format, block_size=self.block_size, head_dim=self.head_dim, dtype=self.dtype
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PageTables:
    """Which block holds which tokens of which sequence.

    S sequences, M blocks a sequence, N blocks in the pool. A row that holds no block is free.

    Attributes:
      block_ids: i32[S, M]. Block at each logical index, or `NULL_BLOCK`.
      held_lens: i32[S]. Tokens that each row's blocks hold.
      num_blocks_held: i32[S]. Blocks of each sequence; their room may exceed `held_lens`.
      free_blocks: i32[N]. A stack: the first `num_free` entries are the free blocks, the last
        of these is taken next. What lies above is meaningless.
      num_free: i32[]. Blocks that are free.
      ref_counts: i32[N]. Holders of each block; 0 means free.
      token_formats: i32[S]. How each row's tokens are written, a `TokenFormat`; 0 for a free row.
      num_pruned: i32[S]. Tokens that were dropped from each sequence: its next token stands at
        position `seq_lens`, which counts both.
      block_sizes: Tokens a block of each `TokenFormat` (static); the native ones for a format that
        is not in use.
    """

    block_ids: jax.Array
    held_lens: jax.Array
    num_blocks_held: jax.Array
    free_blocks: jax.Array
    num_free: jax.Array
    ref_counts: jax.Array
    token_formats: jax.Array
    num_pruned: jax.Array
    block_sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def seq_lens(self) -> jax.Array:
        """i32[S]. Length of each row's sequence, the tokens included that were dropped from it."""
        return self.held_lens + self.num_pruned

    @property
    def block_size(self) -> int:
        """Tokens a native block."""
        return self.block_sizes[TokenFormat.Native]

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return self.ref_counts.shape[-1]

    @property
    def max_seqs(self) -> int:
        """Rows."""
        return self.block_ids.shape[-2]

    @property
    def max_blocks_per_seq(self) -> int:
        """Blocks that one row can hold."""
        return self.block_ids.shape[-1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CacheState:
    """The whole cache.

    Attributes:
      pool: The bytes.
      tables: Whose they are.
    """

    pool: BlockPool
    tables: PageTables


def init(spec: CacheSpec, device: JaxDevice | Mesh | NamedSharding | None = None) -> CacheState:
    """Returns an empty cache, its pool zeroed.

    Where the model's parameters lie on a mesh, even one of a single device, give that mesh. A
    program that takes such parameters returns the cache on their mesh. If the cache was not there
    before the first call, the second call has arguments of another sharding, and compiles again.

    Args:
      spec: Sizes and dtype.
      device: Where the arrays live; the default device if absent. On each device of a `Mesh` lies
        the whole cache; `sharding.init_sharded` spreads the heads over an axis. A `NamedSharding`
        is that of the pool; the tables then lie on each of its mesh's devices.

    Example:
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=4, dtype="float32",
      ...                  num_blocks=8, block_size=4, max_seqs=2, max_blocks_per_seq=3)
      >>> state = init(spec)
      >>> state.pool.k.shape, int(state.tables.num_free)
      ((8, 2, 1, 4, 4), 8)
    """
    shape = (spec.num_blocks, spec.num_layers, spec.num_kv_heads, spec.block_size, spec.head_dim)
    dtype = jnp.dtype(spec.dtype)
    if isinstance(device, Mesh):
        device = NamedSharding(device, PartitionSpec())
    sharding, everywhere = None, device
    if isinstance(device, NamedSharding):
        sharding, everywhere = device, NamedSharding(device.mesh, PartitionSpec())
        platform = next(iter(device.device_set)).platform
    else:
        platform = device.platform if device else jax.default_backend()
    storage = storage_dtype(dtype, platform)
    pool = BlockPool(
        k=jnp.zeros(shape, storage, device=device),
        v=jnp.zeros(shape, storage, device=device),
        dtype=dtype,
        sharding=sharding,
    )
    return CacheState(pool=pool, tables=init_tables(spec, everywhere))


def init_tables(spec: CacheSpec, device: JaxDevice | NamedSharding | None = None) -> PageTables:
    """Returns tables in which every block is free; the lowest block is taken first."""
    rows = spec.max_seqs
    tables = PageTables(
        block_ids=jnp.full((rows, spec.max_blocks_per_seq), NULL_BLOCK, jnp.int32),
        held_lens=jnp.zeros(rows, jnp.int32),
        num_blocks_held=jnp.zeros(rows, jnp.int32),
        free_blocks=jnp.arange(spec.num_blocks - 1, -1, -1, dtype=jnp.int32),
        num_free=jnp.asarray(spec.num_blocks, jnp.int32),
        ref_counts=jnp.zeros(spec.num_blocks, jnp.int32),
        token_formats=jnp.zeros(rows, jnp.int32),
        num_pruned=jnp.zeros(rows, jnp.int32),
        block_sizes=(spec.block_size,) * len(TokenFormat),
    )
    return tables if device is None else jax.device_put(tables, device)
