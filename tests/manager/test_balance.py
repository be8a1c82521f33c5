"""Plans that balance pools, against every plan there is, and against a bound that none beats."""

import itertools
import random

import pytest

from ferrum_jax.manager.balance import CacheLoad, PoolLoad, plan_moves
from ferrum_jax.types import Device

CAPACITY = 100


def pool(used, caches, *, capacity=CAPACITY, free_rows=9):
    """A pool with caches of (name, bytes), or (name, bytes, bytes that are freed)."""
    loads = [(*cache, cache[1])[:3] for cache in caches]
    return PoolLoad(
        capacity_bytes=capacity,
        used_bytes=used,
        num_free_rows=free_rows,
        caches=tuple(
            CacheLoad(request_id=name, num_bytes=size, freed_bytes=freed)
            for name, size, freed in loads
        ),
    )


def pools_of(*pools):
    return {Device("gpu", index): pool for index, pool in enumerate(pools)}


def random_pools(rng, num_pools, num_caches, shares=False):
    """Pools of which the first ones are fuller."""
    homes = [min(int(rng.expovariate(1.2)), num_pools - 1) for _ in range(num_caches)]
    pools = []
    for index in range(num_pools):
        caches, used = [], 0
        for number, home in enumerate(homes):
            size = rng.randint(1, 30)
            if home == index and used + size <= CAPACITY:
                caches.append((number, size, rng.randint(0, size) if shares else size))
                used += size
        used += rng.randint(0, (CAPACITY - used) // 4)
        pools.append(pool(used, caches, free_rows=rng.choice([9, 9, 1, 2])))
    return pools_of(*pools)


def moves_of(plan):
    return [(move.request_id, move.source, move.target, move.num_bytes) for move in plan]


def fits(pools, moves):
    """Whether there is room for each move when its turn comes."""
    room = {device: pool.capacity_bytes - pool.used_bytes for device, pool in pools.items()}
    rows = {device: pool.num_free_rows for device, pool in pools.items()}
    freed = {cache.request_id: cache.freed_bytes for p in pools.values() for cache in p.caches}
    for name, source, target, size in moves:
        if size > room[target] or not rows[target]:
            return False
        room[target] -= size
        room[source] += freed[name]
        rows[target] -= 1
        rows[source] += 1
    return True


def spread(pools, moves):
    """By how much the pools' utilisations differ after moves."""
    used = {device: pool.used_bytes for device, pool in pools.items()}
    freed = {cache.request_id: cache.freed_bytes for p in pools.values() for cache in p.caches}
    for name, source, target, size in moves:
        used[target] += size
        used[source] -= freed[name]
    shares = [used[device] / pools[device].capacity_bytes for device in pools]
    return max(shares) - min(shares)


def merit(pools, moves, tolerance):
    """What is to be least: first how far the pools are apart, then the bytes moved."""
    apart = round(max(spread(pools, moves), tolerance), 9)
    return apart, sum(size for *_, size in moves)


def best_merit(pools, tolerance):
    """The merit of the best of all plans."""
    caches = [
        (cache.request_id, device, cache.num_bytes)
        for device, pool in pools.items()
        for cache in pool.caches
        if cache.freed_bytes
    ]
    found = merit(pools, [], tolerance)
    for targets in itertools.product(pools, repeat=len(caches)):
        moves = [
            (name, home, target, size)
            for (name, home, size), target in zip(caches, targets, strict=True)
            if target != home
        ]
        new = merit(pools, moves, tolerance)
        if new < found and any(fits(pools, order) for order in itertools.permutations(moves)):
            found = new
    return found


@pytest.mark.parametrize("seed", range(60))
def test_for_few_caches_no_plan_is_better(seed):
    rng = random.Random(seed)
    num_pools = rng.choice([2, 2, 3])
    pools = random_pools(rng, num_pools, rng.randint(0, 6), shares=rng.random() < 0.3)
    tolerance = rng.choice([0.0, 0.05, 0.1, 0.3])
    moves = moves_of(plan_moves(pools, tolerance))
    assert fits(pools, moves)
    assert merit(pools, moves, tolerance) == best_merit(pools, tolerance)


def tight_pools(rng):
    """Three pools, some of them full of up to two caches, with few rows."""
    pools, numbers = [], iter(range(9))
    for _ in range(3):
        caches, used, most = [], 0, rng.choice([100, 95, 60, 40])
        while used < most and len(caches) < 2:
            size = min(rng.randint(10, 60), most - used)
            caches.append((next(numbers), size))
            used += size
        pools.append(pool(most, caches, free_rows=rng.choice([9, 1, 0])))
    return pools_of(*pools)


@pytest.mark.parametrize("seed", range(40))
def test_where_there_is_little_room_no_plan_that_can_be_carried_out_is_better(seed):
    rng = random.Random(seed)
    pools, tolerance = tight_pools(rng), rng.choice([0.0, 0.05, 0.1])
    moves = moves_of(plan_moves(pools, tolerance))
    assert fits(pools, moves)
    assert merit(pools, moves, tolerance) == best_merit(pools, tolerance)


def least_bytes(pools, tolerance):
    """Bytes that have to move even if caches could be cut up: no plan moves fewer."""
    used = [(pool.used_bytes, pool.capacity_bytes) for pool in pools.values()]
    least = float("inf")
    for step in range(2001):
        low, high = step / 2000, step / 2000 + tolerance
        too_much = sum(max(0, bytes_ - high * size) for bytes_, size in used)
        too_little = sum(max(0, low * size - bytes_) for bytes_, size in used)
        least = min(least, max(too_much, too_little))
    return least


def test_many_caches_are_balanced_for_little_more_than_has_to_move():
    rng, ratios = random.Random(0), []
    for num_pools in (2, 4, 8):
        loads = []
        for index in range(num_pools):
            sizes = [rng.randint(100, 6000) for _ in range(4 + 20 * (index % 2))]
            caches = [((index, number), size) for number, size in enumerate(sizes)]
            loads.append(pool(sum(sizes), caches, capacity=100_000, free_rows=99))
        pools = pools_of(*loads)
        moves = moves_of(plan_moves(pools, 0.05))
        assert fits(pools, moves) and spread(pools, moves) <= 0.05 < spread(pools, [])
        ratios.append(merit(pools, moves, 1.0)[1] / least_bytes(pools, 0.05))
    assert max(ratios) < 1.1 and min(ratios) > 0.95


def test_pools_of_other_sizes_are_compared_by_shares():
    pools = pools_of(
        pool(60, [("a", 30), ("b", 20), ("c", 10)], capacity=100), pool(0, [], capacity=1000)
    )
    [move] = plan_moves(pools, 0.4)
    assert move.request_id == "b"


def test_pools_within_the_tolerance_stay_as_they_are():
    pools = pools_of(pool(50, [("a", 10)]), pool(40, []))
    assert plan_moves(pools, 0.1) == []
    assert plan_moves({}, 0.1) == []


def test_a_cache_that_cannot_help_is_not_moved():
    alone = pools_of(pool(90, [("giant", 90)]), pool(0, []))
    assert plan_moves(alone, 0.1) == []
    shared = pools_of(pool(50, [("a", 50, 0), ("b", 50, 0)]), pool(0, []))
    assert plan_moves(shared, 0.1) == []


def test_a_move_waits_until_another_one_has_made_room():
    pools = pools_of(
        pool(100, [("a", 60), ("b", 40)]), pool(60, [("c", 60)]), pool(0, [], free_rows=1)
    )
    moves = moves_of(plan_moves(pools, 0.2))
    assert fits(pools, moves)
    full = pools_of(pool(90, [("a", 30)], free_rows=0), pool(0, [], free_rows=0))
    assert plan_moves(full, 0.1) == []


@pytest.mark.parametrize("tolerance", [-0.01, 1.01, float("nan"), "0.1"])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        plan_moves(pools_of(pool(1, [])), tolerance)
