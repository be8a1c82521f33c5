"""Detection of stalls: each request that holds blocks waits for more, on any event loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

from ferrum_jax.errors import InvalidHandleError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.waiting import Waiter
from ferrum_jax.types import RequestId


@dataclasses.dataclass(frozen=True)
class Rest:
    """The waiters of one event loop that sleep until room is made. Immutable: threads share it.

    Attributes:
      waiters: Waiters that extend and sleep, in the order in which they are served.
      num_room_changes: Changes of room that there had been before the first one tried last.
    """

    waiters: tuple[Waiter, ...]
    num_room_changes: int


class Stalls:
    """What the event loops over one manager know of each other. Thread-safe.

    Each loop publishes its sleepers after its first waiter has tried in vain. The manager is
    stalled when the sleepers of all loops hold all blocks, and room was not made since any of
    their tries; the loop that publishes last sees it.
    """

    def __init__(self) -> None:
        self._rests: dict[Hashable, Rest] = {}  # Each access is one atomic operation.

    def publish(self, loop: Hashable, rest: Rest | None) -> None:
        """Replaces what is known of one loop.

        Args:
          loop: Names the loop.
          rest: Its sleepers; None while its first waiter is awake, or nothing waits.
        """
        if rest is None:
            self._rests.pop(loop, None)
        else:
            self._rests[loop] = rest

    def candidates(
        self,
        count_changes: Callable[[], int],
        list_handles: Callable[[], list[tuple[RequestId, KvCacheHandle]]],
    ) -> list[tuple[Hashable, Waiter]]:
        """Returns which waiters to refuse, the best one first; none unless the manager is stalled.

        Args:
          count_changes: Returns how often room was made in the manager so far.
          list_handles: Returns all live requests of the manager.

        Returns:
          Pairs of a loop and one of its waiters. The last to be served comes first, of those whose
          end would make room if there are any.
        """
        num_changes = count_changes()
        rests = self._rests.copy().items()
        asleep = [
            (loop, waiter)
            for loop, rest in rests
            for waiter in rest.waiters
            if rest.num_room_changes == num_changes
        ]
        names = {e.request_id for _, waiter in asleep for e in waiter.entries if e.is_live}
        is_stalled = all(
            name in names or not _holds_blocks(handle) for name, handle in list_handles()
        )
        if not is_stalled or count_changes() != num_changes:
            return []
        useful = [item for item in asleep if any(e.num_blocks for e in item[1].entries)]
        return sorted(useful or asleep, key=lambda item: item[1].came)[::-1]


def _holds_blocks(handle: KvCacheHandle) -> bool:
    try:
        return handle.stats().blocks_allocated > 0
    except InvalidHandleError:  # Another thread was faster.
        return False
