"""Choosing the next token of each row from its logits."""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.checks import check_count, check_number


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. Hashable and static: another one recompiles.

    In this order: logits are divided by `temperature`; the `top_k` best tokens are kept; of
    these, with their probabilities made to sum to one, the fewest best ones that reach `top_p`
    together; one of those kept is drawn. The best token is always kept. Among equal
    ones the lower token id counts as the better, so `top_k` keeps exactly that many.

    Logits may be anything. NaN counts as minus infinity, which is drawn only if a row has nothing
    else; several of plus infinity share all probability equally.

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
            try:
                check_count("top_k", self.top_k)
            except ValueError as error:
                raise ValueError(f"{error} Leave it None to keep every token.") from None
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
        dtype = getattr(key, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"key must be a typed key such as jax.random.key(0) to draw tokens at temperature "
                f"{self.temperature}, got {key if dtype is None else dtype}. "
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
          ValueError: If tokens are to be drawn and there is no typed key, or keys are not R.
          AssertionError: Logits are not of rank 2.
        """
        chex.assert_rank(logits, 2, custom_message="logits must be f32[R, V], a row per token.")
        self.check_key(key)
        if key is None or self.is_greedy:
            return jnp.argmax(_comparable(logits), axis=-1).astype(jnp.int32)
        num_rows = logits.shape[0]
        if key.shape not in ((), (num_rows,)):
            raise ValueError(
                f"key must be one key, or one for each of {num_rows} rows, got {list(key.shape)}. "
                "Make them with jax.random.split(key, num_rows)."
            )
        return _draw(logits, key, **self._arguments(logits.shape[-1]))

    def _arguments(self, num_tokens: int) -> dict[str, Any]:
        """Returns what `_kept` needs to know of this, for a vocabulary of `num_tokens`."""
        # The logits are made smaller by a power of two, which is exact, where their differences
        # could be out of range otherwise. Then the divisor is in range also, and its inverse, by
        # which a compiler may multiply.
        scale = 0.5 ** min(max(math.frexp(self.temperature)[1], 0), 126)
        divisor = min(max(self.temperature * scale, _SMALLEST), 1 / _SMALLEST)
        top_p = 1.0 if self.top_p is None else self.top_p
        return {
            "temperature": (np.float32(scale), np.float32(divisor)),
            "top_p": np.float32(max(top_p, _SMALLEST)) if top_p < 1 else None,
            "top_k": self.top_k if self.top_k is not None and self.top_k < num_tokens else None,
        }


# Float32 has no smaller number that a device need not take for zero.
_SMALLEST = float(np.finfo(np.float32).tiny)


def _comparable(logits: jax.Array) -> jax.Array:
    """Returns f32 logits that have an order: no NaN, and one zero only."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    return jnp.where(jnp.abs(logits) < _SMALLEST, 0.0, logits)


@functools.partial(jax.jit, static_argnames="top_k")
def _draw(
    logits: jax.Array,
    key: jax.Array,
    temperature: tuple[jax.Array, jax.Array],
    top_p: jax.Array | None,
    top_k: int | None,
) -> jax.Array:
    """Returns i32[R], one of the kept tokens of each row; see `_kept`."""
    keys = jax.random.split(key, logits.shape[0]) if key.ndim == 0 else key
    logits, token_ids = _kept(logits, temperature, top_p, top_k)
    chosen = jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
    if token_ids is None:
        return chosen
    return jnp.take_along_axis(token_ids, chosen[:, None], axis=-1)[:, 0]


@functools.partial(jax.jit, static_argnames="top_k")
def _kept(
    logits: jax.Array,
    temperature: tuple[jax.Array, jax.Array],
    top_p: jax.Array | None,
    top_k: int | None,
) -> tuple[jax.Array, jax.Array | None]:
    """Returns logits after temperature, the best one 0, minus infinity where dropped.

    Args:
      logits: f32[R, V].
      temperature: A scale of logits, then a divisor.
      top_p: f32[], if tokens are to be dropped by it.
      top_k: K, if fewer than V.

    Returns:
      f32[R, K], and i32[R, K] token ids if K is not V.
    """
    logits, token_ids = _comparable(logits), None
    if top_k is not None:
        logits, token_ids = lax.top_k(logits, top_k)
    scale, divisor = temperature
    scaled = logits * scale
    best = jnp.max(scaled, axis=-1, keepdims=True)
    below = jnp.where(scaled == best, 0.0, (scaled - best) / divisor)  # Also if all are infinite.
    if top_p is not None:
        below = jnp.where(_reaching(logits, jax.nn.softmax(below, -1), top_p), below, -jnp.inf)
    return below, token_ids


def _reaching(logits: jax.Array, share: jax.Array, top_p: jax.Array) -> jax.Array:
    """Returns bool[R, K]: the fewest best of f32[R, K] logits whose shares reach `top_p` together.

    No sort: unsigned integers are made of the bits of floats that are ordered as these are, so
    the least one kept is found bit by bit, as the largest at which it and those above reach
    `top_p`. Logits decide what is better, since different ones may have equal shares.
    """
    bits = lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    bits = jnp.where(bits >= sign, ~bits, bits | sign)

    def settle_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        raised = least | (sign >> i.astype(jnp.uint32))
        reached = jnp.sum(jnp.where(bits >= raised, share, 0.0), axis=-1, keepdims=True)
        return jnp.where(reached >= top_p, raised, least)

    least = lax.fori_loop(0, 32, settle_bit, jnp.zeros((share.shape[0], 1), jnp.uint32))
    above = jnp.sum(jnp.where(bits > least, share, 0.0), axis=-1, keepdims=True)
    is_equal = bits == least
    num_before = jnp.cumsum(is_equal, axis=-1, dtype=jnp.int32) - 1
    is_needed = above + num_before.astype(jnp.float32) * share < top_p
    return (bits > least) | (is_equal & is_needed)
