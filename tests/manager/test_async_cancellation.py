"""Async calls that are cancelled at each step of the event loop, and calls that run in threads."""

import asyncio
import time

import pytest

from ferrum_jax import errors
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.event_loops import BLOCKS, SteppedLoop, busy, make_async, on_loop, settle, until
from tests.support.managers import BLOCK_SIZE, start, tokens_of, write_tokens

# Threads beside the event loop.


@on_loop
async def test_allocate_extend_and_deallocate_wait_on_the_event_loop_while_gc_runs_in_a_thread():
    manager = make_async()
    handle = start(manager.manager, "a", 1)
    with busy(manager) as (began, may_end):
        working = asyncio.ensure_future(manager.gc())
        await until(began.is_set)
        calls = (
            manager.allocate(manager.new_request("b", 1)),
            manager.extend(handle, 1),
            manager.deallocate("a"),
            manager.explain_lookup([1, 2, 3]),
            manager.check(),
        )
        waiting = [asyncio.ensure_future(call) for call in calls]
        await settle(100)  # The event loop goes on.
        assert not working.done() and not any(task.done() for task in waiting)
        with pytest.raises(errors.WaitTimeoutError):
            await manager.allocate(manager.new_request("c"), timeout_seconds=0.01)
        may_end.set()
        await asyncio.gather(working, *waiting)
    assert [name for name, _ in manager.list_handles()] == ["b"]


@on_loop
async def test_allocate_and_extend_that_find_room_are_served_before_the_next_thread_begins():
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
async def test_calls_wait_for_two_steps_of_run_at_most(num_streams):
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
async def test_run_block_table_defragment_and_gc_return_and_raise_what_the_manager_does():
    manager = make_async()
    handle = await manager.allocate(manager.new_request("a", 4))
    write_tokens(manager.manager, handle, [7, 8, 9, 10])
    assert await manager.run(lambda state, seq_ids, x: (state, x + 1), [handle], 41) == 42
    with pytest.raises(TypeError, match="A step must return"):
        await manager.run(lambda state, seq_ids: None, [])
    assert await manager.block_table(handle) == handle.block_table()
    await manager.defragment()
    assert tokens_of(handle) == [7, 8, 9, 10]
    del handle
    assert (await manager.gc()).caches_freed == 1
    await manager.check()


# Cancellation.


@on_loop
async def test_gc_in_a_thread_ends_before_its_cancellation_is_raised():
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
async def test_free_blocks_that_fails_after_its_cancellation_is_the_context_of_it():
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
    assert isinstance(raised.value.__context__, errors.FerrumError)
    await blocked


@on_loop
async def test_hold_deallocates_its_request_however_the_block_ends():
    manager = make_async()
    request = manager.new_request("a", 1)
    with pytest.raises(KeyError):
        async with manager.hold(request) as handle:
            await manager.extend(handle, 1)
            raise KeyError
    assert not handle.is_valid()
    async with manager.hold(request):
        await manager.deallocate("a")
        other = await manager.allocate(request)
    assert other.is_valid()  # A later request with the same id is not deallocated.
    with pytest.raises(errors.WaitTimeoutError):
        async with manager.hold(manager.new_request("b", 15), timeout_seconds=0):
            async with manager.hold(manager.new_request("c", 15)):
                async with manager.hold(manager.new_request("d", 15), timeout_seconds=0):
                    pass
    await manager.deallocate("a")
    assert manager.free_block_count() == manager.total_block_count()


class FullManager:
    """Every kind of call at once on a full manager; one call is cancelled."""

    def __init__(self, manager: AsyncKvCacheManager):
        self.manager, self.blocks, self.handles, self.ended = manager, [], {}, []

    def calls(self) -> dict:
        manager, request = self.manager, self.manager.new_request
        urgent = request("high", 2 * BLOCK_SIZE, priority=Priority.High)
        return {
            "extend": manager.extend(self.handles[0], 2 * BLOCK_SIZE),
            "extend_all": manager.extend_all([self.handles[1], self.handles[2]], 1),
            "high": manager.allocate(urgent, timeout_seconds=60),
            "allocate_blocks": self.take_blocks(),
            "hold": self.hold(),
            "late": manager.allocate(request("late", 1)),
            "deallocate": self.deallocate(),
            "free_blocks": self.take_and_free(),
            "run": manager.run(lambda state, seq_ids: (state, 1), [self.handles[0]]),
            "gc": manager.gc(),
        }

    async def take_blocks(self):
        self.blocks += await self.manager.allocate_blocks(1, priority=Priority.Critical)

    async def hold(self):
        async with self.manager.hold(self.manager.new_request("held", 1)):
            await asyncio.sleep(0)

    async def deallocate(self):
        for i in range(3, BLOCKS):
            self.ended.append(self.handles[i])
            await self.manager.deallocate(i)
            await asyncio.sleep(0)

    async def take_and_free(self):
        await self.manager.free_blocks(await self.manager.allocate_blocks(1))

    async def play(self, name: str, num_steps: int, num_cancels: int) -> bool:
        """Returns whether the call was done before it was cancelled."""
        for i in range(BLOCKS):
            self.handles[i] = await self.manager.allocate(self.manager.new_request(i, BLOCK_SIZE))
        tasks = {key: asyncio.ensure_future(call) for key, call in self.calls().items()}
        await settle(num_steps)
        was_done = tasks[name].done()
        for _ in range(num_cancels):
            tasks[name].cancel()
            await asyncio.sleep(0)
        await settle(100)
        assert not any(handle.is_valid() for handle in self.ended)
        for i in range(3, BLOCKS):
            if self.handles[i].is_valid():
                await self.manager.deallocate(i)
        await settle(200)
        await self.check(tasks, name)
        return was_done

    async def check(self, tasks: dict, name: str):
        """Checks that all other calls were served, and that the cancelled one left nothing."""
        assert self.manager.num_waiting == 0
        for key, task in tasks.items():
            assert task.done() and (key == name or task.exception() is None), key
        live = dict(self.manager.list_handles())
        if tasks[name].cancelled():
            assert name not in live
            assert name != "extend" or self.handles[0].num_tokens() == BLOCK_SIZE
            assert name != "extend_all" or self.handles[1].num_tokens() == BLOCK_SIZE
            assert name != "allocate_blocks" or not self.blocks
        assert "held" not in live
        for key in live:
            await self.manager.deallocate(key)
        await self.manager.free_blocks(self.blocks)
        await self.manager.check()
        assert self.manager.free_block_count() == self.manager.total_block_count()


@pytest.mark.parametrize("num_cancels", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize(
    "name", "extend extend_all high allocate_blocks hold late deallocate free_blocks run gc".split()
)
def test_a_call_that_is_cancelled_at_any_step_changes_nothing(name, num_cancels):
    manager, num_steps, was_done = make_async().manager, 0, False
    while not was_done:
        scene = FullManager(AsyncKvCacheManager(manager))
        with asyncio.Runner(loop_factory=SteppedLoop) as runner:
            was_done = runner.run(scene.play(name, num_steps, num_cancels))
        num_steps += 1
    assert num_steps > 2
