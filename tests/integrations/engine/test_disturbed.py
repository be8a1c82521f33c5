"""An engine and what others do to its manager between its steps or inside one; interruptions."""

import asyncio
import time

import pytest

import ferrum_jax as fj
from ferrum_jax.integrations.engine import Engine, EngineOptions, RequestOptions
from ferrum_jax.integrations.mixed import StepOptions
from tests.support.managers import Clock
from tests.support.served import MODEL_FN, PARAMS, answer, make_manager

OPTIONS = EngineOptions(max_rows=4, step=StepOptions(chunk_tokens=3, chunks_per_step=4))
PROMPTS = [[number, 2, 3] for number in (1, 2, 3)]


def limited(max_new_tokens: int = 8, **options) -> RequestOptions:
    return RequestOptions(max_new_tokens=max_new_tokens, **options)


def require_answers(answers, max_new_tokens: int = 8) -> None:
    for completion in answers:
        assert completion.result() == answer(completion.prompt, max_new_tokens, stop=None)


def swap_out_all(manager: fj.PagedKvCacheManager) -> None:
    for request_id, _ in manager.list_handles():
        manager.swap_out(request_id)


def test_requests_swapped_out_between_steps_keep_the_token_that_only_the_device_knows():
    manager = make_manager()
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        answers = [engine.submit(prompt, limited()) for prompt in PROMPTS]
        for num_steps in (1, 3, 2):
            for _ in range(num_steps):
                engine.step()
            swap_out_all(manager)
        engine.run()
        assert engine.num_preempted >= 6
        require_answers(answers)
    manager.check()


@pytest.mark.parametrize("call", ["run", "extend_all"])
def test_a_request_swapped_out_inside_a_step_fails_no_other(monkeypatch, call):
    manager = make_manager()
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        answers = [engine.submit(prompt, limited()) for prompt in PROMPTS]
        for _ in range(2):
            engine.step()
        inner = getattr(manager, call)

        def raced(*args):
            monkeypatch.undo()
            manager.swap_out(manager.list_handles()[1][0])
            return inner(*args)

        monkeypatch.setattr(manager, call, raced)
        engine.run()
        assert getattr(manager, call) == inner
        require_answers(answers)
    manager.check()


def test_samples_that_cannot_be_forked_compute_the_prompt_themselves(monkeypatch):
    manager = make_manager()
    inner = manager.fork

    def raced(*args):
        monkeypatch.undo()
        swap_out_all(manager)
        return inner(*args)

    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        monkeypatch.setattr(manager, "fork", raced)
        answers = engine.submit(PROMPTS[0], limited(), n=3)
        engine.run()
        require_answers(answers)
    manager.check()


def test_an_interrupted_step_is_run_again_and_keeps_the_lanes_of_samples():
    num_traces = [0]

    def model(params, tokens, batch):
        num_traces[0] += 1
        if num_traces[0] == 1:
            raise KeyboardInterrupt
        return MODEL_FN(params, tokens, batch)

    manager = make_manager()
    with Engine(model, PARAMS, manager, OPTIONS) as engine:
        answers = engine.submit(PROMPTS[0], limited(), n=4)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        engine.run()
        require_answers(answers)
        assert [sample.num_cached_tokens for sample in answers] == [0, 3, 3, 3]
    manager.check()


def test_a_request_for_which_there_is_room_does_not_time_out():
    clock = Clock()
    with Engine(MODEL_FN, PARAMS, make_manager(), OPTIONS, clock=clock) as engine:
        late = engine.submit(PROMPTS[0], limited(timeout_seconds=5.0))
        clock.now += 6
        require_answers([late, engine.submit(PROMPTS[1], limited(timeout_seconds=0))])
        require_answers(engine.submit([4] * 20, limited(timeout_seconds=0), n=3))


def test_a_request_that_has_started_does_not_time_out():
    clock, manager = Clock(), make_manager(max_blocks=9, caches=False)
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS, clock=clock) as engine:
        answers = [engine.submit(p, limited(16, timeout_seconds=5.0)) for p in PROMPTS]
        while not engine.num_preempted:
            engine.step()
        clock.now += 6
        require_answers(answers, 16)


def test_a_coroutine_that_is_cancelled_leaves_no_thread_that_drives():
    manager = make_manager()
    for number in range(3):
        manager.allocate(manager.new_request(number, initial_tokens=32))
    with Engine(MODEL_FN, PARAMS, manager, OPTIONS) as engine:
        waiting = engine.submit(PROMPTS[0], limited(timeout_seconds=10.0))

        async def leave() -> None:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.ensure_future(waiting), 0.1)

        start = time.monotonic()
        asyncio.run(leave())  # Waits for its threads.
        assert time.monotonic() - start < 5 and not waiting.is_done
        manager.deallocate(0)
        require_answers([waiting])


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": 2**31}, "seed must be from -2147483648 to 2147483647"),
        ({"seed": -(2**31) - 1}, "seed must be from"),
        ({"cache_salt": 5}, "cache_salt must be a str"),
    ],
)
def test_what_a_step_could_not_take_is_refused_at_once(options, error):
    with pytest.raises(ValueError, match=error):
        RequestOptions(**options)
