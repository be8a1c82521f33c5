"""Async calls that preempt less urgent requests, and requests that wait to be swapped in."""

import asyncio
import threading

import pytest

from ferrum_jax import LruEvictionPolicy, errors
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.event_loops import BLOCKS, Line, SteppedLoop, make_async, on_loop, settle
from tests.support.managers import BLOCK_SIZE, tokens_of, write_tokens


class Policy(LruEvictionPolicy):
    """Records the threads that ask it."""

    def __init__(self):
        super().__init__()
        self.threads = set()

    def select_eviction_candidates(self, required_memory, active_caches):
        self.threads.add(threading.current_thread())
        return super().select_eviction_candidates(required_memory, active_caches)


@on_loop
async def test_swap_in_waits_in_the_queue_of_allocate():
    line = Line(make_async(preemption_policy=LruEvictionPolicy()))
    await line.fill()
    write_tokens(line.manager.manager, line.handles[1], [7, 8, 9])
    for i in (0, *range(3, BLOCKS)):
        await line.manager.extend(line.handles[i], 0)
    urgent = line.request("urgent", 2, Priority.High)
    await line.manager.allocate(urgent, timeout_seconds=0)
    for i in (1, 2):  # The requests that were used longest ago.
        with pytest.raises(errors.SwappedOutError):
            await line.manager.extend(line.handles[i], 1)
    with pytest.raises(errors.WaitTimeoutError, match="swapped out"):
        await line.manager.swap_in(1, timeout_seconds=0)
    await line.begin("late", line.manager.allocate(line.request("late")))
    await line.begin("restored", line.manager.swap_in(1))
    with pytest.raises(errors.UnknownRequestError):
        await line.manager.swap_in("unknown")
    await line.manager.deallocate("urgent")
    await asyncio.gather(*line.tasks)
    assert line.served == ["late", "restored"]
    assert tokens_of(line.handles[1]) == [7, 8, 9]
    await line.empty()


@on_loop
async def test_allocate_and_extend_preempt_in_a_thread_beside_the_event_loop():
    policy = Policy()
    line = Line(make_async(preemption_policy=policy))
    await line.fill(BLOCKS - 2)
    await line.manager.allocate(line.request("urgent", 4, Priority.High))
    await line.manager.extend(line.manager.get_handle("urgent"), BLOCK_SIZE)
    assert line.manager.stats().preemption_count == 3
    assert threading.current_thread() not in policy.threads
    await line.empty()


@on_loop
async def test_extend_that_waits_is_refused_when_its_request_is_preempted():
    line = Line(make_async(preemption_policy=LruEvictionPolicy()))
    await line.fill()
    tasks = [await line.extend(i) for i in (0, 1)]
    await line.manager.allocate(line.request("urgent", 2, Priority.High))
    await asyncio.wait(tasks)
    assert [type(task.exception()) for task in tasks] == [errors.SwappedOutError] * 2
    await line.empty()


def test_allocate_that_preempts_and_is_cancelled_at_any_step_allocates_nothing():
    manager = make_async(preemption_policy=LruEvictionPolicy()).manager

    async def scene(num_steps):
        line = Line(AsyncKvCacheManager(manager))
        await line.fill()
        task = asyncio.ensure_future(
            line.manager.allocate(line.request("urgent", 2, Priority.High))
        )
        await settle(num_steps)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled() == (line.manager.get_handle("urgent") is None)
        await line.empty()
        return task.cancelled()

    num_steps, was_cancelled = 0, True
    while was_cancelled:
        with asyncio.Runner(loop_factory=SteppedLoop) as runner:
            was_cancelled = runner.run(scene(num_steps))
        num_steps += 1
    assert num_steps > 2
