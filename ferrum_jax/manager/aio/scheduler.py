"""How calls wait on an event loop: for room, for their turn, and for work in a thread."""

import asyncio
import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ferrum_jax.errors import OutOfBlocksError, OutOfRowsError, WaitTimeoutError
from ferrum_jax.manager.aio.queue import Waiter, WaitingQueue, can_extend_together
from ferrum_jax.manager.aio.stalls import Sleepers, stalls_of
from ferrum_jax.manager.pools import Pools
from ferrum_jax.types import Device

Result = TypeVar("Result")
Exclude = frozenset[Device]
"""Devices on which a call must leave the room to others."""

_SHORTAGES = (OutOfBlocksError, OutOfRowsError)


class Scheduler:
    """Runs the calls of one event loop: each as soon as there is room, and no thread is busy.

    One call at a time runs in a thread, and no other call begins meanwhile: it would block the loop
    on the manager's lock. Calls that wait for room try before the next call in a thread begins.

    Each waiter tries by itself when it is woken, and acquires room and returns without an await
    between. So a cancellation finds a waiter that has nothing, or a call that is done.

    Args:
      pools: The pools in which calls wait for room.
      queue: The order of the waiters.
    """

    def __init__(self, pools: Pools, queue: WaitingQueue):
        self._pools, self._queue, self._stalls = pools, queue, stalls_of(pools)
        self._jobs, self._is_busy, self._idle = asyncio.Lock(), False, asyncio.Event()
        self._num_pending = 0  # Calls that go on as soon as no thread is busy.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop_listening: Callable[[], None] = _do_nothing

    async def wait(
        self,
        waiter: Waiter,
        call: Callable[[Exclude], Result],
        undo: Callable[[Result], None] | None = None,
    ) -> Result:
        """Runs a call as soon as there is room and it is its turn.

        Args:
          waiter: The place in the queue.
          call: Raises a shortage while there is no room.
          undo: Takes the result back. Given if the call waits for the device: the call then runs in
            a thread, and may be cancelled before the result arrives.

        Returns:
          What the call returns.

        Raises:
          WaitTimeoutError: If there was no room in the waiter's time.
          OutOfBlocksError: If all calls that could make room wait for it, this one last.
        """
        loop, deadline = self._running_loop(), None
        if waiter.timeout_seconds is not None:
            deadline = loop.time() + waiter.timeout_seconds
        if undo is None and not self._queue and not self._is_busy:
            try:
                return call(frozenset())  # The usual case: there is nothing to wait for.
            except _SHORTAGES as shortage:
                waiter.shortage = shortage

        with self._in_queue(waiter):
            while True:
                await self._until_awake(waiter, deadline)
                exclude = self._eligible_waiters().get(waiter)
                if exclude is None and waiter.may_skip_queue():
                    exclude = frozenset()
                if exclude is not None:
                    try:
                        attempt = functools.partial(call, exclude)
                        return attempt() if undo is None else await self._in_thread(attempt, undo)
                    except _SHORTAGES as error:
                        waiter.shortage = error
                self._fall_asleep(waiter)

    async def run_in_thread(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs a call in a worker thread; it completes even if cancelled."""
        self._running_loop()
        async with self._jobs:
            while self._is_busy or self._has_pending_calls():
                await (self._idle.wait() if self._is_busy else asyncio.sleep(0))
            return await self._in_thread(functools.partial(call, *args, **kwargs))

    async def run_on_loop(self, call: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Runs a call as soon as no thread is busy."""
        self._running_loop()
        await self._until_idle()
        return call(*args, **kwargs)

    async def run_uncancellable(
        self, call: Callable[..., Result], *args: Any, **kwargs: Any
    ) -> Result:
        """Runs a call as soon as no thread is busy, even if cancelled."""
        self._running_loop()
        cancelled: asyncio.CancelledError | None = None
        while self._is_busy:
            try:
                await self._until_idle()
            except asyncio.CancelledError as error:
                cancelled = error
        try:
            return call(*args, **kwargs)
        finally:
            if cancelled is not None:
                raise cancelled

    async def _until_idle(self) -> None:
        """Waits until no thread is busy; the caller then comes before the next thread."""
        self._num_pending += 1
        try:
            while self._is_busy:
                await self._idle.wait()
        finally:
            self._num_pending -= 1

    def _has_pending_calls(self) -> bool:
        """Returns whether calls are about to run on the loop, which a thread would hold up."""
        return self._num_pending > 0 or not all(waiter.is_asleep for waiter in self._queue)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        """Returns the running loop, which must be the one of the first call."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        if loop is not self._loop:
            raise RuntimeError(
                "An AsyncKvCacheManager is used from a second event loop, where nothing would "
                "wake the calls that wait in the first. Make one for each loop; they may share "
                "the wrapped manager."
            )
        return loop

    async def _in_thread(
        self, call: Callable[[], Result], undo: Callable[[Result], None] | None = None
    ) -> Result:
        """Runs a call in a worker thread, while none is busy."""
        run = contextvars.copy_context().run
        self._is_busy = True
        self._idle.clear()
        try:
            return await _completed(self._running_loop().run_in_executor(None, run, call), undo)
        finally:
            self._is_busy = False
            self._idle.set()

    @contextlib.contextmanager
    def _in_queue(self, waiter: Waiter) -> Iterator[None]:
        """Keeps a waiter in the queue; listens to the pools while there is one."""
        if not self._queue:
            self._stop_listening = self._pools.add_room_listener(self._on_room_change)
        self._queue.join(waiter)
        self._publish()
        try:
            yield
        finally:
            held_up_others = waiter in self._eligible_waiters() or waiter.refusal is not None
            self._queue.discard(waiter)
            self._publish()
            if not self._queue:
                self._stop_listening()
            elif held_up_others:
                self._wake(*self._eligible_waiters())

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
        waiter.num_room_changes = self._pools.num_room_changes
        waiter.is_trying = True
        waiter.wake.clear()

    def _fall_asleep(self, waiter: Waiter) -> None:
        """Puts a waiter to sleep that has tried in vain, unless its sleep would never end."""
        waiter.is_trying = False
        self._publish()
        if waiter.device is None:
            return
        first = self._queue.extending()[waiter.device][0]
        if waiter is not first:
            self._wake(first)  # To find out whether all wait now.
        elif waiter.is_asleep:
            self._refuse_if_stalled(waiter.device)

    def _publish(self) -> None:
        """Tells the other event loops which waiters sleep here; after each change of that."""
        sleepers = {
            device: Sleepers(tuple(w for w in line if w.is_asleep), line[0].num_room_changes)
            for device, line in self._queue.extending().items()
            if line[0].is_asleep
        }
        self._stalls.publish(self, sleepers)

    def _refuse_if_stalled(self, device: Device) -> None:
        """Refuses the last waiter that extends on a device, on any loop, if no wait would end."""
        try:
            candidates = self._stalls.candidates(self._pools, device)
        except RuntimeError:
            return  # The manager was closed meanwhile, which wakes all waiters.
        for scheduler, waiter in candidates:
            if scheduler is self:
                waiter.refusal = OutOfBlocksError(
                    f"{waiter.asks}: every request that holds blocks waits for more on {device}, "
                    "so that no wait would end. Deallocate this one, or swap it out, and the "
                    "others can go on."
                )
                self._wake(waiter)
                return
            if isinstance(scheduler, Scheduler) and scheduler.refuse_if_stalled_soon(device):
                return  # It looks again there, where nothing changes meanwhile.

    def refuse_if_stalled_soon(self, device: Device) -> bool:
        """Looks for a stall on this loop, from any thread; returns False if the loop is closed."""
        return self._call_soon(self._refuse_if_stalled, device)

    def _on_room_change(self) -> None:
        """Wakes the waiters that should try; called from any thread."""
        self._call_soon(self._wake_after_change)

    def _call_soon(self, callback: Callable[..., None], *args: Any) -> bool:
        """Calls on the loop, from any thread; returns False if the loop is closed."""
        if self._loop is None:
            return False
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # The loop is closed: nothing waits there any more.
            return False
        return True

    def _wake(self, *waiters: Waiter) -> None:
        for waiter in waiters:
            waiter.wake.set()
        self._publish()

    def _wake_after_change(self) -> None:
        """Wakes each waiter that should try after a change of room."""
        # Waiters raise their error if their requests were deallocated, swapped out or moved apart.
        failing = (w for w in self._queue if not can_extend_together(w.requests))
        self._wake(*self._eligible_waiters(), *failing)

    def _eligible_waiters(self) -> dict[Waiter, Exclude]:
        return dict(self._queue.eligible_waiters(self._pools.preempts))


async def _completed(
    work: "asyncio.Future[Result]", undo: Callable[[Result], None] | None = None
) -> Result:
    """Waits until work is complete, even if cancelled.

    Args:
      work: The work.
      undo: Takes the result back if the wait is cancelled.

    Returns:
      The result of the work.

    Raises:
      CancelledError: If cancelled meanwhile; raised when the work is complete.
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
    """Stands for the removal of a listener that was not added."""
