"""Coroutines that are cut off at every step, and threads that work beside the loop."""

import asyncio
import time

import pytest

from ferrum_jax.errors import FerrumError, WaitTimeoutError
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.loops import BLOCKS, SteppedLoop, busy, make_async, on_loop, settle, until
from tests.support.managers import BLOCK_SIZE, start, tokens_of, write_tokens


async def cancel(task: asyncio.Task):
    """Cancels a task and waits until it has ended by that."""
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()


# Beside the loop.


@on_loop
async def test_the_loop_goes_on_while_a_thread_works():
    manager, beats = make_async(), 0
    handle = start(manager.manager, "a", 1)
    with busy(manager) as (began, may_end):
        working = asyncio.ensure_future(manager.gc())
        await until(began.is_set)
        waiting = [
            asyncio.ensure_future(call)
            for call in (
                manager.allocate(manager.new_request("b", 1)),
                manager.extend(handle, 1),
                manager.deallocate("a"),
                manager.explain_lookup([1, 2, 3]),
                manager.check(),
            )
        ]
        for _ in range(100):
            await asyncio.sleep(0)
            beats += 1
        assert beats == 100 and not working.done() and not any(task.done() for task in waiting)
        with pytest.raises(WaitTimeoutError):
            await manager.allocate(manager.new_request("c"), timeout_seconds=0.01)
        may_end.set()
        await asyncio.gather(working, *waiting)
    assert [name for name, _ in manager.list_handles()] == ["b"]


@on_loop
async def test_the_more_urgent_goes_first_after_a_thread_has_worked():
    manager, served = make_async(), []

    async def allocate(name, priority):
        await manager.allocate(manager.new_request(name, priority=priority))
        served.append(name)

    with busy(manager) as (began, may_end):
        working = asyncio.ensure_future(manager.gc())
        await until(began.is_set)
        tasks = [asyncio.ensure_future(allocate(str(p), p)) for p in Priority]
        await settle()
        may_end.set()
        await asyncio.gather(working, *tasks)
    assert served == [str(p) for p in reversed(Priority)]


@on_loop
async def test_all_who_find_room_are_served_between_two_threads():
    manager, done = make_async(), []

    async def note(name, call):
        await call
        done.append(name)

    handles = [start(manager.manager, i, BLOCK_SIZE) for i in range(3)]
    with busy(manager) as (began, may_end):
        jobs = [asyncio.ensure_future(note("job", manager.gc())) for _ in range(3)]
        await until(began.is_set)
        calls = [manager.allocate(manager.new_request(i, 1)) for i in range(3, 6)]
        calls += [manager.extend(handle, 1) for handle in handles]
        tasks = [asyncio.ensure_future(note("served", call)) for call in calls]
        await settle()
        may_end.set()
        await asyncio.gather(*jobs, *tasks)
    assert done == ["job", *["served"] * 6, "job", "job"]


@pytest.mark.parametrize("num_streams", [1, 2])
@on_loop
async def test_a_stream_of_steps_keeps_nobody_waiting(num_streams):
    manager, begun, is_over = make_async(), [], False
    handle = start(manager.manager, "a", 1)

    def step(state, seq_ids):
        begun.append(time.sleep(0.001))
        return state, None

    async def decode():
        while not is_over:
            await manager.run(step, [handle])

    streams = [asyncio.ensure_future(decode()) for _ in range(num_streams)]
    for call in (
        lambda: manager.allocate(manager.new_request("b", 1)),
        lambda: manager.extend(handle, 1),
        lambda: manager.deallocate("b"),
        lambda: manager.explain_lookup([1, 2, 3]),
        lambda: manager.allocate_blocks(1),
        lambda: manager.check(),
    ):
        await asyncio.sleep(0.002)
        num_before = len(begun)
        await call()
        assert len(begun) <= num_before + 2
    is_over = True
    await asyncio.gather(*streams)


@on_loop
async def test_a_step_and_the_slow_methods_do_what_the_manager_does():
    manager = make_async()
    handle = await manager.allocate(manager.new_request("a", 4))
    write_tokens(manager.manager, handle, [7, 8, 9, 10])
    output = await manager.run(lambda state, seq_ids, x: (state, x + 1), [handle], 41)
    assert output == 42
    assert await manager.block_table(handle) == handle.block_table()
    await manager.defragment()
    assert tokens_of(handle) == [7, 8, 9, 10]
    del handle
    assert (await manager.gc()).caches_freed == 1
    await manager.check()


@on_loop
async def test_what_a_thread_raises_reaches_the_caller():
    manager = make_async()
    with pytest.raises(TypeError, match="A step must return"):
        await manager.run(lambda state, seq_ids: None, [])
    await manager.check()


# Cut off.


@on_loop
async def test_work_under_way_is_finished_before_a_cancellation_is_told():
    manager = make_async()
    start(manager.manager, "dropped", 1)
    with busy(manager) as (began, may_end):
        task = asyncio.ensure_future(manager.gc())
        await until(began.is_set)
        for _ in range(3):
            task.cancel()
            await settle()
            assert not task.done()
        may_end.set()
        await asyncio.wait([task])
    assert task.cancelled() and not manager.list_handles()
    await manager.check()


@on_loop
async def test_a_failure_is_the_cause_of_a_cancellation_that_came_before_it():
    manager = make_async()
    with busy(manager) as (began, _):
        blocked = asyncio.ensure_future(manager.gc())
        await until(began.is_set)
        freeing = asyncio.ensure_future(manager.free_blocks([5]))
        await settle()
        freeing.cancel()
        await settle()
        assert not freeing.done()
    with pytest.raises(asyncio.CancelledError) as raised:
        await freeing
    assert isinstance(raised.value.__context__, FerrumError)
    await blocked


@on_loop
async def test_room_is_given_back_even_by_a_call_that_is_cut_off():
    manager = make_async()
    blocks = await manager.allocate_blocks(2)
    started = [asyncio.Event(), asyncio.Event()]

    async def hold():
        async with manager.hold(manager.new_request("held", 1)):
            started[0].set()
            await started[1].wait()

    holding = asyncio.ensure_future(hold())
    await started[0].wait()
    start(manager.manager, "a", 1)
    kept = manager.get_handle("a")
    with busy(manager) as (began, _):
        blocked = asyncio.ensure_future(manager.gc())
        await until(began.is_set)
        started[1].set()
        calls = [manager.deallocate("a"), manager.free_blocks(blocks)]
        tasks = [holding, *map(asyncio.ensure_future, calls)]
        for task in tasks:
            await settle()
            task.cancel()
            await settle()
            assert not task.done()
    await asyncio.wait(tasks)
    await blocked
    assert all(task.cancelled() for task in tasks) and not kept.is_valid()
    assert manager.free_block_count() == manager.total_block_count()
    await manager.check()


@on_loop
async def test_a_hold_ends_with_its_block_however_that_ends():
    manager = make_async()
    request = manager.new_request("a", 1)
    async with manager.hold(request) as handle:
        await manager.extend(handle, 1)
    assert not handle.is_valid()
    with pytest.raises(KeyError):
        async with manager.hold(request):
            raise KeyError
    async with manager.hold(request):
        await manager.deallocate("a")
        other = await manager.allocate(request)
    assert other.is_valid()  # Its namesake is not its business.
    with pytest.raises(WaitTimeoutError):
        async with manager.hold(manager.new_request("b", 15), timeout_seconds=0):
            async with manager.hold(manager.new_request("c", 15)):
                async with manager.hold(manager.new_request("d", 15), timeout_seconds=0):
                    pass
    await manager.deallocate("a")
    assert manager.free_block_count() == manager.total_block_count()


class Drama:
    """Every kind of call at once on a full manager; one of them is cut off at some step."""

    def __init__(self, manager: AsyncKvCacheManager):
        self.manager, self.blocks, self.handles = manager, [], {}

    def calls(self) -> dict:
        manager, request = self.manager, self.manager.new_request
        urgent = request("high", 2 * BLOCK_SIZE, priority=Priority.High)
        return {
            "extend": manager.extend(self.handles[0], 2 * BLOCK_SIZE),
            "extend all": manager.extend_all([self.handles[1], self.handles[2]], 1),
            "high": manager.allocate(urgent, timeout_seconds=60),
            "blocks": self.take_blocks(),
            "hold": self.hold(),
            "late": manager.allocate(request("late", 1)),
            "free": self.free(),
            "run": manager.run(lambda state, seq_ids: (state, 1), [self.handles[0]]),
            "gc": manager.gc(),
        }

    async def take_blocks(self):
        blocks = await self.manager.allocate_blocks(1, priority=Priority.Critical)
        self.blocks += blocks

    async def hold(self):
        async with self.manager.hold(self.manager.new_request("held", 1)):
            await asyncio.sleep(0)

    async def free(self):
        for i in range(3, BLOCKS):
            await self.manager.deallocate(i)
            await asyncio.sleep(0)

    async def play(self, name: str, num_steps: int, num_cuts: int) -> bool:
        """Returns whether the call was over before it was to be cut off."""
        for i in range(BLOCKS):
            self.handles[i] = await self.manager.allocate(self.manager.new_request(i, BLOCK_SIZE))
        tasks = {key: asyncio.ensure_future(call) for key, call in self.calls().items()}
        await settle(num_steps)
        was_over = tasks[name].done()
        for _ in range(num_cuts):
            tasks[name].cancel()
            await asyncio.sleep(0)
        await settle(100)
        for i in range(3, BLOCKS):
            if self.handles[i].is_valid():
                await self.manager.deallocate(i)
        await settle(200)
        await self.judge(tasks, name)
        return was_over

    async def judge(self, tasks: dict, name: str):
        """Finds all served but the one, and nothing of that one left."""
        assert self.manager.num_waiting == 0
        for key, task in tasks.items():
            assert task.done() and (key == name or task.exception() is None), key
        live = dict(self.manager.list_handles())
        if tasks[name].cancelled():
            assert name not in live
            assert name != "extend" or self.handles[0].num_tokens() == BLOCK_SIZE
            assert name != "extend all" or self.handles[1].num_tokens() == BLOCK_SIZE
            assert name != "blocks" or not self.blocks
        assert "held" not in live
        for key in live:
            await self.manager.deallocate(key)
        await self.manager.free_blocks(self.blocks)
        await self.manager.check()
        assert self.manager.free_block_count() == self.manager.total_block_count()


@pytest.mark.parametrize("num_cuts", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize(
    "name",
    ["extend", "extend all", "high", "blocks", "hold", "late", "free", "run", "gc"],
)
def test_a_call_that_is_cut_off_at_any_step_leaves_nothing_and_nobody_behind(name, num_cuts):
    manager, num_steps, was_over = make_async().manager, 0, False
    while not was_over:
        drama = Drama(AsyncKvCacheManager(manager))
        with asyncio.Runner(loop_factory=SteppedLoop) as runner:
            was_over = runner.run(drama.play(name, num_steps, num_cuts))
        num_steps += 1
    assert num_steps > 2
