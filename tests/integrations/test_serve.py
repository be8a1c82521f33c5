"""`serve`: each request gets the tokens that it would get alone, whatever else is in the queue."""

import importlib

import chex
import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.integrations.sampling import Sampling
from ferrum_jax.integrations.serve import ServeOptions, serve
from tests.support.served import MODEL_FN, PARAMS, STOP, WEIGHTS, answer, random_prompts
from tests.support.tiny_model import dense_logits, tiny_cache

WIDTH = 9
ROWS = [0, 4, 2]
MIXED = ServeOptions(
    max_new_tokens=WIDTH,
    stop_token_ids=(STOP,),
    step=StepOptions(chunk_tokens=3, chunks_per_step=2),
)
EXACT = ServeOptions(
    max_new_tokens=WIDTH,
    stop_token_ids=(STOP,),
    step=StepOptions(chunk_tokens=2, chunks_per_step=2, exact=True),
)


def cache_with_free(num_blocks: int) -> fj.CacheState:
    """A cache of 24 blocks of 4 tokens, of which rows that are not served hold all but some."""
    state = fj.init(tiny_cache())
    held = 24 - num_blocks
    rows = [1, 3, 5]
    state, ok = fj.allocate(state, rows, [4 * min(8, max(0, held - 8 * i)) for i in range(3)])
    assert bool(ok)
    return state


def answers(served, num: int) -> list[list[int]]:
    tokens, counts = np.asarray(served.tokens), np.asarray(served.num_tokens)
    assert tokens.shape == (num, WIDTH)
    assert (tokens[np.arange(WIDTH) >= counts[:, None]] == -1).all()
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


@pytest.mark.parametrize("options", [MIXED, EXACT], ids=["mixed", "exact"])
@pytest.mark.parametrize("seed", range(6))
def test_serve_answers_a_queue_as_one_prompt_at_a_time(options, seed):
    rng = np.random.default_rng(seed)
    prompts = random_prompts(rng, 8)
    limits = rng.integers(1, WIDTH + 1, 8)
    state = cache_with_free([24, 12, 8, 7, 6, 6][seed])
    free = int(state.tables.num_free)
    changed = ServeOptions(
        max_new_tokens=WIDTH, stop_token_ids=(STOP,), step=options.step, limits=limits
    )
    served = serve(MODEL_FN, PARAMS, state, ROWS, prompts, options=changed)
    expected = [answer(prompt, int(limit)) for prompt, limit in zip(prompts, limits, strict=True)]
    assert answers(served, 8) == expected
    assert served.ok.all() and int(served.state.tables.num_free) == free
    assert served.state.seq_lens[np.asarray(ROWS)].tolist() == [0, 0, 0]
    fj.check_state(served.state)


def test_serve_puts_the_youngest_back_to_wait_and_all_finish():
    prompts = [[1, 2, 3], [4, 5], [6], [8, 9, 10], list(range(9))]
    served = serve(MODEL_FN, PARAMS, cache_with_free(5), ROWS, prompts, options=MIXED)
    assert int(served.num_preempted) > 0
    assert answers(served, 5) == [answer(prompt, WIDTH) for prompt in prompts]


def test_serve_fails_only_the_request_that_the_blocks_do_not_hold_alone():
    prompts = [[1, 2, 3], list(range(12)), [6], [9], [9]]
    served = serve(MODEL_FN, PARAMS, cache_with_free(3), ROWS, prompts, options=MIXED)
    got = answers(served, 5)
    assert served.ok.tolist() == [True, False, True, True, True]
    assert got[0] == answer(prompts[0], WIDTH) and got[2] == answer(prompts[2], WIDTH)
    assert got[1] == answer(prompts[1], WIDTH)[: len(got[1])]
    assert int(served.state.tables.num_free) == 3


def test_serve_gives_log_probabilities_of_a_full_recomputation():
    prompts = [list(range(9)), [9], [4], [8, 8], [1]]
    served = serve(MODEL_FN, PARAMS, cache_with_free(24), ROWS, prompts, options=MIXED)
    for prompt, tokens, given in zip(
        prompts, answers(served, 5), np.asarray(served.logprobs), strict=True
    ):
        logits = dense_logits(WEIGHTS, prompt + tokens[:-1])[len(prompt) - 1 :]
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(
            given[: len(tokens)], logprobs[np.arange(len(tokens)), tokens], atol=2e-5
        )
        assert np.isnan(given[len(tokens) :]).all()


def test_serve_draws_by_key_and_position_only():
    sampled = ServeOptions(
        max_new_tokens=WIDTH, step=MIXED.step, sampling=Sampling(temperature=1.2, top_k=8)
    )
    prompts = random_prompts(np.random.default_rng(3), 4)
    keys = jax.random.split(jax.random.key(1), 4)
    one = serve(MODEL_FN, PARAMS, cache_with_free(24), ROWS, prompts, options=sampled, key=keys)
    order = np.asarray([2, 0, 3, 1])
    mixed_up = [prompts[i] for i in order]
    other = serve(
        MODEL_FN, PARAMS, cache_with_free(7), ROWS, mixed_up, options=sampled, key=keys[order]
    )
    assert np.asarray(one.tokens)[order].tolist() == other.tokens.tolist()
    same = [prompts[0]] * 4  # Other draws for each number in the queue.
    drawn = serve(
        MODEL_FN, PARAMS, cache_with_free(24), ROWS, same, options=sampled, key=jax.random.key(0)
    )
    assert len({tuple(row) for row in drawn.tokens.tolist()}) > 1


def test_serve_compiles_once_for_other_prompts_limits_and_rows():
    @chex.assert_max_traces(n=2)  # A mixed step, and one that only decodes.
    def counted(params, tokens, batch):
        return MODEL_FN(params, tokens, batch)

    for seed, rows in ((0, ROWS), (1, [2, 0, 4])):
        rng = np.random.default_rng(seed)
        prompts = [rng.integers(0, 40, rng.integers(9, 17)).tolist() for _ in range(5 + seed)]
        limits = rng.integers(1, 5, len(prompts))
        options = ServeOptions(max_new_tokens=WIDTH, step=MIXED.step, limits=limits)
        assert serve(counted, PARAMS, cache_with_free(24), rows, prompts, options=options).ok.all()


def test_serve_copies_no_pool():
    module = importlib.import_module("ferrum_jax.integrations.serve")
    state = fj.init(tiny_cache(num_blocks=4096))
    queue = module.Queue.of([[1, 2, 3]], MIXED)
    rows = np.asarray(ROWS, np.int32)
    lowered = module.serve_queue.lower(
        MODEL_FN, PARAMS, state, rows, queue, MIXED, (None, np.asarray([STOP], np.int32))
    )
    pool_bytes = sum(x.nbytes for x in jax.tree.leaves(state.pools))
    assert lowered.compile().memory_analysis().temp_size_in_bytes < pool_bytes / 10


@pytest.mark.parametrize(
    ("rows", "prompts", "options", "error"),
    [
        (ROWS, [], {}, "at least one prompt"),
        (ROWS, [[1], []], {}, r"prompts\[1\] is empty"),
        ([0, 0], [[1]], {}, "different rows"),
        ([0, 6], [[1]], {}, "from 0 to 5"),
        ([1], [[1]], {}, "hold tokens"),
        (ROWS, [[1] * 25], {}, "a row holds 32"),
        (ROWS, [[1]], {"limits": [1, 2]}, "one per prompt"),
        (ROWS, [[1]], {"limits": [0]}, "at least 1"),
    ],
)
def test_serve_refuses(rows, prompts, options, error):
    state = cache_with_free(12)
    changed = ServeOptions(max_new_tokens=WIDTH, step=MIXED.step, **options)
    with pytest.raises(ValueError, match=error):
        serve(MODEL_FN, PARAMS, state, rows, prompts, options=changed)
    fj.check_state(state)


def test_serve_says_that_it_is_called_from_the_host():
    def inside(state):
        return serve(MODEL_FN, PARAMS, state, ROWS, [[1]], options=MIXED).state

    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(inside)(cache_with_free(12))
