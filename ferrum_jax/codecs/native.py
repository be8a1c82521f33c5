"""Codec of blocks that hold the numbers of the pool's dtype, token by token."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ferrum_jax.encoding import decode, encode
from ferrum_jax.payload import KeysAndValues, KeyValue


@dataclasses.dataclass(frozen=True)
class NativeCodec:
    """Codec of one layer and head of a native block; see `Codec`.

    Attributes:
      num_tokens: B, tokens per block.
      dtype: Dtype of the numbers.
    """

    num_tokens: int
    dtype: np.dtype

    @property
    def rotates_keys(self) -> bool:
        """False: keys are stored as they are."""
        return False

    @property
    def rotates_values(self) -> bool:
        """False: values are stored as they are."""
        return False

    def decode(self, k_half: jax.Array, v_half: jax.Array) -> KeysAndValues:
        """Returns halves as numbers of the pool's dtype."""
        return KeysAndValues(decode(k_half, self.dtype), decode(v_half, self.dtype))

    def encode(self, k: jax.Array, v: jax.Array, stored: DTypeLike) -> KeysAndValues:
        """Rounds tokens to the pool's dtype, and returns them as stored."""
        storage = np.dtype(stored)
        return KeysAndValues(encode(k, self.dtype, storage), encode(v, self.dtype, storage))

    def pack(self, k: jax.Array, v: jax.Array) -> KeysAndValues:
        """Returns tokens as they are."""
        return KeysAndValues(k, v)

    def replace(
        self, k_half: jax.Array, v_half: jax.Array, packed: KeysAndValues, is_new: jax.Array
    ) -> KeysAndValues:
        """Replaces some tokens of blocks."""
        new = self.encode(*packed, k_half.dtype)
        is_new = is_new[..., None]
        return KeysAndValues(jnp.where(is_new, new.k, k_half), jnp.where(is_new, new.v, v_half))


def native_codec(payload: KeyValue, block_size: int) -> NativeCodec:
    """Returns the codec of a pool's native blocks.

    Args:
      payload: Heads and dtype of the pool.
      block_size: B, tokens per native block.
    """
    return NativeCodec(block_size, np.dtype(payload.dtype))
