"""The protocol of a codec: how the tokens of one format lie in the blocks of a pool."""

from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from ferrum_jax.payload import KeysAndValues


class Codec(Protocol):
    """How keys and values lie in one layer and head of a block.

    B tokens per native block, D numbers per head, T tokens per block. A block has two halves, each
    [B, D]: one in the array of the keys, one in that of the values. A codec may use the numbers of
    both as it likes, so that blocks are copied, moved and stored alike in every format. Codecs are
    frozen and hashable: a program is compiled for each.
    """

    @property
    def num_tokens(self) -> int:
        """T, tokens per block."""
        ...

    @property
    def rotates_keys(self) -> bool:
        """Whether decoded keys are rotated (`codecs.rotation`); attention rotates the queries."""
        ...

    @property
    def rotates_values(self) -> bool:
        """Whether decoded values are rotated; attention rotates its output back."""
        ...

    def decode(self, k_half: jax.Array, v_half: jax.Array) -> KeysAndValues:
        """Decodes whole blocks.

        Args:
          k_half: [..., B, D]. Blocks of the pool's keys, as stored.
          v_half: [..., B, D]. The same blocks of the pool's values.

        Returns:
          Keys and values, each [..., T, D], as float32, or as the pool's dtype if native.
        """
        ...

    def encode(self, k: jax.Array, v: jax.Array, stored: DTypeLike) -> KeysAndValues:
        """Encodes whole blocks.

        Args:
          k: f32[..., T, D]. Keys, not rotated.
          v: f32[..., T, D]. Values, not rotated.
          stored: Dtype of the pool's arrays.

        Returns:
          The two halves, each [..., B, D] of that dtype.
        """
        ...

    def pack(self, k: jax.Array, v: jax.Array) -> Any:
        """Encodes tokens one by one, for `replace`.

        Args:
          k: f32[..., D]. Keys, not rotated.
          v: f32[..., D]. Values, not rotated.

        Returns:
          Any pytree of arrays [..., X]: what a block stores of each token.
        """
        ...

    def replace(
        self, k_half: jax.Array, v_half: jax.Array, packed: Any, is_new: jax.Array
    ) -> KeysAndValues:
        """Replaces some tokens of blocks; no bit of another token changes.

        Args:
          k_half: [..., B, D]. Blocks of the pool's keys, as stored.
          v_half: [..., B, D]. The same blocks of the pool's values.
          packed: All T tokens, from `pack`: arrays [..., T, X].
          is_new: bool[..., T]. Tokens to replace.

        Returns:
          The two halves, each [..., B, D] as stored.
        """
        ...
