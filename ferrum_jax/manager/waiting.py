"""Who waits for room, and who of them comes first."""

import asyncio
import bisect
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

from ferrum_jax.checks import check_number
from ferrum_jax.errors import FerrumError
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.types import Priority


@dataclasses.dataclass(eq=False, kw_only=True)
class Waiter:
    """One call that waits for room.

    Attributes:
      asks: What it asks for, for messages.
      priority: How urgent it is.
      may_go_ahead: Says whether to try it although others come first: because it takes no room
        from them, or to hear at once why it can never be served.
      entries: The requests that it wants to extend; none if it begins something new.
      timeout_seconds: How long it waits at most; None for ever.
      wake: Set when it should try. It is set at first: everybody tries once.
      shortage: Why it was not served when it tried last.
      refusal: Why it must not wait any longer.
      is_trying: Whether it is trying just now, perhaps in a thread.
      num_room_changes: Changes of room that there had been before it tried last.
      came: Its place among equal waiters, in seconds; set when it joins a queue.
    """

    asks: str
    priority: Priority
    may_go_ahead: Callable[[], bool]
    entries: tuple[LiveRequest, ...] = ()
    timeout_seconds: float | None = None
    wake: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    shortage: FerrumError | None = None
    refusal: FerrumError | None = None
    is_trying: bool = False
    num_room_changes: int = 0
    came: float = 0.0

    def __post_init__(self) -> None:
        """Checks the timeout, and lets it try once."""
        timeout_seconds = self.timeout_seconds
        if (
            timeout_seconds is not None
            and not check_number("timeout_seconds", timeout_seconds) >= 0
        ):
            raise ValueError(f"timeout_seconds must be at least 0, got {timeout_seconds}.")
        self.wake.set()

    @property
    def is_asleep(self) -> bool:
        """Whether it has tried in vain, and nothing has happened since."""
        return not (self.wake.is_set() or self.is_trying)


class WaitingQueue:
    """The waiters in the order in which they are served. Not thread-safe.

    Those who extend come before those who begin, since others may be waiting for the blocks that
    they hold. Among each, a level of priority is worth `ageing_seconds` of waiting: with 10, a
    Normal request goes before a High one that comes more than 10 seconds later. So nobody is
    overtaken for ever, and two waiters never change places. Equal ones are served in the order
    in which they came.

    Args:
      ageing_seconds: Waiting time that is worth one level of `Priority`.
      clock: Returns seconds that only grow.

    Raises:
      ValueError: Unless `ageing_seconds` is positive and finite.
    """

    def __init__(self, ageing_seconds: float, clock: Callable[[], float]):
        if not 0 < check_number("ageing_seconds", ageing_seconds) < math.inf:
            raise ValueError(f"ageing_seconds must be positive and finite, got {ageing_seconds}.")
        self._ageing_seconds, self._clock = ageing_seconds, clock
        self._numbers = itertools.count()
        self._waiters: list[tuple[bool, float, int, Waiter]] = []

    @property
    def first(self) -> Waiter | None:
        """Who is served next."""
        return self._waiters[0][-1] if self._waiters else None

    def who_may_try(self, preempts: bool) -> Iterator[Waiter]:
        """Finds whose turn it is: the first one's.

        Args:
          preempts: Whether a request is swapped out for a more urgent one. Then it is also the
            turn of each who is more urgent than all before it, if these all extend: it need not
            wait for blocks that it can take from them.
        """
        most_urgent = -1
        for waiter in self:
            if waiter.priority > most_urgent:
                yield waiter
            if not (preempts and waiter.entries):
                return
            most_urgent = max(most_urgent, waiter.priority)

    def join(self, waiter: Waiter) -> None:
        """Adds a waiter. It came now."""
        waiter.came = self._came(waiter.priority)
        place = not waiter.entries, waiter.came, next(self._numbers), waiter
        bisect.insort(self._waiters, place)

    def leave(self, waiter: Waiter) -> None:
        """Removes a waiter, served or not."""
        del self._waiters[self.num_before(waiter)]

    def is_anyone_before(self, priority: Priority) -> bool:
        """Says whether a request that came now, to begin something, would not be the first."""
        return bool(self._waiters) and self._waiters[0][:2] <= (True, self._came(priority))

    def num_before(self, waiter: Waiter) -> int:
        """Returns how many are served before a waiter."""
        return next(i for i, other in enumerate(self) if other is waiter)

    def extending(self) -> Iterator[Waiter]:
        """The waiters that extend: those come first."""
        return itertools.takewhile(lambda waiter: waiter.entries, self)

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter]:
        """The waiters, the first to be served first."""
        return (waiter for *_, waiter in self._waiters)

    def _came(self, priority: Priority) -> float:
        """Returns when a waiter of now came, were all of the lowest priority."""
        return self._clock() - priority * self._ageing_seconds


def takes_no_block(entries: Sequence[LiveRequest], num_tokens: int) -> bool:
    """Says whether requests can be extended in the blocks that they hold, or not at all.

    Args:
      entries: The requests.
      num_tokens: How many more for each.
    """
    if not all(entry.is_live and entry.is_resident for entry in entries):
        return True
    return any(
        entry.num_tokens + num_tokens > entry.allocation.max_sequence_length for entry in entries
    ) or all(entry.pool.counts.num_new_blocks(entry.seq_id, num_tokens) == 0 for entry in entries)


def names_of(entries: Sequence[LiveRequest]) -> str:
    """Says briefly which requests these are."""
    first = ", ".join(repr(entry.request_id) for entry in entries[:3])
    return first if len(entries) <= 3 else f"{first} and {len(entries) - 3} others"
