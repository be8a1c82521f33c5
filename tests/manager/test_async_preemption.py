"""Coroutines that swap each other out: urgent ones go at once, the others wait to come back."""

import asyncio
import random
import threading

import pytest

from ferrum_jax import LruEvictionPolicy
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    OutOfBlocksError,
    SwappedOutError,
    UnknownRequestError,
    WaitTimeoutError,
)
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.helpers import put
from tests.support.loops import BLOCKS, Line, SteppedLoop, make_async, on_loop, settle
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, tokens_of, write_tokens


class Policy(LruEvictionPolicy):
    """Remembers in which threads it was asked."""

    def __init__(self):
        super().__init__()
        self.threads = set()

    def select_eviction_candidates(self, required_memory, active_caches):
        self.threads.add(threading.current_thread())
        return super().select_eviction_candidates(required_memory, active_caches)


@on_loop
async def test_who_is_swapped_out_waits_to_come_back_in_the_same_line():
    line = Line(make_async(preemption_policy=LruEvictionPolicy()))
    await line.fill()
    write_tokens(line.manager.manager, line.handles[1], [7, 8, 9])
    for i in (0, *range(3, BLOCKS)):
        await line.manager.extend(line.handles[i], 0)
    urgent = line.request("urgent", 2, Priority.High)
    await line.manager.allocate(urgent, timeout_seconds=0)
    for i in (1, 2):  # They were used longest ago.
        with pytest.raises(SwappedOutError):
            await line.manager.extend(line.handles[i], 1)
    with pytest.raises(WaitTimeoutError, match="swapped out"):
        await line.manager.swap_in(1, timeout_seconds=0)
    await line.begin("late", line.manager.allocate(line.request("late")))
    await line.begin("back", line.manager.swap_in(1))
    with pytest.raises(UnknownRequestError):
        await line.manager.swap_in("nobody")
    await line.manager.deallocate("urgent")
    await asyncio.gather(*line.tasks)
    assert line.served == ["late", "back"]
    assert tokens_of(line.handles[1]) == [7, 8, 9]
    await line.empty()


@on_loop
async def test_the_loop_does_not_copy_what_is_swapped_out():
    policy = Policy()
    line = Line(make_async(preemption_policy=policy))
    await line.fill(BLOCKS - 2)
    await line.manager.allocate(line.request("urgent", 4, Priority.High))
    await line.manager.extend(line.manager.get_handle("urgent"), BLOCK_SIZE)
    assert line.manager.stats().preemption_count == 3
    assert threading.current_thread() not in policy.threads
    await line.empty()


@on_loop
async def test_who_waits_to_extend_is_told_that_it_was_swapped_out():
    line = Line(make_async(preemption_policy=LruEvictionPolicy()))
    await line.fill()
    tasks = [await line.extend(i) for i in (0, 1)]
    await line.manager.allocate(line.request("urgent", 2, Priority.High))
    await asyncio.wait(tasks, timeout=1)
    assert [type(task.exception()) for task in tasks] == [SwappedOutError] * 2
    await line.empty()


def test_an_urgent_call_that_is_cut_off_at_any_step_leaves_nothing_behind():
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

    num_steps, was_cut = 0, True
    while was_cut:
        with asyncio.Runner(loop_factory=SteppedLoop) as runner:
            was_cut = runner.run(scene(num_steps))
        num_steps += 1
    assert num_steps > 2


class Client:
    """One request's life among more urgent ones; it knows every token that it wrote."""

    def __init__(self, manager: AsyncKvCacheManager, name: int):
        self.manager, self.name, self.random = manager, name, random.Random(name)
        self.tokens, self.num_returns = [], 0

    async def live(self):
        priority = self.random.choice(list(Priority))
        request = self.manager.new_request(self.name, priority=priority)
        async with self.manager.hold(request) as handle:
            for _ in range(self.random.randrange(2, MAX_TOKENS)):
                await self.persist(lambda: self.manager.extend(handle, 1))
                self.tokens.append(self.random.randrange(1, 60_000))
                await self.persist(lambda: self.manager.run(self.write, [handle]))
            await self.persist(lambda: self.manager.extend(handle, 0))
            assert tokens_of(handle) == self.tokens

    async def persist(self, call):
        """Calls, and comes back from host memory before, as often as it has to."""
        while True:
            try:
                return await call()
            except OutOfBlocksError:  # All wait: the last has to go for a while.
                await self.manager.swap_out(self.name)
            except SwappedOutError:
                self.num_returns += 1
                await self.manager.swap_in(self.name)

    def write(self, state, seq_ids):
        place = (int(seq_ids[0]), len(self.tokens) - 1)
        return put(state, {place: self.tokens[-1]}, num_slots=1), None


@on_loop
async def test_many_that_swap_each_other_out_keep_what_they_wrote():
    manager = make_async(
        preemption_policy=LruEvictionPolicy(), tiers=TierConfig(host_budget_bytes=2**20)
    )
    clients = [Client(manager, name) for name in range(20)]
    await asyncio.gather(*[client.live() for client in clients])
    assert sum(client.num_returns for client in clients) >= manager.stats().preemption_count > 5
    assert manager.num_waiting == 0 and not manager.list_handles()
    await manager.check()
    assert manager.free_block_count() == manager.total_block_count()
