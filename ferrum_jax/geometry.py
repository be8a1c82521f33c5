"""Sizes of a model's cache that do not depend on the size of the pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import INT32_LIMIT, check_count, settle_count
from ferrum_jax.layers import LayerGroup, LayerMap
from ferrum_jax.reader import cached_layers
from ferrum_jax.spec import CacheSpec
from ferrum_jax.types import DataType

_OF_GROUPS: Any = None
"""Default of a field that layer groups determine, and that must be given without them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheGeometry:
    """Sizes that a model and a service need, independent of the size of the pool.

    The layers are either alike, or in `groups`, which then determine the first four fields: heads
    and dtype are those of the first group. Groups of equal geometry take blocks of one pool; see
    `equal_sized`.

    Attributes:
      num_layers: Number of layers that have a cache.
      num_kv_heads: Number of key/value heads (not query heads).
      head_dim: Numbers per head.
      dtype: Dtype of the pool; anything that `DataType.of` accepts.
      groups: Layer groups, if layers differ.
      shared_layers: For each layer without a cache of its own, the layer that has it.
      max_seqs: Maximum number of requests at once.
      max_sequence_length: Maximum number of tokens per request, prompt and answer together.

    Raises:
      ValueError: A field is wrong.
    """

    num_layers: int = _OF_GROUPS
    num_kv_heads: int = _OF_GROUPS
    head_dim: int = _OF_GROUPS
    dtype: DataType = _OF_GROUPS
    groups: Sequence[LayerGroup] = ()
    shared_layers: Mapping[int, int] | Sequence[tuple[int, int]] = ()
    max_seqs: int
    max_sequence_length: int

    def __post_init__(self) -> None:
        """Checks each field."""
        if self.dtype is not None or not self.groups:
            object.__setattr__(self, "dtype", DataType.of(self.dtype))
        if self.groups:
            self._settle_groups()
        for name in ("num_layers", "num_kv_heads", "head_dim", "max_seqs", "max_sequence_length"):
            settle_count(self, name, limit=INT32_LIMIT)
        if self.shared_layers:
            object.__setattr__(self, "shared_layers", self.spec(1, 1).shared_layers)

    @classmethod
    def of(
        cls,
        config: Any,
        *,
        max_seqs: int,
        max_sequence_length: int,
        dtype: Any = None,
    ) -> CacheGeometry:
        """Returns the geometry of a model, read from the model's configuration.

        Args:
          config: As for `CacheSpec.of`.
          max_seqs: Maximum number of requests at once.
          max_sequence_length: Maximum number of tokens per request, prompt and answer together.
          dtype: Dtype of the pool; the one that the configuration names if None.

        Raises:
          ValueError: A field is missing, wrong or unknown; the text says what was looked for, and
            what there is.
        """
        if dtype is not None:
            dtype = DataType.of(dtype).jnp_dtype
        layers = cached_layers(config, dtype).fields()
        return cls(**layers, max_seqs=max_seqs, max_sequence_length=max_sequence_length)

    @property
    def layer_map(self) -> LayerMap:
        """Where each layer's cache is."""
        return self.spec(1, 1).layer_map

    def spec(self, num_blocks: int, block_size: int) -> CacheSpec:
        """Returns the shape of a cache of this geometry.

        Args:
          num_blocks: Number of blocks in each pool that has no number of its own.
          block_size: Tokens per block.

        Returns:
          The spec, with rows of enough blocks for `max_sequence_length` tokens.

        Raises:
          ValueError: A size is below 1, or an index would not fit in an int32.
        """
        check_count("block_size", block_size)
        layers: dict[str, Any] = {"groups": self.groups}
        if not self.groups:
            layers = {
                "num_layers": self.num_layers,
                "num_kv_heads": self.num_kv_heads,
                "head_dim": self.head_dim,
                "dtype": self.dtype.jnp_dtype,
            }
        return CacheSpec(
            **layers,
            shared_layers=self.shared_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            max_seqs=self.max_seqs,
            max_blocks_per_seq=ceil_div(self.max_sequence_length, block_size),
        )

    def _settle_groups(self) -> None:
        """Checks the groups, and derives from them what describes the layers."""
        spec = CacheSpec(
            groups=self.groups, num_blocks=1, block_size=1, max_seqs=1, max_blocks_per_seq=1
        )
        object.__setattr__(self, "groups", spec.groups)
        payload = spec.groups[0].payload
        derived = {
            "num_layers": sum(len(group.layers) for group in self.groups),
            "num_kv_heads": payload.num_kv_heads,
            "head_dim": payload.head_dim,
            "dtype": DataType.of(payload.dtype),
        }
        for name, value in derived.items():
            if getattr(self, name) not in (None, value):
                raise ValueError(
                    f"{name} is {value} in the groups, and {getattr(self, name)!r} was given. "
                    "Leave it out."
                )
            object.__setattr__(self, name, value)
