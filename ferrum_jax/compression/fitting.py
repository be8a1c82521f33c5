"""Fits kept keys and values, so that attention to them is close to attention to all tokens.

All functions are for one layer. H KV heads, T tokens (padded), D head dimension, Q reference
queries per KV head: those of all query heads that share the KV head, flattened. No result depends
on the padding.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count
from ferrum_jax.compression.held import HeldTokens

# Outputs matter most: an error e of the log-sum-exp changes the cache's share of a later softmax by
# e / 4 at most, and so adds about a tenth of e squared to the squared error there.
_LOG_SUM_EXP_WEIGHT = 0.1

# Weight of the mean squared move, in units of the mean square of the head. On keys and values of a
# real model, with a quarter or half of 512 tokens kept, 0 and 0.2 differ by 4 % either way in the
# error of later queries; 1 increases it by up to 4 %, and 5 by about 10 %.
_MOVE_WEIGHT = 0.2


class Fit(NamedTuple):
    """Fitted tokens, and the error of attention to them.

    Attributes:
      tokens: The fitted tokens, K of them.
      error_before: f32[]. `attention_error` on the reference queries before the fit.
      error_after: f32[]. The same error after the fit; never larger, except for rounding.
    """

    tokens: HeldTokens
    error_before: jax.Array
    error_after: jax.Array


class _Moves(NamedTuple):
    """Changes of keys and values, each f32[H, K, D].

    In units of the root mean square of their head, so that one learning rate suits all heads.
    """

    k: jax.Array
    v: jax.Array


_Objective: TypeAlias = Callable[[_Moves], tuple[jax.Array, tuple[jax.Array, jax.Array]]]
"""Moves -> (loss f32[], (losses of the heads, output errors of the heads), f32[H] each)."""


def attention(
    tokens: HeldTokens, queries: jax.Array, scale: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Attends from each query to all tokens held, as queries of later tokens would.

    Args:
      tokens: Tokens.
      queries: f32[H, Q, D].
      scale: Factor of the logits.

    Returns:
      `(out, log_sum_exp)`, f32[H, Q, D] and f32[H, Q]; zero and `-inf` if no token is held.
    """
    chex.assert_rank([tokens.k, tokens.v, tokens.num_held, queries], [3, 3, 0, 3])
    chex.assert_equal_shape([tokens.k, tokens.v])
    logits = scale * jnp.einsum("hqd,htd->hqt", queries, tokens.clean_k)
    logits = jnp.where(tokens.is_held[None, None], logits, -jnp.inf)

    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    is_empty = total == 0.0
    total = jnp.where(is_empty, 1.0, total)
    out = jnp.einsum("hqt,htd->hqd", weights / total, tokens.clean_v)
    log_sum_exp = jnp.where(is_empty, -jnp.inf, peak + jnp.log(total))
    return out, log_sum_exp[:, :, 0]


def attention_error(out: jax.Array, reference: jax.Array) -> jax.Array:
    """Returns the relative error of outputs, over all heads.

    Args:
      out: f32[H, Q, D]. Outputs.
      reference: f32[H, Q, D]. Exact outputs.

    Returns:
      f32[]. L2 norm of the difference, divided by that of the reference unless the latter is 0.

    Example:
      >>> reference = jnp.full((1, 2, 2), 4.0, jnp.float32)
      >>> float(attention_error(reference + 1.0, reference))
      0.25
    """
    chex.assert_equal_shape([out, reference])
    norm = jnp.linalg.norm(reference.ravel())
    return jnp.linalg.norm((out - reference).ravel()) / jnp.where(norm > 0.0, norm, 1.0)


def fit(
    full: HeldTokens,
    kept: HeldTokens,
    queries: jax.Array,
    scale: jax.Array | float,
    *,
    num_steps: jax.Array | int,
    learning_rate: jax.Array | float,
) -> Fit:
    """Optimises kept keys and values, so that attention to them is as it was to all tokens.

    Runs Adam on keys and values together. The loss of a head is the squared error of its outputs,
    relative to their squared norm, plus the squared error of its log-sum-exps, plus a penalty on
    changes. The log-sum-exp matters because later tokens join the same softmax: it determines the
    share of the weight that the cache gets, which outputs alone do not. The penalty matters
    because there are few queries and many entries; see `_MOVE_WEIGHT`.

    Each head uses the step with the least loss, of the steps at which its outputs are no worse than
    at the start. Its log-sum-exps may be worse, if the outputs gain more. The fit helps only if the
    reference queries resemble later queries. It needs about a dozen arrays as large as the kept
    keys, and one f32[H, Q, T].

    Args:
      full: All tokens.
      kept: The tokens to fit (K of them), as the start: a good selection gives a good fit.
      queries: f32[H, Q, D]. Reference queries.
      scale: Factor of the logits.
      num_steps: i32[]. Steps, at least 1.
      learning_rate: f32[]. Learning rate of the first step, in units of the root mean square of the
        entries of a head; it decays to 0 by a cosine. 60 steps from 0.02 work well.

    Returns:
      The fitted tokens and the errors. Entries beyond `kept.num_held` are unchanged.

    Raises:
      ValueError: `num_steps` is not a positive integer, and not an array.

    References:
      Zweiger et al. 2026, "Fast KV Compaction via Attention Matching", arXiv 2602.16284, have the
      same two targets, outputs and attention mass. They solve for values and for a bias per token,
      which an ordinary cache cannot store; here the keys adapt to the mass.
    """
    if not isinstance(num_steps, jax.Array):
        check_count("num_steps", num_steps)
    chex.assert_equal_shape([kept.k, kept.v])
    chex.assert_equal_shape_prefix([full.k, kept.k, queries], 1)
    reference = attention(full, queries, scale)
    objective = functools.partial(
        _loss, kept=kept, queries=queries, scale=scale, reference=reference
    )
    start = _Moves(jnp.zeros_like(kept.k), jnp.zeros_like(kept.v))
    fitted = _moved(kept, _descend(objective, start, num_steps, learning_rate))
    before, after = (
        attention_error(attention(tokens, queries, scale)[0], reference[0])
        for tokens in (kept, fitted)
    )
    return Fit(fitted, before, after)


def _moved(kept: HeldTokens, moves: _Moves) -> HeldTokens:
    """Applies moves to the tokens held; other entries stay unchanged, bit for bit."""
    is_held = kept.is_held[None, :, None]
    k, v = (
        jnp.where(is_held, x + jnp.sqrt(_mean_square(x, kept.num_held))[:, None, None] * move, x)
        for x, move in ((kept.k, moves.k), (kept.v, moves.v))
    )
    return HeldTokens(k, v, kept.num_held)


def _loss(
    moves: _Moves,
    *,
    kept: HeldTokens,
    queries: jax.Array,
    scale: jax.Array | float,
    reference: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Computes an `_Objective`; `reference` is the result of `attention` to all tokens."""
    out, log_sum_exp = attention(_moved(kept, moves), queries, scale)
    want, want_log_sum_exp = reference
    power = jnp.sum(want**2, axis=(1, 2))
    errors = jnp.sum((out - want) ** 2, axis=(1, 2)) / jnp.where(power > 0.0, power, 1.0)
    log_sum_exp_errors = jnp.mean((log_sum_exp - want_log_sum_exp) ** 2, axis=1)
    moved = sum(_mean_square(x, kept.num_held) for x in moves)
    losses = errors + _LOG_SUM_EXP_WEIGHT * log_sum_exp_errors + _MOVE_WEIGHT * moved
    return jnp.sum(losses), (losses, errors)


def _descend(
    objective: _Objective,
    start: _Moves,
    num_steps: jax.Array | int,
    learning_rate: jax.Array | float,
) -> _Moves:
    """Runs Adam and returns the best moves of each head."""
    import optax  # Here, since it takes long to import, and few callers fit.

    num_steps = jnp.asarray(num_steps, jnp.int32)

    def rate_at(step: ArrayLike) -> jax.Array:
        done = jnp.minimum(step, num_steps).astype(jnp.float32) / num_steps.astype(jnp.float32)
        return learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    optimizer = optax.adam(rate_at)
    _, (start_losses, start_errors) = objective(start)

    def step(
        _: jax.Array, carry: tuple[_Moves, Any, _Moves, jax.Array]
    ) -> tuple[_Moves, Any, _Moves, jax.Array]:
        moves, state, best, best_losses = carry
        (_, (losses, errors)), gradients = jax.value_and_grad(objective, has_aux=True)(moves)
        # False if no token is held or a step diverged, since comparisons with NaN are false.
        is_better = (losses < best_losses) & (errors <= start_errors)
        best = jax.tree.map(
            lambda new, old: jnp.where(is_better[:, None, None], new, old), moves, best
        )
        # Optax raises a float to an integer power, which strict dtype promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state)
        moves = jax.tree.map(jnp.add, moves, updates)
        return moves, state, best, jnp.where(is_better, losses, best_losses)

    # Moves are evaluated when the next step begins, so the last moves need one more step.
    carry = (start, optimizer.init(start), start, start_losses)
    _, _, best, _ = jax.lax.fori_loop(0, num_steps + 1, step, carry)
    return best


def _mean_square(x: jax.Array, num_held: jax.Array) -> jax.Array:
    """Returns the mean square per head of the tokens held of f32[H, T, D]; 0 if none is."""
    num_entries = jnp.maximum(num_held, 1).astype(jnp.float32) * x.shape[2]
    is_held = jnp.arange(x.shape[1], dtype=jnp.int32) < num_held
    return jnp.sum(jnp.where(is_held[None, :, None], x, 0.0) ** 2, axis=(1, 2)) / num_entries
