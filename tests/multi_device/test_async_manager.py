"""The async manager over two devices: calls wait for room on the devices that they can use."""

import asyncio
import dataclasses
import functools

import jax
import numpy as np
import pytest

from ferrum_jax import Device, LruEvictionPolicy, ops
from ferrum_jax.errors import GeometryMismatchError, OutOfBlocksError, WaitTimeoutError
from ferrum_jax.manager import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.event_loops import busy, on_loop, settle, until
from tests.support.managers import BLOCK_SIZE, tokens_of, write_tokens
from tests.support.multi_device import CPU, make_multi

pytestmark = pytest.mark.skipif(len(jax.devices("cpu")) < 2, reason="needs two CPU devices")

BLOCKS = 8  # Of each device.


class Calls:
    """Calls on an async manager over two devices, and the handles that they return."""

    def __init__(self, **config):
        self.manager = AsyncKvCacheManager(make_multi(2, geometry={"max_seqs": 12}, **config))
        self.handles = {}

    async def allocate(self, name, device, num_blocks=1, priority=Priority.Normal) -> asyncio.Task:
        request = self.manager.new_request(
            name, num_blocks * BLOCK_SIZE, priority=priority, device=CPU[device]
        )

        async def allocate():
            self.handles[name] = await self.manager.allocate(request)

        return await self.begin(allocate())

    async def extend(self, name, num_blocks=1, **timeout) -> asyncio.Task:
        call = self.manager.extend(self.handles[name], num_blocks * BLOCK_SIZE, **timeout)
        return await self.begin(call)

    async def begin(self, call) -> asyncio.Task:
        task = asyncio.ensure_future(call)
        await settle()
        return task

    async def free(self, *names):
        for name in names:
            await self.manager.deallocate(name)
            await settle()

    def device_of(self, name) -> int:
        return CPU.index(self.manager.get_cache_device(name))

    async def fill(self, device, num_left=0):
        """Leaves `num_left` blocks free on a device, by requests `(device, i)` of two blocks."""
        odd = [("odd", num_left % 2)] if num_left % 2 else []
        for i, num_blocks in [*enumerate([2] * ((BLOCKS - num_left) // 2)), *odd]:
            await (await self.allocate((device, i), device, num_blocks))

    async def end(self):
        """Ends every request, and finds that nothing is left."""
        while self.manager.list_handles() or self.manager.num_waiting:
            await self.free(*[name for name, _ in self.manager.list_handles()])
        await self.manager.check()
        stats = self.manager.stats()
        assert stats.free_blocks == stats.total_blocks == 2 * BLOCKS


@on_loop
async def test_extend_is_refused_when_all_requests_of_its_device_wait():
    calls = Calls()
    await calls.fill(0)
    await calls.fill(1)
    tasks = [await calls.extend((0, i)) for i in range(BLOCKS // 2)]
    with pytest.raises(OutOfBlocksError, match="waits for more on cpu:0"):
        await tasks.pop()
    assert not any(task.done() for task in tasks)
    await calls.free((0, BLOCKS // 2 - 1))
    assert [task.done() for task in tasks] == [True, True, False]
    await calls.end()


@on_loop
async def test_rebalance_devices_makes_room_for_a_call_that_waits():
    calls = Calls()
    await calls.fill(0)
    task = await calls.extend((0, 0))
    assert not task.done()
    assert await calls.manager.plan_rebalance()
    await calls.manager.rebalance_devices()
    await settle()
    assert task.done() and calls.manager.last_rebalance
    await calls.end()


@on_loop
async def test_set_device_preference_lets_a_request_try_another_device():
    calls = Calls()
    await calls.manager.set_device_preference([CPU[0]])
    await calls.fill(0)
    task = await calls.allocate("a", 0)
    assert not task.done()
    await calls.manager.set_device_preference(CPU[:2])
    await settle()
    assert task.done() and calls.device_of("a") == 1
    await calls.end()


@on_loop
async def test_swap_in_waits_for_its_device_and_holds_up_no_other():
    calls = Calls()
    await calls.allocate("away", 0, 2)
    handle = calls.handles["away"]
    tokens = list(range(1, 2 * BLOCK_SIZE + 1))
    write_tokens(calls.manager.manager, handle, tokens)
    await calls.manager.swap_out("away")
    await calls.fill(0)
    task = await calls.begin(calls.manager.swap_in("away"))
    other = await calls.allocate("a", 0)
    await until(other.done)  # After the first try to swap in, which is made in a thread.
    assert calls.device_of("a") == 1 and not task.done()
    await calls.free((0, 0))
    await until(task.done)
    assert tokens_of(handle) == tokens and calls.device_of("away") == 0
    await calls.end()


@on_loop
async def test_run_computes_on_the_device_that_is_named():
    calls = Calls()
    await calls.allocate("a", 1, 0)

    @functools.partial(jax.jit, donate_argnums=0)
    def extend(state, seq_ids):
        counts = np.full(seq_ids.shape, 3, np.int32)
        return ops.extend(state, seq_ids, counts, max_new_tokens=3)

    await calls.manager.run(extend, [calls.handles["a"]], extends=True, reserve_tokens=3)
    assert calls.handles["a"].num_tokens() == 3
    free = await calls.manager.run(lambda s, _: (s, int(s.tables.num_free)), [], device=CPU[1])
    assert free == BLOCKS - 1
    with pytest.raises(GeometryMismatchError):
        await calls.manager.run(extend, [calls.handles["a"]], device=CPU[0])
    await calls.end()


@pytest.mark.parametrize("preempts", [False, True])
@on_loop
async def test_a_cancelled_call_leaves_nothing_on_any_device(preempts):
    calls = Calls(preemption_policy=LruEvictionPolicy() if preempts else None)
    await calls.fill(0, num_left=1)
    await calls.fill(1, num_left=1)
    used = calls.manager.stats().used_memory_bytes
    with busy(calls.manager) as (began, may_end):
        gc = asyncio.ensure_future(calls.manager.gc())
        await until(began.is_set)
        tasks = [
            await calls.allocate("a", 0, 1, Priority.Low),
            await calls.allocate("b", 1, 3, Priority.Low),
            await calls.extend((1, 0), 3),
            await calls.begin(calls.manager.move_cache((1, 1), CPU[0])),
        ]
        for task in tasks:
            task.cancel()
        may_end.set()
        await gc
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {asyncio.CancelledError}
    assert calls.manager.stats().used_memory_bytes == used and calls.device_of((1, 1)) == 1
    assert calls.manager.get_handle("a") is None and calls.manager.num_waiting == 0
    await calls.end()


@on_loop
async def test_a_more_urgent_allocate_preempts_on_either_device():
    calls = Calls(preemption_policy=LruEvictionPolicy())
    await calls.fill(0)
    await calls.fill(1)
    for name in range(4):
        await (await calls.allocate(name, 1, 4, Priority.High))
    assert [calls.device_of(name) for name in range(4)] == [1, 1, 0, 0]
    assert calls.manager.stats().preemption_count == BLOCKS
    await calls.end()


@on_loop
async def test_allocate_is_refused_at_once_on_a_device_without_a_pool():
    calls = Calls()
    await calls.fill(0)
    waiting = await calls.extend((0, 0))
    request = calls.manager.new_request("a", 1)
    with pytest.raises(GeometryMismatchError):
        await calls.manager.allocate(dataclasses.replace(request, device=Device("cpu", 7)))
    assert waiting.cancel()
    await calls.end()


def test_allocate_of_pools_leaves_out_excluded_devices():
    manager = make_multi(2)
    pools, request = manager.pools, manager.new_request("a", 1, device=CPU[0])
    assert not pools.can_allocate(request, exclude=CPU[:2])
    with pytest.raises(OutOfBlocksError, match="may go to none of"):
        pools.allocate(request, exclude=CPU[:2])
    pools.allocate(request, exclude=CPU[:1])
    assert manager.get_cache_device("a") == CPU[1]


@on_loop
async def test_allocate_times_out_while_every_device_is_full():
    calls = Calls()
    await calls.fill(0)
    await calls.fill(1)
    request = calls.manager.new_request("a", 1)
    with pytest.raises(WaitTimeoutError):
        await calls.manager.allocate(request, timeout_seconds=0.01)
    await calls.end()


@on_loop
async def test_close_ends_calls_that_wait_on_any_device():
    calls = Calls()
    await calls.fill(0)
    await calls.fill(1)
    tasks = [await calls.extend((0, 0)), await calls.extend((1, 0)), await calls.allocate("a", 0)]
    await calls.manager.close()
    ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} == {RuntimeError}
