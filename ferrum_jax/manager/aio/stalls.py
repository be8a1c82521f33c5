"""Detection of stalls: each request that holds blocks waits for more, on any event loop."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Hashable, Mapping

from ferrum_jax.errors import InvalidHandleError
from ferrum_jax.interfaces import KvCacheHandle
from ferrum_jax.manager.aio.queue import Waiter
from ferrum_jax.manager.pools import Pools
from ferrum_jax.types import Device


@dataclasses.dataclass(frozen=True)
class Sleepers:
    """Waiters of one event loop and device that sleep until room is made. Threads share it.

    Attributes:
      waiters: Waiters that extend and sleep, in the order in which they are served.
      num_room_changes: Changes of room before the first one tried last.
    """

    waiters: tuple[Waiter, ...]
    num_room_changes: int


class Stalls:
    """What the event loops over one manager know of each other. Thread-safe.

    Each loop publishes the sleepers of each device after the first waiter there has tried in vain.
    A device is stalled when the sleepers of all loops hold all of its blocks, and room was not made
    since any of their tries; the loop that publishes last detects it.
    """

    def __init__(self) -> None:
        # Each access is one atomic operation.
        self._sleepers: dict[Hashable, Mapping[Device, Sleepers]] = {}

    def publish(self, loop: Hashable, sleepers: Mapping[Device, Sleepers]) -> None:
        """Replaces what is known of one loop.

        Args:
          loop: Names the loop.
          sleepers: The sleepers of each device where the first waiter sleeps.
        """
        if sleepers:
            self._sleepers[loop] = sleepers
        else:
            self._sleepers.pop(loop, None)

    def candidates(self, pools: Pools, device: Device) -> list[tuple[Hashable, Waiter]]:
        """Returns the waiters to refuse on a device, the best one first; none unless it is stalled.

        Args:
          pools: The pools that the loops share.
          device: The device to look at.

        Returns:
          Pairs of a loop and one of its waiters. The last to be served comes first, of those that
          would make room by their end if there are any.
        """
        num_changes = pools.num_room_changes
        asleep = [
            (loop, waiter)
            for loop, published in self._sleepers.copy().items()
            if device in published and published[device].num_room_changes == num_changes
            for waiter in published[device].waiters
        ]
        names = {r.request_id for _, waiter in asleep for r in waiter.requests if r.is_live}
        manager = pools.devices[device]
        with manager.access.reading():
            handles = manager.list_handles()
        is_stalled = all(name in names or not _holds_blocks(handle) for name, handle in handles)
        if not is_stalled or pools.num_room_changes != num_changes:
            return []
        useful = [item for item in asleep if any(any(r.num_blocks) for r in item[1].requests)]
        return sorted(useful or asleep, key=lambda item: item[1].arrival)[::-1]


_stalls: weakref.WeakKeyDictionary[Pools, Stalls] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def stalls_of(pools: Pools) -> Stalls:
    """Returns the one `Stalls` that all event loops over these pools share."""
    with _lock:
        return _stalls.setdefault(pools, Stalls())


def _holds_blocks(handle: KvCacheHandle) -> bool:
    try:
        return handle.stats().blocks_allocated > 0
    except InvalidHandleError:  # Another thread has just deallocated the request.
        return False
