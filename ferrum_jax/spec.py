"""The exact shape of a cache: layer groups, the pools that they draw from, and sizes.

A *layer group* is a set of layers whose tokens leave the same payload behind and are kept equally
long. Each group has page tables of its own. Groups of equal geometry draw blocks from one pool.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from ferrum_jax.checks import INT32_LIMIT, check_count, check_items, check_type, settle_count
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import to_dtype

_ONE_GROUP = ("num_layers", "num_kv_heads", "head_dim", "dtype")
_ONLY_GROUP = "all"


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers with the same payload, whose tokens are kept equally long.

    Attributes:
      name: Name of the group, different for each group of a cache.
      layers: The layers, by the model's own numbers; `range` is fine.
      payload: What a token leaves behind in each layer.
      sliding_window: W, the number of tokens that a query sees, its own included; None for all.
        Blocks that the window has passed are released as rows are extended.
      num_blocks: Blocks of the group's pool; that of the `CacheSpec` if None.

    Raises:
      ValueError: A field is wrong; the text names it.

    Example:
      >>> LayerGroup("local", range(3), KeyValue(1, 64, "bfloat16"), sliding_window=512).layers
      (0, 1, 2)
    """

    name: str
    layers: Sequence[int]
    payload: KeyValue
    sliding_window: int | None = None
    num_blocks: int | None = None

    def __post_init__(self) -> None:
        """Checks each field."""
        check_type("name", self.name, str)
        check_type("payload", self.payload, KeyValue)
        layers = [check_count("layers", layer, minimum=0) for layer in _items(self)]
        if not layers or len(set(layers)) < len(layers):
            raise ValueError(
                f"layers of group {self.name!r} must be at least one layer, each named once, got "
                f"{layers}."
            )
        object.__setattr__(self, "layers", tuple(layers))
        for name in ("sliding_window", "num_blocks"):
            if getattr(self, name) is not None:
                settle_count(self, name, limit=INT32_LIMIT)


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


@dataclasses.dataclass(frozen=True)
class GroupPlace:
    """Where a layer group is in a cache.

    Attributes:
      group: The group.
      pool: Index of its pool.
      index: Index of the group among those of its pool.
    """

    group: LayerGroup
    pool: int
    index: int


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """Finds the group of a layer. Static: a part of a cache's structure.

    Attributes:
      places: All groups, in the order of the spec.
      shared_layers: Pairs of a layer without a cache and the layer whose cache it reads.
    """

    places: tuple[GroupPlace, ...]
    shared_layers: tuple[tuple[int, int], ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether there is one group: a layer's number is then its index, and may be traced."""
        return len(self.places) == 1

    @property
    def layers(self) -> list[int]:
        """All layers that have a cache of their own."""
        return [layer for place in self.places for layer in place.group.layers]

    def names(self) -> list[str]:
        """Returns the names of all groups."""
        return [place.group.name for place in self.places]

    def is_shared(self, layer: Any) -> bool:
        """Returns whether a layer reads the cache of another one."""
        return _is_integer(layer) and int(layer) in dict(self.shared_layers)

    def find(self, layer: Any, group: str | None = None) -> tuple[int, Any]:
        """Finds the group of a layer, and the layer's index in it.

        Args:
          layer: The model's number of the layer, an integer where there are several groups; or an
            index within `group`, which may be traced.
          group: Name of a group, or None.

        Returns:
          `(group index, layer index)`.

        Raises:
          ValueError: There is no such group, the layer on the host is not one of the cache's, or a
            traced layer comes without the group that it is of.
        """
        if group is not None:
            return self._find_in(group, layer)
        if not _is_integer(layer):
            if not self.is_single:
                raise ValueError(
                    f"A layer that is traced, or on the device, needs the group that it is of: "
                    f"pass group=, one of {self.names()}, and the index within that group."
                )
            return 0, layer
        number = dict(self.shared_layers).get(int(layer), int(layer))
        for i, place in enumerate(self.places):
            if number in place.group.layers:
                return i, place.group.layers.index(number)
        raise ValueError(
            f"Layer {layer} was asked for; the cache has {_ranges(self.layers)}. Make the cache "
            "with all layers of the model."
        )

    def group_index(self, name: str | None) -> int:
        """Returns the index of a group.

        Args:
          name: Name of the group; None if there is only one.

        Raises:
          ValueError: There is no such group, or there are several and none is named.
        """
        names = self.names()
        if name is None and self.is_single:
            return 0
        if name not in names:
            raise ValueError(f"There is no layer group {name!r}; there are {names}. Name one.")
        return names.index(name)

    def _find_in(self, group: str, layer: Any) -> tuple[int, Any]:
        """Returns the index of a group by name, and a checked index within it."""
        i = self.group_index(group)
        num_layers = len(self.places[i].group.layers)
        if _is_integer(layer) and not 0 <= layer < num_layers:
            raise ValueError(
                f"Layer {layer} of group {group!r} was asked for; it has {num_layers}, counted "
                "from 0."
            )
        return i, layer


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
      shared_layers: For each layer without a cache of its own, the layer whose cache it reads.
      num_blocks: Number of blocks in each pool.
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

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The groups; a single one if all layers are alike."""
        if self.groups:
            return tuple(self.groups)
        assert self.num_layers is not None and self.num_kv_heads is not None
        payload = KeyValue(self.num_kv_heads, self.head_dim or 0, self.dtype)
        return (LayerGroup(_ONLY_GROUP, range(self.num_layers), payload),)

    @property
    def pools(self) -> tuple[PoolSpec, ...]:
        """The pools, in the order in which the groups first name them."""
        windows: dict[tuple[Any, ...], list[int | None]] = {}
        for group in self.layer_groups:
            windows.setdefault(self._geometry(group), []).append(group.sliding_window)
        return tuple(
            PoolSpec(payload, num_layers, num_blocks, self.block_size, tuple(of_groups))
            for (payload, num_layers, num_blocks), of_groups in windows.items()
        )

    @property
    def layer_map(self) -> LayerMap:
        """Where each layer's cache is."""
        geometries: list[Any] = []
        counts: list[int] = []
        places = []
        for group in self.layer_groups:
            geometry = self._geometry(group)
            if geometry not in geometries:
                geometries.append(geometry)
                counts.append(0)
            pool = geometries.index(geometry)
            places.append(GroupPlace(group, pool, counts[pool]))
            counts[pool] += 1
        return LayerMap(tuple(places), tuple(self.shared_layers))

    @property
    def block_bytes(self) -> int:
        """Bytes per block: keys and values of all layers of one group.

        Raises:
          ValueError: There are several pools, whose blocks differ; see `pools`.
        """
        if len(self.pools) > 1:
            raise ValueError(
                f"This cache has {len(self.pools)} pools with different blocks. Ask for "
                "block_bytes of each of `pools`."
            )
        return self.pools[0].block_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes of all blocks of all pools."""
        return sum(pool.num_blocks * pool.block_bytes for pool in self.pools)

    def _geometry(self, group: LayerGroup) -> tuple[KeyValue, int, int]:
        return group.payload, len(group.layers), group.num_blocks or self.num_blocks

    def _settle_groups(self) -> None:
        """Makes `groups` a tuple, and checks that they agree with each other."""
        groups = check_items("groups", self.groups)
        for group in groups:
            check_type("groups", group, LayerGroup)
        given = [name for name in _ONE_GROUP if getattr(self, name) is not None]
        if groups and given:
            raise ValueError(
                f"groups and {', '.join(given)} cannot both be given: these describe a cache "
                "whose layers are all alike. Leave one of them out."
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


def equal_sized(groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Cuts groups of one payload into parts of equal numbers of layers, which share a pool.

    Memory then flows between them: blocks that a sliding window lets go of are taken by layers
    that keep all tokens.

    Args:
      groups: Layer groups.

    Returns:
      The groups; one that was cut is named "name/0", "name/1" and so on.

    Example:
      >>> payload = KeyValue(1, 64, "bfloat16")
      >>> cut = equal_sized([LayerGroup("full", [5], payload),
      ...                    LayerGroup("local", range(5), payload, sliding_window=512)])
      >>> [group.name for group in cut]
      ['full', 'local/0', 'local/1', 'local/2', 'local/3', 'local/4']
    """
    parts: list[LayerGroup] = []
    for group in groups:
        alike = [other for other in groups if other.payload == group.payload]
        size = math.gcd(*(len(other.layers) for other in alike))
        cuts = [group.layers[i : i + size] for i in range(0, len(group.layers), size)]
        parts += [
            dataclasses.replace(
                group, name=group.name if len(cuts) == 1 else f"{group.name}/{i}", layers=layers
            )
            for i, layers in enumerate(cuts)
        ]
    return tuple(parts)


def _items(group: LayerGroup) -> list[Any]:
    return check_items(f"layers of group {group.name!r}", group.layers)


def _is_integer(layer: Any) -> bool:
    """Returns whether a layer is a number on the host."""
    if isinstance(layer, (bool, jax.Array)):
        return False
    return isinstance(layer, (int, np.integer)) or (
        isinstance(layer, np.ndarray) and layer.ndim == 0 and layer.dtype.kind in "iu"
    )


def _ranges(layers: Sequence[int]) -> str:
    """Returns layers as text: "2 layers, counted from 0" or the numbers."""
    if list(layers) == list(range(len(layers))):
        return f"{len(layers)} layers, counted from 0"
    return f"layers {sorted(layers)}"
