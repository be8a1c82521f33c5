"""`rollout`: each sample gets the tokens that it would get alone; each prompt is computed once."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.integrations.nnx import nnx_model
from ferrum_jax.integrations.rollout import Rollout, draw_seeds, rollout
from ferrum_jax.integrations.sampling import sample_keys
from ferrum_jax.integrations.serve import serve
from ferrum_jax.integrations.serve_loop import ServeOptions
from tests.support.served import MODEL_FN, PARAMS, STOP, answer, random_prompts
from tests.support.tiny_model import tiny_cache, tiny_decoder

WIDTH, SAMPLES, BLOCK_SIZE = 9, 3, 4
OPTIONS = ServeOptions(
    max_new_tokens=WIDTH,
    stop_token_ids=(STOP,),
    step=StepOptions(chunk_tokens=3, chunks_per_step=2),
)
EXACT = dataclasses.replace(
    OPTIONS, step=StepOptions(chunk_tokens=2, chunks_per_step=2, exact=True)
)


def cache_with_free(num_blocks: int, num_rows: int = 3) -> fj.CacheState:
    """A cache of 24 blocks and 6 rows, of which other requests hold all but some."""
    state, held = fj.init(tiny_cache()), 24 - num_blocks
    counts = [max(1, min(8, held - 8 * i)) for i in range(6 - num_rows)]
    if not held:
        return state
    state, ok = fj.allocate(state, [1, 3, 5, 0, 2][: len(counts)], np.multiply(counts, BLOCK_SIZE))
    assert bool(ok)
    return state


def prompts_of(seed: int) -> list[list[int]]:
    """Five prompts, two of them equal."""
    rng = np.random.default_rng(seed)
    prompts = [*random_prompts(rng, 3), rng.integers(0, 41, rng.integers(9, 15)).tolist()]
    return [*prompts, prompts[seed % 4]]


def answers(out: Rollout) -> list[list[list[int]]]:
    tokens, counts = np.asarray(out.tokens), np.asarray(out.num_tokens)
    assert (tokens[np.arange(tokens.shape[-1]) >= counts[..., None]] == -1).all()
    return [
        [row[:count].tolist() for row, count in zip(*of_prompt, strict=True)]
        for of_prompt in zip(tokens, counts, strict=True)
    ]


def num_needed(prompts, out: Rollout) -> int:
    """Tokens to compute if each distinct prompt is computed once."""
    distinct = {tuple(prompt) for prompt in prompts}
    return sum(map(len, distinct)) + int((out.num_tokens - 1).sum())


@pytest.mark.parametrize("options", [OPTIONS, EXACT], ids=["mixed", "exact"])
@pytest.mark.parametrize("seed", range(6))
def test_rollout_answers_as_one_sample_at_a_time(options, seed):
    num_blocks = [21, 12, 8, 7, 6, 6][seed]
    prompts = prompts_of(seed)
    limits = np.random.default_rng(seed).integers(1, WIDTH + 1, (5, SAMPLES))
    state = cache_with_free(num_blocks)
    free = int(state.tables.num_free)
    options = dataclasses.replace(options, limits=limits)
    out = rollout(MODEL_FN, PARAMS, state, prompts, samples=SAMPLES, options=options)
    expected = [
        [answer(prompt, int(limit)) for limit in of_prompt]
        for prompt, of_prompt in zip(prompts, limits, strict=True)
    ]
    assert answers(out) == expected
    if num_blocks >= 12:
        assert int(out.num_computed) == num_needed(prompts, out)
    assert out.state is not None
    fj.check_state(out.state)
    assert int(out.state.tables.num_free) == free
    assert out.state.seq_lens[np.asarray([0, 2, 4])].tolist() == [0, 0, 0]


def test_draws_depend_on_the_numbers_of_prompt_and_sample_and_nothing_compiles_again():
    @chex.assert_max_traces(n=3)  # The shape of logits, a mixed step, and one that only decodes.
    def counted(params, tokens, batch):
        return MODEL_FN(params, tokens, batch)

    options = dataclasses.replace(OPTIONS, sampling=fj.Sampling(temperature=1.2, top_k=8))
    key, other_params = jax.random.key(5), nnx_model(tiny_decoder(1))[1]
    for seed, num_blocks, params in ((0, 21, PARAMS), (1, 8, other_params)):
        prompts = prompts_of(seed)
        state = cache_with_free(num_blocks)
        out = rollout(counted, params, state, prompts, samples=SAMPLES, options=options, key=key)
        numbers = np.divmod(np.arange(5 * SAMPLES), SAMPLES)
        keys = sample_keys(draw_seeds(key, 5)[numbers[0]], numbers[1])
        alone = serve(
            MODEL_FN,
            params,
            cache_with_free(12),
            [4],
            [prompts[i] for i in numbers[0]],
            options=options,
            key=keys,
        )
        assert out.tokens.reshape(15, WIDTH).tolist() == alone.tokens.tolist()
        np.testing.assert_allclose(out.logprobs.reshape(15, WIDTH), alone.logprobs, atol=2e-5)
        assert len({tuple(row) for row in out.tokens.reshape(15, WIDTH).tolist()}) > 10
