"""Traces of requests, and the hit rate of each block policy on them."""

from __future__ import annotations

import dataclasses
import heapq
import json
import math
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.checks import check_count
from ferrum_jax.config import PrefixCacheConfig
from ferrum_jax.policies.blocks import BlockPolicyFactory, make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import BlockId

OPTIMUM = "optimum"
"""Key of the hit rates of `optimal_hit_rate` in what `replay_all` returns."""

_NEVER = sys.maxsize


@dataclasses.dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
      arrival_seconds: Arrival time.
      hash_ids: Blocks of the prompt; each id stands for all tokens up to the block's end.
    """

    arrival_seconds: float
    hash_ids: TokenIds


def read_trace(path: str | pathlib.Path) -> list[TracedRequest]:
    """Reads a trace of requests from a file.

    Args:
      path: A file of JSON lines in UTF-8, with or without a byte order mark.

    Returns:
      The requests, in the order of the lines.

    Raises:
      ValueError: If a line is not a request (the text names it), or if no request has blocks.
      OSError: If the file cannot be read.
    """
    trace: list[TracedRequest] = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                trace.append(_read_request(line.decode("utf-8-sig" if number == 1 else "utf-8")))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"Line {number} of {path} is not a request ({error!r:.200}). It needs a "
                    '"timestamp" in milliseconds and a list of "hash_ids".'
                ) from error
    if not any(request.hash_ids for request in trace):
        raise ValueError(f"{path} has no request with blocks.")
    return trace


def _read_request(line: str) -> TracedRequest:
    record = json.loads(line)
    seconds = float(record["timestamp"]) / 1000
    if not math.isfinite(seconds):
        raise ValueError(f'"timestamp" must be finite, got {record["timestamp"]!r}')
    return TracedRequest(seconds, TokenIds(record["hash_ids"]))


def replay(
    trace: Sequence[TracedRequest],
    policy: str | BlockPolicyFactory,
    capacity: int,
    *,
    num_skipped: int = 0,
) -> float:
    """Returns the hit rate of one block policy on a trace.

    Requests run one after the other. Each looks up its blocks, leases those that are cached, evicts
    others to make room, commits the rest and ends, as in the manager; there is no pool.

    Args:
      trace: Requests in order of arrival.
      policy: A block policy's name, or a factory.
      capacity: Blocks of the pool. Of a longer request the first blocks are cached.
      num_skipped: First requests that fill the cache and are not counted.

    Returns:
      Blocks found over blocks looked up, in [0, 1].

    Raises:
      ValueError: If the policy is unknown, or `capacity` is below 1.

    Example:
      >>> trace = [TracedRequest(float(i), TokenIds([1, 2, 3 + i])) for i in range(2)]
      >>> replay(trace, "lru", capacity=8)
      0.3333333333333333
    """
    check_count("capacity", capacity)
    # A pool with room for every block of the trace never evicts: a larger one finds the same.
    capacity = min(capacity, max(1, sum(len(request.hash_ids) for request in trace)))
    cache = _make_cache(policy, capacity)
    free = list(range(capacity))
    num_found = num_asked = 0
    for i, request in enumerate(trace):
        num_hits = _serve(cache, request, free, capacity)
        if i >= num_skipped:
            num_found += num_hits
            num_asked += len(request.hash_ids)
    return num_found / max(1, num_asked)


def optimal_hit_rate(
    trace: Sequence[TracedRequest], capacity: int, *, num_skipped: int = 0
) -> float:
    """Returns the hit rate of a cache that knows the future, an upper bound for every policy.

    It evicts the block with the latest next use, deeper blocks first, and does not cache a block
    that would be evicted at once.

    Args:
      trace: As for `replay`.
      capacity: As for `replay`.
      num_skipped: As for `replay`.

    Returns:
      Blocks found over blocks looked up, in [0, 1].

    Raises:
      ValueError: If `capacity` is below 1.

    References:
      Belady: A study of replacement algorithms for a virtual-storage computer, IBM Systems
      Journal 5(2), 1966.
    """
    check_count("capacity", capacity)
    cached: dict[int, int] = {}  # The request that uses each block next.
    farthest: list[tuple[int, int, int]] = []
    num_found = num_asked = 0
    for i, (request, next_uses) in enumerate(zip(trace, _next_uses(trace), strict=True)):
        if i >= num_skipped:
            num_found += _num_leading(request.hash_ids, cached)
            num_asked += len(request.hash_ids)
        for index, (hash_id, next_use) in enumerate(zip(request.hash_ids, next_uses, strict=True)):
            if next_use == _NEVER:
                cached.pop(hash_id, None)
            else:
                cached[hash_id] = next_use
                heapq.heappush(farthest, (-next_use, -index, hash_id))
        while len(cached) > capacity:
            next_use, _, hash_id = heapq.heappop(farthest)
            if cached.get(hash_id) == -next_use:
                del cached[hash_id]
    return num_found / max(1, num_asked)


def replay_all(
    trace: Sequence[TracedRequest],
    policies: Mapping[str, str | BlockPolicyFactory],
    capacities: Sequence[int],
    *,
    num_skipped: int = 0,
    progress: Callable[[Sequence[tuple[str, int]]], Iterable[tuple[str, int]]] = iter,
) -> dict[str, list[float]]:
    """Replays a trace with each policy at each capacity.

    Args:
      trace: As for `replay`.
      policies: A block policy's name or a factory, by the name to list it under.
      capacities: Blocks of the pool in each run.
      num_skipped: As for `replay`.
      progress: Wraps the iterable of runs, to show progress.

    Returns:
      The hit rate at each capacity, by policy and for `OPTIMUM`.

    Raises:
      ValueError: As for `replay`.
    """
    hit_rates: dict[str, list[float]] = {name: [] for name in (*policies, OPTIMUM)}
    for name, capacity in progress([(n, c) for n in hit_rates for c in capacities]):
        if name == OPTIMUM:
            hit_rate = optimal_hit_rate(trace, capacity, num_skipped=num_skipped)
        else:
            hit_rate = replay(trace, policies[name], capacity, num_skipped=num_skipped)
        hit_rates[name].append(hit_rate)
    return hit_rates


def format_table(hit_rates: Mapping[str, Sequence[float]], capacities: Sequence[int]) -> str:
    """Returns hit rates in percent as a table: one line per policy, one column per capacity.

    Args:
      hit_rates: Hit rates by policy, one per capacity, as `replay_all` returns them.
      capacities: Capacities in blocks.
    """
    width = max(map(len, hit_rates))
    lines = [" " * width + "".join(f"{capacity:>10,}" for capacity in capacities)]
    for name, row in hit_rates.items():
        lines.append(f"{name:<{width}}" + "".join(f"{100 * rate:>10.2f}" for rate in row))
    return "\n".join(lines)


def _make_cache(policy: str | BlockPolicyFactory, capacity: int) -> PrefixCache:
    config = PrefixCacheConfig(
        max_prefixes=capacity,
        min_prefix_length=1,
        prefix_ttl_seconds=math.inf,
        enable_cross_request_sharing=True,
    )
    # A hash id stands for a block, so a block has one token here.
    return PrefixCache(config, block_size=1, policy=make_block_policy(policy, capacity))


def _serve(cache: PrefixCache, request: TracedRequest, free: list[BlockId], capacity: int) -> int:
    """Serves one request, and returns how many of its blocks were cached."""
    now = request.arrival_seconds
    # A lookup excludes the last token: append one that belongs to no block.
    match = cache.lookup(request.hash_ids + [0], None, now)
    lease = cache.acquire(match)
    kept, num_hits = request.hash_ids[:capacity], len(match.blocks)
    num_new = len(kept) - num_hits
    if num_new > len(free):
        free += cache.evict(PerPool([num_new - len(free)]), now)
    block_ids = match.block_ids + [free.pop() for _ in range(num_new)]
    plan = cache.plan_commit(lease, kept, [block_ids], now)
    cache.apply_commit(lease, plan, now)
    free += plan.evicted
    cache.release(lease, now)
    return num_hits


def _next_uses(trace: Sequence[TracedRequest]) -> list[list[int]]:
    """Returns, for each block of each request, the index of the next request that uses it."""
    next_use: dict[int, int] = {}
    next_uses: list[list[int]] = []
    for i in range(len(trace) - 1, -1, -1):
        next_uses.append([next_use.get(hash_id, _NEVER) for hash_id in trace[i].hash_ids])
        next_use.update(dict.fromkeys(trace[i].hash_ids, i))
    return next_uses[::-1]


def _num_leading(hash_ids: Iterable[int], cached: Mapping[int, int]) -> int:
    """Returns the number of leading blocks that are cached."""
    num_hits = 0
    for hash_id in hash_ids:
        if hash_id not in cached:
            break
        num_hits += 1
    return num_hits
