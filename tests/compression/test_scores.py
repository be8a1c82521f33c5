"""Scores against loops in float64; the selection keeps what it must, and exactly as many."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.compression import scores
from ferrum_jax.compression.held import HeldTokens

H, T, D, Q = 2, 9, 4, 5
SCALE = 0.7
KEYS_ONLY = ["window", "key_norm", "key_difference"]
WITH_QUERIES = ["observed_attention", "expected_attention"]


def tokens_of(num_held, seed=0, garbage=np.nan):
    """Tokens, of which the padding is garbage, and queries."""
    rng = np.random.default_rng(seed)
    k, v = (rng.normal(size=(H, T, D)).astype(np.float32) for _ in range(2))
    queries = (rng.normal(size=(H, Q, D)) + 0.5).astype(np.float32)
    k[:, num_held:] = v[:, num_held:] = garbage
    held = HeldTokens(jnp.asarray(k), jnp.asarray(v), jnp.int32(num_held))
    return held, jnp.asarray(queries)


def oracle(name, k, v, queries):
    """One head, only its tokens held, token by token."""
    k, v, queries = (np.asarray(x, np.float64) for x in (k, v, queries))
    directions = np.stack([key / np.linalg.norm(key) for key in k])
    anchor = np.mean(directions, axis=0)
    mean, covariance = np.mean(queries, axis=0), np.cov(queries.T, bias=True)
    weights = np.exp(SCALE * queries @ k.T)
    weights /= weights.sum(axis=1, keepdims=True)
    result = []
    for i, key in enumerate(k):
        cosine = key @ anchor / np.linalg.norm(key) / np.linalg.norm(anchor)
        expected = np.exp(SCALE * mean @ key + SCALE**2 * key @ covariance @ key / 2)
        result.append(
            {
                "window": i,
                "key_norm": -np.sqrt(np.sum(key**2)),
                "key_difference": -cosine,
                "observed_attention": np.mean(weights[:, i]),
                "expected_attention": np.log(expected * np.linalg.norm(v[i])),
            }[name]
        )
    return result


@pytest.mark.parametrize("name", scores.scorer_names())
@pytest.mark.parametrize("num_held", [1, 6, T])
def test_a_scorer_agrees_with_its_formula(transform, name, num_held):
    tokens, queries = tokens_of(num_held)
    got = transform(scores.token_scorer(name))(tokens, queries, SCALE)
    k, v, _ = tokens
    chex.assert_shape(got, (H, T))
    assert got.dtype == jnp.float32
    want = [oracle(name, k[h, :num_held], v[h, :num_held], queries[h]) for h in range(H)]
    np.testing.assert_allclose(got[:, :num_held], want, rtol=2e-5, atol=2e-6)
    assert np.all(np.isneginf(got[:, num_held:]))


@pytest.mark.parametrize("name", scores.scorer_names())
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_scores_do_not_depend_on_the_padding(name, garbage):
    scorer = scores.token_scorer(name)
    clean, dirty = (scorer(*tokens_of(6, garbage=x), SCALE) for x in (0.0, garbage))
    np.testing.assert_array_equal(clean, dirty)


@pytest.mark.parametrize("name", scores.scorer_names())
def test_an_empty_cache_has_no_score_at_all(name):
    assert np.all(np.isneginf(scores.token_scorer(name)(*tokens_of(0), SCALE)))


@pytest.mark.parametrize("name", KEYS_ONLY)
def test_scorers_of_keys_need_no_queries(name):
    assert not scores.needs_queries(name)
    tokens, queries = tokens_of(6)
    scorer = scores.token_scorer(name)
    np.testing.assert_array_equal(scorer(tokens, None, SCALE), scorer(tokens, queries, SCALE))


@pytest.mark.parametrize("name", WITH_QUERIES)
def test_scorers_that_need_queries_say_so(name):
    assert scores.needs_queries(name)
    tokens, _ = tokens_of(6)
    with pytest.raises(ValueError, match=f"'{name}' needs reference queries"):
        scores.token_scorer(name)(tokens, None, SCALE)


@pytest.mark.parametrize("ask", [scores.token_scorer, scores.needs_queries])
def test_an_unknown_scorer_is_refused_with_the_known_names(ask):
    with pytest.raises(ValueError, match="'windwo'; known are window, key_norm, key_diff"):
        ask("windwo")


def test_keys_of_zero_have_no_direction():
    zeros = jnp.zeros((H, T, D), jnp.float32)
    got = scores.key_difference(HeldTokens(zeros, zeros, jnp.int32(6)), None, SCALE)
    np.testing.assert_array_equal(got[:, :6], 0.0)


def test_the_key_that_points_away_from_the_others_scores_best():
    k = np.ones((1, 5, D), np.float32)
    k[0, 3] = [-1.0, 1.0, -1.0, 1.0]
    k[0, 4] *= 100.0  # Length is no direction.
    tokens = HeldTokens(jnp.asarray(k), jnp.asarray(k), jnp.int32(5))
    got = scores.key_difference(tokens, None, SCALE)
    assert np.argmax(got) == 3
    np.testing.assert_allclose(got[0, 4], got[0, 0], rtol=1e-6)


def test_expected_attention_orders_tokens_whose_weights_would_overflow():
    tokens, queries = tokens_of(T)
    got = scores.expected_attention(tokens._replace(k=100.0 * tokens.k), queries, SCALE)
    assert np.all(np.isfinite(got))
    assert all(len(set(row)) == T for row in np.asarray(got))


def kept_by_loop(row, num_held, num_kept, num_sinks, num_recent):
    """The dull way: those that must stay, then the best, earlier ones first."""
    must = [i for i in range(num_held) if i < num_sinks or i >= num_held - num_recent]
    rest = [i for i in range(num_held) if i not in must]
    clean = [-np.inf if np.isnan(x) else x for x in row]
    rest.sort(key=lambda i: (-clean[i], i))
    return sorted(must + rest[: num_kept - len(must)])


# A few values, so that there are ties; and what no scorer should give.
SCORES = st.sampled_from([-1.0, -0.0, 0.0, 0.5, 2.0, np.inf, -np.inf, np.nan])


@hypothesis.settings(max_examples=200)
@hypothesis.given(data=st.data())
def test_select_tokens_equals_a_loop(data):
    rows = data.draw(st.lists(st.lists(SCORES, min_size=T, max_size=T), min_size=H, max_size=H))
    num_held = data.draw(st.integers(0, T))
    num_sinks, num_recent = data.draw(st.sampled_from([(0, 0), (1, 0), (0, 2), (2, 3), (4, 9)]))
    num_kept = data.draw(st.integers(min(num_held, num_sinks + num_recent), num_held))
    order = _select(
        jnp.asarray(rows, jnp.float32),
        jnp.int32(num_held),
        jnp.int32(num_kept),
        num_sinks=num_sinks,
        num_recent=num_recent,
    )
    assert order.dtype == jnp.int32
    for row, got in zip(rows, np.asarray(order), strict=True):
        want = kept_by_loop(row, num_held, num_kept, num_sinks, num_recent)
        assert got[:num_kept].tolist() == want
        assert sorted(got.tolist()) == list(range(T))


_select = jax.jit(scores.select_tokens, static_argnames=("num_sinks", "num_recent"))


def test_compact_reorders_each_head_by_its_own_order(transform):
    (k, _, held), _ = tokens_of(6)
    row = jnp.asarray([[0, 5, 4, 3, 2, 1, 0, 0, 0], [5, 0, 1, 2, 3, 4, 0, 0, 0]], jnp.float32)
    order = scores.select_tokens(row, held, jnp.int32(3), num_sinks=1, num_recent=0)
    got = transform(scores.compact)(k, order)
    np.testing.assert_array_equal(got[0, :3], k[0, :3])
    np.testing.assert_array_equal(got[1, :3], np.asarray(k)[1, [0, 4, 5]])
