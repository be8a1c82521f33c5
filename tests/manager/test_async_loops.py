"""Several event loops over one manager: no wait is without end."""

import asyncio
import collections
import contextlib
import threading

import jax
import numpy as np
import pytest

from ferrum_jax.errors import CacheLostError, OutOfBlocksError, UncountedTokensError
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.ops import free
from ferrum_jax.types import Priority
from tests.support.loops import PATIENCE_SECONDS, make_async, on_loop, settle, until
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, make_manager, start
from tests.support.parts import pool_of


class LoopThread:
    """An event loop in a thread of its own, with an async manager over a shared one."""

    def __init__(self, manager, **options):
        self.loop = asyncio.new_event_loop()
        self.manager = AsyncKvCacheManager(manager, **options)
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def begin(self, coroutine):
        """Starts a coroutine on the loop, and waits until it waits there or is done."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        self.finish(settle())
        return future

    def finish(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE_SECONDS)

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(PATIENCE_SECONDS)
        self.loop.close()


@contextlib.contextmanager
def loops_over(manager, num_loops, **options):
    loops = [LoopThread(manager, **options) for _ in range(num_loops)]
    try:
        yield loops
    finally:
        for loop in loops:
            loop.close()


@pytest.mark.parametrize("num_loops", [1, 2, 3])
def test_when_all_wait_on_several_loops_the_last_of_them_is_refused(num_loops):
    manager = make_manager()
    handles = [start(manager, name, 4 * BLOCK_SIZE) for name in range(3)]
    with loops_over(manager, num_loops) as loops:
        homes = [loops[i % num_loops] for i in range(3)]
        calls = []
        for home, handle in zip(homes, handles, strict=True):
            assert not any(call.done() for call in calls)
            calls.append(home.begin(home.manager.extend(handle, BLOCK_SIZE)))
        with pytest.raises(OutOfBlocksError, match="every request that holds blocks waits"):
            calls.pop().result(PATIENCE_SECONDS)
        assert not any(call.done() for call in calls)
        homes[2].finish(homes[2].manager.deallocate(2))
        for call in calls:  # Four blocks are free, and each asks for one.
            call.result(PATIENCE_SECONDS)
    manager.check()


def test_the_last_is_refused_on_whichever_loop_it_waits():
    manager = make_manager()
    manager.allocate_blocks(4)
    low = start(manager, "low", 4 * BLOCK_SIZE, priority=Priority.Low)
    high = start(manager, "high", 4 * BLOCK_SIZE, priority=Priority.High)
    with loops_over(manager, 2) as (one, other):
        refused = one.begin(one.manager.extend(low, 1))
        served = other.begin(other.manager.extend(high, 1))
        with pytest.raises(OutOfBlocksError):
            refused.result(PATIENCE_SECONDS)
        assert not served.done()
        one.finish(one.manager.deallocate("low"))
        served.result(PATIENCE_SECONDS)


def test_a_loop_that_was_closed_while_calls_waited_there_does_not_hold_up_another():
    manager = make_manager()
    manager.allocate_blocks(4)
    low = start(manager, "low", 4 * BLOCK_SIZE, priority=Priority.Low)
    high = start(manager, "high", 4 * BLOCK_SIZE, priority=Priority.High)
    with loops_over(manager, 1) as (other,):
        closed = LoopThread(manager)
        waits = closed.begin(closed.manager.extend(low, 1))
        closed.close()
        with pytest.raises(OutOfBlocksError):
            other.begin(other.manager.extend(high, 1)).result(PATIENCE_SECONDS)
        assert not waits.done()


def test_room_that_comes_while_all_wait_is_not_answered_with_a_refusal():
    manager = make_manager()
    handles = [start(manager, name, 4 * BLOCK_SIZE) for name in range(3)]
    with loops_over(manager, 2) as loops:
        calls = [
            loop.begin(loop.manager.extend(handle, BLOCK_SIZE))
            for loop, handle in zip(loops, handles, strict=False)
        ]
        manager.deallocate(2)  # By a thread that does not wait.
        for call in calls:
            call.result(PATIENCE_SECONDS)
    assert manager.free_block_count() == 2


@pytest.mark.parametrize("num_loops", [1, 2, 4])
def test_whatever_waits_on_several_loops_ends(num_loops):
    manager = make_manager()
    outcomes = collections.Counter()

    async def live(asyncs, name, rng):
        for _ in range(8):
            request = asyncs.new_request(name, int(rng.integers(0, 10)))
            async with asyncs.hold(request) as handle:
                while handle.num_tokens() < MAX_TOKENS:
                    await asyncio.sleep(0)
                    most = MAX_TOKENS - handle.num_tokens()
                    try:
                        await asyncs.extend(handle, int(rng.integers(1, most + 1)))
                        outcomes["extended"] += 1
                    except OutOfBlocksError:
                        outcomes["refused"] += 1
                        break

    with loops_over(manager, num_loops) as loops:
        lives = [
            asyncio.run_coroutine_threadsafe(
                live(loop.manager, (i, j), np.random.default_rng([num_loops, i, j])), loop.loop
            )
            for i, loop in enumerate(loops)
            for j in range(8 // num_loops)
        ]
        for life in lives:
            life.result(PATIENCE_SECONDS)
    assert outcomes["extended"] and outcomes["refused"]
    assert manager.free_block_count() == manager.total_block_count()
    manager.check()


# Caches that are lost, and counts that were wrong.


def lose(state, seq_ids):
    """A step that consumes the state, and fails before it returns another one."""
    jax.tree.map(lambda leaf: leaf.delete(), state)
    raise RuntimeError("the model failed")


@pytest.mark.parametrize("is_direct", [False, True], ids=["by a coroutine", "by a thread"])
@on_loop
async def test_calls_that_wait_hear_that_the_cache_is_lost(is_direct):
    manager = make_async()
    inner = manager.manager
    one = await manager.allocate(manager.new_request("one", 4 * BLOCK_SIZE))
    await manager.allocate(manager.new_request("away", 1))
    await manager.swap_out("away")
    two = await manager.allocate(manager.new_request("two", 1))
    await manager.allocate_blocks(7)
    waiting = [
        asyncio.ensure_future(call)
        for call in (
            manager.extend(one, BLOCK_SIZE),
            manager.allocate(manager.new_request("new", 1)),
            manager.allocate_blocks(1),
            manager.swap_in("away"),
        )
    ]
    await settle()
    await until(lambda: manager.num_waiting == 4)
    with pytest.raises(RuntimeError, match="the model failed"):
        if is_direct:
            await asyncio.to_thread(inner.run, lose, [two])
        else:
            await manager.run(lose, [two])
    for call in waiting:
        with pytest.raises(CacheLostError, match="make another"):
            await call
    assert manager.num_waiting == 0


def test_what_waits_for_room_is_told_when_counts_are_corrected():
    manager = make_manager()
    a = start(manager, "a", 4 * BLOCK_SIZE)

    def unasked(state, seq_ids):
        return free(state, seq_ids), None

    manager.run(unasked, [a])
    jax.block_until_ready(pool_of(manager).state)
    heard = []
    manager.add_room_listener(lambda: heard.append(manager.free_block_count()))
    with pytest.raises(UncountedTokensError):
        manager.gc()
    assert heard == [12]
