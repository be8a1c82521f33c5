"""Which tokens of a layer are worth keeping: scorers by name, and the choice they lead to.

Everything here is about one layer. H KV heads, T tokens (padded), D head dim, Q reference
queries of each KV head: the query heads that share it, and their tokens, flattened together.
What lies beyond the tokens held is garbage, perhaps NaN, and no result depends on it.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp

TokenScorer: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | float], jax.Array
]
"""`(k, v, num_held, queries, scale)` to f32[H, T]: higher is kept. Only the order matters.

k and v are f32[H, T, D], `num_held` is i32[], the queries are f32[H, Q, D] or None, `scale` is
what logits are multiplied with. What is not held scores `-inf`.
"""


def window(
    k: jax.Array,
    v: jax.Array,
    num_held: jax.Array,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """Later is better: with the first tokens kept as sinks, this is StreamingLLM.

    Args:
      k: f32[H, T, D]. Keys; only their shape matters.
      v: Not used.
      num_held: i32[]. Tokens held.
      queries: Not used.
      scale: Not used.

    Returns:
      f32[H, T].

    References:
      Xiao et al. 2023, arXiv 2309.17453.
    """
    del v, queries, scale
    num_heads, num_tokens, _ = k.shape
    positions = jnp.arange(num_tokens, dtype=jnp.float32)
    return _of_held(jnp.broadcast_to(positions, (num_heads, num_tokens)), num_held)


def key_norm(
    k: jax.Array,
    v: jax.Array,
    num_held: jax.Array,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """Keys of small norm are better: they tend to be attended to more.

    Args:
      k: f32[H, T, D]. Keys.
      v: Not used.
      num_held: i32[]. Tokens held.
      queries: Not used.
      scale: Not used.

    Returns:
      f32[H, T]. Minus the L2 norm of each key.

    References:
      Devoto et al. 2024, arXiv 2406.11430.
    """
    del v, queries, scale
    return _of_held(-jnp.linalg.norm(_zero_beyond(k, num_held), axis=-1), num_held)


def key_difference(
    k: jax.Array,
    v: jax.Array,
    num_held: jax.Array,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """Keys that point away from the others are better: KeyDiff.

    Args:
      k: f32[H, T, D]. Keys.
      v: Not used.
      num_held: i32[]. Tokens held.
      queries: Not used.
      scale: Not used.

    Returns:
      f32[H, T]. Minus the cosine between each key and the mean of all normalised keys. A key of
      zero has no direction: its cosine counts as 0.

    References:
      Park et al. 2025, arXiv 2504.15364 (the variant with one anchor, linear in the tokens).
    """
    del v, queries, scale
    directions = _normalised(_zero_beyond(k, num_held))
    # The sum has the direction of the mean, and what is not held adds nothing to it.
    anchor = _normalised(jnp.sum(directions, axis=1))
    return _of_held(-jnp.einsum("htd,hd->ht", directions, anchor), num_held)


def observed_attention(
    k: jax.Array,
    v: jax.Array,
    num_held: jax.Array,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """Tokens that the reference queries attend to are better: SnapKV without its pooling.

    SnapKV lets the last queries of the prompt vote with their softmax weights, then smooths the
    votes along the tokens. Here every query sees every token held, and votes are not smoothed.

    Args:
      k: f32[H, T, D]. Keys.
      v: Not used.
      num_held: i32[]. Tokens held.
      queries: f32[H, Q, D]. Reference queries.
      scale: What logits are multiplied with.

    Returns:
      f32[H, T]. Mean softmax weight.

    Raises:
      ValueError: If there are no queries.

    References:
      Li et al. 2024, arXiv 2404.14469.
    """
    del v
    logits = _logits("observed_attention", k, num_held, queries, scale)
    weights = jax.nn.softmax(logits, axis=-1, where=_held(logits, num_held))
    return _of_held(jnp.mean(weights, axis=1), num_held)


def expected_attention(
    k: jax.Array,
    v: jax.Array,
    num_held: jax.Array,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """Tokens to which Gaussian queries would give much are better, by weight and by value.

    A query of mean m and covariance S has a logit that is Gaussian too, so the weight before
    normalisation is expected to be exp(scale m·k + scale² kᵀSk / 2). The mean and variance of
    the logits of the reference queries are just scale m·k and scale² kᵀSk, with m and S those of
    the queries. The paper takes them from hidden states, averaged over positions to come, once
    for each query head, and multiplies with the norm of the value after the output projection,
    which a cache does not know; here the norm is that of the value itself.

    Args:
      k: f32[H, T, D]. Keys.
      v: f32[H, T, D]. Values.
      num_held: i32[]. Tokens held.
      queries: f32[H, Q, D]. Reference queries.
      scale: What logits are multiplied with.

    Returns:
      f32[H, T]. Logarithm of expected weight times norm: the product itself could overflow, or
      vanish for many tokens at once and so lose their order.

    Raises:
      ValueError: If there are no queries.

    References:
      Devoto et al. 2025, arXiv 2510.00636.
    """
    logits = _logits("expected_attention", k, num_held, queries, scale)
    expected = jnp.mean(logits, axis=1) + 0.5 * jnp.var(logits, axis=1)
    value_norms = jnp.linalg.norm(_zero_beyond(v, num_held), axis=-1)
    return _of_held(expected + jnp.log(value_norms), num_held)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A scorer, and what it asks for."""

    scorer: TokenScorer
    needs_queries: bool


_SCORERS = {
    "window": _Entry(window, needs_queries=False),
    "key_norm": _Entry(key_norm, needs_queries=False),
    "key_difference": _Entry(key_difference, needs_queries=False),
    "observed_attention": _Entry(observed_attention, needs_queries=True),
    "expected_attention": _Entry(expected_attention, needs_queries=True),
}


def scorer_names() -> list[str]:
    """Returns the names of all scorers.

    Example:
      >>> scorer_names()[:3]
      ['window', 'key_norm', 'key_difference']
    """
    return list(_SCORERS)


def token_scorer(name: str) -> TokenScorer:
    """Finds a scorer by name.

    Args:
      name: One of `scorer_names()`.

    Raises:
      ValueError: If no scorer has that name.
    """
    return _entry(name).scorer


def needs_queries(name: str) -> bool:
    """Tells whether a scorer works only with reference queries.

    Args:
      name: One of `scorer_names()`.

    Raises:
      ValueError: If no scorer has that name.

    Example:
      >>> needs_queries("window"), needs_queries("observed_attention")
      (False, True)
    """
    return _entry(name).needs_queries


def select_tokens(
    scores: jax.Array,
    num_held: jax.Array,
    num_kept: jax.Array,
    *,
    num_sinks: jax.Array | int,
    num_recent: jax.Array | int,
) -> jax.Array:
    """Chooses the tokens of best score in each head, the first and the last ones before all.

    Between equal scores the earlier token wins; NaN counts as `-inf`.

    Args:
      scores: f32[H, T]. Higher is kept.
      num_held: i32[]. Tokens held.
      num_kept: i32[]. Tokens to keep in each head, at most `num_held` and at least
        `min(num_held, num_sinks + num_recent)`.
      num_sinks: i32[]. First tokens, kept whatever their score.
      num_recent: i32[]. Last tokens held, kept whatever their score.

    Returns:
      i32[H, T]. In the first `num_kept` places the tokens kept, in ascending order; behind them
      all others, so that each row is a permutation.

    Example:
      >>> scores = jnp.asarray([[0.0, 5.0, 1.0, 3.0, 2.0, 9.0]], jnp.float32)
      >>> held, kept = jnp.int32(5), jnp.int32(3)  # The last score is beyond the tokens held.
      >>> select_tokens(scores, held, kept, num_sinks=1, num_recent=0)[0, :3].tolist()
      [0, 1, 3]
    """
    chex.assert_rank([scores, num_held, num_kept], [2, 0, 0])
    num_tokens = scores.shape[1]
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    must_stay = (tokens < num_sinks) | (tokens >= num_held - num_recent)
    # A class of its own for each, since any score, even an infinite one, is the scorer's to give.
    classes = jnp.where(tokens >= num_held, 2, jnp.where(must_stay, 0, 1)).astype(jnp.int32)
    classes, tokens = (jnp.broadcast_to(x, scores.shape) for x in (classes, tokens))
    order = -jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    _, _, ranked = jax.lax.sort((classes, order, tokens), dimension=1, is_stable=True, num_keys=2)

    is_kept = jnp.arange(num_tokens, dtype=jnp.int32) < num_kept
    # Tokens dropped are lifted above all others for the sort, so that they end up behind.
    lifted = jnp.where(is_kept[None, :], ranked, ranked + num_tokens)
    return jnp.sort(lifted, axis=1) % num_tokens


def compact(x: jax.Array, order: jax.Array) -> jax.Array:
    """Moves the tokens of each head to the places that a selection gives them.

    Args:
      x: [H, T, D]. Keys or values.
      order: i32[H, T]. Which token each place takes, from `select_tokens`.

    Returns:
      [H, T, D].
    """
    chex.assert_rank([x, order], [3, 2])
    chex.assert_equal_shape_prefix([x, order], 2)
    return jnp.take_along_axis(x, order[:, :, None], axis=1)


def _entry(name: str) -> _Entry:
    if name not in _SCORERS:
        raise ValueError(f"There is no token scorer {name!r}; known are {', '.join(_SCORERS)}.")
    return _SCORERS[name]


def _held(x: jax.Array, num_held: jax.Array) -> jax.Array:
    """Which places of the last axis are held, in as many axes as `x` has."""
    held = jnp.arange(x.shape[-1], dtype=jnp.int32) < num_held
    return held.reshape((1,) * (x.ndim - 1) + held.shape)


def _zero_beyond(x: jax.Array, num_held: jax.Array) -> jax.Array:
    """Zeroes the garbage of f32[H, T, D]: a mask afterwards is too late, 0 * NaN is NaN."""
    held = jnp.arange(x.shape[1], dtype=jnp.int32) < num_held
    return jnp.where(held[None, :, None], x, 0.0)


def _of_held(scores: jax.Array, num_held: jax.Array) -> jax.Array:
    """Scores of the tokens held, `-inf` beyond."""
    return jnp.where(_held(scores, num_held), scores, -jnp.inf)


def _normalised(x: jax.Array) -> jax.Array:
    """Divides by the L2 norm along the last axis; zero stays zero."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0.0, norm, 1.0)


def _logits(
    name: str,
    k: jax.Array,
    num_held: jax.Array,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """f32[H, Q, T]; zero beyond the tokens held."""
    if queries is None:
        raise ValueError(
            f"The token scorer {name!r} needs reference queries, got None. "
            "Pass them, or choose a scorer that needs none."
        )
    chex.assert_rank([k, queries], 3)
    return scale * jnp.einsum("hqd,htd->hqt", queries, _zero_beyond(k, num_held))
