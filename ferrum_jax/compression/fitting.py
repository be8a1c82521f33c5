"""What the tokens kept should become, so that attention to them is as it was to all of them.

Everything here is about one layer. H KV heads, T tokens (padded), D head dim, Q reference
queries of each KV head: the query heads that share it, and their tokens, flattened together.
What lies beyond the tokens held is garbage, perhaps NaN, and no result depends on it.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import chex
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count

# Outputs come first: an error e of the log-sum-exp moves a cache's share of a later softmax by
# e / 4 at most, and so adds about a tenth of its square to the squared error there.
_LOG_SUM_EXP_WEIGHT = 0.1

# Per squared move of the average entry, in units of the root mean square of its head. On keys and
# values of a real model, a quarter or half of 512 tokens kept, the error of later queries differs
# by 4 % either way between 0 and 0.2; 1 costs up to 4 % of it, 5 about a tenth.
_MOVE_WEIGHT = 0.2


class HeldTokens(NamedTuple):
    """The tokens of one layer.

    Attributes:
      k: f32[H, T, D]. Keys.
      v: f32[H, T, D]. Values.
      num_held: i32[]. How many of the T tokens are real.
    """

    k: jax.Array
    v: jax.Array
    num_held: jax.Array


class Fit(NamedTuple):
    """Tokens fitted, and how well attention to them stands for attention to all.

    Attributes:
      k: f32[H, K, D]. Keys.
      v: f32[H, K, D]. Values.
      error_before: f32[]. `attention_error` on the reference queries before the fit.
      error_after: f32[]. The same after it; never larger, rounding aside.
    """

    k: jax.Array
    v: jax.Array
    error_before: jax.Array
    error_after: jax.Array


class _Moves(NamedTuple):
    """f32[H, K, D] each: how far keys and values are from where they began.

    In units of the root mean square of their head, so that one learning rate suits all.
    """

    k: jax.Array
    v: jax.Array


_Objective: TypeAlias = Callable[[_Moves], tuple[jax.Array, tuple[jax.Array, jax.Array]]]
"""Moves to the loss f32[]; and to those of the heads and the errors of outputs, f32[H] each."""


def attention(
    k: jax.Array, v: jax.Array, num_held: jax.Array, queries: jax.Array, scale: jax.Array | float
) -> tuple[jax.Array, jax.Array]:
    """Attends every query to every token held, as queries of later tokens would.

    Args:
      k: f32[H, T, D]. Keys.
      v: f32[H, T, D]. Values.
      num_held: i32[]. Tokens held.
      queries: f32[H, Q, D].
      scale: What logits are multiplied with.

    Returns:
      `(out, log_sum_exp)`, f32[H, Q, D] and f32[H, Q]. Zero and `-inf` where nothing is held.
    """
    chex.assert_rank([k, v, num_held, queries], [3, 3, 0, 3])
    chex.assert_equal_shape([k, v])
    held = _held(k, num_held)
    # Garbage may be NaN, and 0 * NaN is NaN, in the outputs and in gradients.
    k, v = (jnp.where(held, x, 0.0) for x in (k, v))
    logits = scale * jnp.einsum("hqd,htd->hqt", queries, k)
    logits = jnp.where(held.swapaxes(1, 2), logits, -jnp.inf)

    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    is_empty = total == 0.0
    total = jnp.where(is_empty, 1.0, total)
    out = jnp.einsum("hqt,htd->hqd", weights / total, v)
    log_sum_exp = jnp.where(is_empty, -jnp.inf, peak + jnp.log(total))
    return out, log_sum_exp[:, :, 0]


def attention_error(out: jax.Array, reference: jax.Array) -> jax.Array:
    """Measures how far outputs are from a reference, all heads together.

    Args:
      out: f32[H, Q, D].
      reference: f32[H, Q, D].

    Returns:
      f32[]. The L2 norm of the difference over that of the reference; where the latter is 0,
      the norm of the difference itself.

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
    """Moves kept keys and values until attention to them is as it was to all tokens.

    Adam on keys and values at once. The loss of a head is the squared error of its outputs,
    relative to their squared norm, plus that of its log-sum-exps, plus a penalty on moving. The
    log-sum-exp matters because later tokens join the same softmax: it says how much of the
    weight the cache takes there, and outputs alone could be right at the wrong share. The
    penalty matters because the queries are few and the entries many: see `_MOVE_WEIGHT`.

    A head takes the step of the least loss it has seen, and none at which its outputs are worse
    than at the start. Its log-sum-exps may be, for as much as outputs gain by it. Without queries
    that resemble those to come there is nothing to be gained here.

    Args:
      full: All tokens.
      kept: The tokens to move, K places; where they start matters, so choose them well.
      queries: f32[H, Q, D]. Reference queries.
      scale: What logits are multiplied with.
      num_steps: i32[]. Steps, at least 1.
      learning_rate: f32[]. Of the first step, in units of the root mean square of the entries of a
        head; it falls to 0 along a cosine. 60 steps from 0.02 do well.

    Returns:
      The tokens moved, places beyond `kept.num_held` as they were, and the errors. On the way
      there are about a dozen arrays as large as the keys kept, and one f32[H, Q, T].

    Raises:
      ValueError: If `num_steps` is not a positive integer, as far as the host knows.

    References:
      The same two targets, outputs and attention mass, guide Zweiger et al. 2026, "Fast KV
      Compaction via Attention Matching", arXiv 2602.16284; they solve for values and for a bias
      a token, which an ordinary cache has no place for. Here keys make up for the mass.
    """
    if not isinstance(num_steps, jax.Array):
        check_count("num_steps", num_steps)
    chex.assert_equal_shape([kept.k, kept.v])
    chex.assert_equal_shape_prefix([full.k, kept.k, queries], 1)
    reference = attention(*full, queries, scale)
    objective = functools.partial(
        _loss, kept=kept, queries=queries, scale=scale, reference=reference
    )
    start = _Moves(jnp.zeros_like(kept.k), jnp.zeros_like(kept.v))
    fitted = _moved(kept, _descend(objective, start, num_steps, learning_rate))
    before, after = (
        attention_error(attention(*tokens, queries, scale)[0], reference[0])
        for tokens in (kept, fitted)
    )
    return Fit(fitted.k, fitted.v, before, after)


def _moved(kept: HeldTokens, moves: _Moves) -> HeldTokens:
    """Moves the tokens held, and leaves what lies beyond them as it is, bit for bit."""
    held = _held(kept.k, kept.num_held)
    k, v = (
        jnp.where(held, x + jnp.sqrt(_mean_square(x, kept.num_held))[:, None, None] * move, x)
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
    """Judges moves, as `_Objective` says, by the reference that `attention` to all returned."""
    out, log_sum_exp = attention(*_moved(kept, moves), queries, scale)
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
    """Runs Adam and returns, for each head, the best moves that it came by."""
    import optax  # Here, since it takes a tenth of a second to import, and only fits need it.

    num_steps = jnp.asarray(num_steps, jnp.int32)

    def rate_at(step: ArrayLike) -> jax.Array:
        done = jnp.minimum(step, num_steps).astype(jnp.float32) / num_steps.astype(jnp.float32)
        return learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

    optimizer = optax.adam(rate_at)
    _, (start_losses, start_errors) = objective(start)

    def step(
        _: jax.Array, carry: tuple[_Moves, optax.OptState, _Moves, jax.Array]
    ) -> tuple[_Moves, optax.OptState, _Moves, jax.Array]:
        moves, state, best, best_losses = carry
        (_, (losses, errors)), gradients = jax.value_and_grad(objective, has_aux=True)(moves)
        # False where nothing is held or a step went to infinity, since NaN compares as false.
        is_better = (losses < best_losses) & (errors <= start_errors)
        best = jax.tree.map(
            lambda new, old: jnp.where(is_better[:, None, None], new, old), moves, best
        )
        # Optax raises a float to an integer power, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state)
        moves = jax.tree.map(jnp.add, moves, updates)
        return moves, state, best, jnp.where(is_better, losses, best_losses)

    # Moves are judged when the next step begins, so the last ones need a turn more.
    carry = (start, optimizer.init(start), start, start_losses)
    _, _, best, _ = jax.lax.fori_loop(0, num_steps + 1, step, carry)
    return best


def _held(x: jax.Array, num_held: jax.Array) -> jax.Array:
    """bool[1, T, 1]. Which tokens of [H, T, D] are held."""
    return (jnp.arange(x.shape[1], dtype=jnp.int32) < num_held)[None, :, None]


def _mean_square(x: jax.Array, num_held: jax.Array) -> jax.Array:
    """f32[H]. Over the tokens held of f32[H, T, D]; zero where there are none."""
    num_entries = jnp.maximum(num_held, 1).astype(jnp.float32) * x.shape[2]
    return jnp.sum(jnp.where(_held(x, num_held), x, 0.0) ** 2, axis=(1, 2)) / num_entries
