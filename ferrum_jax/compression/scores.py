"""Scores tokens of a layer, and selects the tokens to keep.

All functions are for one layer. H KV heads, T tokens (padded), D head dimension, Q reference
queries per KV head: those of all query heads that share the KV head, flattened. No result depends
on the padding.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import chex
import jax
import jax.numpy as jnp

from ferrum_jax.compression.held import HeldTokens

TokenScorer: TypeAlias = Callable[[HeldTokens, jax.Array | None, jax.Array | float], jax.Array]
"""`(tokens, queries, scale) -> scores`, f32[H, T]: tokens of higher score are kept.

Queries are f32[H, Q, D] or None, `scale` is the factor of the logits. Only the order of scores
matters. Padding scores `-inf`.
"""


def window(tokens: HeldTokens, queries: jax.Array | None, scale: jax.Array | float) -> jax.Array:
    """Scores later tokens higher: with the first tokens kept as sinks, this is StreamingLLM.

    Args:
      tokens: Tokens; only their number matters.
      queries: Not used.
      scale: Not used.

    Returns:
      f32[H, T].

    References:
      Xiao et al. 2023, arXiv 2309.17453.
    """
    del queries, scale
    num_heads, num_tokens, _ = tokens.k.shape
    positions = jnp.arange(num_tokens, dtype=jnp.float32)
    return _of_held(jnp.broadcast_to(positions, (num_heads, num_tokens)), tokens)


def key_norm(tokens: HeldTokens, queries: jax.Array | None, scale: jax.Array | float) -> jax.Array:
    """Scores keys of small norm higher: they tend to get more attention.

    Args:
      tokens: Tokens; values do not matter.
      queries: Not used.
      scale: Not used.

    Returns:
      f32[H, T]. Minus the L2 norm of each key.

    References:
      Devoto et al. 2024, arXiv 2406.11430.
    """
    del queries, scale
    return _of_held(-jnp.linalg.norm(tokens.clean_k, axis=-1), tokens)


def key_difference(
    tokens: HeldTokens, queries: jax.Array | None, scale: jax.Array | float
) -> jax.Array:
    """Scores keys higher that point away from the others: KeyDiff.

    Args:
      tokens: Tokens; values do not matter.
      queries: Not used.
      scale: Not used.

    Returns:
      f32[H, T]. Minus the cosine between each key and the mean of all normalised keys; 0 for a key
      of zeros, which has no direction.

    References:
      Park et al. 2025, arXiv 2504.15364 (the variant with one anchor, of linear cost).
    """
    del queries, scale
    directions = _normalised(tokens.clean_k)
    # The sum has the direction of the mean; tokens that are not held are zero in it.
    anchor = _normalised(jnp.sum(directions, axis=1))
    return _of_held(-jnp.einsum("htd,hd->ht", directions, anchor), tokens)


def observed_attention(
    tokens: HeldTokens, queries: jax.Array | None, scale: jax.Array | float
) -> jax.Array:
    """Scores tokens by the attention of the reference queries: SnapKV without its pooling.

    SnapKV averages the softmax weights of the last queries of the prompt, and smooths the result
    along the tokens. Here each query attends to all tokens held, and the result is not smoothed.

    Args:
      tokens: Tokens; values do not matter.
      queries: f32[H, Q, D]. Reference queries.
      scale: Factor of the logits.

    Returns:
      f32[H, T]. Mean softmax weight.

    Raises:
      ValueError: If there are no queries.

    References:
      Li et al. 2024, arXiv 2404.14469.
    """
    logits = _logits("observed_attention", tokens, queries, scale)
    weights = jax.nn.softmax(logits, axis=-1, where=tokens.is_held[None, None])
    return _of_held(jnp.mean(weights, axis=1), tokens)


def expected_attention(
    tokens: HeldTokens, queries: jax.Array | None, scale: jax.Array | float
) -> jax.Array:
    """Scores tokens by the expected weight of Gaussian queries, times the norm of the value.

    If queries are Gaussian with mean m and covariance S, logits are Gaussian too, and the expected
    weight before normalisation is exp(scale m·k + scale² kᵀSk / 2). If m and S are those of the
    reference queries, the mean and variance of their logits are just scale m·k and scale² kᵀSk. The
    paper computes m and S from hidden states, averaged over later positions, for each query head,
    and uses the norm of the value after the output projection, which a cache does not have; here
    it is the norm of the value itself.

    Args:
      tokens: Tokens.
      queries: f32[H, Q, D]. Reference queries.
      scale: Factor of the logits.

    Returns:
      f32[H, T]. Logarithm of the expected weight times the norm. The product itself could overflow,
      or underflow for many tokens and so lose their order.

    Raises:
      ValueError: If there are no queries.

    References:
      Devoto et al. 2025, arXiv 2510.00636.
    """
    logits = _logits("expected_attention", tokens, queries, scale)
    expected = jnp.mean(logits, axis=1) + 0.5 * jnp.var(logits, axis=1)
    value_norms = jnp.linalg.norm(tokens.clean_v, axis=-1)
    return _of_held(expected + jnp.log(value_norms), tokens)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """A scorer, and whether it needs reference queries."""

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
    """Returns the scorer of a name.

    Args:
      name: One of `scorer_names()`.

    Returns:
      The scorer.

    Raises:
      ValueError: If no scorer has that name.
    """
    return _entry(name).scorer


def needs_queries(name: str) -> bool:
    """Returns whether a scorer needs reference queries.

    Args:
      name: One of `scorer_names()`.

    Returns:
      Whether the scorer raises without queries.

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
    """Selects the tokens of highest score in each head; sinks and recent tokens always.

    Of equal scores the earlier token is selected; NaN counts as `-inf`.

    Args:
      scores: f32[H, T]. Scores of the tokens.
      num_held: i32[]. Tokens held.
      num_kept: i32[]. Tokens to keep in each head, at most `num_held` and at least
        `min(num_held, num_sinks + num_recent)`.
      num_sinks: i32[]. First tokens, which are kept whatever their score.
      num_recent: i32[]. Last tokens held, which are kept whatever their score.

    Returns:
      i32[H, T]. For each head a permutation of the tokens: first the `num_kept` kept tokens in
      ascending order, then all others.

    Example:
      >>> scores = jnp.asarray([[0.0, 5.0, 1.0, 3.0, 2.0, 9.0]], jnp.float32)
      >>> held, kept = jnp.int32(5), jnp.int32(3)  # The last score is beyond the tokens held.
      >>> select_tokens(scores, held, kept, num_sinks=1, num_recent=0)[0, :3].tolist()
      [0, 1, 3]
    """
    chex.assert_rank([scores, num_held, num_kept], [2, 0, 0])
    num_tokens = scores.shape[1]
    tokens = jnp.arange(num_tokens, dtype=jnp.int32)
    is_protected = (tokens < num_sinks) | (tokens >= num_held - num_recent)
    # Sort by class first, since a scorer may return any score, even an infinite one.
    classes = jnp.where(tokens >= num_held, 2, jnp.where(is_protected, 0, 1)).astype(jnp.int32)
    classes, tokens = (jnp.broadcast_to(x, scores.shape) for x in (classes, tokens))
    order = -jnp.where(jnp.isnan(scores), -jnp.inf, scores)
    _, _, ranked = jax.lax.sort((classes, order, tokens), dimension=1, is_stable=True, num_keys=2)

    is_kept = jnp.arange(num_tokens, dtype=jnp.int32) < num_kept
    # T is added to dropped tokens, so that the sort places them after all kept tokens.
    lifted = jnp.where(is_kept[None, :], ranked, ranked + num_tokens)
    return jnp.sort(lifted, axis=1) % num_tokens


def compact(x: jax.Array, order: jax.Array) -> jax.Array:
    """Reorders the tokens of each head.

    Args:
      x: [H, T, D]. Keys or values.
      order: i32[H, T]. Index of the token for each place, from `select_tokens`.

    Returns:
      [H, T, D]. The reordered keys or values.
    """
    chex.assert_rank([x, order], [3, 2])
    chex.assert_equal_shape_prefix([x, order], 2)
    return jnp.take_along_axis(x, order[:, :, None], axis=1)


def _entry(name: str) -> _Entry:
    if name not in _SCORERS:
        raise ValueError(f"There is no token scorer {name!r}; known are {', '.join(_SCORERS)}.")
    return _SCORERS[name]


def _of_held(scores: jax.Array, tokens: HeldTokens) -> jax.Array:
    """Returns scores (f32[H, T]) with `-inf` in the padding."""
    return jnp.where(tokens.is_held[None], scores, -jnp.inf)


def _normalised(x: jax.Array) -> jax.Array:
    """Divides by the L2 norm along the last axis; zeros stay zeros."""
    norm = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(norm > 0.0, norm, 1.0)


def _logits(
    name: str,
    tokens: HeldTokens,
    queries: jax.Array | None,
    scale: jax.Array | float,
) -> jax.Array:
    """Returns the logits of reference queries, f32[H, Q, T]; zero beyond the tokens held."""
    if queries is None:
        raise ValueError(
            f"The token scorer {name!r} needs reference queries, got None. "
            "Pass them, or choose a scorer that needs none."
        )
    chex.assert_rank([tokens.k, queries], 3)
    return scale * jnp.einsum("hqd,htd->hqt", queries, tokens.clean_k)
