"""Several event loops over one manager: every call that waits ends."""

import asyncio
import contextlib
import random
import threading

import jax
import pytest

from ferrum_jax import LruEvictionPolicy, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.ops import free
from ferrum_jax.types import Priority
from tests.support.caches import contents, put
from tests.support.event_loops import PATIENCE_SECONDS, make_async, on_loop, settle, until
from tests.support.internals import wait_for_device
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, make_manager, start


class LoopThread:
    """An event loop in its own thread, with an async manager over a shared manager."""

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
def test_extend_is_refused_last_in_first_out_when_all_requests_wait_on_several_event_loops(
    num_loops,
):
    manager = make_manager()
    handles = [start(manager, name, 4 * BLOCK_SIZE) for name in range(3)]
    with loops_over(manager, num_loops) as loops:
        homes = [loops[i % num_loops] for i in range(3)]
        calls = []
        for home, handle in zip(homes, handles, strict=True):
            assert not any(call.done() for call in calls)
            calls.append(home.begin(home.manager.extend(handle, BLOCK_SIZE)))
        with pytest.raises(errors.OutOfBlocksError, match="every request that holds blocks waits"):
            calls.pop().result(PATIENCE_SECONDS)
        assert not any(call.done() for call in calls)
        homes[2].finish(homes[2].manager.deallocate(2))
        for call in calls:  # Four blocks are free, and each asks for one.
            call.result(PATIENCE_SECONDS)
    manager.check()


def test_extend_of_the_least_urgent_request_is_refused_on_another_event_loop():
    manager = make_manager()
    manager.allocate_blocks(4)
    low = start(manager, "low", 4 * BLOCK_SIZE, priority=Priority.Low)
    high = start(manager, "high", 4 * BLOCK_SIZE, priority=Priority.High)
    with loops_over(manager, 2) as (one, other):
        refused = one.begin(one.manager.extend(low, 1))
        served = other.begin(other.manager.extend(high, 1))
        with pytest.raises(errors.OutOfBlocksError):
            refused.result(PATIENCE_SECONDS)
        assert not served.done()
        one.finish(one.manager.deallocate("low"))
        served.result(PATIENCE_SECONDS)


def test_extend_is_refused_though_a_call_waits_on_a_closed_event_loop():
    manager = make_manager()
    manager.allocate_blocks(4)
    low = start(manager, "low", 4 * BLOCK_SIZE, priority=Priority.Low)
    high = start(manager, "high", 4 * BLOCK_SIZE, priority=Priority.High)
    with loops_over(manager, 1) as (other,):
        closed = LoopThread(manager)
        waits = closed.begin(closed.manager.extend(low, 1))
        closed.close()
        with pytest.raises(errors.OutOfBlocksError):
            other.begin(other.manager.extend(high, 1)).result(PATIENCE_SECONDS)
        assert not waits.done()


def test_extend_is_served_when_deallocate_makes_room_while_all_requests_wait():
    manager = make_manager()
    handles = [start(manager, name, 4 * BLOCK_SIZE) for name in range(3)]
    with loops_over(manager, 2) as loops:
        calls = [
            loop.begin(loop.manager.extend(handle, BLOCK_SIZE))
            for loop, handle in zip(loops, handles, strict=False)
        ]
        manager.deallocate(2)  # In a thread without an event loop.
        for call in calls:
            call.result(PATIENCE_SECONDS)
    assert manager.free_block_count() == 2


# Random requests.


class Client:
    """A request that is extended, times out, is cancelled, swapped out and restored."""

    def __init__(self, manager: AsyncKvCacheManager, name: int):
        self.manager, self.name, self.random = manager, name, random.Random(name)
        self.tokens, self.was_allocated = [], False

    async def live(self) -> str:
        """Returns how the request has ended."""
        timeout = self.random.choice([None, None, None, 0, 0.01])
        request = self.manager.new_request(self.name, priority=self.random.choice([*Priority]))
        if self.random.random() < 0.3:
            cancel = asyncio.current_task().cancel
            asyncio.get_running_loop().call_later(self.random.random() / 10, cancel)
        try:
            async with self.manager.hold(request, timeout_seconds=timeout) as handle:
                self.was_allocated = True
                for _ in range(self.random.randrange(2, MAX_TOKENS)):
                    await self.persist(lambda: self.manager.extend(handle, 1))
                    self.tokens.append(self.random.randrange(1, 60_000))
                    await self.persist(lambda: self.manager.run(self.write_and_read, [handle]))
        except (asyncio.CancelledError, errors.WaitTimeoutError) as error:
            return type(error).__name__
        return "finished"

    async def persist(self, call) -> None:
        """Makes a call, and again after each time that the request was swapped out."""
        while True:
            try:
                return await call()
            except errors.OutOfBlocksError:  # All requests wait: this one makes room.
                await self.manager.swap_out(self.name)
            except errors.SwappedOutError:
                await self.manager.swap_in(self.name)

    def write_and_read(self, state, seq_ids):
        row = int(seq_ids[0])
        state = put(state, {(row, len(self.tokens) - 1): self.tokens[-1]}, num_slots=1)
        assert contents(state, row) == self.tokens
        return state, None


async def keep_house(manager: AsyncKvCacheManager) -> str:
    """Calls what runs in a thread while requests wait."""
    for _ in range(10):
        blocks = await manager.allocate_blocks(1, priority=Priority.Critical)
        await manager.gc()
        await manager.defragment()
        await manager.free_blocks(blocks)
        await manager.check()
        await asyncio.sleep(0.001)
    return "kept house"


@pytest.mark.parametrize("policy", [None, LruEvictionPolicy()], ids=["wait", "preempt"])
@pytest.mark.parametrize("num_loops", [1, 3])
def test_extend_swap_out_and_cancel_on_event_loops_leave_nothing_behind(num_loops, policy):
    manager = make_manager(
        initial_blocks=6,
        enable_pooling=policy is None,
        geometry={"max_seqs": 16},
        preemption_policy=policy,
        tiers=TierConfig(host_budget_bytes=2**20),
    )
    levels = []

    def call_back(level):
        levels.append(level)
        assert manager.stats().total_blocks <= 12
        raise RuntimeError("The callback is wrong.")

    manager.set_pressure_callback(call_back)
    with loops_over(manager, num_loops) as loops:
        homes = [loops[i % num_loops] for i in range(40)]
        clients = [Client(home.manager, i) for i, home in enumerate(homes)]
        calls = [client.live() for client in clients]
        calls += [keep_house(loop.manager) for loop in loops]
        futures = [
            asyncio.run_coroutine_threadsafe(call, home.loop)
            for call, home in zip(calls, [*homes, *loops], strict=True)
        ]
        outcomes = {future.result(PATIENCE_SECONDS) for future in futures}
        assert outcomes >= {"finished", "kept house"}
        assert all(loop.manager.num_waiting == 0 for loop in loops)
    stats = manager.stats()
    assert (stats.preemption_count > 0) == (policy is not None)
    assert stats.allocation_count >= sum(client.was_allocated for client in clients)
    assert stats.growth_count and levels and not manager.list_handles()
    assert manager.free_block_count() == manager.total_block_count()
    manager.check()


# Lost caches and corrected counts.


def lose(state, seq_ids):
    """A step that deletes the state, and fails before it returns another one."""
    jax.tree.map(lambda leaf: leaf.delete(), state)
    raise RuntimeError("the model failed")


@pytest.mark.parametrize("is_direct", [False, True], ids=["by a coroutine", "by a thread"])
@on_loop
async def test_calls_that_wait_raise_cache_lost_error_when_run_loses_the_cache(is_direct):
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
        with pytest.raises(errors.CacheLostError, match="make another"):
            await call
    assert manager.num_waiting == 0


def test_room_listeners_are_called_when_gc_corrects_the_counts():
    manager = make_manager()
    a = start(manager, "a", 4 * BLOCK_SIZE)

    def unasked(state, seq_ids):
        return free(state, seq_ids), None

    manager.run(unasked, [a])
    wait_for_device(manager)
    calls = []
    manager.add_room_listener(lambda: calls.append(manager.free_block_count()))
    with pytest.raises(errors.UncountedTokensError):
        manager.gc()
    assert calls == [12]
