"""Async calls that wait for room, and what wakes them. Their order is in the state machine."""

import asyncio
import threading

import pytest

from ferrum_jax.manager.aio import AsyncKvCacheManager
from tests.support.event_loops import BLOCKS, Line, make_async, on_loop, settle
from tests.support.managers import start


@on_loop
async def test_allocate_and_extend_that_find_room_do_not_yield_to_the_event_loop():
    manager = make_async()
    for coroutine in (
        manager.allocate(manager.new_request("a", 1)),
        manager.extend(manager.manager.allocate(manager.new_request("b", 1)), 5),
        manager.deallocate("b"),
        manager.deallocate("a"),
    ):
        with pytest.raises(StopIteration):
            coroutine.send(None)
    await manager.check()


@on_loop
async def test_deallocate_in_another_thread_wakes_an_allocate_that_waits():
    line = Line(make_async())
    await line.fill()
    task = await line.allocate("a", 2)

    def free():
        line.manager.manager.deallocate(0)
        line.manager.manager.deallocate(1)

    thread = threading.Thread(target=free)
    thread.start()
    await task
    thread.join()
    await line.empty()


def room_listeners_of(manager: AsyncKvCacheManager) -> tuple[list, list]:
    """Callbacks of `add_room_listener`: those that are registered, and all that ever were."""
    now, ever = [], []
    inner = manager.manager.pools.add_room_listener

    def add(callback):
        now.append(callback)
        ever.append(callback)
        remove = inner(callback)
        return lambda: (now.remove(callback), remove())

    manager.manager.pools.add_room_listener = add
    return now, ever


@on_loop
async def test_add_room_listener_is_called_only_while_a_call_waits():
    line = Line(make_async())
    listening, _ = room_listeners_of(line.manager)
    await line.fill()
    assert not listening
    await line.allocate("a")
    await line.allocate("b")
    assert len(listening) == 1
    await line.free(0, 1)
    assert not listening
    await line.empty()


@on_loop
async def test_stats_count_an_allocate_that_waits_as_one_failure():
    line = Line(make_async())
    await line.fill()
    await line.allocate("a", 4)
    await line.free(0, 1, 2, 3)
    stats = line.manager.stats()
    assert (stats.allocation_count, stats.allocation_failures) == (BLOCKS + 1, 1)
    await line.empty()


def test_an_async_manager_refuses_a_second_event_loop():
    manager = make_async()
    asyncio.run(manager.check())
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(manager.check())
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(manager.allocate(manager.new_request("a")))


def test_an_event_loop_that_ends_while_allocate_waits_leaves_no_listener():
    manager = make_async()
    listening, heard = room_listeners_of(manager)
    start(manager.manager, "a", 15)

    async def leave():
        for i in range(4):
            waiting = manager.allocate(manager.new_request(i, 15))
            asyncio.get_running_loop().create_task(waiting)
        await settle()

    asyncio.run(leave())
    assert manager.num_waiting == 0 and heard and not listening
    for late in heard:
        late()  # Another thread may call a listener when the loop ends.
    for name, _ in manager.list_handles():
        manager.manager.deallocate(name)
    manager.manager.check()
