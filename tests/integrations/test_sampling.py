"""`Sampling`: the tokens that plain NumPy keeps, drawn with its probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.integrations.generate import GenerateOptions
from ferrum_jax.integrations.sampling import Sampling, _draw, _kept

NUM_DRAWS = 4000
LOGITS = np.asarray([0.3, 2.0, -1.0, 2.0, 0.1, 1.5, -3.0, 0.3, 2.5, -np.inf], np.float32)


def expected_shares(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, float]:
    """The probability of each token, one after the other, and how near `top_p` a sum comes."""
    logits = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    best_first = np.argsort(-logits, kind="stable")
    is_best = logits == logits.max()
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        below = np.where(is_best, 0, (logits - logits.max()) / sampling.temperature)
        shares = np.exp(below)
    shares[best_first[sampling.top_k :] if sampling.top_k else []] = 0
    shares /= shares.sum()
    if sampling.top_p is None:
        return shares, 1.0
    reached, distance = 0.0, 1.0
    for token in best_first:
        if reached >= sampling.top_p:
            shares[token] = 0
        reached += shares[token]
        distance = min(distance, abs(reached - sampling.top_p))
    return shares / shares.sum(), distance


def drawn_shares(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    rows = jnp.asarray(np.tile(logits, (NUM_DRAWS, 1)))
    tokens = sampling.sample(rows, jax.random.key(7))
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=logits.size) / NUM_DRAWS


def any_logits(rng: np.random.Generator) -> np.ndarray:
    """f32[40, 50] rows of every kind: huge, tiny, equal, infinite, not a number."""
    logits = rng.normal(size=(40, 50)) * 10 ** rng.uniform(-5, 5, (40, 1))
    logits[5:15] = logits[5:15].round(1)  # Many are equal.
    logits[15:20] = rng.uniform(-3.4e38, 3.4e38, (5, 50))
    odd = rng.choice([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38, -3.4e38], (15, 50))
    logits[20:35] = np.where(rng.random((15, 50)) < rng.random((15, 1)), odd, logits[20:35])
    logits[35:] = [[0], [-np.inf], [np.nan], [np.inf], [-3.4e38]]
    return logits.astype(np.float32)


def any_sampling(rng: np.random.Generator) -> Sampling:
    """Any temperature and any `top_p` that a Python float can be."""
    temperature = float(
        10 ** (rng.uniform(-2, 2) if rng.random() < 0.4 else rng.uniform(-307, 308))
    )
    top_p = rng.choice([None, rng.uniform(0.01, 0.99), 10 ** rng.uniform(-307, -1), 5e-324])
    return Sampling(temperature=temperature, top_k=rng.choice([None, 3]), top_p=top_p)


def test_the_best_token_is_taken_and_of_equal_ones_the_first(transform):
    logits = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -5.0, -6.0]])
    tokens = transform(Sampling(top_k=2, top_p=0.1).sample)(logits)
    assert tokens.tolist() == [1, 1] and tokens.dtype == jnp.int32


def test_any_logits_and_any_choice_keep_what_float64_keeps():
    rng = np.random.default_rng(0)
    num_compared = 0
    for seed in range(50):
        logits, sampling = any_logits(rng), any_sampling(rng)
        below, ids = _kept(jnp.asarray(logits), **sampling._arguments(50))
        shares = np.exp(np.asarray(below))
        shares /= shares.sum(-1, keepdims=True)
        if ids is not None:
            kept, shares = shares, np.zeros_like(logits)
            np.put_along_axis(shares, np.asarray(ids), kept, axis=-1)
        best = np.asarray(Sampling().sample(jnp.asarray(logits)))
        drawn = np.asarray(sampling.sample(jnp.asarray(logits), jax.random.key(seed)))
        for row, share in enumerate(shares):
            expected, distance = expected_shares(logits[row], sampling)
            assert best[row] == np.argmax(np.where(np.isnan(logits[row]), -np.inf, logits[row]))
            assert share[best[row]] > 0 and share[drawn[row]] > 0, (sampling, row)
            if distance > 1e-5:  # Else the last bits of a sum decide whether it reaches top_p.
                np.testing.assert_allclose(share, expected, atol=2e-5, err_msg=f"{sampling} {row}")
                num_compared += 1
    assert num_compared > 0.9 * 50 * 40


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=2.0, top_k=2, top_p=0.6),
        Sampling(temperature=1.0, top_p=0.55),
        Sampling(temperature=2.0, top_p=0.9),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_plain_numpy_says(sampling):
    (expected, _), drawn = expected_shares(LOGITS, sampling), drawn_shares(LOGITS, sampling)
    assert not drawn[expected == 0].any()
    np.testing.assert_allclose(drawn, expected, atol=0.03)


def test_another_temperature_or_top_p_does_not_compile_again():
    logits, key = jnp.asarray(np.tile(LOGITS, (2, 1))), jax.random.key(0)
    Sampling(temperature=0.3, top_p=0.2).sample(logits, key)
    num_programs = _draw._cache_size()
    Sampling(temperature=9.0, top_p=0.7).sample(logits, key)
    assert _draw._cache_size() == num_programs


def test_a_row_with_its_own_key_does_not_depend_on_the_others():
    sampling, keys = Sampling(temperature=1.0, top_k=8), jax.random.split(jax.random.key(0), 6)
    logits = jax.random.normal(jax.random.key(1), (6, 10))
    together = sampling.sample(logits, keys)
    alone = [int(sampling.sample(logits[i : i + 1], keys[i : i + 1])[0]) for i in range(6)]
    assert together.tolist() == alone


def test_a_vocabulary_of_real_size_is_not_sorted():
    logits = jax.ShapeDtypeStruct((2, 49152), jnp.float32)
    for sampling in (Sampling(), Sampling(temperature=1.0, top_p=0.9)):
        program = jax.make_jaxpr(sampling.sample)(logits, jax.random.key(0))
        assert "sort" not in str(program) and "top_k" not in str(program)


def test_equal_choices_are_one_choice():
    assert Sampling(temperature=0.7, top_k=5) == Sampling(temperature=0.7, top_k=5)
    assert len({Sampling(), Sampling(temperature=0.0), Sampling(top_p=0.5)}) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_forbidden_tokens_count_as_minus_infinity_in_choices_and_log_probabilities(temperature):
    forbidden = [8, 1]
    options = GenerateOptions(
        max_new_tokens=1,
        sampling=Sampling(temperature=temperature, top_k=4, forbidden_token_ids=forbidden),
        top_logprobs=LOGITS.size,
    )
    logits, key = jnp.asarray(np.tile(LOGITS, (50, 1))), jax.random.key(3)
    masked = logits.at[:, np.asarray(forbidden)].set(-jnp.inf)
    allowed = dataclasses.replace(
        options, sampling=Sampling(temperature=temperature, top_k=4)
    ).choose(masked, key)
    chosen = options.choose(logits, key)
    jax.tree.map(np.testing.assert_array_equal, chosen, allowed)
    assert not set(chosen.tokens.tolist()) & set(forbidden)
    assert options.sampling.sample(logits, key).tolist() == chosen.tokens.tolist()
    with pytest.raises(ValueError, match="below the 8 tokens of the vocabulary, got 8"):
        options.sampling.sample(logits[:, :8], key)


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k must be at least 1, got 0. Leave it None", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("forbidden_token_ids", 3),
        ("forbidden_token_ids", (-1,)),
        ("forbidden_token_ids", (1.5,)),
        ("forbidden_token_ids", (1 << 31,)),
    ],
)
def test_a_wrong_choice_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field.split()[0]: value})


def test_keys_are_one_or_one_a_row():
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match=r"one per row \(3\)"):
        Sampling(temperature=1.0).sample(jnp.zeros((3, 4)), keys)


@pytest.mark.parametrize("key", [None, jax.random.PRNGKey(0), 5], ids=["none", "raw", "seed"])
def test_drawing_without_a_typed_key_is_refused(key):
    with pytest.raises(ValueError, match="jax.random.key"):
        Sampling(temperature=1.0).sample(jnp.zeros((1, 3)), key)
