"""The calls that wait for room, and the order in which they are served."""

import asyncio
import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from ferrum_jax.checks import check_number
from ferrum_jax.errors import FerrumError
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.types import Device, Priority


@dataclasses.dataclass(eq=False, kw_only=True)
class Waiter:
    """One call that waits for room.

    Attributes:
      asks: What the call asks for, for messages.
      priority: How urgent the call is.
      devices: Returns the devices on which the call may take room.
      may_skip_queue: Returns whether to try although other waiters come first: because the call
        takes no room from them, or to learn at once why it can never be served.
      requests: The requests to extend, all on one device; empty if the call begins something new.
      timeout_seconds: How long to wait; None for no limit.
      wake: Set when the waiter should try. It is set at first: each waiter tries once.
      shortage: The error of the last try.
      refusal: The error that ends the wait.
      is_trying: Whether a try is under way, perhaps in a thread.
      num_room_changes: Changes of room before the last try.
      arrival: Sort key among waiters, in seconds; set by `WaitingQueue.join`.
    """

    asks: str
    priority: Priority
    devices: Callable[[], Collection[Device]]
    may_skip_queue: Callable[[], bool]
    requests: tuple[LiveRequest, ...] = ()
    timeout_seconds: float | None = None
    wake: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    shortage: FerrumError | None = None
    refusal: FerrumError | None = None
    is_trying: bool = False
    num_room_changes: int = 0
    arrival: float = 0.0

    def __post_init__(self) -> None:
        """Checks the timeout, and allows the first try."""
        timeout_seconds = self.timeout_seconds
        if (
            timeout_seconds is not None
            and not check_number("timeout_seconds", timeout_seconds) >= 0
        ):
            raise ValueError(f"timeout_seconds must be at least 0, got {timeout_seconds}.")
        self.wake.set()

    @property
    def is_asleep(self) -> bool:
        """Whether the waiter has tried in vain, and nothing has happened since."""
        return not (self.wake.is_set() or self.is_trying)

    @property
    def device(self) -> Device | None:
        """The device of the requests to extend; None if the call begins something new."""
        return self.requests[0].pool.device if self.requests else None


class WaitingQueue:
    """The waiters in the order in which they are served. Not thread-safe.

    Waiters that extend come before those that begin something new, since others may be waiting for
    the blocks that they hold. Within each group, a level of priority is worth `ageing_seconds` of
    waiting: with 10, a Normal request goes before a High one that arrives more than 10 seconds
    later. So no waiter is overtaken for ever, and two waiters never change places. Equal ones are
    served in the order of arrival.

    Waiters for different devices do not hold each other up: each claims the devices on which it
    waits for room.

    Args:
      devices: All devices on which calls can wait for room.
      ageing_seconds: Waiting time that is worth one level of `Priority`.
      clock: Returns seconds that only grow.

    Raises:
      ValueError: Unless `ageing_seconds` is positive and finite.
    """

    def __init__(
        self, devices: Collection[Device], ageing_seconds: float, clock: Callable[[], float]
    ):
        if not 0 < check_number("ageing_seconds", ageing_seconds) < math.inf:
            raise ValueError(f"ageing_seconds must be positive and finite, got {ageing_seconds}.")
        self._devices = frozenset(devices)
        self._ageing_seconds, self._clock = ageing_seconds, clock
        self._numbers = itertools.count()
        self._waiters: list[tuple[bool, float, int, Waiter]] = []

    def join(self, waiter: Waiter) -> None:
        """Adds a waiter that arrives now."""
        waiter.arrival = self._arrival(waiter.priority)
        place = not waiter.requests, waiter.arrival, next(self._numbers), waiter
        bisect.insort(self._waiters, place)

    def discard(self, waiter: Waiter) -> None:
        """Removes a waiter, served or not."""
        del self._waiters[self.num_before(waiter)]

    def num_before(self, waiter: Waiter) -> int:
        """Returns how many waiters are served before a waiter."""
        return next(i for i, other in enumerate(self) if other is waiter)

    def eligible_waiters(self, preempts: bool) -> Iterator[tuple[Waiter, frozenset[Device]]]:
        """Finds the waiters that may try now: on each device, the first that waits for its room.

        Args:
          preempts: Whether requests are swapped out for more urgent ones. Then a waiter may also
            try where it is more urgent than all that come before it there, if these all extend:
            it need not wait for blocks that it can take from them.

        Yields:
          Each waiter, with the devices that it must not use.
        """
        claims = dict[Device, float]()
        for waiter in self:
            if len(claims) == len(self._devices) and min(claims.values()) == math.inf:
                return
            devices = waiter.devices()
            excluded = frozenset(d for d, level in claims.items() if waiter.priority <= level)
            if not excluded.issuperset(devices):
                yield waiter, excluded
            level = waiter.priority if preempts and waiter.requests else math.inf
            claims.update({device: max(claims.get(device, -1), level) for device in devices})

    def devices_before(self, priority: Priority) -> frozenset[Device]:
        """Returns the devices for which a new request of this priority would have to wait."""
        newcomer = True, self._arrival(priority)
        before = itertools.takewhile(lambda place: place[:2] <= newcomer, self._waiters)
        return frozenset(device for *_, waiter in before for device in waiter.devices())

    def extending(self) -> dict[Device, list[Waiter]]:
        """Returns the waiters that extend, by device, the first to be served first."""
        lines = dict[Device, list[Waiter]]()
        for waiter in self:
            if waiter.device is None:
                break  # Those that extend come first.
            lines.setdefault(waiter.device, []).append(waiter)
        return lines

    def __len__(self) -> int:
        """Number of waiters."""
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """The waiters, the first to be served first."""
        return (waiter for *_, waiter in self._waiters)

    def _arrival(self, priority: Priority) -> float:
        """Returns now − priority × `ageing_seconds`: the effective time of arrival."""
        return self._clock() - priority * self._ageing_seconds


def can_extend_together(requests: Sequence[LiveRequest]) -> bool:
    """Returns whether one call can extend requests, if there is room: they are on one device."""
    is_one_device = len({request.pool.device for request in requests}) <= 1
    return is_one_device and all(r.is_live and r.is_resident for r in requests)


def takes_no_block(requests: Sequence[LiveRequest], num_tokens: int) -> bool:
    """Returns whether requests can be extended without free blocks, or never.

    Args:
      requests: The requests.
      num_tokens: Additional tokens for each.
    """
    if not can_extend_together(requests):
        return True
    if any(r.num_tokens + num_tokens > r.allocation.max_sequence_length for r in requests):
        return True
    return all(r.pool.counts.needs_no_free_block(r.seq_id, num_tokens) for r in requests)


def names_of(requests: Iterable[LiveRequest]) -> str:
    """Returns the ids of requests for a message, at most three of them."""
    names = [repr(request.request_id) for request in requests]
    first = ", ".join(names[:3])
    return first if len(names) <= 3 else f"{first} and {len(names) - 3} others"
