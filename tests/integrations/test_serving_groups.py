"""Serving loops over layer groups: windows that free blocks, and pools of several geometries."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.integrations.engine import Engine, EngineOptions, RequestOptions
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.integrations.serve import serve
from ferrum_jax.integrations.serve_loop import ServeOptions
from ferrum_jax.layers import most_window_blocks
from ferrum_jax.policies import LruEvictionPolicy
from ferrum_jax.reader import cached_layers
from tests.support.grouped_decoder import GROUPS, ONE_GROUP, VOCAB, Decoder, random_params
from tests.support.internals import pool_of
from tests.support.managers import PREFIXES
from tests.support.tiny_families import CONFIGS, tiny_model
from tests.support.whole_batch import whole_logits

STEP = StepOptions(chunk_tokens=4, chunks_per_step=2)
EXACT = StepOptions(chunk_tokens=4, chunks_per_step=1, exact=True)
WIDTH = 6


@functools.cache
def alone(prompt: tuple[int, ...]) -> list[int]:
    """The answer of a cache that keeps all tokens, attention being told the windows."""
    state, _ = fj.allocate(fj.init(ONE_GROUP), [0], [len(prompt)])
    model = Decoder(names_windows=True), random_params()
    logits, state = fj.prefill(*model, state, [0], [prompt])
    options = fj.GenerateOptions(max_new_tokens=WIDTH)
    out = fj.generate(*model, state, [0], jnp.argmax(logits, axis=-1), options=options)
    return out.tokens[0].tolist()


def prompts_of(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, rng.integers(1, 31)).tolist() for _ in range(6)]


@pytest.mark.parametrize("step", [STEP, EXACT], ids=["mixed", "exact"])
@pytest.mark.parametrize("num_held", [0, 75])
def test_serve_over_windows_that_free_blocks(step, num_held):
    model, prompts = (Decoder(names_windows=False), random_params()), prompts_of(num_held)
    state, ok = fj.allocate(fj.init(GROUPS), [3], [2 * num_held // 3])  # Two groups hold it.
    assert bool(ok)
    free = int(state.tables.num_free)
    options = ServeOptions(max_new_tokens=WIDTH, step=step)
    served = serve(*model, state, [0, 1, 2], prompts, options=options)
    assert served.ok.all() and served.tokens.tolist() == [alone(tuple(p)) for p in prompts]
    assert int(served.state.tables.num_free) == free
    fj.check_state(served.state)


@pytest.mark.parametrize("num_held", [1, 28, 36])
def test_rollout_over_windows_that_free_blocks(num_held):
    model, prompts = (Decoder(names_windows=False), random_params()), prompts_of(2)[:4]
    state = fj.init(dataclasses.replace(GROUPS, num_blocks=32))
    state, ok = fj.allocate(state, [3], [num_held])
    assert bool(ok)
    free = int(state.tables.num_free)  # At last, as many as one sample may need.
    options = ServeOptions(max_new_tokens=WIDTH, step=STEP)
    out = fj.rollout(*model, state, prompts, samples=2, options=options)
    assert out.tokens.tolist() == [[alone(tuple(prompt))] * 2 for prompt in prompts]
    assert int(out.state.tables.num_free) == free
    fj.check_state(out.state)


def make_manager(layers: dict, max_blocks: int, **options) -> fj.PagedKvCacheManager:
    return fj.PagedKvCacheManager(
        fj.CacheConfig(
            block_size=4,
            max_blocks=max_blocks,
            initial_blocks=max_blocks,
            enable_prefix_caching=True,
            prefix_cache_config=PREFIXES,
        ),
        fj.CacheGeometry(**layers, max_seqs=3, max_sequence_length=40),
        fj.ManagerOptions(**options),
    )


@pytest.mark.parametrize("policy", [None, LruEvictionPolicy()], ids=["recompute", "swap"])
@pytest.mark.parametrize("max_blocks", [96, 24, 14])
def test_engine_over_windows_that_free_blocks(max_blocks, policy):
    """Though 14 blocks hold the longest prompt and answer only as windows release theirs."""
    manager = make_manager({"groups": GROUPS.groups}, max_blocks, preemption_policy=policy)
    rng, prompts = np.random.default_rng(max_blocks), prompts_of(max_blocks)
    prompts += [prompts[0] + [5], prompts[0][:20] + [7, 8], [*range(30)]]
    options, answers = EngineOptions(max_rows=3, step=STEP), []
    with Engine(Decoder(names_windows=False), random_params(), manager, options) as engine:
        for prompt in prompts:
            request = RequestOptions(
                max_new_tokens=WIDTH, priority=fj.Priority(int(rng.integers(1, 4)))
            )
            answers += engine.submit(prompt, request, n=int(rng.choice([1, 1, 3])))
            answers[-1].cancel() if rng.random() < 0.2 else None
            for _ in range(rng.integers(0, 3)):
                engine.step()
                require_passed_are_released(manager)
        while engine.step():
            require_passed_are_released(manager)
    for answer in answers:
        expected = alone(tuple(answer.prompt))
        is_done = answer.finish_reason == "length"
        assert answer.tokens == (expected if is_done else expected[: len(answer.tokens)])
        assert is_done or answer.finish_reason == "cancelled"


def require_passed_are_released(manager: fj.PagedKvCacheManager) -> None:
    """Asserts that rows hold no more in windows than a window and a step of 8 tokens take."""
    manager.check()
    counts = pool_of(manager).counts
    assert counts.num_blocks_held.reshape(2, -1)[1].max() <= most_window_blocks(5, 8, 4)


def test_engine_finds_what_prompts_begin_with_though_windows_have_passed_it():
    manager, (a, b) = make_manager({"groups": GROUPS.groups}, 96), np.arange(1, 53).reshape(2, 26)
    a, b = (a % VOCAB).tolist(), [*(a[:16] % VOCAB).tolist(), *(b[:11] % VOCAB).tolist()]
    options = EngineOptions(max_rows=3, step=STEP)
    with Engine(Decoder(names_windows=False), random_params(), manager, options) as engine:
        answers = [engine.submit(p, RequestOptions(max_new_tokens=WIDTH)) for p in (a, b)]
        engine.run()
    assert [answer.num_cached_tokens for answer in answers] == [0, 16]
    assert [answer.tokens for answer in answers] == [alone(tuple(p)) for p in (a, b)]


@pytest.mark.parametrize("family", ["gemma4", "gpt-oss"])
def test_engine_serves_the_families(family):
    config, model = CONFIGS[family], tiny_model(CONFIGS[family])
    manager = make_manager(cached_layers(config, "float32").fields(), 40)
    rng = np.random.default_rng(3)
    head = rng.integers(0, 61, 11).tolist()
    prompts = [head, [*head[:9], 4, 2], [7]]
    with Engine(*model, manager, EngineOptions(max_rows=3, step=STEP)) as engine:
        answers = [engine.submit(p, RequestOptions(max_new_tokens=3)) for p in prompts]
        engine.run()
    for prompt, answer in zip(prompts, answers, strict=True):
        for i, token in enumerate(answer.tokens):
            logits = whole_logits(model, config, [[*prompt, *answer.tokens[:i]]])[0]
            assert logits[token] > logits.max() - 1e-4
    manager.check()
