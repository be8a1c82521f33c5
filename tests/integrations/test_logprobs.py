"""Log-probabilities of logits, and of what `generate` returns, beside plain NumPy in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.generate import GenerateOptions, generate
from ferrum_jax.decoding.logprobs import Chosen, token_logprobs, top_logprobs
from ferrum_jax.decoding.prefill import PrefillOptions, prefill
from ferrum_jax.decoding.sampling import Sampling, token_keys
from ferrum_jax.integrations.nnx import nnx_model
from tests.support.tiny_model import (
    VOCAB,
    dense_logits,
    dense_logprobs,
    tiny_cache,
    tiny_decoder,
    weights_of,
)

MODEL = nnx_model(tiny_decoder())
WEIGHTS = weights_of(tiny_decoder())
PROMPTS = [[1], [5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
ROWS = np.arange(4, dtype=np.int32)
KEYS = jax.vmap(jax.random.key)(jnp.arange(10, 14))
DRAWN = Sampling(temperature=1.3, top_k=20, top_p=0.95)
NUM_TOP, RARE = 3, 40  # No row generates token 40.
OPTIONS = GenerateOptions(
    max_new_tokens=12, top_logprobs=NUM_TOP, sampling=DRAWN, stop_token_ids=(RARE,)
)


def odd_logits() -> np.ndarray:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(16, 50)) * 10 ** rng.uniform(-3, 5, (16, 1))
    odd = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38], (8, 50))
    logits[:8] = np.where(rng.random((8, 50)) < rng.random((8, 1)), odd, logits[:8])
    logits[8:12] = [[-np.inf], [np.nan], [np.inf], [-3.4e38]]
    logits[12] = logits[12].round(1)  # Many are equal.
    return logits.astype(np.float32)


def started(order=ROWS):
    """The cache after the prompts, prompt i in row `order[i]`, and the logits after each."""
    order = np.asarray(order, np.int32)
    state, ok = fj.allocate(fj.init(tiny_cache()), order, [len(prompt) for prompt in PROMPTS])
    assert bool(ok)
    options = PrefillOptions(chunk_tokens=4, rows_per_step=4)
    return prefill(*MODEL, state, order, PROMPTS, options=options)


def decoded(order=ROWS, lengths=(12,), options=OPTIONS, only=range(4)):
    """What each prompt decodes with its own key, in calls of some lengths, some at the same time.

    Args:
      order: Row of each prompt.
      lengths: Tokens of each call.
      options: Options of the calls.
      only: Prompts that are decoded; the others stay.

    Returns:
      `Chosen` of [4, 12] and of [4], on the host.
    """
    logits, state = started(order)
    lens = jnp.asarray([len(prompt) for prompt in PROMPTS])
    after = options.choose(logits, token_keys(KEYS, lens))
    is_decoded = np.isin(ROWS, list(only))
    rows = np.where(is_decoded, np.asarray(order), -1).astype(np.int32)
    parts = []
    for length in lengths:
        limited = dataclasses.replace(options, limits=np.full(4, length, np.int32))
        out = generate(*MODEL, state, rows, after, options=limited, key=KEYS)
        assert bool(out.ok) and (out.num_tokens == jnp.where(is_decoded, length, 0)).all()
        state, after = out.state, out.next
        parts.append(jax.tree.map(lambda x, n=length: np.asarray(x)[:, :n], out.chosen))
    whole = jax.tree.map(lambda *xs: np.concatenate(xs, axis=1), *parts)
    return whole, jax.device_get(after)


def require_true(chosen: Chosen, prompt: list[int], temperature=1.0):
    """Checks the log-probabilities of a row's tokens against a full recomputation."""
    text = [*prompt, *map(int, chosen.tokens)]
    want = dense_logprobs(dense_logits(WEIGHTS, text)[len(prompt) - 1 : -1] / temperature)
    taken = np.take_along_axis(want, np.asarray(chosen.tokens)[:, None], 1)[:, 0]
    np.testing.assert_allclose(chosen.logprobs, taken, atol=2e-4)
    best = np.sort(want, axis=1)[:, ::-1][:, : chosen.top_logprobs.shape[1]]
    np.testing.assert_allclose(chosen.top_logprobs, best, atol=2e-4)
    named = np.take_along_axis(want, np.asarray(chosen.top_tokens), 1)
    np.testing.assert_allclose(named, best, atol=2e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_log_probabilities_are_those_of_plain_numpy(dtype):
    logits = jnp.asarray(odd_logits(), dtype)
    want = dense_logprobs(np.asarray(logits.astype(jnp.float32)))
    tokens = np.random.default_rng(0).integers(0, 50, 16)
    got = token_logprobs(logits, tokens)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want[np.arange(16), tokens], rtol=1e-5, atol=1e-5)
    best, logprobs = top_logprobs(logits, 5)
    clean = np.where(np.isnan(logits.astype(jnp.float32)), -np.inf, logits.astype(jnp.float32))
    order = np.argsort(-clean, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(best, order)
    np.testing.assert_allclose(logprobs, np.take_along_axis(want, order, 1), rtol=1e-5, atol=1e-5)


def test_a_token_outside_the_vocabulary_has_no_log_probability():
    got = token_logprobs(jnp.zeros((3, 5)), [-1, 5, 4])
    np.testing.assert_allclose(got, [np.nan, np.nan, -np.log(5)], rtol=1e-6)
    with pytest.raises(ValueError, match="top_logprobs must be at most the 5 tokens"):
        top_logprobs(jnp.zeros((3, 5)), 6)
    with pytest.raises(AssertionError, match="tokens must have one per row"):
        token_logprobs(jnp.zeros((3, 5)), [1])


def test_generate_returns_the_log_probability_of_each_token_and_of_the_best_ones():
    whole, after = decoded()
    for row, prompt in enumerate(PROMPTS):
        own = jax.tree.map(lambda x, row=row: x[row], whole)
        ended = jax.tree.map(lambda x, y, row=row: np.concatenate([x, y[row][None]]), own, after)
        require_true(ended, prompt)


def test_log_probabilities_after_temperature_are_those_of_divided_logits():
    options = dataclasses.replace(OPTIONS, logprobs_after_temperature=True)
    whole, _ = decoded(options=options)
    for row, prompt in enumerate(PROMPTS):
        own = jax.tree.map(lambda x, row=row: x[row], whole)
        require_true(own, prompt, temperature=1.3)
    greedy = dataclasses.replace(options, sampling=Sampling())
    logits = jnp.asarray(odd_logits()[12:])
    want = dataclasses.replace(greedy, logprobs_after_temperature=False).choose(logits)
    for got, expected in zip(
        jax.tree.leaves(greedy.choose(logits)), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


def test_short_calls_give_the_tokens_and_log_probabilities_of_a_long_one():
    (whole, after), (pieces, at_last) = decoded(), decoded(lengths=(1, 4, 2, 5))
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(at_last), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    "order, lengths, only",
    [([3, 0, 2, 1], (12,), range(4)), ([5, 4, 1, 0], (7, 5), [0, 2]), (ROWS, (12,), [3])],
)
def test_a_key_per_request_draws_the_same_tokens_in_any_row_batch_and_split(order, lengths, only):
    whole, _ = decoded()
    other, _ = decoded(order, lengths, only=only)
    only = list(only)
    np.testing.assert_array_equal(other.tokens[only], whole.tokens[only])
    np.testing.assert_allclose(other.logprobs[only], whole.logprobs[only], atol=1e-5)


def test_draws_depend_on_the_key_and_the_position():
    whole, _ = decoded()
    keys = KEYS[::-1]
    logits, state = started()
    first = OPTIONS.choose(logits, token_keys(KEYS, [len(prompt) for prompt in PROMPTS]))
    limited = dataclasses.replace(OPTIONS, limits=np.full(4, 12, np.int32))
    out = generate(*MODEL, state, ROWS, first, options=limited, key=keys)
    assert (np.asarray(out.tokens)[:, 1:] != whole.tokens[:, 1:]).any(axis=1).all()
    logits = jnp.zeros((32, VOCAB))
    same = jnp.broadcast_to(KEYS[0], 32)
    assert len(set(DRAWN.sample(logits, token_keys(same, np.arange(32))).tolist())) > 8
    assert len(set(DRAWN.sample(logits, token_keys(same, np.full(32, 7))).tolist())) == 1


def test_rows_that_end_or_pause_have_no_log_probability_past_their_end():
    logits, state = started()
    greedy = dataclasses.replace(OPTIONS, sampling=Sampling())
    first = greedy.choose(logits)
    stop = int(first.tokens[1])
    limits = np.asarray([3, 12, 0, 5], np.int32)
    options = dataclasses.replace(greedy, limits=limits, stop_token_ids=(stop,))
    out = generate(*MODEL, state, [0, 1, -1, 3], first, options=options)
    assert out.tokens[1].tolist() == [stop, *[-1] * 11] and out.num_tokens[2] == 0
    is_token = np.arange(12) < np.asarray(out.num_tokens)[:, None]
    np.testing.assert_array_equal(np.isnan(out.logprobs), ~is_token)
    np.testing.assert_array_equal(np.isnan(out.chosen.top_logprobs).any(-1), ~is_token)
    np.testing.assert_array_equal((np.asarray(out.chosen.top_tokens) < 0).any(-1), ~is_token)
    is_done = np.asarray(out.next_tokens) < 0
    np.testing.assert_array_equal(np.isnan(out.next.logprobs), is_done)
    assert is_done[1] and is_done[2] and out.logprobs[1, 0] == first.logprobs[1]


def test_first_tokens_without_log_probabilities_have_nan():
    logits, state = started()
    first = OPTIONS.choose(logits, KEYS).tokens
    limited = dataclasses.replace(OPTIONS, limits=np.full(4, 12, np.int32))
    out = generate(*MODEL, state, ROWS, first, options=limited, key=KEYS)
    assert np.isnan(out.logprobs[:, 0]).all() and np.isfinite(out.logprobs[:, 1:]).all()


def test_generate_refuses_other_numbers_of_keys_and_of_best_tokens():
    state = fj.init(tiny_cache())
    with pytest.raises(ValueError, match="one per row"):
        generate(*MODEL, state, ROWS, ROWS, options=OPTIONS, key=KEYS[:3])
    with pytest.raises(ValueError, match="must have the 3 best tokens"):
        first = Chosen.unknown(ROWS, 2)
        generate(*MODEL, state, ROWS, first, options=OPTIONS, key=KEYS)
    for field, value in (("top_logprobs", -1), ("logprobs_after_temperature", 1)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(OPTIONS, **{field: value})
