"""The page "From a dense cache to this one": its diffs apply, and change no token of an answer."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

PAGE = pathlib.Path(__file__).parent.parent / "docs/from_a_dense_cache.md"
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3], [27], [18, 28, 18, 28, 45]]
NUM_TOKENS = 20
SECTIONS = {
    heading: re.findall(r"^```(python|diff)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for heading, text in re.findall(
        r"^## ([^\n]+)\n(.*?)(?=^## |\Z)",
        PAGE.read_text(encoding="utf-8"),
        re.DOTALL | re.MULTILINE,
    )
}
DECODERS = [heading for heading, blocks in SECTIONS.items() if blocks]


def side_of(diff: str, sign: str) -> str:
    """The lines that a diff expects (sign "-"), or those that it leaves ("+")."""
    lines = diff.splitlines()
    assert all(line[:1] in ("", " ", "+", "-") for line in lines)
    return "".join(line[1:] + "\n" for line in lines if line[:1] in ("", " ", sign))


def paged(heading: str) -> str:
    """The dense decoder of a section after all of its diffs."""
    (_, source), *diffs = SECTIONS[heading]
    for kind, diff in diffs:
        assert kind == "diff"
        before, after = side_of(diff, "-"), side_of(diff, "+")
        assert source.count(before) == 1, f"The diff does not apply:\n{diff}"
        source = source.replace(before, after)
    return source


def defined(source: str, name: str) -> dict:
    """What a program defines."""
    names: dict = {}
    exec(compile(source, name, "exec"), names)
    return names


def scaled(weights):
    """Weights so large that attention decides which token is next."""
    return jax.tree.map(lambda weight: 3 * weight, weights)


def weights(heading: str, dense: dict, changed: dict) -> tuple:
    """What the two `answer` functions take, with the same weights."""
    if "NNX" in heading:
        models = [names["Decoder"](nnx.Rngs(0)) for names in (dense, changed)]
        for one, other in zip(*(jax.tree.leaves(nnx.state(m)) for m in models), strict=True):
            np.testing.assert_array_equal(one, other)
        for model in models:
            nnx.update(model, scaled(nnx.state(model)))
        return tuple(models)
    tokens = jnp.zeros((1, 1), jnp.int32)
    params = dense["MODEL"].init(jax.random.key(0), tokens, tokens, dense["init_cache"](1, 1))
    return scaled(params), scaled(params)


def test_the_page_has_a_decoder_of_each_kind_in_sixty_lines():
    assert [heading.split()[-1] for heading in DECODERS] == ["NNX", "Linen"]
    for heading in DECODERS:
        kind, source = SECTIONS[heading][0]
        code = [line for line in source.splitlines() if line]
        assert kind == "python" and len(code) <= 60
        assert len([line for line in paged(heading).splitlines() if line]) < len(code)


@pytest.fixture
def as_users_run():
    """JAX's own settings; those of the tests refuse what a page may do."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("as_users_run")
@pytest.mark.parametrize("heading", DECODERS)
def test_the_paged_decoder_answers_as_the_dense_one_token_for_token(heading):
    dense = defined(SECTIONS[heading][0][1], "dense")
    changed = defined(paged(heading), "paged")
    before, after = weights(heading, dense, changed)
    answers = dense["answer"](before, PROMPTS, NUM_TOKENS)
    assert changed["answer"](after, PROMPTS, NUM_TOKENS) == answers
    assert len({tuple(answer) for answer in answers}) == 3 and len(set(answers[0])) > 5


@pytest.mark.parametrize("heading", DECODERS)
def test_nothing_of_the_dense_cache_is_left(heading):
    source = paged(heading)
    for word in ("init_cache", "mask", "cache =", "width"):
        assert word not in source
