"""Event loops for tests: coroutines as tests, steps of a loop, and queues of calls that wait."""

import asyncio
import contextlib
import functools
import threading

from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.types import Priority
from tests.support.managers import BLOCK_SIZE, make_manager

PATIENCE_SECONDS = 60  # Only a hang takes so long.
BLOCKS = 12  # Blocks of the managers of `make_async`.


class ShiftedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time `advance` sets forward."""

    shift_seconds = 0.0

    def time(self) -> float:
        return super().time() + self.shift_seconds


async def advance(seconds: float):
    """Sets the time of the running `ShiftedLoop` forward, and runs what is due."""
    asyncio.get_running_loop().shift_seconds += seconds
    await settle()


def on_loop(test):
    """Makes a coroutine function a test, which fails if it hangs or the loop reports an error."""

    @functools.wraps(test)
    def run_test(*args, **kwargs):
        complaints = []

        async def main():
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _, context: complaints.append(context))
            await asyncio.wait_for(test(*args, **kwargs), PATIENCE_SECONDS)

        with asyncio.Runner(loop_factory=ShiftedLoop) as runner:
            runner.run(main())
        assert not complaints

    return run_test


async def settle(num_steps: int = 20):
    """Runs the other tasks for some steps of the event loop."""
    for _ in range(num_steps):
        await asyncio.sleep(0)


async def until(condition):
    """Waits until another thread has made a condition true."""
    while not condition():
        await asyncio.sleep(0.001)


def make_async(
    *, ageing_seconds=10.0, clock=None, max_seqs=2 * BLOCKS, **config
) -> AsyncKvCacheManager:
    """An async manager of 12 blocks of 3 tokens, and rows for more requests than blocks."""
    manager = make_manager(geometry={"max_seqs": max_seqs}, **config)
    clocks = {} if clock is None else {"clock": clock}
    return AsyncKvCacheManager(manager, ageing_seconds=ageing_seconds, **clocks)


class SteppedLoop(asyncio.SelectorEventLoop):
    """An event loop where work in a thread always takes two steps of the loop."""

    def run_in_executor(self, executor, func, *args):
        future = self.create_future()

        def work():
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_soon(self.call_soon, work)
        return future


@contextlib.contextmanager
def busy(manager: AsyncKvCacheManager):
    """Makes `gc` of the wrapped manager last until an event is set or the block ends."""
    inner, began, may_end = manager.manager.gc, threading.Event(), threading.Event()

    def slow_gc():
        began.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return inner()

    manager.manager.gc = slow_gc
    try:
        yield began, may_end
    finally:
        may_end.set()
        del manager.manager.gc


class Line:
    """Async calls that wait, and the order in which they are served."""

    def __init__(self, manager: AsyncKvCacheManager):
        self.manager, self.served, self.handles, self.tasks = manager, [], {}, []

    async def fill(self, num_requests: int = BLOCKS):
        """Allocates requests of one block each, with numbers as ids."""
        for i in range(num_requests):
            self.handles[i] = await self.manager.allocate(self.request(i))

    def request(self, name, num_blocks: int = 1, priority=Priority.Normal):
        return self.manager.new_request(name, num_blocks * BLOCK_SIZE, priority=priority)

    async def allocate(
        self, name, num_blocks=1, priority=Priority.Normal, **timeout
    ) -> asyncio.Task:
        request = self.request(name, num_blocks, priority)
        return await self.begin(name, self.manager.allocate(request, **timeout))

    async def extend(self, name, num_tokens=1, **timeout) -> asyncio.Task:
        handle = self.handles[name]
        return await self.begin(name, self.manager.extend(handle, num_tokens, **timeout))

    async def begin(self, name, call) -> asyncio.Task:
        async def wait():
            result = await call
            if result is not None:
                self.handles[name] = result
            self.served.append(name)

        self.tasks.append(asyncio.ensure_future(wait()))
        await settle()
        return self.tasks[-1]

    async def free(self, *names) -> list:
        """Deallocates requests one by one; returns the calls that were served."""
        num_before = len(self.served)
        for name in names:
            await self.manager.deallocate(name)
            await settle()
        return self.served[num_before:]

    async def empty(self):
        """Deallocates every request, and checks that nothing is left."""
        while self.manager.list_handles() or self.manager.num_waiting:
            await self.free(*[name for name, _ in self.manager.list_handles()])
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.manager.check()
        assert self.manager.free_block_count() == self.manager.total_block_count()
