"""Choosing the next token of each row from its logits."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.checks import check_count, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Hashable and static: another one recompiles.

    In this order: logits are divided by `temperature`; the `top_k` best tokens are kept; of
    these, with their probabilities made to sum to one, the fewest best ones that reach `top_p`
    together; one of the rest is drawn. The best token is always kept. Among equal
    ones the lower token id counts as the better, so `top_k` keeps exactly that many.

    Attributes:
      temperature: 0 takes the best token always, and needs no key; 1 leaves the probabilities.
      top_k: Tokens kept at most; all if absent.
      top_p: Probability kept at least, in (0, 1]; all if absent or 1.

    Example:
      >>> Sampling().sample(jnp.asarray([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])).tolist()
      [1, 0]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        """Checks each field."""
        if not 0 <= check_number("temperature", self.temperature) < math.inf:
            raise ValueError(
                f"temperature must be finite and at least 0, got {self.temperature}. "
                "0 takes the best token."
            )
        if self.top_k is not None:
            check_count("top_k", self.top_k)
        if self.top_p is not None and not 0 < check_number("top_p", self.top_p) <= 1:
            raise ValueError(
                f"top_p must be above 0 and at most 1, got {self.top_p}. "
                "Leave it None to keep every token."
            )

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always taken."""
        return self.temperature == 0

    def check_key(self, key: jax.Array | None) -> None:
        """Refuses a key that this sampling cannot draw with.

        Args:
          key: A typed key or keys (`jax.random.key`), or None.

        Raises:
          ValueError: If tokens are to be drawn and this is no typed key.
        """
        if self.is_greedy:
            return
        if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"key must be a typed key such as jax.random.key(0) to draw tokens at temperature "
                f"{self.temperature}, got {None if key is None else key.dtype}. "
                "Give one, or set temperature to 0."
            )

    def sample(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Chooses a token for each row.

        Args:
          logits: f32[R, V].
          key: One typed key, or keys [R]: a row's token then depends on its own key and logits
            only. Not needed at temperature 0.

        Returns:
          i32[R]. Token ids.

        Raises:
          ValueError: If tokens are to be drawn and there is no typed key.
        """
        chex.assert_rank(logits, 2)
        self.check_key(key)
        if key is None or self.is_greedy:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        keys = jax.random.split(key, logits.shape[0]) if key.ndim == 0 else key
        logits, token_ids = self._kept(logits.astype(jnp.float32) / self.temperature)
        chosen = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
        if token_ids is None:
            return chosen
        return jnp.take_along_axis(token_ids, chosen[:, None], axis=-1)[:, 0]

    def _kept(self, logits: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Returns f32[R, K] logits, minus infinity where dropped, and the ids if K is not V."""
        token_ids = None
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            logits, token_ids = lax.top_k(logits, self.top_k)
        if self.top_p is not None and self.top_p < 1:
            share = jax.nn.softmax(logits, axis=-1)
            logits = jnp.where(_reaching(share, self.top_p), logits, -jnp.inf)
        return logits, token_ids


def _reaching(share: jax.Array, top_p: float) -> jax.Array:
    """Returns bool[R, K]: the fewest largest of f32[R, K] shares that reach `top_p` together.

    No sort: the bits of positive floats are ordered as the floats are, so the smallest share
    kept is found bit by bit, as the largest at which it and those above reach `top_p`.
    """
    bits = lax.bitcast_convert_type(share, jnp.int32)

    def settle_bit(i: jax.Array, smallest: jax.Array) -> jax.Array:
        raised = smallest | (jnp.int32(1) << (30 - i))
        reached = jnp.sum(jnp.where(bits >= raised, share, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= top_p, raised, smallest)

    smallest = lax.fori_loop(0, 31, settle_bit, jnp.zeros((share.shape[0], 1), jnp.int32))
    above, equal = jnp.where(bits > smallest, share, 0.0), jnp.where(bits == smallest, share, 0.0)
    share_before = jnp.sum(above, axis=-1, keepdims=True) + jnp.cumsum(equal, axis=-1) - equal
    return (bits > smallest) | ((bits == smallest) & (share_before < top_p))
