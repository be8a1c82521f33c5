"""How calls wait on an event loop: for room, for their turn, and for work in a thread."""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ferrum_jax.errors import OutOfBlocksError, OutOfRowsError, WaitTimeoutError
from ferrum_jax.manager.manager import PagedKvCacheManager
from ferrum_jax.manager.stalls import Rest
from ferrum_jax.manager.waiting import Waiter, WaitingQueue
from ferrum_jax.types import Priority

Result = TypeVar("Result")

_SHORTAGES = (OutOfBlocksError, OutOfRowsError)


class WaitingRoom:
    """Where the calls of one event loop wait: for room in a manager, and for each other.

    One call at a time runs in a thread, and no other one begins meanwhile: it would block the loop
    on the manager's lock. Those who wait for room try before the next call in a thread begins.

    Each waiter tries by itself when it is woken, and takes room in the same breath in which it
    returns. So a cancellation finds a waiter that has nothing, or a call that is done.

    Args:
      manager: Whose room is waited for.
      queue: The order.
    """

    def __init__(self, manager: PagedKvCacheManager, queue: WaitingQueue):
        self._manager, self._queue = manager, queue
        self._jobs, self._is_busy, self._idle = asyncio.Lock(), False, asyncio.Event()
        self._num_impatient = 0  # Calls that go on as soon as no thread is busy.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_listening: Callable[[], None] = _do_nothing

    @property
    def num_waiting(self) -> int:
        """How many calls wait for room."""
        return len(self._queue)

    def is_anyone_before(self, priority: Priority) -> bool:
        """Says whether a new request of this priority would have to wait for others."""
        return self._queue.is_anyone_before(priority)

    async def wait(
        self,
        waiter: Waiter,
        call: Callable[[], Result],
        undo: Callable[[Result], None] | None = None,
    ) -> Result:
        """Calls as soon as there is room and nobody comes first.

        Args:
          waiter: Who waits.
          call: Raises a shortage while there is no room.
          undo: Takes the result back. It is given if the call waits for the device: then it runs
            in a thread, and may be cancelled before the result arrives.

        Returns:
          What the call returns.

        Raises:
          WaitTimeoutError: If there was no room in the waiter's time.
          OutOfBlocksError: If all who could make room wait for it, this waiter last.
        """
        loop, deadline = self._running_loop(), None
        if waiter.timeout_seconds is not None:
            deadline = loop.time() + waiter.timeout_seconds
        if undo is None and not self._queue and not self._is_busy:
            try:
                return call()  # The usual case: there is nobody to wait for.
            except _SHORTAGES as shortage:
                waiter.shortage = shortage

        with self._in_queue(waiter):
            while True:
                await self._until_awake(waiter, deadline)
                if waiter in self._who_may_try() or waiter.may_go_ahead():
                    try:
                        return call() if undo is None else await self._in_thread(call, undo)
                    except _SHORTAGES as error:
                        waiter.shortage = error
                self._fall_asleep(waiter)

    async def off_loop(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Calls in a thread, to the end even when cancelled."""
        self._running_loop()
        async with self._jobs:
            while self._is_busy or self._is_anyone_quick():
                await (self._idle.wait() if self._is_busy else asyncio.sleep(0))
            return await self._in_thread(functools.partial(call, *args, **kwargs))

    async def on_loop(self, call: Callable[..., Result], *args: Any) -> Result:
        """Calls as soon as no thread is busy."""
        self._running_loop()
        await self._until_idle()
        return call(*args)

    async def surely(self, call: Callable[..., Result], *args: Any) -> Result:
        """Calls as soon as no thread is busy, even when cancelled."""
        self._running_loop()
        cancelled: asyncio.CancelledError | None = None
        while self._is_busy:
            try:
                await self._until_idle()
            except asyncio.CancelledError as error:
                cancelled = error
        try:
            return call(*args)
        finally:
            if cancelled is not None:
                raise cancelled

    async def _until_idle(self) -> None:
        """Waits until no thread is busy. Who then goes on at once comes before the next thread."""
        self._num_impatient += 1
        try:
            while self._is_busy:
                await self._idle.wait()
        finally:
            self._num_impatient -= 1

    def _is_anyone_quick(self) -> bool:
        """Says whether somebody is about to call on the loop, who would wait for a thread."""
        return self._num_impatient > 0 or not all(waiter.is_asleep for waiter in self._queue)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Returns the loop, which must be the one of the first call."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if loop is not self._loop:
            raise RuntimeError(
                "An AsyncKvCacheManager is used from a second event loop, where nothing would "
                "wake those who wait in the first. Make one for each loop; they may share a "
                "PagedKvCacheManager."
            )
        return loop

    async def _in_thread(
        self, call: Callable[[], Result], undo: Callable[[Result], None] | None = None
    ) -> Result:
        """Calls in a thread, where none is busy."""
        run = contextvars.copy_context().run
        self._is_busy = True
        self._idle.clear()
        try:
            return await _to_the_end(self._running_loop().run_in_executor(None, run, call), undo)
        finally:
            self._is_busy = False
            self._idle.set()

    @contextlib.contextmanager
    def _in_queue(self, waiter: Waiter) -> Iterator[None]:
        """Keeps a waiter in the queue; listens to the manager while there is one."""
        if not self._queue:
            self._stop_listening = self._manager.add_room_listener(self._hear_of_room)
        self._queue.join(waiter)
        self._publish()
        try:
            yield
        finally:
            was_first = waiter is self._queue.first
            self._queue.leave(waiter)
            self._publish()
            if not self._queue:
                self._stop_listening()
            elif was_first or waiter.refusal is not None:
                self._wake_first()

    async def _until_awake(self, waiter: Waiter, deadline: float | None) -> None:
        """Waits until a waiter should try, and can."""
        try:
            async with asyncio.timeout_at(deadline):
                await waiter.wake.wait()
                if waiter.refusal is not None:
                    raise waiter.refusal
                await self._until_idle()
        except TimeoutError:
            why = "It was not its turn." if waiter.shortage is None else waiter.shortage
            raise WaitTimeoutError(
                f"{waiter.asks} waited {waiter.timeout_seconds} seconds for room, at last behind "
                f"{self._queue.num_before(waiter)} others. {why}"
            ) from waiter.shortage
        # Read before the try: room that another thread makes from now on is not overlooked.
        waiter.num_room_changes = self._manager.num_room_changes
        waiter.is_trying = True
        waiter.wake.clear()

    def _fall_asleep(self, waiter: Waiter) -> None:
        """Lets a waiter sleep that has tried in vain, unless its sleep would never end."""
        waiter.is_trying = False
        self._publish()
        if waiter.entries and waiter is not self._queue.first:
            self._wake_first()  # To find out whether all wait now.
        elif waiter.entries and waiter.is_asleep:
            self._refuse_if_stalled()

    def _publish(self) -> None:
        """Tells the other event loops which waiters sleep here; after each change of that."""
        first, rest = self._queue.first, None
        if first is not None and first.entries and first.is_asleep:
            sleepers = (waiter for waiter in self._queue.extending() if waiter.is_asleep)
            rest = Rest(tuple(sleepers), first.num_room_changes)
        self._manager.stalls.publish(self, rest)

    def _refuse_if_stalled(self) -> None:
        """Refuses the last of all waiters that extend, on whichever loop, if no wait would end."""
        manager = self._manager
        try:
            candidates = manager.stalls.candidates(
                lambda: manager.num_room_changes, manager.list_handles
            )
        except RuntimeError:
            return  # The manager was closed meanwhile, which wakes all waiters.
        for room, waiter in candidates:
            if room is self:
                waiter.refusal = OutOfBlocksError(
                    f"{waiter.asks}: every request that holds blocks waits for more, so that no "
                    "wait would end. Deallocate this one, or swap it out, and the others can go on."
                )
                self._wake(waiter)
                return
            if isinstance(room, WaitingRoom) and room._call_soon(room._refuse_if_stalled):
                return  # It asks again there, where nothing changes meanwhile.

    def _hear_of_room(self) -> None:
        """Wakes who should try; called from any thread."""
        self._call_soon(self._wake_due)

    def _call_soon(self, callback: Callable[[], None]) -> bool:
        """Calls on the loop, from any thread; returns False if the loop is closed."""
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # The loop is closed: nothing waits there any more.
            return False
        return True

    def _wake(self, waiter: Waiter) -> None:
        waiter.wake.set()
        self._publish()

    def _wake_due(self) -> None:
        """Wakes each waiter that should try after a change of room."""
        for waiter in self._who_may_try():
            self._wake(waiter)
        for waiter in self._queue.extending():
            if not all(entry.is_live and entry.is_resident for entry in waiter.entries):
                self._wake(waiter)  # To hear that its request is deallocated or swapped out.

    def _who_may_try(self) -> Iterator[Waiter]:
        return self._queue.who_may_try(self._manager.preempts)

    def _wake_first(self) -> None:
        if self._queue.first is not None:
            self._wake(self._queue.first)


async def _to_the_end(
    work: "asyncio.Future[Result]", undo: Callable[[Result], None] | None = None
) -> Result:
    """Waits for work that must not be left half done.

    Args:
      work: What is under way.
      undo: Takes the result back if nobody gets it.

    Returns:
      Its result.

    Raises:
      CancelledError: If cancelled meanwhile, but only when the work is done.
    """
    cancelled: asyncio.CancelledError | None = None
    while not work.done():
        try:
            await asyncio.wait([work])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is None:
        return work.result()
    failure = work.exception()
    if failure is None and undo is not None:
        undo(work.result())
    raise cancelled from failure


def _do_nothing() -> None:
    """Stops listening where nobody listens."""
