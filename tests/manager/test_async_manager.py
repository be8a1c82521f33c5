"""Coroutines that wait for room: who comes first, and what wakes them."""

import asyncio
import inspect
import threading

import pytest

from ferrum_jax import AdvancedKvCacheManager, BlockAllocator, PagedKvCacheManager
from ferrum_jax.errors import WaitTimeoutError
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.loops import BLOCKS, Line, make_async, on_loop, settle
from tests.support.managers import BLOCK_SIZE, Clock, make_manager, start

PLAIN = {
    *("block_size", "can_allocate", "compression_stats", "free_block_count", "get_handle"),
    *("list_handles", "new_request", "set_pressure_callback", "stats", "total_block_count"),
}


# The order.


@on_loop
async def test_what_finds_room_does_not_give_up_the_loop():
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
async def test_who_waits_is_served_when_room_is_freed():
    manager = make_async()
    line = Line(manager)
    await line.fill()
    await line.allocate("a")
    assert line.served == [] and manager.num_waiting == 1
    assert await line.free(0) == ["a"]
    assert line.handles["a"].num_tokens() == BLOCK_SIZE
    await line.empty()


@on_loop
async def test_a_row_is_waited_for_as_blocks_are():
    manager = AsyncKvCacheManager(make_manager(geometry={"max_seqs": 1}))
    line = Line(manager)
    await line.fill(1)
    await line.allocate("a")
    assert await line.free(0) == ["a"]
    await line.empty()


@on_loop
async def test_the_more_urgent_goes_first_and_equals_go_in_turn():
    line = Line(make_async())
    await line.fill()
    for name, priority in [("n1", 1), ("c1", 3), ("l1", 0), ("n2", 1), ("h1", 2), ("c2", 3)]:
        await line.allocate(name, priority=Priority(priority))
    assert await line.free(*range(6)) == ["c1", "c2", "h1", "n1", "n2", "l1"]
    await line.empty()


@on_loop
async def test_blocks_for_no_request_are_waited_for_in_the_same_line():
    line = Line(make_async())
    await line.fill()
    await line.allocate("n1")
    call = line.manager.allocate_blocks(1, priority=Priority.High)
    blocks = await line.begin("blocks", call)
    await line.allocate("h2", priority=Priority.High)
    await line.free(0)
    while not blocks.done():
        await settle()
    await line.free(1, 2)
    assert line.served == ["blocks", "h2", "n1"]
    await line.manager.free_blocks(line.handles.pop("blocks"))
    await line.empty()


@on_loop
async def test_waiting_makes_as_urgent_as_a_higher_level():
    clock = Clock()
    line = Line(make_async(clock=clock, ageing_seconds=10.0))
    await line.fill()
    for name, priority, now in [
        ("low, at 0", 0, 0),
        ("high, at 9", 2, 9),
        ("normal, at 10", 1, 10),
        ("critical, at 29", 3, 29),
        ("critical, at 31", 3, 31),
    ]:
        clock.now = 100 + now
        await line.allocate(name, priority=Priority(priority))
    assert await line.free(*range(5)) == [
        *("high, at 9", "critical, at 29", "low, at 0", "normal, at 10", "critical, at 31"),
    ]
    await line.empty()


@on_loop
async def test_nobody_starves_under_a_stream_of_urgent_requests():
    clock = Clock()
    line = Line(make_async(clock=clock, ageing_seconds=10.0))
    await line.fill()
    waiting = await line.allocate("low", priority=Priority.Low)
    for i in range(BLOCKS, BLOCKS + 40):
        clock.now += 1
        await line.allocate(i, priority=Priority.Critical)
        await line.free(i - BLOCKS)
        if waiting.done():
            break
    assert clock.now == 100 + 30  # Three levels of ten seconds; who came first wins the tie.
    await line.empty()


@on_loop
async def test_a_small_request_does_not_overtake_a_large_one():
    line = Line(make_async())
    await line.fill()
    await line.allocate("large", 4)
    await line.allocate("small")
    assert await line.free(0, 1, 2) == []
    assert await line.free(3) == ["large"]
    assert await line.free(4) == ["small"]
    await line.empty()


@on_loop
async def test_who_comes_late_does_not_overtake_unless_more_urgent():
    line = Line(make_async())
    await line.fill()
    await line.allocate("large", 4)
    await line.free(0, 1)
    for priority in (Priority.Low, Priority.Normal):
        request = line.request("late", 1, priority)
        assert line.manager.manager.can_allocate(request)
        assert not line.manager.can_allocate(request)
        with pytest.raises(WaitTimeoutError, match="not its turn"):
            await line.manager.allocate(request, timeout_seconds=0)
    assert line.manager.can_allocate(line.request("urgent", 1, Priority.High))
    await line.manager.allocate(line.request("urgent", 1, Priority.High), timeout_seconds=0)
    assert line.served == []
    await line.empty()


@on_loop
async def test_who_extends_goes_before_who_begins():
    line = Line(make_async())
    await line.fill()
    await line.allocate("critical", priority=Priority.Critical)
    await line.extend(0)
    await line.extend(1)
    assert await line.free(2, 3, 4) == [0, 1, "critical"]
    await line.empty()


@on_loop
async def test_of_those_who_extend_the_more_urgent_request_goes_first():
    line = Line(make_async())
    await line.fill(BLOCKS - 2)
    await line.allocate("high", priority=Priority.High)
    await line.allocate("low", priority=Priority.Low)
    line.served.clear()
    for name in ("low", 0, "high"):
        await line.extend(name)
    assert await line.free(1, 2, 3) == ["high", 0, "low"]
    await line.empty()


@on_loop
async def test_an_extension_in_the_last_block_does_not_wait():
    line = Line(make_async())
    await line.fill(BLOCKS - 1)
    line.handles["half"] = await line.manager.allocate(line.manager.new_request("half", 1))
    await line.extend(0)
    await line.extend("half", BLOCK_SIZE - 1)
    assert line.served == ["half"] and line.manager.num_waiting == 1
    await line.manager.extend(line.handles[1], 0, timeout_seconds=0)
    await line.empty()


@on_loop
async def test_several_are_extended_together_or_not_at_all():
    line = Line(make_async())
    await line.fill()
    handles = [line.handles[0], line.handles[1]]
    task = await line.begin("both", line.manager.extend_all(handles, 1))
    await line.free(2)
    assert [handle.num_tokens() for handle in handles] == [BLOCK_SIZE] * 2
    await line.free(3)
    assert [handle.num_tokens() for handle in handles] == [BLOCK_SIZE + 1] * 2
    await task
    await line.empty()


# Beside others.


@on_loop
async def test_another_thread_wakes_who_waits():
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


def listeners_of(manager: AsyncKvCacheManager) -> tuple[list, list]:
    """Who listens for room from now on, and who ever has."""
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
async def test_room_is_listened_for_only_while_somebody_waits():
    line = Line(make_async())
    listening, _ = listeners_of(line.manager)
    await line.fill()
    assert not listening
    await line.allocate("a")
    await line.allocate("b")
    assert len(listening) == 1
    await line.free(0, 1)
    assert not listening
    await line.empty()


@on_loop
async def test_a_wait_counts_as_one_failure_at_most():
    line = Line(make_async())
    await line.fill()
    await line.allocate("a", 4)
    await line.free(0, 1, 2, 3)
    stats = line.manager.stats()
    assert (stats.allocation_count, stats.allocation_failures) == (BLOCKS + 1, 1)
    await line.empty()


@on_loop
async def test_a_pressure_callback_that_raises_disturbs_nobody():
    line, levels = Line(make_async()), []

    def complain(level):
        levels.append(level)
        raise RuntimeError("The callback is wrong.")

    line.manager.set_pressure_callback(complain)
    await line.fill()
    await line.allocate("a", 5)
    assert await line.free(*range(5)) == ["a"]
    assert levels
    await line.empty()


def test_a_second_loop_is_refused():
    manager = make_async()
    asyncio.run(manager.check())
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(manager.check())
    with pytest.raises(RuntimeError, match="second event loop"):
        asyncio.run(manager.allocate(manager.new_request("a")))


def test_a_loop_that_ends_leaves_the_manager_whole():
    manager = make_async()
    listening, heard = listeners_of(manager)
    start(manager.manager, "a", 15)

    async def leave():
        for i in range(4):
            waiting = manager.allocate(manager.new_request(i, 15))
            asyncio.get_running_loop().create_task(waiting)
        await settle()

    asyncio.run(leave())
    assert manager.num_waiting == 0 and heard and not listening
    for late in heard:
        late()  # Another thread may be about to tell of room when the loop ends.
    for name, _ in manager.list_handles():
        manager.manager.deallocate(name)
    manager.manager.check()


def test_every_method_of_the_manager_is_offered():
    names = {"new_request", "extend_all", "run", "commit", "explain_lookup", "check"}
    for contract in (AdvancedKvCacheManager, BlockAllocator):
        names |= contract.__abstractmethods__
    for name in sorted(names & set(dir(PagedKvCacheManager))):
        offered, given = getattr(AsyncKvCacheManager, name), getattr(PagedKvCacheManager, name)
        assert inspect.iscoroutinefunction(offered) == (name not in PLAIN), name
        assert (
            inspect.signature(given).parameters.keys()
            <= inspect.signature(offered).parameters.keys()
        ), name
