"""Keys and values: the payload of attention layers."""

from __future__ import annotations

import dataclasses

import numpy as np
from jax.typing import DTypeLike

from ferrum_jax.checks import INT32_LIMIT, settle_count
from ferrum_jax.types import to_dtype


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """A key and a value per token, layer and head.

    Attributes:
      num_kv_heads: Number of key/value heads.
      head_dim: Numbers per head.
      dtype: Dtype of the pool; anything that names a dtype, stored as the NumPy dtype.
    """

    num_kv_heads: int
    head_dim: int
    dtype: DTypeLike

    def __post_init__(self) -> None:
        """Checks each field."""
        settle_count(self, "num_kv_heads", limit=INT32_LIMIT)
        settle_count(self, "head_dim", limit=INT32_LIMIT)
        object.__setattr__(self, "dtype", to_dtype(self.dtype))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * np.dtype(self.dtype).itemsize
