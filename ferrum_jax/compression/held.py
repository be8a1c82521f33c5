"""Tokens of one layer: the tokens held, and padding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class HeldTokens(NamedTuple):
    """Keys and values of one layer, H KV heads, T tokens, D head dimension.

    The padding is undefined, possibly NaN, so that a mask after a product is too late: 0 * NaN is
    NaN. Functions of tokens read `clean_k` and `clean_v`.

    Attributes:
      k: f32[H, T, D]. Keys.
      v: f32[H, T, D]. Values.
      num_held: i32[]. How many of the T tokens are held, the first ones; the others are padding.
    """

    k: jax.Array
    v: jax.Array
    num_held: jax.Array

    @property
    def is_held(self) -> jax.Array:
        """bool[T]. Which tokens are held."""
        return jnp.arange(self.k.shape[1], dtype=jnp.int32) < self.num_held

    @property
    def clean_k(self) -> jax.Array:
        """f32[H, T, D]. Keys, zero in the padding."""
        return jnp.where(self.is_held[None, :, None], self.k, 0.0)

    @property
    def clean_v(self) -> jax.Array:
        """f32[H, T, D]. Values, zero in the padding."""
        return jnp.where(self.is_held[None, :, None], self.v, 0.0)

    def resized(self, size: int) -> "HeldTokens":
        """Returns the first `size` tokens, with zeros as padding."""
        padding = (0, 0), (0, max(0, size - self.k.shape[1])), (0, 0)
        k, v = (jnp.pad(x, padding)[:, :size] for x in (self.k, self.v))
        sized = self._replace(k=k, v=v)
        return sized._replace(k=sized.clean_k, v=sized.clean_v)
