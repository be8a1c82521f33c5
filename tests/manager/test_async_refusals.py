"""Async calls that do not get room: timeouts, errors at once, and stalls."""

import asyncio

import pytest

from ferrum_jax import errors
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.event_loops import (
    BLOCKS,
    Line,
    advance,
    busy,
    make_async,
    on_loop,
    settle,
    until,
)
from tests.support.managers import BLOCK_SIZE, make_manager, start
from tests.support.multi_device import make_multi

# Timeouts.


@on_loop
async def test_timeout_seconds_raises_what_is_missing_and_allocates_nothing():
    line = Line(make_async())
    await line.fill()
    first = await line.allocate("first", 2, timeout_seconds=10)
    second = await line.allocate("second", 2, timeout_seconds=20)
    extending = await line.extend(0, timeout_seconds=30)
    for task, text in [
        (first, "'first' waited 10 seconds .* behind 1 others.* 2 blocks are needed, and 0 of"),
        (second, "'second' waited 20 seconds .* behind 1 others"),
        (extending, "1 more tokens for 0 waited 30 seconds .* behind 0 others"),
    ]:
        await advance(10)
        with pytest.raises(errors.WaitTimeoutError, match=text) as raised:
            await task
        assert isinstance(raised.value, TimeoutError) and isinstance(
            raised.value, errors.FerrumError
        )
        assert isinstance(raised.value.__cause__, errors.OutOfBlocksError)
    assert line.manager.num_waiting == 0
    assert line.handles[0].num_tokens() == BLOCK_SIZE
    assert await line.free(1) == []
    await line.allocate("first", timeout_seconds=0)
    await line.empty()


@on_loop
async def test_timeout_seconds_raises_a_shortage_of_rows():
    manager = AsyncKvCacheManager(make_manager(geometry={"max_seqs": 1}))
    start(manager.manager, "a")
    with pytest.raises(errors.WaitTimeoutError, match="all 1 are in use") as raised:
        await manager.allocate(manager.new_request("b"), timeout_seconds=0.0)
    assert isinstance(raised.value.__cause__, errors.OutOfRowsError)


@on_loop
async def test_allocate_is_served_when_the_call_before_it_times_out():
    line = Line(make_async())
    await line.fill()
    large = await line.allocate("large", 2, timeout_seconds=10)
    await line.allocate("small")
    assert await line.free(0) == []
    await advance(10)
    assert line.served == ["small"] and isinstance(large.exception(), errors.WaitTimeoutError)
    await line.empty()


@on_loop
async def test_a_wrong_timeout_seconds_or_ageing_seconds_is_refused():
    manager = make_async()
    request, handle = manager.new_request("a"), start(manager.manager, "b")
    for wrong in (-1, float("nan"), "soon"):
        for call in (
            manager.allocate(request, timeout_seconds=wrong),
            manager.extend(handle, 1, timeout_seconds=wrong),
            manager.allocate_blocks(1, timeout_seconds=wrong),
        ):
            with pytest.raises(ValueError, match="timeout_seconds"):
                await call
    for wrong in (0, -1.0, float("inf"), None):
        with pytest.raises(ValueError, match="ageing_seconds"):
            AsyncKvCacheManager(manager.manager, ageing_seconds=wrong)


# Errors.


@pytest.mark.parametrize("is_behind", [False, True], ids=["alone", "behind another"])
@on_loop
async def test_allocate_and_extend_do_not_wait_for_what_can_never_succeed(is_behind):
    line = Line(make_async(max_blocks=4))
    await line.fill(4)
    if is_behind:
        await line.extend(0)
        await line.allocate("waits")
    manager, handle, dead = line.manager, line.handles[1], line.handles[2]
    dead = manager.manager.allocate(manager.new_request("dead", 0))
    manager.manager.deallocate("dead")
    foreign = start(make_manager(), "foreign", 1)
    request = manager.new_request
    other_model = make_manager(geometry={"num_layers": 3}).new_request("a")
    longer = make_manager(geometry={"max_sequence_length": 99}).new_request("a")
    for error, call in [
        (errors.DuplicateRequestError, manager.allocate(request(1))),
        (errors.RequestTooLargeError, manager.allocate(request("a", 15))),
        (errors.GeometryMismatchError, manager.allocate(other_model)),
        (errors.SequenceTooLongError, manager.allocate(longer)),
        (errors.SequenceTooLongError, manager.extend(handle, 13)),
        (errors.InvalidHandleError, manager.extend(dead, 1)),
        (errors.InvalidHandleError, manager.extend(foreign, 1)),
        (errors.UnknownRequestError, manager.deallocate("unknown")),
        (ValueError, manager.extend(handle, -1)),
        (ValueError, manager.allocate_blocks(-1)),
    ]:
        with pytest.raises(error) as raised:
            await call
        assert not isinstance(raised.value, errors.WaitTimeoutError)
    await line.empty()


@on_loop
async def test_allocate_that_waits_is_refused_when_its_id_becomes_live():
    line = Line(make_async())
    await line.fill()
    first = await line.allocate("twice")
    second = await line.allocate("twice")
    assert await line.free(0) == ["twice"]
    assert first.done() and isinstance(second.exception(), errors.DuplicateRequestError)
    await line.empty()


@on_loop
async def test_extend_that_waits_is_refused_when_its_request_is_swapped_out():
    line = Line(make_async())
    await line.fill()
    first, second = await line.extend(0, 4 * BLOCK_SIZE), await line.extend(1)
    await line.manager.swap_out(1)
    with pytest.raises(errors.SwappedOutError):
        await second
    with pytest.raises(errors.SwappedOutError):
        await line.manager.extend(line.handles[1], 1)
    assert not first.done()
    with pytest.raises(errors.OutOfBlocksError):
        for name in range(2, BLOCKS):  # Request 1 holds no block: all others wait.
            await line.extend(name)
        await line.tasks[-1]
    assert await line.free(BLOCKS - 1, 2) == [] and await line.free(3) == [0]
    await line.free(*range(4, BLOCKS - 1))
    await line.manager.swap_in(1)
    await line.empty()


# Stalls: all requests wait.


@on_loop
async def test_extend_is_not_refused_while_another_call_can_be_served():
    line = Line(make_async())
    await line.fill(BLOCKS - 1)
    line.handles["half"] = await line.manager.allocate(line.manager.new_request("half", 1))
    tasks = [await line.extend(i, 4 * BLOCK_SIZE) for i in range(BLOCKS - 2)]
    with busy(line.manager) as (began, _):
        working = asyncio.ensure_future(line.manager.gc())
        await until(began.is_set)
        line.manager.manager.deallocate(BLOCKS - 2)  # Wakes the first request.
        await settle()
        last = await line.extend("half", 1)
    await working
    await last
    assert not any(task.done() for task in tasks)
    await line.empty()


@on_loop
async def test_extend_is_refused_when_all_requests_wait_at_whichever_step_the_last_begins():
    for num_steps in range(8):
        line = Line(make_async())
        await line.fill(BLOCKS - 1)
        await line.allocate("high", priority=Priority.High)
        tasks = [await line.extend(i, 4 * BLOCK_SIZE) for i in range(BLOCKS - 2)]
        await line.manager.deallocate(BLOCKS - 2)  # Wakes the first request after some steps.
        await settle(num_steps)
        high = await line.extend("high", 4 * BLOCK_SIZE)
        assert not high.done() and not any(task.done() for task in tasks[:-1])
        assert isinstance(tasks[-1].exception(), errors.OutOfBlocksError)
        await line.empty()


def test_an_async_manager_refuses_methods_of_the_other_kind_of_manager():
    several = AsyncKvCacheManager(make_multi(1))
    for method in (several.free_block_count, several.total_block_count, several.block_size):
        with pytest.raises(ValueError, match="is for one device"):
            method()
    one = make_async()
    for method in (one.supported_devices, one.device_stats):
        with pytest.raises(ValueError, match="is for several devices"):
            method()
    with pytest.raises(ValueError, match="manager must be a PagedKvCacheManager or"):
        AsyncKvCacheManager(one)
