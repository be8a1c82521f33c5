"""Which caches to move so that several pools are about equally full, for the fewest bytes.

The choice is a partition problem, so that no quick rule is always right. Here caches are looked
at one by one, the largest first, and each may stay or go to any other pool. When the states so
reached become too many, equal ones are merged, and the most promising are kept: those whose bytes
moved so far, plus the least that would still have to move if caches could be cut up, are the
fewest. For few caches, 13 in two pools or 8 in three, nothing is dropped, and the plan is the best
there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ferrum_jax.checks import check_number
from ferrum_jax.types import Device, RequestId

_MAX_STATES = 8192
_MAX_WORK = 400_000  # States times pools times caches.
_MIN_STATES = 16
_BISECTIONS = 10  # To a thousandth of a pool.
_MAX_ORDERS = 200  # That are tried if the first one leads to a dead end.
_HASTE = 2.0  # Above 1, so that states which are far from the goal are dropped first.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLoad:
    """What one cache takes.

    Attributes:
      request_id: Whose.
      num_bytes: Bytes that move with it, and that it takes where it goes.
      freed_bytes: Bytes that it leaves free behind it: less than `num_bytes` where it shares
        blocks.
    """

    request_id: RequestId
    num_bytes: int
    freed_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolLoad:
    """How full one pool is.

    Attributes:
      capacity_bytes: Bytes that it may grow to.
      used_bytes: Bytes of the blocks in use.
      num_free_rows: Sequences that it could hold besides those that it does.
      caches: Those that may move.
    """

    capacity_bytes: int
    used_bytes: int
    num_free_rows: int
    caches: tuple[CacheLoad, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMove:
    """One cache that moves.

    Attributes:
      request_id: Whose.
      source: From where.
      target: To where.
      num_bytes: How many bytes.
    """

    request_id: RequestId
    source: Device
    target: Device
    num_bytes: int


def plan_moves(pools: Mapping[Device, PoolLoad], tolerance: float) -> list[CacheMove]:
    """Plans to bring the pools' utilisations within a tolerance of each other.

    Utilisation is bytes in use over capacity. If no plan reaches the tolerance, the one whose
    utilisations come closest is returned, of several the one that moves the fewest bytes. A cache
    that would leave nothing free behind it, since all its blocks are shared, stays.

    Args:
      pools: How full each one is.
      tolerance: Most by which two utilisations may differ, in [0, 1].

    Returns:
      The moves, in an order in which each one fits; empty if none is needed, or none helps.

    Raises:
      ValueError: If the tolerance is not in [0, 1].

    Example:
      >>> cache = CacheLoad(request_id="chat-1", num_bytes=30, freed_bytes=30)
      >>> full = PoolLoad(capacity_bytes=100, used_bytes=80, num_free_rows=4, caches=(cache,))
      >>> empty = PoolLoad(capacity_bytes=100, used_bytes=10, num_free_rows=4, caches=())
      >>> [move] = plan_moves({Device("gpu", 0): full, Device("gpu", 1): empty}, tolerance=0.2)
      >>> move.request_id, str(move.target), move.num_bytes
      ('chat-1', 'gpu:1', 30)
    """
    if not 0 <= check_number("tolerance", tolerance) <= 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}.")
    loads = list(pools.values())
    caches = [
        (home, cache)
        for home, pool in enumerate(loads)
        for cache in pool.caches
        if cache.freed_bytes > 0
    ]
    caches.sort(key=lambda item: -item[1].num_bytes)
    capacities = np.asarray([pool.capacity_bytes for pool in loads], float)
    now = _States.of(loads)
    if not caches or _spread(now.used, capacities)[0] <= tolerance:
        return []
    states = _search(now, caches, capacities, tolerance)
    apart = np.maximum(_spread(states.used, capacities), tolerance)
    for state in np.lexsort((states.cost, apart)):
        in_order = _in_order(_moves_to(states.targets[state], caches, list(pools)), pools)
        if in_order is not None:
            return in_order
    return []


@dataclasses.dataclass(frozen=True)
class _States:
    """Where a choice for each of some caches leads; K states, C caches, D pools.

    Attributes:
      used: i64[K, D]. Bytes in use then.
      rows: i64[K, D]. Sequences that each pool could hold besides; negative for too many.
      cost: i64[K]. Bytes that move.
      targets: i64[K, C]. The pool in which each cache is then.
    """

    used: np.ndarray
    rows: np.ndarray
    cost: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, pools: Sequence[PoolLoad]) -> _States:
        """Returns the one state in which nothing is chosen yet."""
        used = np.asarray([[pool.used_bytes for pool in pools]], np.int64)
        rows = np.asarray([[pool.num_free_rows for pool in pools]], np.int64)
        return cls(used, rows, np.zeros(1, np.int64), np.zeros((1, 0), np.int64))

    def part(self, index: np.ndarray) -> _States:
        """Returns some of the states."""
        return _States(self.used[index], self.rows[index], self.cost[index], self.targets[index])

    def choosing(self, home: int, cache: CacheLoad) -> _States:
        """Returns each state with each place for one more cache, which is at `home` now."""
        num_states, num_pools = self.used.shape
        places = np.arange(num_pools)
        arrives = np.eye(num_pools, dtype=np.int64)
        arrives[home] = 0
        leaves = np.zeros_like(arrives)
        leaves[places != home, home] = 1
        change = arrives * cache.num_bytes - leaves * cache.freed_bytes
        used = (self.used[:, None] + change).reshape(-1, num_pools)
        rows = (self.rows[:, None] + leaves - arrives).reshape(-1, num_pools)
        cost = (self.cost[:, None] + (places != home) * cache.num_bytes).reshape(-1)
        targets = np.repeat(self.targets, num_pools, axis=0)
        return _States(used, rows, cost, np.column_stack([targets, np.tile(places, num_states)]))

    def merged(self, num_left: int) -> _States:
        """Returns the cheapest of those states that are equally full.

        They are different states for all that if one has fewer rows left, so that these may not
        do for the caches that are still to be placed.

        Args:
          num_left: How many caches these are.
        """
        cheapest_first = self.part(np.argsort(self.cost, kind="stable"))
        # Sorting whole rows is slow; two different ones have the same hash once in 2**64 times.
        rows = np.minimum(cheapest_first.rows, num_left)
        numbers = np.concatenate([cheapest_first.used, rows], axis=1)
        factors = np.random.default_rng(0).integers(2**62, size=numbers.shape[1])
        _, first = np.unique(numbers @ factors, return_index=True)
        return cheapest_first.part(first)


def _search(
    states: _States,
    caches: Sequence[tuple[int, CacheLoad]],
    capacities: np.ndarray,
    tolerance: float,
) -> _States:
    """Returns where the most promising choices lead.

    Args:
      states: How full the pools are now.
      caches: Each cache that may move, with the pool in which it is; the largest first.
      capacities: f64[D]. Bytes of each pool.
      tolerance: Most by which two utilisations should differ.
    """
    work = len(caches) * len(capacities)
    width = max(_MIN_STATES, min(_MAX_STATES, _MAX_WORK // work))
    for place, (home, cache) in enumerate(caches, start=1):
        states = states.choosing(home, cache)
        if len(states.cost) > width:
            states = states.merged(len(caches) - place)
        if len(states.cost) > width:
            rest = _least_bytes(states.used, capacities, tolerance)
            states = states.part(np.argsort(states.cost + _HASTE * rest)[:width])
    return states


def _moves_to(
    targets: np.ndarray, caches: Sequence[tuple[int, CacheLoad]], devices: Sequence[Device]
) -> list[CacheMove]:
    """Returns the moves that bring each cache to its target, in no special order."""
    return [
        CacheMove(
            request_id=cache.request_id,
            source=devices[home],
            target=devices[target],
            num_bytes=cache.num_bytes,
        )
        for (home, cache), target in zip(caches, targets, strict=True)
        if target != home
    ]


def _spread(used: np.ndarray, capacities: np.ndarray) -> np.ndarray:
    """Returns f64[K], by how much the utilisations of each state differ at most."""
    shares = used / capacities
    # Rounded, since 0.67 - 0.62 is more than 0.05.
    return np.round(shares.max(axis=1) - shares.min(axis=1), 9)


def _least_bytes(used: np.ndarray, capacities: np.ndarray, tolerance: float) -> np.ndarray:
    """Returns f64[K], the bytes that would have to move if caches could be cut up.

    For any window of utilisations, as wide as the tolerance, what is above it has to leave, and
    what is missing below it to arrive. The best window is where the two are equal.
    """
    low, high = np.zeros(len(used)), np.ones(len(used))
    surplus = deficit = np.zeros(len(used))
    for _ in range(_BISECTIONS):
        bottom = (low + high) / 2
        surplus = np.maximum(used - (bottom + tolerance)[:, None] * capacities, 0).sum(axis=1)
        deficit = np.maximum(bottom[:, None] * capacities - used, 0).sum(axis=1)
        is_low = surplus > deficit
        low, high = np.where(is_low, bottom, low), np.where(is_low, high, bottom)
    return np.maximum(surplus, deficit)


def _in_order(
    moves: Sequence[CacheMove], pools: Mapping[Device, PoolLoad]
) -> list[CacheMove] | None:
    """Returns moves in an order in which there is room for each; None if none was found.

    The first that fits goes first. Where that leads to a dead end, since it took the room that
    another one needed to make room in its turn, others are tried, `_MAX_ORDERS` in all.
    """
    freed = {cache.request_id: cache.freed_bytes for p in pools.values() for cache in p.caches}
    room = {device: pool.capacity_bytes - pool.used_bytes for device, pool in pools.items()}
    rows = {device: pool.num_free_rows for device, pool in pools.items()}
    begun = [_Order((), tuple(moves), room, rows)]
    for _ in range(_MAX_ORDERS + len(moves)):
        if not begun:
            return None
        order = begun.pop()
        if not order.waiting:
            return list(order.done)
        begun += reversed(
            [order.and_then(move, freed) for move in order.waiting if order.fits(move)]
        )
    return None


@dataclasses.dataclass(frozen=True)
class _Order:
    """Some moves in an order, and what is left then.

    Attributes:
      done: The moves, each of which fits.
      waiting: The others.
      room: Bytes that are free then in each pool.
      rows: Sequences that each could hold besides.
    """

    done: tuple[CacheMove, ...]
    waiting: tuple[CacheMove, ...]
    room: Mapping[Device, int]
    rows: Mapping[Device, int]

    def fits(self, move: CacheMove) -> bool:
        """Says whether there is room for one more."""
        return move.num_bytes <= self.room[move.target] and self.rows[move.target] > 0

    def and_then(self, move: CacheMove, freed: Mapping[RequestId, int]) -> _Order:
        """Returns the order with one more, which leaves `freed` bytes behind it."""
        room, rows = dict(self.room), dict(self.rows)
        room[move.target] -= move.num_bytes
        room[move.source] += freed[move.request_id]
        rows[move.target] -= 1
        rows[move.source] += 1
        waiting = tuple(other for other in self.waiting if other is not move)
        return _Order((*self.done, move), waiting, room, rows)
