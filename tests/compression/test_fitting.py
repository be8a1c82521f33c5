"""Fitted tokens: lower errors for seen and unseen queries, and never higher ones."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.compression import fitting, scores
from ferrum_jax.compression.held import HeldTokens

H, T, K, D, Q = 2, 64, 40, 16, 24
NUM_HELD, NUM_KEPT = 60, 30
SCALE = D**-0.5
LEARNING_RATE = 0.02

_fit = jax.jit(fitting.fit, static_argnames="num_steps")
_attention = jax.jit(fitting.attention)


@jax.jit
def _pruned(full, num_kept, garbage):
    score = scores.key_norm(full, None, SCALE)
    order = scores.select_tokens(score, full.num_held, num_kept, num_sinks=2, num_recent=4)
    k, v = (scores.compact(x, order)[:, :K] for x in (full.k, full.v))
    beyond = jnp.arange(K)[None, :, None] >= num_kept
    return HeldTokens(*(jnp.where(beyond, garbage, x) for x in (k, v)), num_kept)


def problem(seed=0, garbage=np.nan, num_held=NUM_HELD, num_kept=NUM_KEPT):
    """A cache, its pruned self, reference queries, and many more queries of the same kind.

    Queries share a mean and a few directions, as those of one text do; keys come in clusters,
    and values depend on keys.
    """
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    directions, mean = normal(H, 4, D), normal(H, 1, D)
    queries = mean + normal(H, 10 * Q, 4) @ directions / 2 + 0.2 * normal(H, 10 * Q, D)
    k = normal(H, 8, D)[:, rng.integers(8, size=T)] + 0.5 * normal(H, T, D)
    v = np.tanh(k @ normal(H, D, D) / 4) + 0.3 * normal(H, T, D)
    k[:, num_held:] = v[:, num_held:] = garbage
    full = HeldTokens(jnp.asarray(k), jnp.asarray(v), jnp.int32(num_held))

    kept = _pruned(full, np.int32(num_kept), np.float32(garbage))
    return full, kept, jnp.asarray(queries[:, :Q]), jnp.asarray(queries[:, Q:])


def fit(full, kept, queries, *, num_steps=60, learning_rate=LEARNING_RATE):
    return _fit(full, kept, queries, SCALE, num_steps=num_steps, learning_rate=learning_rate)


def misses(full: HeldTokens, tokens: HeldTokens, queries):
    """Relative error of outputs, and root mean square error of log-sum-exps."""
    out, log_sum_exp = _attention(tokens, queries, SCALE)
    want, want_log_sum_exp = _attention(full, queries, SCALE)
    spread = jnp.sqrt(jnp.mean((log_sum_exp - want_log_sum_exp) ** 2))
    return float(fitting.attention_error(out, want)), float(spread)


@pytest.mark.parametrize("num_held", [1, 37, T])
def test_attention_is_the_softmax_that_a_loop_takes(transform, num_held):
    full, _, queries, _ = problem(num_held=num_held)
    out, log_sum_exp = transform(fitting.attention)(full, queries, SCALE)
    for h, q in np.ndindex(H, Q):
        k, v = (np.asarray(x[h, :num_held], np.float64) for x in (full.k, full.v))
        weights = np.exp(SCALE * k @ np.asarray(queries[h, q], np.float64))
        np.testing.assert_allclose(out[h, q], weights @ v / weights.sum(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log_sum_exp[h, q], np.log(weights.sum()), rtol=1e-5)


def test_attention_to_nothing_is_zero_and_weighs_nothing(transform):
    full, _, queries, _ = problem(num_held=0)
    out, log_sum_exp = transform(fitting.attention)(full, queries, SCALE)
    np.testing.assert_array_equal(out, 0.0)
    assert np.all(np.isneginf(log_sum_exp))


def test_attention_survives_logits_beyond_what_exp_can_hold():
    full, _, queries, _ = problem()
    out, log_sum_exp = fitting.attention(full, 1000.0 * queries, SCALE)
    assert np.all(np.isfinite(out)) and np.all(np.isfinite(log_sum_exp))
    assert np.max(log_sum_exp) > 500.0


@pytest.mark.parametrize(("norm", "want"), [(2.0, 0.5), (0.0, 1.0)])
def test_an_error_is_relative_unless_there_is_nothing_to_relate_it_to(norm, want):
    reference = jnp.asarray([[[norm, 0.0]]], jnp.float32)
    off = reference + jnp.asarray([[[0.0, 1.0]]], jnp.float32)
    assert float(fitting.attention_error(off, reference)) == want
    assert float(fitting.attention_error(reference, reference)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_a_fit_lowers_the_error_of_seen_and_unseen_queries(seed):
    full, kept, queries, others = problem(seed)
    result = fit(full, kept, queries)
    for asked, factor in [(queries, 0.4), (others, 0.6)]:
        before, after = misses(full, kept, asked), misses(full, result.tokens, asked)
        assert after[0] < factor * before[0]
        assert after[1] < factor * before[1]


@pytest.mark.parametrize("seed", range(4))
def test_a_fit_to_three_queries_lowers_the_error_of_others(seed):
    full, kept, queries, others = problem(seed)
    few = jnp.tile(queries[:, :3], (1, Q // 3, 1))  # As often as needed for the same shape.
    result = fit(full, kept, few)
    assert misses(full, result.tokens, others)[0] < misses(full, kept, others)[0]


def test_a_fit_serves_later_tokens_that_join_the_same_softmax():
    full, kept, queries, others = problem()
    result = fit(full, kept, queries)
    rng = np.random.default_rng(9)
    later = jnp.asarray(rng.normal(size=(2, H, 12, D)), jnp.float32)

    def with_later(tokens):
        num_held = int(tokens.num_held)
        k, v = (
            jnp.concatenate([x[:, :num_held], y], axis=1)
            for x, y in zip(tokens[:2], later, strict=True)
        )
        return fitting.attention(HeldTokens(k, v, jnp.int32(k.shape[1])), others, SCALE)[0]

    want = with_later(full)
    before, after = (
        float(fitting.attention_error(with_later(x), want)) for x in (kept, result.tokens)
    )
    assert after < 0.7 * before


def test_the_errors_reported_are_those_of_the_queries_given():
    full, kept, queries, _ = problem()
    result = fit(full, kept, queries)
    for got, tokens in [(result.error_before, kept), (result.error_after, result.tokens)]:
        np.testing.assert_allclose(got, misses(full, tokens, queries)[0], rtol=1e-4)


@pytest.mark.parametrize("learning_rate", [1e-6, 0.3, 3.0, 1e4, 1e30, np.inf, np.nan])
def test_no_learning_rate_makes_any_head_worse(learning_rate):
    full, kept, queries, _ = problem()
    result = fit(full, kept, queries, learning_rate=learning_rate)
    for h in range(H):
        alone, start, end = (
            HeldTokens(k[h : h + 1], v[h : h + 1], n) for k, v, n in (full, kept, result.tokens)
        )
        asked = queries[h : h + 1]
        before, after = misses(alone, start, asked), misses(alone, end, asked)
        assert after[0] <= before[0] * (1 + 1e-5)
        assert loss(after) <= loss(before) * (1 + 1e-5)


def loss(missed):
    """The loss of a fit, without the penalty on changes."""
    out, log_sum_exp = missed
    return out**2 + 0.1 * log_sum_exp**2


def test_much_better_outputs_may_cost_a_little_of_the_share_of_later_softmaxes():
    full, _, queries, _ = problem(garbage=0.0)
    rng = np.random.default_rng(3)
    noise = jnp.asarray(rng.normal(size=(H, T, D)), jnp.float32)
    kept = full._replace(v=full.v + noise)  # The right share from the start.
    result = fit(full, kept, queries)
    before, after = misses(full, kept, queries), misses(full, result.tokens, queries)
    assert before[1] == 0.0 < after[1]
    assert after[0] < before[0] / 4
    assert loss(after) < loss(before)


@pytest.mark.parametrize("seed", range(3))
def test_a_fit_of_a_few_steps_to_queries_like_no_other_keeps_what_it_gained(seed):
    """Random keys: the log-sum-exps of those kept are near to begin with, by chance."""
    rng = np.random.default_rng(seed)
    k, v = jnp.asarray(rng.normal(size=(2, 1, 128, D)), jnp.float32)
    queries = jnp.asarray(np.random.default_rng(5).normal(size=(1, 32, D)), jnp.float32)
    full = HeldTokens(k, v, jnp.int32(128))
    score = scores.key_difference(full, None, SCALE)
    order = scores.select_tokens(score, full.num_held, jnp.int32(32), num_sinks=4, num_recent=8)
    kept = HeldTokens(*(scores.compact(x, order)[:, :32] for x in (k, v)), jnp.int32(32))
    result = fit(full, kept, queries)
    assert result.error_after < result.error_before / 2


@pytest.mark.parametrize(
    ("held", "learning_rate", "bound"),
    [
        ({}, np.nan, None),  # Its steps diverge.
        ({"num_held": NUM_KEPT}, LEARNING_RATE, 1e-6),
        ({"num_held": 0, "num_kept": 0}, LEARNING_RATE, 0.0),
    ],
    ids=["diverging", "of all tokens", "of no token"],
)
def test_a_fit_that_gains_nothing_returns_the_tokens_unchanged(held, learning_rate, bound):
    full, kept, queries, _ = problem(**held)
    result = fit(full, kept, queries, learning_rate=learning_rate)
    np.testing.assert_array_equal(result.tokens.k, kept.k)
    np.testing.assert_array_equal(result.tokens.v, kept.v)
    assert result.error_after <= (result.error_before if bound is None else bound)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_a_fit_does_not_depend_on_the_padding_and_does_not_change_it(garbage):
    clean, dirty = (
        fit(full, kept, queries)
        for full, kept, queries, _ in (problem(garbage=x) for x in (0.0, garbage))
    )
    for got, want in [(dirty.tokens.k, clean.tokens.k), (dirty.tokens.v, clean.tokens.v)]:
        np.testing.assert_array_equal(got[:, :NUM_KEPT], want[:, :NUM_KEPT])
        np.testing.assert_array_equal(got[:, NUM_KEPT:], np.float32(garbage))
    assert dirty.error_after == clean.error_after


def test_fitting_is_traced_once_for_any_number_of_tokens_and_maps_over_layers():
    traced_once = jax.jit(chex.assert_max_traces(_one_step, n=1))
    for num_held, num_kept in [(60, 30), (40, 40), (17, 6)]:
        full, kept, queries, _ = problem(num_held=num_held, num_kept=num_kept)
        result = traced_once(full, kept, queries)
        assert result.error_after <= result.error_before * (1 + 1e-5)

    layers = jax.tree.map(
        lambda *x: jnp.stack(x), *[problem(seed=seed, garbage=0.0)[:3] for seed in range(2)]
    )
    mapped = jax.jit(lambda x: jax.lax.map(lambda layer: _one_step(*layer), x))(layers)
    for seed in range(2):
        alone = traced_once(*problem(seed=seed, garbage=0.0)[:3])
        np.testing.assert_allclose(mapped.tokens.k[seed], alone.tokens.k, rtol=1e-4, atol=1e-5)
        assert alone.error_after < alone.error_before  # The one step was judged, too.


def _one_step(full, kept, queries):
    return fitting.fit(full, kept, queries, SCALE, num_steps=1, learning_rate=LEARNING_RATE)


def test_a_fit_without_steps_or_of_tokens_of_other_heads_is_refused():
    full, kept, queries, _ = problem()
    for num_steps in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="num_steps must be"):
            fitting.fit(full, kept, queries, SCALE, num_steps=num_steps, learning_rate=0.02)
    with pytest.raises(AssertionError):
        fitting.fit(full, kept, queries[:1], SCALE, num_steps=1, learning_rate=0.02)
