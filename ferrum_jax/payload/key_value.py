"""Keys and values: the payload of attention layers."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
from jax.typing import DTypeLike

from ferrum_jax.checks import INT32_LIMIT, settle_count
from ferrum_jax.types import to_dtype


class KeysAndValues(NamedTuple):
    """A pair of arrays, one for keys and one for values.

    Attributes:
      k: Array for keys.
      v: Array for values.
    """

    k: jax.Array
    v: jax.Array


@dataclasses.dataclass(frozen=True)
class KeyValue:
    """A key and a value per token, layer and head.

    A pool has an array of each, by name. No other code knows the names: it takes all arrays alike,
    or asks `split` for the keys and the values.

    Attributes:
      num_kv_heads: Number of key/value heads, H.
      head_dim: Numbers per head, D.
      dtype: Dtype of the numbers; anything that names a dtype, stored as the NumPy dtype.

    Example:
      >>> KeyValue(num_kv_heads=2, head_dim=64, dtype="bfloat16").features
      {'k': (2, 64), 'v': (2, 64)}
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
    def features(self) -> dict[str, tuple[int, int]]:
        """Names of a pool's arrays, and in each the features of a token: (H, D)."""
        return {name: (self.num_kv_heads, self.head_dim) for name in KeysAndValues._fields}

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer."""
        return 2 * self.num_kv_heads * self.head_dim * np.dtype(self.dtype).itemsize

    def split(self, arrays: Mapping[str, jax.Array]) -> KeysAndValues:
        """Returns the array of the keys and that of the values.

        Args:
          arrays: Arrays of a pool, or parts of them, by name.
        """
        return KeysAndValues(**arrays)

    def join(self, k: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
        """Returns the arrays of a pool by name; the inverse of `split`.

        Args:
          k: Array of the keys.
          v: Array of the values.
        """
        return KeysAndValues(k, v)._asdict()
