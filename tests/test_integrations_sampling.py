"""Choosing tokens: the same sets as plain NumPy keeps, drawn as often as they should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.integrations.sampling import Sampling

NUM_DRAWS = 4000
LOGITS = np.asarray([0.3, 2.0, -1.0, 2.0, 0.1, 1.5, -3.0, 0.3, 2.5, -np.inf], np.float32)


def expected_shares(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The probability of each token, one token after the other."""
    shares = np.exp(logits.astype(np.float64) / sampling.temperature)
    best_first = np.argsort(-logits, kind="stable")
    shares[best_first[sampling.top_k :] if sampling.top_k else []] = 0
    shares /= shares.sum()
    reached = 0.0
    for token in best_first:
        if reached >= (sampling.top_p or 1):
            shares[token] = 0
        reached += shares[token]
    return shares / shares.sum()


def drawn_shares(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    rows = jnp.asarray(np.tile(logits, (NUM_DRAWS, 1)))
    tokens = jax.jit(sampling.sample)(rows, jax.random.key(7))
    assert tokens.dtype == jnp.int32
    return np.bincount(tokens, minlength=logits.size) / NUM_DRAWS


def test_the_best_token_is_taken_and_of_equal_ones_the_first(transform):
    logits = jnp.asarray([[1.0, 3.0, 3.0], [-jnp.inf, -5.0, -6.0]])
    tokens = transform(Sampling(top_k=2, top_p=0.1).sample)(logits)
    assert tokens.tolist() == [1, 1] and tokens.dtype == jnp.int32


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0),
        Sampling(temperature=1.0, top_k=1),
        Sampling(temperature=1.0, top_k=2),
        Sampling(temperature=2.0, top_k=4),
        Sampling(temperature=1.0, top_k=1000),
        Sampling(temperature=1.0, top_p=0.01),
        Sampling(temperature=1.0, top_p=0.55),
        Sampling(temperature=2.0, top_p=0.9),
        Sampling(temperature=1.0, top_p=1.0),
        Sampling(temperature=1.0, top_k=3, top_p=0.6),
    ],
    ids=str,
)
def test_tokens_are_drawn_as_often_as_plain_numpy_says(sampling):
    expected, drawn = expected_shares(LOGITS, sampling), drawn_shares(LOGITS, sampling)
    assert not drawn[expected == 0].any()
    np.testing.assert_allclose(drawn, expected, atol=0.03)


def test_top_p_keeps_what_numpy_keeps_for_many_rows():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, (40, 50)).astype(np.float32).round(1)  # Rounded: many are equal.
    sampling = Sampling(temperature=0.8, top_p=0.83)
    kept, ids = sampling._kept(jnp.asarray(logits) / 0.8)
    assert ids is None
    expected = np.stack([expected_shares(row, sampling) for row in logits])
    np.testing.assert_array_equal(np.isfinite(kept), expected > 0)


def test_top_k_comes_before_top_p():
    logits = np.log(np.asarray([0.4, 0.3, 0.2, 0.1], np.float32))
    # Of the two best, 4/7 and 3/7, the first alone reaches 0.5; of all four it would not.
    assert drawn_shares(logits, Sampling(temperature=1.0, top_k=2, top_p=0.5))[0] == 1
    assert drawn_shares(logits, Sampling(temperature=1.0, top_p=0.5))[1] > 0.3


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


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
    ],
)
def test_a_wrong_choice_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        Sampling(**{field: value})


@pytest.mark.parametrize("key", [None, jax.random.PRNGKey(0)], ids=["none", "raw"])
def test_drawing_without_a_typed_key_is_refused(key):
    with pytest.raises(ValueError, match="jax.random.key"):
        Sampling(temperature=1.0).sample(jnp.zeros((1, 3)), key)
