"""Log-probabilities of tokens: of those that were chosen, and of the best ones.

They are computed in float32. As in `Sampling`, NaN logits count as minus infinity, and several
logits of plus infinity have equal probabilities.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.decoding.sampling import comparable
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.types import IdsLike

NULL_TOKEN = -1
"""Token id that stands for no token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chosen:
    """Tokens, with their log-probabilities and those of the n best tokens in their places.

    Attributes:
      tokens: i32[...]. Token ids; `NULL_TOKEN` for none.
      logprobs: f32[...]. Log-probability of each token, given those before it; NaN if it is not
        known, or there is no token.
      top_tokens: i32[..., n]. The best tokens, the best one first; `NULL_TOKEN` if not known.
      top_logprobs: f32[..., n]. Log-probabilities of the best tokens; NaN if not known.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top_tokens: jax.Array
    top_logprobs: jax.Array

    @classmethod
    def unknown(cls, tokens: IdsLike, num_top: int) -> "Chosen":
        """Returns tokens of which no log-probability is known.

        Args:
          tokens: i32[...]. Token ids.
          num_top: Number of best tokens, n (static).
        """
        tokens = jnp.asarray(as_ids(tokens))
        top = *tokens.shape, num_top
        return cls(
            tokens,
            jnp.full(tokens.shape, jnp.nan, jnp.float32),
            jnp.full(top, NULL_TOKEN, jnp.int32),
            jnp.full(top, jnp.nan, jnp.float32),
        )

    @classmethod
    def of(cls, logits: jax.Array, tokens: jax.Array, num_top: int) -> "Chosen":
        """Returns tokens with their log-probabilities.

        Args:
          logits: f32[R, V]. Logits of each row.
          tokens: i32[R]. A token of each row.
          num_top: Number of best tokens, n (static).
        """
        return cls(tokens, token_logprobs(logits, tokens), *top_logprobs(logits, num_top))

    def where(self, rows: jax.Array, other: "Chosen") -> "Chosen":
        """Returns these tokens for some rows, and other ones for the other rows.

        Args:
          rows: bool[R]. Which rows, of [R, ...].
          other: Tokens of the same shape.
        """

        def select(x: jax.Array, y: jax.Array) -> jax.Array:
            return jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y)

        return jax.tree.map(select, self, other)


class ChosenTokens:
    """What results with chosen tokens have in common.

    Attributes:
      chosen: Tokens (i32[..., W]), then `NULL_TOKEN`, with their log-probabilities.
    """

    chosen: Chosen

    @property
    def tokens(self) -> jax.Array:
        """i32[..., W]. The tokens, then `NULL_TOKEN`."""
        return self.chosen.tokens

    @property
    def logprobs(self) -> jax.Array:
        """f32[..., W]. Log-probability of each token, then NaN."""
        return self.chosen.logprobs


def token_logprobs(logits: jax.Array, tokens: IdsLike) -> jax.Array:
    """Returns the log-probability of one token of each row.

    Args:
      logits: f32[R, V]. Logits of each row, of any float dtype.
      tokens: i32[R]. A token of each row.

    Returns:
      f32[R]. Log-probabilities; NaN for a token outside the vocabulary, such as `NULL_TOKEN`.

    Raises:
      AssertionError: The shapes differ.

    Example:
      >>> jnp.exp(token_logprobs(jnp.log(jnp.asarray([[0.5, 0.25, 0.25]])), [1])).tolist()
      [0.25]
    """
    tokens = jnp.asarray(as_ids(tokens))
    chex.assert_rank(logits, 2, custom_message="logits must be f32[R, V], a row per token.")
    chex.assert_shape(tokens, logits.shape[:1], custom_message="tokens must have one per row.")
    is_token = (tokens >= 0) & (tokens < logits.shape[1])
    picked = jnp.take_along_axis(logits, jnp.where(is_token, tokens, 0)[:, None], axis=1)
    return jnp.where(is_token, _logprobs(logits, comparable(picked))[:, 0], jnp.nan)


def top_logprobs(logits: jax.Array, num_top: int) -> tuple[jax.Array, jax.Array]:
    """Returns the best tokens of each row and their log-probabilities, the best token first.

    Args:
      logits: f32[R, V]. Logits of each row, of any float dtype.
      num_top: Number of best tokens, n (static). Of equal ones, the lower id comes first.

    Returns:
      `(tokens, logprobs)`: i32[R, n] and f32[R, n].

    Raises:
      AssertionError: Logits are not of rank 2.
      ValueError: `num_top` is more than the vocabulary.

    Example:
      >>> tokens, logprobs = top_logprobs(jnp.log(jnp.asarray([[0.25, 0.5, 0.25]])), 2)
      >>> tokens.tolist(), jnp.exp(logprobs).tolist()
      ([[1, 0]], [[0.5, 0.25]])
    """
    chex.assert_rank(logits, 2, custom_message="logits must be f32[R, V], a row per token.")
    num_rows, num_tokens = logits.shape
    if num_top > num_tokens:
        raise ValueError(
            f"top_logprobs must be at most the {num_tokens} tokens of the vocabulary, got "
            f"{num_top}."
        )
    if not num_top:
        return jnp.zeros((num_rows, 0), jnp.int32), jnp.zeros((num_rows, 0), jnp.float32)
    best, tokens = lax.top_k(comparable(logits), num_top)
    return tokens, _logprobs(logits, best)


def _logprobs(logits: jax.Array, picked: jax.Array) -> jax.Array:
    """Returns f32[R, n], those of n comparable logits `picked` (f32[R, n]) out of f32[R, V]."""

    def below_best(x: jax.Array) -> jax.Array:
        return jnp.where(x == best, 0.0, x - best)  # Also if the best ones are infinite.

    logits = comparable(logits.T)  # Tokens first, as in `Sampling`.
    best = jnp.max(logits, axis=0, keepdims=True)
    total = jnp.sum(jnp.exp(below_best(logits)), axis=0, keepdims=True)
    return (below_best(picked.T) - jnp.log(total)).T
