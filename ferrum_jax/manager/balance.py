"""Rebalancing: plans the moves that make pools about equally full for the fewest bytes.

The choice is a partition problem, so that no quick rule is always right. The search goes through
the caches, the largest first, and each may stay or move to any other pool. When the search reaches
too many states, equal ones are merged, and the most promising are kept: those with the fewest bytes
moved so far, plus the least that would still have to move if caches could be divided. For few
caches, 13 in two pools or 8 in three, no state is dropped, and the plan is optimal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from ferrum_jax.checks import check_number
from ferrum_jax.types import Device, RequestId

_MAX_STATES = 8192
_MAX_WORK = 400_000  # States times pools times caches.
_MIN_STATES = 16
_BISECTIONS = 10  # Precision of a thousandth of a pool.
_MAX_ORDERS = 200  # Orders of moves that are tried if the first one leads to a dead end.
_REST_WEIGHT = 2.0  # Above 1, so that states that are far from the goal are dropped first.


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheLoad:
    """Bytes of one request's cache.

    Attributes:
      request_id: The request.
      num_bytes: Bytes that a move copies, and that the cache takes in the target pool.
      freed_bytes: Bytes that a move frees in the source pool: less than `num_bytes` where the
        request shares blocks.
    """

    request_id: RequestId
    num_bytes: int
    freed_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PoolLoad:
    """How full one pool is.

    Attributes:
      capacity_bytes: Bytes that the pool may grow to.
      used_bytes: Bytes of the blocks in use.
      num_free_rows: Sequences that can be started there.
      caches: The caches that may move.
    """

    capacity_bytes: int
    used_bytes: int
    num_free_rows: int
    caches: tuple[CacheLoad, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheMove:
    """One move of a request's cache.

    Attributes:
      request_id: The request.
      source: The device that it leaves.
      target: The device that it moves to.
      num_bytes: Bytes that are copied.
    """

    request_id: RequestId
    source: Device
    target: Device
    num_bytes: int


def plan_moves(pools: Mapping[Device, PoolLoad], tolerance: float) -> list[CacheMove]:
    """Plans moves that bring the pools' utilisations within a tolerance of each other.

    Utilisation is bytes in use over capacity. If no plan reaches the tolerance, the plan with the
    closest utilisations is returned, of several the one that moves the fewest bytes. A cache that
    would free nothing, since all its blocks are shared, stays.

    Args:
      pools: How full each pool is.
      tolerance: Maximum difference of two utilisations, in [0, 1].

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
    """States of the pools after a choice for each of some caches; K states, C caches, D pools.

    Attributes:
      used: i64[K, D]. Bytes in use.
      rows: i64[K, D]. Free rows; negative for too few.
      cost: i64[K]. Bytes moved.
      targets: i64[K, C]. The pool of each cache.
    """

    used: np.ndarray
    rows: np.ndarray
    cost: np.ndarray
    targets: np.ndarray

    @classmethod
    def of(cls, pools: Sequence[PoolLoad]) -> _States:
        """Returns the one state before any choice."""
        used = np.asarray([[pool.used_bytes for pool in pools]], np.int64)
        rows = np.asarray([[pool.num_free_rows for pool in pools]], np.int64)
        return cls(used, rows, np.zeros(1, np.int64), np.zeros((1, 0), np.int64))

    def part(self, index: np.ndarray) -> _States:
        """Returns some of the states."""
        return _States(self.used[index], self.rows[index], self.cost[index], self.targets[index])

    def choosing(self, home: int, cache: CacheLoad) -> _States:
        """Returns each state with each choice for one more cache, which is in pool `home` now."""
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
        """Returns the cheapest of the states that are equally full.

        States still differ if their free rows differ, and may be too few for the caches to come.

        Args:
          num_left: Caches for which no choice is made yet.
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
    """Returns the most promising states after a choice for every cache.

    Args:
      states: The state of the pools now.
      caches: Each cache that may move, with the index of its pool; the largest first.
      capacities: f64[D]. Bytes of each pool.
      tolerance: Maximum difference of two utilisations.
    """
    work = len(caches) * len(capacities)
    width = max(_MIN_STATES, min(_MAX_STATES, _MAX_WORK // work))
    for place, (home, cache) in enumerate(caches, start=1):
        states = states.choosing(home, cache)
        if len(states.cost) > width:
            states = states.merged(len(caches) - place)
        if len(states.cost) > width:
            rest = _least_bytes(states.used, capacities, tolerance)
            states = states.part(np.argsort(states.cost + _REST_WEIGHT * rest)[:width])
    return states


def _moves_to(
    targets: np.ndarray, caches: Sequence[tuple[int, CacheLoad]], devices: Sequence[Device]
) -> list[CacheMove]:
    """Returns the moves that bring each cache to its target, in any order."""
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
    """Returns the maximum difference of two utilisations in each state: f64[K]."""
    shares = used / capacities
    # Rounded, since 0.67 - 0.62 is more than 0.05.
    return np.round(shares.max(axis=1) - shares.min(axis=1), 9)


def _least_bytes(used: np.ndarray, capacities: np.ndarray, tolerance: float) -> np.ndarray:
    """Returns the bytes that would have to move if caches could be divided: f64[K].

    For any window of utilisations, as wide as the tolerance, what is above it has to leave, and
    what is missing below it has to arrive. The best window is where the two are equal.
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
    """Returns the moves in an order in which each one fits; None if no order was found.

    The first that fits comes first. Where that leads to a dead end, since it took the room that
    another move needed to make room in turn, other orders are tried, `_MAX_ORDERS` in all.
    """
    freed = {cache.request_id: cache.freed_bytes for p in pools.values() for cache in p.caches}
    room = {device: pool.capacity_bytes - pool.used_bytes for device, pool in pools.items()}
    rows = {device: pool.num_free_rows for device, pool in pools.items()}
    begun: list[_Order] = [((), tuple(moves), room, rows)]
    for _ in range(_MAX_ORDERS + len(moves)):
        if not begun:
            return None
        done, waiting, room, rows = begun.pop()
        if not waiting:
            return list(done)
        for move in reversed(waiting):
            source, target = move.source, move.target
            if move.num_bytes <= room[target] and rows[target] > 0:
                others = tuple(other for other in waiting if other is not move)
                num_source = room[source] + freed[move.request_id]
                room_then = {**room, source: num_source, target: room[target] - move.num_bytes}
                rows_then = {**rows, source: rows[source] + 1, target: rows[target] - 1}
                begun.append(((*done, move), others, room_then, rows_then))
    return None


_Order: TypeAlias = tuple[
    tuple[CacheMove, ...], tuple[CacheMove, ...], dict[Device, int], dict[Device, int]
]
"""Moves in an order, the other moves, and the bytes and rows that are free then in each pool."""
