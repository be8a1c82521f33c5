"""Sampling: the choice of each row's next token from its logits."""

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count, check_number
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.types import IdsLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Temperature, top-k and top-p sampling. Hashable and static: another one recompiles.

    Logits of forbidden tokens become minus infinity. Logits are divided by `temperature`; the
    `top_k` best tokens are kept; of these, with their probabilities normalized to a sum of 1, the
    smallest set of best tokens with a sum of at least `top_p` is kept; one of these is drawn. The
    best token is always kept. Of tokens with equal logits the one with the lower id counts as
    better, so `top_k` keeps exactly that many.

    Logits may be any floats. NaN counts as minus infinity, which is drawn only if a row has no
    other logits. Several logits of plus infinity have equal probabilities.

    Attributes:
      temperature: 0 always chooses the best token, without a key; 1 keeps the probabilities.
      top_k: Maximum number of tokens kept; all if None.
      top_p: Minimum probability kept, in (0, 1]; all if None or 1.
      forbidden_token_ids: Tokens that are never chosen. `GenerateOptions.choose`, and so the decode
        loops, normalize log-probabilities without them; their own is minus infinity.

    Raises:
      ValueError: A field is out of its range or of a wrong type.

    Example:
      >>> Sampling().sample(jnp.asarray([[0.1, 0.7, 0.2], [0.5, 0.1, 0.4]])).tolist()
      [1, 0]
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    forbidden_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Checks each field."""
        if not 0 <= check_number("temperature", self.temperature) < math.inf:
            raise ValueError(
                f"temperature must be finite and at least 0, got {self.temperature}. "
                "0 chooses the best token."
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
        forbidden = check_token_ids("forbidden_token_ids", self.forbidden_token_ids)
        object.__setattr__(self, "forbidden_token_ids", forbidden)

    @property
    def is_greedy(self) -> bool:
        """Whether the best token is always chosen."""
        return self.temperature == 0

    def check_key(self, key: jax.Array | None) -> None:
        """Checks that tokens can be drawn with a key.

        Args:
          key: A typed key or keys (`jax.random.key`), or None.

        Raises:
          ValueError: The temperature is above 0, and `key` is not a typed key.
        """
        if self.is_greedy:
            return
        dtype = getattr(key, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"key must be a typed key such as jax.random.key(0) to draw tokens at temperature "
                f"{self.temperature}, got {key if dtype is None else dtype}. "
                "Pass one, or set temperature to 0."
            )

    def sample(self, logits: jax.Array, key: jax.Array | None = None) -> jax.Array:
        """Chooses a token for each row.

        Args:
          logits: f32[R, V]. Logits of each row.
          key: One typed key for all rows, or keys [R]: then a row's token depends only on its own
            key and logits. Not needed at temperature 0.

        Returns:
          i32[R]. Token ids.

        Raises:
          ValueError: The temperature is above 0, and `key` is not a typed key, or not R keys; or a
            forbidden token is outside the vocabulary.
          AssertionError: Logits are not of rank 2.
        """
        chex.assert_rank(logits, 2, custom_message="logits must be f32[R, V], a row per token.")
        self.check_key(key)
        logits = self.without_forbidden(logits)
        if key is None or self.is_greedy:
            return _best(logits)
        num_rows = logits.shape[0]
        if key.shape not in ((), (num_rows,)):
            raise ValueError(
                f"key must be one key, or one per row ({num_rows}), got shape {list(key.shape)}. "
                "Make them with jax.random.split(key, num_rows)."
            )
        return _draw(logits, key, **self._arguments(logits.shape[-1]))

    def without_forbidden(self, logits: jax.Array) -> jax.Array:
        """Sets the logits of forbidden tokens to minus infinity.

        Args:
          logits: f32[R, V]. Logits of each row.

        Returns:
          f32[R, V].

        Raises:
          ValueError: A forbidden token is outside the vocabulary.
        """
        if not self.forbidden_token_ids:
            return logits
        if (largest := max(self.forbidden_token_ids)) >= logits.shape[-1]:
            raise ValueError(
                f"forbidden_token_ids must be below the {logits.shape[-1]} tokens of the "
                f"vocabulary, got {largest}."
            )
        return logits.at[:, np.asarray(self.forbidden_token_ids)].set(-jnp.inf)

    def after_temperature(self, logits: jax.Array) -> jax.Array:
        """Divides logits by the temperature, before tokens are dropped by `top_k` or `top_p`.

        Args:
          logits: f32[R, V]. Logits of each row.

        Returns:
          f32[R, V]. Logits below the best one, which is 0. At temperature 0, the logits as given.
        """
        if self.is_greedy:
            return logits
        temperature = self._arguments(logits.shape[-1])["temperature"]
        return _kept(logits, temperature, None, None)[0]

    def _arguments(self, num_tokens: int) -> dict[str, Any]:
        """Returns the arguments of `_kept` for a vocabulary of `num_tokens`."""
        # Logits are scaled down by a power of two, which is exact, if their differences could
        # overflow. Then the divisor is in range, and so is its inverse, by which a compiler may
        # multiply.
        scale = 0.5 ** min(max(math.frexp(self.temperature)[1], 0), 126)
        divisor = min(max(self.temperature * scale, _SMALLEST), 1 / _SMALLEST)
        top_p = 1.0 if self.top_p is None else self.top_p
        return {
            "temperature": (np.float32(scale), np.float32(divisor)),
            "top_p": np.float32(max(top_p, _SMALLEST)) if top_p < 1 else None,
            "top_k": self.top_k if self.top_k is not None and self.top_k < num_tokens else None,
        }


# The smallest positive float32 that no device flushes to zero.
_SMALLEST = float(np.finfo(np.float32).tiny)


def check_token_ids(name: str, token_ids: Iterable[int]) -> tuple[int, ...]:
    """Checks a collection of token ids.

    Args:
      name: Name of the argument, for the error.
      token_ids: Token ids.

    Returns:
      The ids as ints.

    Raises:
      ValueError: They are not token ids within int32.
    """
    if not isinstance(token_ids, Iterable) or isinstance(token_ids, str):
        raise ValueError(
            f"{name} must be a sequence of token ids, got {token_ids!r}. "
            "Pass one token as (token_id,), and none as ()."
        )
    token_ids = tuple(token_ids)
    for token_id in token_ids:
        check_count(name, token_id, minimum=0)
        if int(token_id) > np.iinfo(np.int32).max:
            raise ValueError(f"{name} must be within int32, got {token_id}.")
    return tuple(map(int, token_ids))


@jax.jit
def sample_keys(seeds: ArrayLike, samples: ArrayLike) -> jax.Array:
    """Returns the keys of samples of requests, for `token_keys`.

    Args:
      seeds: i32[R]. Seed of each request.
      samples: i32[R]. Number of each sample among those of its request.

    Returns:
      Typed keys [R].
    """
    keys = jax.vmap(lambda seed, sample: jax.random.fold_in(jax.random.key(seed), sample))
    return keys(jnp.asarray(seeds, jnp.int32), jnp.asarray(samples, jnp.int32))


def token_keys(keys: jax.Array, positions: IdsLike) -> jax.Array:
    """Returns the keys with which the tokens at some positions are drawn.

    A request with a key of its own draws the same token at a position whatever its row, and
    whatever other requests are decoded beside it. `generate` draws the token at position p with
    `token_keys(keys, p)`, so the first token after a prompt is drawn with the prompt's length.

    Args:
      keys: Typed keys [R], one per request; for example `jax.vmap(jax.random.key)(seeds)`.
      positions: i32[R]. Position of each token in its sequence.

    Returns:
      Typed keys [R].
    """
    return jax.vmap(jax.random.fold_in)(keys, jnp.asarray(as_ids(positions)))


def comparable(logits: jax.Array) -> jax.Array:
    """Returns f32 logits that are totally ordered: without NaN, and with one zero only."""
    logits = logits.astype(jnp.float32)
    logits = jnp.where(jnp.isnan(logits), -jnp.inf, logits)
    return jnp.where(jnp.abs(logits) < _SMALLEST, 0.0, logits)


def _best(logits: jax.Array) -> jax.Array:
    """Returns the token of each row's first best logit, i32[R], of f32[R, V]."""
    # Tokens first: the compiler then leaves logits in the layout that the model's last product has,
    # or turns them at no cost; SmolLM2's product and this take 11 to 50 % less than by rows. On CPU
    # `jnp.argmax` takes three times as long: it is not vectorized.
    logits = comparable(logits.T)
    token_ids = jnp.arange(logits.shape[0], dtype=jnp.int32)[:, None]
    is_best = logits == jnp.max(logits, axis=0, keepdims=True)
    return jnp.min(jnp.where(is_best, token_ids, logits.shape[0]), axis=0)


@functools.partial(jax.jit, static_argnames="top_k")
def _draw(
    logits: jax.Array,
    key: jax.Array,
    temperature: tuple[jax.Array, jax.Array],
    top_p: jax.Array | None,
    top_k: int | None,
) -> jax.Array:
    """Draws one of the kept tokens (see `_kept`) of each row; returns i32[R]."""
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
    """Returns logits after temperature, the best one 0, and minus infinity for dropped tokens.

    Args:
      logits: f32[R, V].
      temperature: Scale of the logits, then their divisor.
      top_p: f32[]; None to keep all tokens.
      top_k: K, fewer than V; None to keep all tokens.

    Returns:
      `(logits, token_ids)`: f32[R, K], and i32[R, K], or None if K is V.
    """
    logits, token_ids = comparable(logits), None
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
    """Returns bool[R, K]: the fewest best tokens with probabilities that add up to `top_p`.

    Without a sort: the bits of a float32 are mapped to a uint32 of the same order, so the lowest
    logit to keep is found bit by bit, as the largest number at which it and those above it reach
    `top_p`. Logits decide which token is better, since different ones may have equal shares.

    Args:
      logits: f32[R, K].
      share: f32[R, K]. Probabilities.
      top_p: f32[].
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
