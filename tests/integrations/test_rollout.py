"""`rollout`: each sample gets the tokens that it would get alone; each prompt is computed once."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import SequenceTooLongError
from ferrum_jax.integrations.engine import Engine, EngineOptions, RequestOptions
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.integrations.nnx import nnx_model
from ferrum_jax.integrations.rollout import Samples, draw_seeds, rollout
from ferrum_jax.integrations.sampling import sample_keys
from ferrum_jax.integrations.serve import serve
from ferrum_jax.integrations.serve_loop import Queue, ServeOptions, run_queue
from tests.support.served import MODEL_FN, PARAMS, STOP, answer, make_manager, random_prompts
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
    rows = [1, 3, 5, 0, 2][: 6 - num_rows]
    rest = 24 - num_blocks - len(rows)
    counts = [1 + min(7, max(0, rest - 7 * i)) for i in range(len(rows))]
    state, ok = fj.allocate(fj.init(tiny_cache()), rows, np.multiply(counts, BLOCK_SIZE))
    assert bool(ok) and int(state.tables.num_free) == num_blocks
    return state


def prompts_of(seed: int) -> list[list[int]]:
    """Five prompts, two of them equal."""
    rng = np.random.default_rng(seed)
    prompts = [*random_prompts(rng, 3), rng.integers(0, 41, rng.integers(9, 15)).tolist()]
    return [*prompts, prompts[seed % 4]]


def answers(out: Samples) -> list[list[list[int]]]:
    tokens, counts = np.asarray(out.tokens), np.asarray(out.num_tokens)
    assert (tokens[np.arange(tokens.shape[-1]) >= counts[..., None]] == -1).all()
    return [
        [row[:count].tolist() for row, count in zip(*of_prompt, strict=True)]
        for of_prompt in zip(tokens, counts, strict=True)
    ]


def num_needed(prompts, out: Samples) -> int:
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
    options = dataclasses.replace(options, limits=limits)
    out = rollout(MODEL_FN, PARAMS, state, prompts, samples=SAMPLES, options=options)
    expected = [
        [answer(prompt, int(limit)) for limit in of_prompt]
        for prompt, of_prompt in zip(prompts, limits, strict=True)
    ]
    assert answers(out) == expected
    if num_blocks >= 12:
        assert int(out.num_computed) == num_needed(prompts, out)
    fj.check_state(out.state)
    assert int(out.state.tables.num_free) == num_blocks
    assert out.state.seq_lens[np.asarray([0, 2, 4])].tolist() == [0, 0, 0]


DRAWN = dataclasses.replace(OPTIONS, sampling=fj.Sampling(temperature=1.2, top_k=8))
KEY = jax.random.key(5)


@chex.assert_max_traces(n=3)  # The shape of logits, a mixed step, and one that only decodes.
def counted(params, tokens, batch):
    return MODEL_FN(params, tokens, batch)


@functools.cache
def drawn() -> Samples:
    state = cache_with_free(21)
    return rollout(counted, PARAMS, state, prompts_of(0), samples=SAMPLES, options=DRAWN, key=KEY)


def require_equal(out: Samples, tokens: jax.Array, logprobs: jax.Array) -> None:
    assert out.tokens.reshape(-1, WIDTH).tolist() == tokens.reshape(-1, WIDTH).tolist()
    ours, theirs = (x.reshape(-1, WIDTH) for x in (out.logprobs, logprobs))
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_draws_depend_on_the_numbers_of_prompt_and_sample_and_nothing_compiles_again():
    other_params = nnx_model(tiny_decoder(1))[1]
    again = rollout(
        counted,
        other_params,
        cache_with_free(8),
        prompts_of(1),
        samples=SAMPLES,
        options=DRAWN,
        key=KEY,
    )
    prompt, sample = np.divmod(np.arange(5 * SAMPLES), SAMPLES)
    keys = sample_keys(draw_seeds(KEY, 5)[prompt], sample)
    for seed, params, out in ((0, PARAMS, drawn()), (1, other_params, again)):
        prompts, state = [prompts_of(seed)[i] for i in prompt], cache_with_free(12)
        alone = serve(MODEL_FN, params, state, [4], prompts, options=DRAWN, key=keys)
        require_equal(out, alone.tokens, alone.logprobs)
        assert len({tuple(row) for row in out.tokens.reshape(-1, WIDTH).tolist()}) > 10


@pytest.mark.parametrize("max_blocks", [24, 8])
def test_an_engine_rolls_out_the_same_and_keeps_prefixes_for_a_version(max_blocks):
    manager, prompts = make_manager(max_blocks), prompts_of(0)
    options = EngineOptions(max_rows=4, step=EXACT.step, sampling=DRAWN.sampling)
    request = RequestOptions(max_new_tokens=WIDTH, stop_token_ids=(STOP,))
    num_computed = []
    with Engine(MODEL_FN, PARAMS, manager, options) as engine:
        for version in (None, None, 1):
            engine.set_params(PARAMS, version)
            out = engine.rollout(prompts, samples=SAMPLES, options=request, key=KEY)
            require_equal(out, drawn().tokens, drawn().logprobs)
            assert out.num_tokens.tolist() == drawn().num_tokens.tolist()
            num_computed.append(int(out.num_computed))
    if max_blocks == 24:
        assert num_computed[1] < num_computed[0] == num_computed[2]
    manager.check()
    assert not manager.list_handles()


def test_an_engine_cancels_a_rollout_of_which_a_sample_fails():
    manager = make_manager(3)
    request = RequestOptions(max_new_tokens=WIDTH)
    with Engine(MODEL_FN, PARAMS, manager, EngineOptions(max_rows=4, step=EXACT.step)) as engine:
        with pytest.raises(fj.OutOfBlocksError):
            engine.rollout([[1, 2], [3] * 8], samples=2, options=request)
        assert not manager.list_handles() and not engine.step()
        with pytest.raises(SequenceTooLongError, match="33"):
            engine.rollout([[1, 2], [3] * 25], samples=2, options=request)
        assert not engine.step()


def test_rollout_goes_in_waves_where_there_is_one_row():
    prompts = prompts_of(1)
    out = rollout(
        MODEL_FN, PARAMS, cache_with_free(15, 1), prompts, samples=SAMPLES, options=OPTIONS
    )
    assert answers(out) == [[answer(prompt, WIDTH)] * SAMPLES for prompt in prompts]


@pytest.mark.parametrize("prompt_len", [12, 14])
def test_samples_share_the_full_blocks_of_their_prompt(prompt_len):
    rng = np.random.default_rng(0)
    candidates = [rng.integers(0, 41, prompt_len).tolist() for _ in range(20)]
    prompts = [prompt for prompt in candidates if len(answer(prompt, WIDTH)) == WIDTH][:5]
    assert len(prompts) == 5
    state = cache_with_free(21)
    out = rollout(MODEL_FN, PARAMS, state, prompts, samples=SAMPLES, options=OPTIONS)
    num_shared, num_all = prompt_len // BLOCK_SIZE, -(-(prompt_len + WIDTH - 1) // BLOCK_SIZE)
    assert out.max_blocks.tolist() == [3 + num_shared + SAMPLES * (num_all - num_shared)]


def test_rollout_copies_no_pool():
    state = fj.init(tiny_cache(num_blocks=4096))
    numbers = np.asarray([0, 0, 0])
    queue = Queue.of([np.arange(3)] * 3, numbers + WIDTH, [STOP], numbers, numbers[:2])
    rows = np.asarray([0, 4, 2], np.int32)
    compiled = run_queue.lower(MODEL_FN, PARAMS, state, rows, queue, OPTIONS, None).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    pool_bytes = sum(x.nbytes for x in jax.tree.leaves(state.pools))
    assert memory.temp_size_in_bytes < pool_bytes / 10


@pytest.mark.parametrize(
    ("num_blocks", "prompts", "changes", "error"),
    [
        (12, [], {}, "at least one prompt"),
        (12, [[1], []], {}, r"prompts\[1\] is empty"),
        (12, [[1], [1] * 25], {}, r"prompts\[1\] has 25 tokens.*a row holds 32"),
        (12, [[1]], {"limits": [1, 2, 3]}, r"one per prompt and sample, of shape \[1, 3\]"),
        (12, [[1]], {"sampling": fj.Sampling(temperature=1.0)}, "typed key"),
        (5, [[1], [1] * 13], {}, "21 tokens, which take 6 blocks; 5 of 24 are free"),
    ],
)
def test_rollout_refuses_and_leaves_the_state_usable(num_blocks, prompts, changes, error):
    state = cache_with_free(num_blocks)
    options = dataclasses.replace(OPTIONS, **changes)
    with pytest.raises((ValueError, fj.OutOfBlocksError), match=error):
        rollout(MODEL_FN, PARAMS, state, prompts, samples=SAMPLES, options=options)
    fj.check_state(state)


def test_rollout_says_that_no_row_is_free_and_that_it_is_called_from_the_host():
    full, ok = fj.allocate(fj.init(tiny_cache()), range(6), 1)
    assert bool(ok)
    with pytest.raises(fj.OutOfRowsError, match="all 6 rows hold tokens"):
        rollout(MODEL_FN, PARAMS, full, [[1]], samples=2, options=OPTIONS)

    def inside(state):
        return rollout(MODEL_FN, PARAMS, state, [[1]], samples=2, options=OPTIONS).state

    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(inside)(cache_with_free(12))
