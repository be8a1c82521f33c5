"""Layer groups: layers with the same payload, which keep their tokens equally long."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import INT32_LIMIT, check_count, check_items, check_type, settle_count
from ferrum_jax.payload import KeyValue


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers with the same payload, which keep their tokens equally long.

    Attributes:
      name: Name of the group, different for each group of a cache.
      layers: The layers, by the model's own numbers; `range` is fine.
      payload: What a token leaves behind in each layer.
      sliding_window: W, the number of tokens that a query sees, its own included; None for all.
        Blocks that the window has passed are released as rows are extended.
      num_blocks: Blocks of the group's pool, which it shares with groups of an equal number; those
        of the `CacheSpec`, or of the manager's configuration, if None.

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
      shared_layers: Pairs of a layer without a cache, and the layer of which it reads the cache.
    """

    places: tuple[GroupPlace, ...]
    shared_layers: tuple[tuple[int, int], ...] = ()

    def __str__(self) -> str:
        """Returns the layers that have a cache: "2 layers, counted from 0" or their numbers."""
        layers = sorted(self.layers)
        if layers == list(range(len(layers))):
            return f"{len(layers)} layers, counted from 0"
        return f"layers {layers}"

    def __hash__(self) -> int:
        """Computes the hash once, since each call of a program needs it."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.places, self.shared_layers))

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

    def by_pool(self) -> list[GroupPlace]:
        """Returns all groups, pool by pool, in the order of the rows in the page tables."""
        return sorted(self.places, key=lambda place: (place.pool, place.index))

    def part(self, pool: int) -> LayerMap:
        """Returns the groups of one pool, as those of a cache with that pool alone."""
        places = (dataclasses.replace(it, pool=0) for it in self.by_pool() if it.pool == pool)
        return LayerMap(tuple(places))

    def is_shared(self, layer: Any) -> bool:
        """Returns whether a layer reads the cache of another one."""
        return _is_integer(layer) and int(layer) in dict(self.shared_layers)

    def can_read(self, layer: int) -> bool:
        """Returns whether a layer has a cache, or reads that of another one."""
        return self.is_shared(layer) or any(layer in it.group.layers for it in self.places)

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
            f"Layer {layer} was asked for; the cache has {self}. Make the cache "
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


def first_needed_block(seq_len: int, window: int | None, block_size: int) -> int:
    """Returns the first logical block that tokens from a position on can see.

    The block of the last token counts as needed. `ops.windows.first_needed` is the same on arrays.

    Args:
      seq_len: Position of the next token.
      window: Sliding window; None to see all tokens.
      block_size: Tokens per block.
    """
    return 0 if window is None else max(0, seq_len + 1 - max(window, 2)) // block_size


def most_window_blocks(window: int, num_new: int, block_size: int) -> int:
    """Returns the most blocks that a sequence holds in a group with a sliding window.

    Args:
      window: The window, in tokens.
      num_new: The most tokens by which the sequence grows at once.
      block_size: Tokens per block.
    """
    return ceil_div(window + num_new, block_size) + 1


def equal_sized(groups: Sequence[LayerGroup]) -> tuple[LayerGroup, ...]:
    """Cuts groups of one payload into parts of equal numbers of layers, which share a pool.

    Memory then flows between them: blocks that a sliding window releases are taken by layers that
    keep all tokens.

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
