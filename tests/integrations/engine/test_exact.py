"""Exact steps: the bits of a token's logits do not depend on the batch, nor on what was cached.

Log-probabilities are compared bit for bit, the best ones too: they tell any change of a logit.
"""

import numpy as np
import pytest

from ferrum_jax.integrations.engine import Engine, EngineOptions, RequestOptions
from ferrum_jax.integrations.mixed import StepOptions
from tests.support.served import MODEL_FN, PARAMS, make_manager, random_prompts

EXACT = EngineOptions(
    max_rows=4,
    step=StepOptions(chunk_tokens=4, chunks_per_step=1, exact=True),
    top_logprobs=41,
)
PROMPT = list(range(3, 20))
REQUEST = RequestOptions(max_new_tokens=8)


def bits(completion) -> list[tuple[int, ...]]:
    """The bits of the log-probabilities of all tokens of the vocabulary, at each place."""
    assert completion.is_done
    return [
        tuple(np.asarray([p for _, p in sorted(taken.top)], np.float32).view(np.int32))
        for taken in completion.taken
    ]


def cold() -> list[tuple[int, ...]]:
    with Engine(MODEL_FN, PARAMS, make_manager(caches=False), EXACT) as engine:
        completion = engine.submit(PROMPT, REQUEST)
        completion.result()
    return bits(completion)


def run_with(engine, *others) -> list[tuple[int, ...]]:
    """Serves the prompt among others."""
    requests = [engine.submit(prompt, REQUEST) for prompt in others]
    completion = engine.submit(PROMPT, REQUEST)
    requests += [engine.submit(prompt, REQUEST) for prompt in others[::-1]]
    engine.run()
    return bits(completion)


@pytest.mark.parametrize("num_cached", [4, 9, 17])
def test_logits_after_a_hit_have_the_bits_of_a_cold_prompt(num_cached):
    manager = make_manager()
    with Engine(MODEL_FN, PARAMS, manager, EXACT) as engine:
        engine.submit([*PROMPT[:num_cached], 40, 40], REQUEST).result()
        completion = engine.submit(PROMPT, REQUEST)
        completion.result()
        assert manager.stats().cache_hit_rate > 0
    assert bits(completion) == cold()


@pytest.mark.parametrize("seed", range(3))
def test_logits_in_any_batch_have_the_bits_of_one_alone(seed):
    others = random_prompts(np.random.default_rng(seed), 5)
    with Engine(MODEL_FN, PARAMS, make_manager(), EXACT) as engine:
        assert run_with(engine, *others) == cold()


def test_logits_after_swapping_and_defragmenting_have_the_same_bits():
    manager = make_manager()
    with Engine(MODEL_FN, PARAMS, manager, EXACT) as engine:
        engine.submit([9, 9, 9, 9, 9], REQUEST).result()
        completion = engine.submit(PROMPT, REQUEST)
        while len(completion.tokens) < 2:
            engine.step()
        for request_id, _ in manager.list_handles():
            manager.swap_out(request_id)
        manager.reset_prefixes()
        engine.step()
        manager.defragment()
        completion.result()
        assert engine.num_preempted == 1
    assert bits(completion) == cold()


def test_logits_after_recomputing_have_the_same_bits():
    manager = make_manager(max_blocks=10, caches=False)
    with Engine(MODEL_FN, PARAMS, manager, EXACT) as engine:
        got = run_with(engine, [5], [6])
        assert engine.num_preempted > 0
    assert got == cold()
