"""The CPU kernel gives a query the same bits alone, in a chunk, in every batch and block."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.types import TokenFormat
from tests.support.attention_kernels import compiled
from tests.support.attention_oracle import attention
from tests.support.attention_problems import VARIANTS, Problem, packed_problem, problem

T, LENS = 33, np.asarray([700, 33, 0, 260, 516, 48])
SHAPES = {
    "plain": {"heads": (6, 2), "head_dim": 64, "block_size": 16},
    "all options": {
        **{"heads": (4, 1), "head_dim": 80, "block_size": 24, "dtype": "bfloat16"},
        **{**VARIANTS["all"], "sliding_window": 130},
    },
    "compressed": {"heads": (2, 1), "head_dim": 64, "block_size": 16, "pool_dtype": "float16"},
}
NAMES = pytest.mark.parametrize("name", SHAPES)


def chunks(name: str, seed: int = 0) -> tuple[Problem, np.ndarray]:
    """Rows of several tiles, less than one, and none; with a random number of queries each.

    Returns `(problem, q_lens)`.
    """
    q_lens = np.minimum(np.random.default_rng(seed).integers(1, T + 1, LENS.size), LENS)
    shape = {"seed": seed, "held_lens": LENS, "num_queries": T, "q_lens": q_lens, **SHAPES[name]}
    if name == "compressed":
        return packed_problem(TokenFormat.Int8, **shape), q_lens
    return problem(**shape), q_lens


def bits(p: Problem) -> np.ndarray:
    """The float32 result as integers, equal only if all bits are."""
    arguments = {**p.arguments(), "q": jnp.asarray(p.q, jnp.float32)}
    return np.asarray(compiled("cpu")(arguments, p.token_format)).view(np.int32).reshape(p.q.shape)


def alone(p: Problem, q_lens: np.ndarray) -> Problem:
    """Every query of the chunks as a row of its own; no row where there is no query."""
    row, t = (x.ravel() for x in np.indices((LENS.size, T)))
    is_query = t < q_lens[row]
    return p.replace(
        q=p.q[row, t],
        block_ids=p.block_ids[row],
        held_lens=np.where(is_query, p.held_lens[row] - q_lens[row] + t + 1, 0),
        q_lens=None,
    )


@NAMES
def test_a_query_in_a_chunk_equals_the_query_alone(name):
    for seed in range(3):
        p, q_lens = chunks(name, seed)
        want = bits(p)
        np.testing.assert_allclose(want.view(np.float32), attention(p), rtol=0, atol=1e-5)
        np.testing.assert_array_equal(bits(alone(p, q_lens)).reshape(want.shape), want)
        # The same tokens in a chunk that begins later, at another place among the queries.
        later = np.minimum(q_lens, 1 + seed)
        moved = p.replace(q=np.roll(p.q, later[0] - q_lens[0], axis=1), q_lens=later)
        first = q_lens[0] - later[0]
        np.testing.assert_array_equal(bits(moved)[0, : later[0]], want[0, first : q_lens[0]])


@NAMES
def test_a_row_does_not_depend_on_the_other_rows_or_on_its_place(name):
    p, q_lens = chunks(name)
    want = bits(p)
    rng = np.random.default_rng(0)
    for _ in range(4):
        order, is_kept = rng.permutation(LENS.size), rng.random(LENS.size) < 0.4
        batch = p.replace(
            q=p.q[order],
            block_ids=p.block_ids[order],
            held_lens=np.where(is_kept, p.held_lens[order], 0),
            q_lens=np.where(is_kept, q_lens[order], 0),
        )
        np.testing.assert_array_equal(bits(batch)[is_kept], want[order][is_kept])


@pytest.mark.parametrize("name", ["plain", "all options"])
def test_a_row_does_not_depend_on_the_blocks_that_hold_it(name):
    p, _ = chunks(name)
    order = np.random.default_rng(0).permutation(p.k.shape[0])
    block_ids = np.where(p.block_ids < 0, p.block_ids, np.argsort(order)[p.block_ids])
    moved = dataclasses.replace(p, k=p.k[order], v=p.v[order], block_ids=block_ids.astype(np.int32))
    np.testing.assert_array_equal(bits(moved), bits(p))


def test_a_long_row_has_the_same_bits_in_one_part_and_in_many():
    # Alone it is cut into parts of one tile; among many, which share its blocks, it is one part.
    p = problem(held_lens=[2000], heads=(4, 4), head_dim=32, block_size=16)
    many = {name: np.repeat(getattr(p, name), 99, 0) for name in ("q", "block_ids", "held_lens")}
    few = {**many, "held_lens": np.where(np.arange(99) == 7, p.held_lens, 0)}
    np.testing.assert_array_equal(bits(p.replace(**few))[7], bits(p.replace(**many))[7])
