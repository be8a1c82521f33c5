"""Coroutines that wait for room: who gives up, who is told at once, who is refused."""

import asyncio

import pytest

from ferrum_jax.errors import (
    DuplicateRequestError,
    FerrumError,
    GeometryMismatchError,
    InvalidHandleError,
    OutOfBlocksError,
    OutOfRowsError,
    RequestTooLargeError,
    SequenceTooLongError,
    SwappedOutError,
    UnknownRequestError,
    WaitTimeoutError,
)
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.loops import BLOCKS, Line, busy, make_async, on_loop, settle, until
from tests.support.managers import BLOCK_SIZE, make_manager, start
from tests.support.multi_device import make_multi

# Who gives up.


@on_loop
async def test_a_timeout_says_what_is_short_and_leaves_nothing_behind():
    line = Line(make_async())
    await line.fill()
    first = await line.allocate("first", 2, timeout_seconds=0.01)
    second = await line.allocate("second", 2, timeout_seconds=0.02)
    extending = await line.extend(0, timeout_seconds=0.03)
    for task, text in [
        (first, "'first' waited 0.01 seconds .* behind 1 others.* 2 blocks are needed, and 0 of"),
        (second, "'second' waited 0.02 seconds .* behind 1 others"),
        (extending, "1 more tokens for 0 waited 0.03 seconds .* behind 0 others"),
    ]:
        with pytest.raises(WaitTimeoutError, match=text) as raised:
            await task
        assert isinstance(raised.value, TimeoutError) and isinstance(raised.value, FerrumError)
        assert isinstance(raised.value.__cause__, OutOfBlocksError)
    assert line.manager.num_waiting == 0
    assert line.handles[0].num_tokens() == BLOCK_SIZE
    assert await line.free(1) == []
    await line.allocate("first", timeout_seconds=0.01)
    await line.empty()


@on_loop
async def test_a_shortage_of_rows_is_told_as_such():
    manager = AsyncKvCacheManager(make_manager(geometry={"max_seqs": 1}))
    start(manager.manager, "a")
    with pytest.raises(WaitTimeoutError, match="all 1 are in use") as raised:
        await manager.allocate(manager.new_request("b"), timeout_seconds=0.0)
    assert isinstance(raised.value.__cause__, OutOfRowsError)


@on_loop
async def test_when_the_first_gives_up_the_next_is_served():
    for give_up in ("timeout", "cancel"):
        line = Line(make_async())
        await line.fill()
        large = await line.allocate("large", 2, timeout_seconds=0.02)
        await line.allocate("small")
        assert await line.free(0) == []
        if give_up == "cancel":
            large.cancel()
        await asyncio.wait([large])
        await settle()
        assert line.served == ["small"]
        assert large.cancelled() or isinstance(large.exception(), WaitTimeoutError)
        await line.empty()


@on_loop
async def test_a_wrong_timeout_is_refused():
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


# What is told at once.


@pytest.mark.parametrize("is_crowded", [False, True], ids=["alone", "behind another"])
@on_loop
async def test_what_no_wait_can_mend_is_raised_at_once(is_crowded):
    line = Line(make_async(max_blocks=4))
    await line.fill(4)
    if is_crowded:
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
        (DuplicateRequestError, manager.allocate(request(1))),
        (RequestTooLargeError, manager.allocate(request("a", 15))),
        (GeometryMismatchError, manager.allocate(other_model)),
        (SequenceTooLongError, manager.allocate(longer)),
        (SequenceTooLongError, manager.extend(handle, 13)),
        (InvalidHandleError, manager.extend(dead, 1)),
        (InvalidHandleError, manager.extend(foreign, 1)),
        (UnknownRequestError, manager.deallocate("nobody")),
        (ValueError, manager.extend(handle, -1)),
        (ValueError, manager.allocate_blocks(-1)),
    ]:
        with pytest.raises(error) as raised:
            await call
        assert not isinstance(raised.value, WaitTimeoutError)
    await line.empty()


@on_loop
async def test_an_id_that_comes_to_life_meanwhile_is_refused():
    line = Line(make_async())
    await line.fill()
    first = await line.allocate("twice")
    second = await line.allocate("twice")
    assert await line.free(0) == ["twice"]
    assert first.done() and isinstance(second.exception(), DuplicateRequestError)
    await line.empty()


@on_loop
async def test_a_request_that_ends_while_it_waits_to_extend_is_told():
    line = Line(make_async())
    await line.fill()
    first, second = await line.extend(0), await line.extend(1)
    assert await line.free(1) == [0]
    with pytest.raises(InvalidHandleError):
        await second
    assert first.done()
    await line.empty()


@on_loop
async def test_a_request_that_is_swapped_out_while_it_waits_to_extend_is_told():
    line = Line(make_async())
    await line.fill()
    first, second = await line.extend(0, 4 * BLOCK_SIZE), await line.extend(1)
    await line.manager.swap_out(1)
    with pytest.raises(SwappedOutError):
        await second
    with pytest.raises(SwappedOutError):
        await line.manager.extend(line.handles[1], 1)
    assert not first.done()
    with pytest.raises(OutOfBlocksError):
        for name in range(2, BLOCKS):  # Who is away holds no blocks: all others wait.
            await line.extend(name)
        await line.tasks[-1]
    assert await line.free(BLOCKS - 1, 2) == [] and await line.free(3) == [0]
    await line.free(*range(4, BLOCKS - 1))
    await line.manager.swap_in(1)
    await line.empty()


# When all wait.


@on_loop
async def test_when_all_wait_the_last_of_them_is_refused():
    line = Line(make_async())
    await line.fill(BLOCKS - 2)
    await line.allocate("low", priority=Priority.Low)
    await line.allocate("high", priority=Priority.High)
    line.served.clear()
    tasks = {name: await line.extend(name) for name in ("low", *range(BLOCKS - 2))}
    assert not any(task.done() for task in tasks.values())  # One runs still, and may end.
    await line.allocate("new", priority=Priority.Critical)

    tasks["high"] = await line.extend("high")
    with pytest.raises(OutOfBlocksError, match="Deallocate this one"):
        await tasks.pop("low")
    assert not any(task.done() for task in tasks.values())
    assert await line.free("low") == ["high"]

    tasks["high again"] = await line.extend("high", BLOCK_SIZE)
    youngest = BLOCKS - 3
    with pytest.raises(OutOfBlocksError):
        await tasks.pop(youngest)
    assert await line.free(youngest) == ["high"]
    assert line.manager.num_waiting == BLOCKS - 2
    await line.empty()


@on_loop
async def test_one_alone_that_finds_no_block_is_refused():
    line = Line(make_async(max_blocks=2))
    await line.fill(2)
    await line.free(1)
    await line.manager.extend(line.handles[0], BLOCK_SIZE)
    with pytest.raises(OutOfBlocksError, match="3 blocks|every request"):
        await line.manager.extend(line.handles[0], BLOCK_SIZE)
    await line.empty()


@on_loop
async def test_all_wait_once_the_last_who_ran_has_ended():
    line = Line(make_async())
    await line.fill(BLOCKS - 1)
    first = await line.extend(0, 4 * BLOCK_SIZE)
    others = [await line.extend(i, 4 * BLOCK_SIZE) for i in range(1, BLOCKS - 2)]
    assert not first.done()
    await line.free(BLOCKS - 2)
    assert not first.done() and isinstance(others[-1].exception(), OutOfBlocksError)
    assert not any(other.done() for other in others[:-1])
    await line.empty()


@on_loop
async def test_only_a_request_whose_end_makes_room_is_refused():
    line = Line(make_async())
    await line.fill(BLOCKS - 1)
    line.handles["empty"] = await line.manager.allocate(line.manager.new_request("empty", 0))
    tasks = [await line.extend(i, 4 * BLOCK_SIZE) for i in range(BLOCKS - 2)]
    waiting = await line.extend("empty", 2 * BLOCK_SIZE)
    last = await line.extend(BLOCKS - 2, 4 * BLOCK_SIZE)
    assert isinstance(last.exception(), OutOfBlocksError)
    assert not waiting.done() and not any(task.done() for task in tasks)
    await line.empty()


@on_loop
async def test_blocks_for_no_request_do_not_count_as_room_to_come():
    line = Line(make_async())
    blocks = await line.manager.allocate_blocks(BLOCKS)
    for i in range(2):
        line.handles[i] = await line.manager.allocate(line.manager.new_request(i, 0))
    tasks = [await line.extend(0), await line.extend(1)]
    assert [type(task.exception()) for task in tasks] == [OutOfBlocksError] * 2

    for i in range(2, 5):
        line.handles[i] = await line.manager.allocate(line.manager.new_request(i, 0))
    await line.manager.free_blocks(blocks[:1])
    await line.manager.extend(line.handles[2], 1)
    tasks = [await line.extend(i, 2 * BLOCK_SIZE) for i in (3, 4)]
    assert await line.free(2) == []
    assert [type(task.exception()) for task in tasks] == [OutOfBlocksError] * 2
    await line.manager.free_blocks(blocks[1:])
    await line.empty()


@on_loop
async def test_who_is_about_to_be_served_does_not_count_as_waiting():
    line = Line(make_async())
    await line.fill(BLOCKS - 1)
    line.handles["half"] = await line.manager.allocate(line.manager.new_request("half", 1))
    tasks = [await line.extend(i, 4 * BLOCK_SIZE) for i in range(BLOCKS - 2)]
    with busy(line.manager) as (began, _):
        working = asyncio.ensure_future(line.manager.gc())
        await until(began.is_set)
        line.manager.manager.deallocate(BLOCKS - 2)  # Wakes the first, who has to wait longer.
        await settle()
        last = await line.extend("half", 1)
    await working
    await last
    assert not any(task.done() for task in tasks)
    await line.empty()


@on_loop
async def test_that_all_wait_is_noticed_whenever_the_last_one_comes():
    for num_steps in range(8):
        line = Line(make_async())
        await line.fill(BLOCKS - 1)
        await line.allocate("high", priority=Priority.High)
        tasks = [await line.extend(i, 4 * BLOCK_SIZE) for i in range(BLOCKS - 2)]
        await line.manager.deallocate(BLOCKS - 2)  # Wakes the first, soon.
        await settle(num_steps)
        high = await line.extend("high", 4 * BLOCK_SIZE)
        assert not high.done() and not any(task.done() for task in tasks[:-1])
        assert isinstance(tasks[-1].exception(), OutOfBlocksError)
        await line.empty()


def test_methods_of_one_kind_of_manager_are_refused_over_the_other():
    several = AsyncKvCacheManager(make_multi(1))
    for method in (several.free_block_count, several.total_block_count, several.block_size):
        with pytest.raises(TypeError, match="is for a PagedKvCacheManager"):
            method()
    one = make_async()
    for method in (one.supported_devices, one.device_stats):
        with pytest.raises(TypeError, match="is for a MultiDevicePagedKvCacheManager"):
            method()
    with pytest.raises(ValueError, match="manager must be a PagedKvCacheManager or"):
        AsyncKvCacheManager(one)
