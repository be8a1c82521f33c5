"""The engine: answers of a full recomputation under every mixture of requests, and no leak."""

import asyncio
import threading

import chex
import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.sampling import Sampling
from ferrum_jax.errors import OutOfBlocksError, SequenceTooLongError, WaitTimeoutError
from ferrum_jax.integrations.engine import Engine, EngineOptions, RequestOptions
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.policies import LruEvictionPolicy
from tests.support.caches import num_compilations
from tests.support.managers import Clock
from tests.support.served import (
    MODEL_FN,
    PARAMS,
    STOP,
    WEIGHTS,
    answer,
    make_manager,
    random_prompts,
)
from tests.support.tiny_model import dense_logits

STEP = StepOptions(chunk_tokens=3, chunks_per_step=4)
OPTIONS = EngineOptions(max_rows=4, step=STEP)
EXACT = EngineOptions(max_rows=4, step=StepOptions(chunk_tokens=2, chunks_per_step=2, exact=True))


def limited(max_new_tokens: int = 8, **options) -> RequestOptions:
    return RequestOptions(max_new_tokens=max_new_tokens, stop_token_ids=(STOP,), **options)


def require_empty(manager: fj.PagedKvCacheManager) -> None:
    """No request is left, and every block is free or cached without a user."""
    manager.check()
    stats = manager.stats()
    assert not manager.list_handles()
    assert stats.free_blocks + stats.evictable_blocks == stats.total_blocks


MANAGERS = {
    "ample": {},
    "scarce": {"max_blocks": 9},
    "without prefixes": {"max_blocks": 9, "caches": False},
    "swapping": {"max_blocks": 9, "preemption_policy": "lru"},
}


def manager_named(name: str) -> fj.PagedKvCacheManager:
    settings = dict(MANAGERS[name])
    if "preemption_policy" in settings:
        settings["preemption_policy"] = LruEvictionPolicy()
    return make_manager(**settings)


@pytest.mark.parametrize("options", [OPTIONS, EXACT], ids=["mixed", "exact"])
@pytest.mark.parametrize("name", MANAGERS)
def test_engine_answers_as_a_full_recomputation_whatever_comes_when(name, options):
    for seed in range(4):
        rng, manager = np.random.default_rng(seed), manager_named(name)
        submitted, cancelled = [], set()
        with Engine(MODEL_FN, PARAMS, manager, options) as engine:
            for prompt in random_prompts(rng, 12):
                priority = fj.Priority(int(rng.integers(1, 4)))
                request = limited(int(rng.integers(1, 10)), priority=priority)
                for completion in engine.submit(prompt, request, n=int(rng.choice([1, 1, 1, 3]))):
                    submitted.append((prompt, request, completion))
                for _ in range(rng.integers(0, 4)):
                    engine.step()
                    manager.check()
                if rng.random() < 0.3:
                    victim = int(rng.integers(len(submitted)))
                    if not submitted[victim][2].is_done:
                        submitted[victim][2].cancel()
                        cancelled.add(victim)
                        manager.check()
            engine.run()
            for number, (prompt, request, completion) in enumerate(submitted):
                expected = answer(prompt, request.max_new_tokens)
                if number in cancelled:
                    assert completion.finish_reason == "cancelled"
                    assert completion.tokens == expected[: len(completion.tokens)]
                else:
                    assert completion.result() == expected
                    ended = "stop" if expected[-1] == STOP else "length"
                    assert completion.finish_reason == ended
        require_empty(manager)


def test_engine_reads_the_device_once_a_step_and_a_step_late(monkeypatch):
    reads, get = [], jax.device_get
    with Engine(MODEL_FN, PARAMS, make_manager(), OPTIONS) as engine:
        completion = engine.submit([1, 2, 3], RequestOptions(max_new_tokens=8))
        engine.step()
        assert completion.tokens == [] and engine.num_reads == 0
        monkeypatch.setattr(jax, "device_get", lambda x: reads.append(1) or get(x))
        for number in range(1, 6):
            engine.step()
            assert len(completion.tokens) == number and engine.num_steps == number + 1
        assert len(reads) == engine.num_reads == 5


def test_engine_compiles_a_few_shapes_for_any_requests():
    @chex.assert_max_traces(n=4)  # 1 or 4 rows, and no chunk, 1 or 4.
    def counted(params, tokens, batch):
        return MODEL_FN(params, tokens, batch)

    for seed in range(3):
        prompts = random_prompts(np.random.default_rng(seed), 5 + seed)
        with Engine(counted, PARAMS, make_manager(), OPTIONS) as engine:
            for prompt in prompts:
                engine.submit(prompt, limited(5 + seed))
            engine.run()


def test_a_warm_engine_compiles_nothing_more_and_its_manager_is_unchanged():
    @chex.assert_max_traces(n=3)
    def counted(params, tokens, batch):
        return MODEL_FN(params, tokens, batch)

    manager, prompts = make_manager(), random_prompts(np.random.default_rng(2), 9)
    with Engine(counted, PARAMS, manager, OPTIONS) as engine:
        held, *_ = [engine.submit(prompt, limited()) for prompt in prompts[:1]]
        engine.step()
        (first,) = engine.step_counts
        before = manager.stats()
        engine.warm_up([(4, 4), (4, 0)])
        assert manager.stats() == before and engine.num_steps == 1
        answers = [engine.submit(prompt, limited()) for prompt in prompts]
        engine.run()
        for prompt, completion in zip(prompts[:1] + prompts, [held, *answers], strict=True):
            assert completion.tokens == answer(prompt, 8)
        assert set(engine.step_counts) == {first, (4, 4), (4, 0)} and first.num_rows == 1
        assert sum(engine.step_counts.values()) == engine.num_steps
    require_empty(manager)


def test_all_steps_are_compiled_when_an_engine_is_warm():
    def serve_with(model):
        """Returns how many programs were compiled after the engine was warm."""
        with Engine(model, PARAMS, make_manager(), OPTIONS) as engine:
            engine.warm_up()
            before = num_compilations()
            for prompt in random_prompts(np.random.default_rng(2), 9):
                engine.submit(prompt, limited())
            engine.run()
            assert len(engine.step_counts) > 2
            return num_compilations() - before

    serve_with(MODEL_FN)  # The manager's own programs.
    assert serve_with(lambda params, tokens, batch: MODEL_FN(params, tokens, batch)) == 0


def test_an_engine_does_not_compile_its_first_step_twice():
    def model(params, tokens, batch):
        return MODEL_FN(params, tokens, batch)

    with Engine(model, PARAMS, make_manager(), OPTIONS) as engine:
        engine.warm_up([(4, 4)])
        num_programs = num_compilations()
        engine.warm_up([(4, 4)])
        assert num_compilations() == num_programs


def test_engine_computes_a_shared_prompt_once():
    prompt = list(range(16))
    manager = make_manager()
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        answers = [engine.submit([*prompt, last], limited(4)) for last in range(3)]
        engine.run()
        assert [a.tokens for a in answers] == [answer([*prompt, last], 4) for last in range(3)]
    assert [a.num_cached_tokens for a in answers] == [0, 16, 16]


def test_engine_samples_by_seed_and_position_only():
    options = EngineOptions(max_rows=4, step=STEP, sampling=Sampling(temperature=1.2))

    def draw(manager, order):
        with Engine(MODEL_FN, PARAMS, manager, options) as engine:
            requests = {seed: engine.submit([5, 6, 7], limited(8, seed=seed)) for seed in order}
            engine.run()
            return {seed: request.tokens for seed, request in requests.items()}

    one = draw(make_manager(), range(6))
    assert one == draw(make_manager(max_blocks=9, caches=False), [3, 1, 5, 0, 2, 4])
    assert len({tuple(tokens) for tokens in one.values()}) > 1


@pytest.mark.parametrize("caches", [True, False])
def test_engine_computes_the_prompt_of_n_samples_once(caches):
    options = EngineOptions(max_rows=4, step=STEP, sampling=Sampling(temperature=1.2))
    prompt, request = list(range(13)), limited(6, seed=4)
    manager = make_manager(caches=caches)
    with Engine(MODEL_FN, PARAMS, manager, options) as engine:
        four = engine.submit(prompt, request, n=4)
        while not four[0].tokens:
            engine.step()
        assert all(len(sample.tokens) == 1 for sample in four)
        assert [sample.num_cached_tokens for sample in four] == [0, 13, 13, 13]
        assert manager.stats().free_blocks == 24 - 3 - 4  # 3 full blocks are shared, 4 are own.
        engine.run()
        results = [sample.tokens for sample in four]
        six = [sample.result() for sample in engine.submit(prompt, request, n=6)]
        assert six[:4] == results and len({tuple(tokens) for tokens in six}) > 1
    require_empty(manager)


def test_engine_does_not_find_the_prefixes_of_other_weights():
    prompt, manager = list(range(16)), make_manager()
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        engine.submit(prompt, limited(2)).result()
        assert manager.explain_lookup(prompt).num_cached_tokens > 0
        engine.set_params(PARAMS, version=1)
        assert manager.explain_lookup(prompt).num_cached_tokens == 0
        assert engine.submit(prompt, limited(4)).result() == answer(prompt, 4)
        assert manager.explain_lookup(prompt).num_cached_tokens > 0
    require_empty(manager)


def test_engine_gives_top_log_probabilities():
    options = EngineOptions(max_rows=4, step=STEP, top_logprobs=2)
    with Engine(MODEL_FN, PARAMS, make_manager(), options) as engine:
        completion = engine.submit([1, 2, 3], limited(4))
        completion.result()
    for taken in completion.taken:
        assert taken.top[0] == (taken.token, taken.logprob) and taken.top[1][1] <= taken.logprob


@pytest.mark.parametrize("name", ["ample", "without prefixes"])
def test_engine_gives_log_probabilities_of_prompts_cached_or_not(name):
    options = EngineOptions(max_rows=4, step=STEP, top_logprobs=2)
    prompt, manager = list(range(2, 14)), manager_named(name)
    with Engine(MODEL_FN, PARAMS, manager, options) as engine:
        engine.submit(prompt[:9], limited(2)).result()
        asked = engine.submit(prompt, limited(4, prompt_logprobs=True), n=2)
        other = engine.submit([1, 2], limited())
        engine.run()
        assert other.tokens == answer([1, 2], 8) and other.prompt_taken is None
    logits = dense_logits(WEIGHTS, prompt)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for completion in asked:
        assert completion.tokens == answer(prompt, 4)
        first, *rest = completion.prompt_taken
        assert first.token == prompt[0] and np.isnan(first.logprob)
        for place, taken in enumerate(rest):
            assert taken.token == prompt[place + 1]
            np.testing.assert_allclose(taken.logprob, logprobs[place, taken.token], atol=2e-5)
            assert taken.top[0][0] == logprobs[place].argmax()
    require_empty(manager)


def test_completions_are_read_by_threads_and_by_coroutines():
    prompts = random_prompts(np.random.default_rng(8), 8)
    expected = [answer(prompt, 8) for prompt in prompts]
    manager = make_manager()
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        results: dict[int, list[int]] = {}

        def read(number: int) -> None:
            results[number] = list(engine.submit(prompts[number], limited()))

        threads = [threading.Thread(target=read, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [results[number] for number in range(8)] == expected

        async def stream(prompt):
            return [token async for token in engine.submit(prompt, limited())]

        async def all_of_them():
            return await asyncio.gather(*map(stream, prompts), engine.submit(prompts[0], limited()))

        assert asyncio.run(all_of_them()) == [*expected, expected[0]]
    require_empty(manager)


def test_engine_ends_a_request_that_waits_too_long():
    clock, manager = Clock(), make_manager()
    blocker = manager.allocate(manager.new_request("blocker", initial_tokens=32))
    others = [manager.allocate(manager.new_request(i, initial_tokens=32)) for i in range(2)]
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS, clock=clock) as engine:
        late = engine.submit([1] * 9, limited(timeout_seconds=5.0))
        engine.step()
        assert not late.is_done
        clock.now += 6
        engine.step()
        with pytest.raises(WaitTimeoutError, match="within 5.0 seconds"):
            late.result()
        refused = engine.submit([1] * 9, limited())  # Nothing in the engine can make room.
        with pytest.raises(OutOfBlocksError):
            refused.result()
        for handle in (blocker, *others):
            manager.deallocate(handle.request_id)
        assert engine.submit([1, 2], limited()).result() == answer([1, 2], 8)
    require_empty(manager)


def test_engine_fails_the_requests_of_a_step_that_fails():
    is_broken = [True]

    def model(params, tokens, batch):
        if is_broken[0]:
            raise RuntimeError("no such weight")
        return MODEL_FN(params, tokens, batch)

    manager = make_manager()
    with Engine(model, PARAMS, manager, OPTIONS) as engine:
        broken = engine.submit([1, 2], limited())
        with pytest.raises(RuntimeError, match="no such weight"):
            broken.result()
        assert broken.finish_reason == "error"
        is_broken[0] = False
        assert engine.submit([1, 2], limited()).result() == answer([1, 2], 8)
    require_empty(manager)


def test_requests_end_with_the_error_of_a_manager_that_was_closed():
    manager = make_manager()
    engine = Engine(MODEL_FN, PARAMS, manager, OPTIONS)
    answers = [engine.submit([1, 2], limited()) for _ in range(3)]
    engine.step()
    manager.close()
    with pytest.raises(RuntimeError, match="closed"):
        answers[0].result()
    assert all(one.is_done for one in answers) and not engine.step()


def test_a_closed_engine_has_cancelled_all_and_takes_no_more():
    manager = make_manager()
    engine = Engine(MODEL_FN, PARAMS, manager, OPTIONS)
    running, waiting = engine.submit([1, 2], limited()), engine.submit([3], limited())
    engine.step()
    engine.close()
    assert running.finish_reason == waiting.finish_reason == "cancelled"
    require_empty(manager)
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit([1])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda e: e.submit([]), ValueError, "empty"),
        (lambda e: e.submit([1] * 30, limited(9)), SequenceTooLongError, "38"),
        (lambda e: e.submit([1], limited(), n=0), ValueError, "n must"),
        (lambda e: e.submit([1], {"seed": 1}), ValueError, "options"),
        (lambda e: RequestOptions(timeout_seconds=-1), ValueError, "timeout_seconds"),
        (lambda e: RequestOptions(stop_token_ids="a"), ValueError, "stop_token_ids"),
        (lambda e: EngineOptions(max_rows=0), ValueError, "max_rows"),
        (lambda e: e.warm_up([(1, 0)]), ValueError, "the last one included"),
        (lambda e: e.warm_up([(4, 4), (3, 0)]), ValueError, r"\[\(1, 0\), \(4, 0\), \(1, 1\)"),
    ],
)
def test_engine_refuses(call, error, match):
    engine = Engine(MODEL_FN, PARAMS, make_manager(), OPTIONS)
    with pytest.raises(error, match=match):
        call(engine)
    assert not engine.step()
