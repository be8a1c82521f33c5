"""The exact shape of a cache: layer groups, the pools that they draw from, and sizes.

Each layer group has page tables of its own. Groups of equal geometry draw blocks from one pool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.typing import DTypeLike

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import INT32_LIMIT, check_count, check_items, check_type, settle_count
from ferrum_jax.layers import GroupPlace, LayerGroup, LayerMap
from ferrum_jax.payload import KeyValue
from ferrum_jax.reader import cached_layers
from ferrum_jax.types import to_dtype

_ONE_GROUP = ("num_layers", "num_kv_heads", "head_dim", "dtype")
_ONLY_GROUP = "all"


@dataclasses.dataclass(frozen=True)
class PoolSpec:
    """Shape of one pool, and of the tables of the groups that draw from it.

    Attributes:
      payload: What a token leaves behind in each layer.
      num_layers: Layers of each group.
      num_blocks: Number of blocks.
      block_size: Tokens per block.
      windows: Sliding window of each group; None for a group that keeps all tokens.
    """

    payload: KeyValue
    num_layers: int
    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...]

    @property
    def block_bytes(self) -> int:
        """Bytes per block, all layers of one group."""
        return self.num_layers * self.block_size * self.payload.token_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """The exact shape of a cache. Static: another one recompiles.

    The layers are either alike, and then `num_layers`, `num_kv_heads`, `head_dim` and `dtype`
    describe them; or they are in `groups`.

    Attributes:
      num_layers: Number of cached layers.
      num_kv_heads: Number of key/value heads.
      head_dim: Numbers per head.
      dtype: Dtype of the pool; anything that names a dtype, stored as the NumPy dtype.
      groups: Layer groups, if layers differ.
      shared_layers: For each layer without a cache of its own, the layer that has it.
      num_blocks: Number of blocks in each pool; a group's own `num_blocks` in a pool of these.
      block_size: Tokens per block.
      max_seqs: Maximum number of sequences.
      max_blocks_per_seq: Maximum number of blocks per sequence and group (columns of the tables).

    Raises:
      ValueError: A size is not a positive integer, `dtype` is not one that a pool can have, an
        index would not fit in an int32, or groups overlap.

    Example:
      >>> spec = CacheSpec(num_layers=2, num_kv_heads=1, head_dim=8, dtype="float32",
      ...                  num_blocks=10, block_size=4, max_seqs=2, max_blocks_per_seq=5)
      >>> spec.block_bytes, spec.pool_bytes
      (512, 5120)
    """

    num_layers: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    dtype: DTypeLike | None = None
    groups: Sequence[LayerGroup] = ()
    shared_layers: Mapping[int, int] | Sequence[tuple[int, int]] = ()
    num_blocks: int
    block_size: int
    max_seqs: int
    max_blocks_per_seq: int

    def __post_init__(self) -> None:
        """Checks each field, and that every index fits in an int32."""
        sizes = ["num_blocks", "block_size", "max_seqs", "max_blocks_per_seq"]
        if not self.groups:
            object.__setattr__(self, "dtype", to_dtype(self.dtype))
            sizes = [*_ONE_GROUP[:3], *sizes]
        for name in sizes:
            settle_count(self, name, limit=INT32_LIMIT)
        self._settle_groups()
        self._settle_shared_layers()
        self._check_products()

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        num_blocks: int,
        block_size: int,
        max_seqs: int,
        max_sequence_length: int,
        dtype: DTypeLike | None = None,
    ) -> CacheSpec:
        """Returns the shape of a cache for a model, read from the model's configuration.

        Layers with a sliding window, with other heads, and those that read another layer's cache
        are found by the names of the fields; see `reader.cached_layers`.

        Args:
          config: The fields of a Hugging Face `config.json`, or an object with them; a model
            configuration of Tunix or gemma; anything with the same names of fields.
          num_blocks: Number of blocks in each pool.
          block_size: Tokens per block.
          max_seqs: Maximum number of sequences.
          max_sequence_length: Maximum number of tokens per sequence, prompt and answer together.
          dtype: Dtype of the pool; the one that the configuration names if None.

        Raises:
          ValueError: A field is missing, wrong or unknown; the text says what was looked for, and
            what there is.

        Example:
          >>> config = {"num_hidden_layers": 28, "num_attention_heads": 16, "head_dim": 128,
          ...           "num_key_value_heads": 8, "torch_dtype": "bfloat16"}
          >>> spec = CacheSpec.of(config, num_blocks=64, block_size=16, max_seqs=4,
          ...                     max_sequence_length=512)
          >>> spec.num_kv_heads, spec.head_dim, spec.max_blocks_per_seq
          (8, 128, 32)
        """
        max_sequence_length = check_count("max_sequence_length", max_sequence_length)
        return cls(
            **cached_layers(config, dtype).fields(),
            num_blocks=num_blocks,
            block_size=block_size,
            max_seqs=max_seqs,
            max_blocks_per_seq=ceil_div(max_sequence_length, check_count("block_size", block_size)),
        )

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The groups; a single one if all layers are alike."""
        if self.groups:
            return tuple(self.groups)
        sizes: Any = self.num_kv_heads, self.head_dim, self.dtype
        assert self.num_layers is not None
        payload = KeyValue(*sizes)
        return (LayerGroup(_ONLY_GROUP, range(self.num_layers), payload),)

    @property
    def pools(self) -> tuple[PoolSpec, ...]:
        """The pools, in the order in which the groups first name them."""
        windows: dict[tuple[Any, ...], list[int | None]] = {}
        for group in self.layer_groups:
            windows.setdefault(_geometry(group), []).append(group.sliding_window)
        return tuple(
            PoolSpec(payload, num_layers, own or self.num_blocks, self.block_size, tuple(of_groups))
            for (payload, num_layers, own), of_groups in windows.items()
        )

    @property
    def layer_map(self) -> LayerMap:
        """Where each layer's cache is."""
        geometries: list[Any] = []
        counts: list[int] = []
        places = []
        for group in self.layer_groups:
            geometry = _geometry(group)
            if geometry not in geometries:
                geometries.append(geometry)
                counts.append(0)
            pool = geometries.index(geometry)
            places.append(GroupPlace(group, pool, counts[pool]))
            counts[pool] += 1
        shared: Any = self.shared_layers
        return LayerMap(tuple(places), shared)

    @property
    def block_bytes(self) -> int:
        """Bytes per block: keys and values of all layers of one group.

        Raises:
          ValueError: There are several pools, with different blocks; see `pools`.
        """
        first, *others = self.pools
        if others:
            raise ValueError(
                f"This cache has {1 + len(others)} pools with different blocks. Ask for "
                "block_bytes of each of `pools`."
            )
        return first.block_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of all blocks of all pools."""
        return sum(pool.num_blocks * pool.block_bytes for pool in self.pools)

    def _settle_groups(self) -> None:
        """Makes `groups` a tuple, and checks that they agree with each other."""
        groups = check_items("groups", self.groups)
        for group in groups:
            check_type("groups", group, LayerGroup)
        given = [name for name in _ONE_GROUP if getattr(self, name) is not None]
        if groups and given:
            raise ValueError(
                f"groups and {', '.join(given)} cannot both be given: the latter describe a cache "
                "of layers that are all alike. Leave one of them out."
            )
        names = [group.name for group in groups]
        layers = [layer for group in groups for layer in group.layers]
        if len(set(names)) < len(names):
            raise ValueError(f"Layer groups must have different names, got {names}.")
        if len(set(layers)) < len(layers):
            repeated = sorted({layer for layer in layers if layers.count(layer) > 1})
            raise ValueError(f"Layers {repeated} are in two layer groups. A layer is in one.")
        object.__setattr__(self, "groups", tuple(groups))

    def _settle_shared_layers(self) -> None:
        """Makes `shared_layers` a tuple of pairs, and checks that each layer is known."""
        try:
            pairs = tuple(sorted((int(a), int(b)) for a, b in dict(self.shared_layers).items()))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"shared_layers must map layers to layers, got {self.shared_layers!r}."
            ) from error
        cached = {layer for group in self.layer_groups for layer in group.layers}
        for layer, source in pairs:
            if layer in cached or source not in cached:
                raise ValueError(
                    f"shared_layers says that layer {layer} reads the cache of layer {source}: the "
                    "first must be in no group, and the second in one."
                )
        object.__setattr__(self, "shared_layers", pairs)

    def _check_products(self) -> None:
        """Raises ValueError if an index would not fit in an int32."""
        for pool in self.pools:
            sizes = {
                "num_blocks": pool.num_blocks,
                "num_layers": pool.num_layers,
                "num_kv_heads": pool.payload.num_kv_heads,
                "block_size": pool.block_size,
                "max_blocks_per_seq": self.max_blocks_per_seq,
            }
            for names in (
                ("num_blocks", "num_layers", "num_kv_heads"),
                ("num_blocks", "block_size"),
                ("max_blocks_per_seq", "block_size"),
            ):
                product = math.prod(sizes[name] for name in names)
                if product >= INT32_LIMIT:
                    raise ValueError(
                        f"{' * '.join(names)} must be below 2**31 (indices are int32), got "
                        f"{product}. Lower {names[0]}."
                    )


def _geometry(group: LayerGroup) -> tuple[KeyValue, int, int | None]:
    """Returns what groups of one pool have in common."""
    return group.payload, len(group.layers), group.num_blocks
