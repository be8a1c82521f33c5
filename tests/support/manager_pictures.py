"""Pictures of a manager: all requests and cached prefixes, which a failure must not change.

Two pictures are equal if every request has the same bytes, tokens and status, and every cached
prefix the same bytes, in whichever blocks and rows. `require_as_before` also accepts what makes
room: idle prefixes are evicted, requests are swapped out bit for bit, and the pool grows.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from ferrum_jax import CacheState, PagedKvCacheManager
from ferrum_jax.manager.device import DeviceManager
from ferrum_jax.manager.requests import LiveRequest
from ferrum_jax.types import RequestId
from tests.support.internals import (
    cached_blocks,
    device_of,
    pool_of,
    requests_of,
    state_of,
    store_of,
    taken_blocks,
)

_ENTRY_FIELDS = ("is_resident", "shape", "num_cached_tokens", "last_access")
_KNOWN_FIELDS = "num_computed", "max_computed", "num_retained", "retention", "may_be_cached"


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a manager of one device holds.

    Attributes:
      requests: Fields of each request; `data` has every byte of its blocks.
      cached: Fields of each cached block, by salt and tokens.
      num_taken: Number of blocks of `allocate_blocks`.
      counts: Number of blocks, and counts of what was done.
    """

    requests: dict[RequestId, dict[str, Any]]
    cached: dict[tuple, dict[str, Any]]
    num_taken: int
    counts: dict[str, Any]


def picture(manager: DeviceManager | PagedKvCacheManager) -> Picture:
    """Checks a manager, and returns its picture; free blocks must be zero."""
    manager.check()
    state, stats = state_of(manager), manager.stats()
    state = jax.device_get(state)
    for pool, tables in zip(state.pools, state.page_tables, strict=True):
        for array in pool.arrays.values():
            assert not array[tables.ref_counts == 0].any(), "a free block has bytes"
    return Picture(
        requests={
            request.request_id: _request(manager, request, state)
            for request in requests_of(manager)
        },
        cached=_cached(manager, state),
        num_taken=len(taken_blocks(manager)),
        counts={
            "num_blocks": stats.total_blocks,
            "growth_count": stats.growth_count,
            "preemption_count": stats.preemption_count,
            "num_gone": stats.eviction_count + stats.expiration_count,
            "allocation_count": stats.allocation_count,
            "cache_hit_rate": stats.cache_hit_rate,
        },
    )


def require_as_before(
    before: Picture, after: Picture, may_end: Collection[RequestId] = (), *, may_cache: bool = False
) -> None:
    """Asserts that nothing has changed except that room was made.

    Args:
      before: The picture before a call.
      after: The picture after the call.
      may_end: Requests that may have ended.
      may_cache: Whether more may be cached.
    """
    assert before.requests.keys() - set(may_end) <= after.requests.keys() <= before.requests.keys()
    num_away = 0
    for name, now in after.requests.items():
        is_away = before.requests[name]["is_resident"] and not now["is_resident"]
        num_away += is_away
        now = {**now, "is_resident": now["is_resident"] or is_away}
        assert now == before.requests[name], f"request {name!r} has changed"
    assert after.num_taken == before.num_taken
    assert may_cache or after.cached.keys() <= before.cached.keys()
    for key in after.cached.keys() & before.cached.keys():
        then, now = before.cached[key], after.cached[key]
        for field in ("data", "retention", "ttl_seconds", "is_pinned"):
            assert now[field] == then[field], f"{field} of the cached block {key} has changed"
    gone = before.cached.keys() - after.cached.keys()
    assert not any(before.cached[key]["is_pinned"] for key in gone)
    more = {name: count - before.counts[name] for name, count in after.counts.items()}
    assert more["num_gone"] == len(gone) and more["preemption_count"] == num_away
    assert more["growth_count"] == (more["num_blocks"] > 0) and more["num_blocks"] >= 0
    assert more["allocation_count"] == more["cache_hit_rate"] == 0


def _request(
    manager: DeviceManager | PagedKvCacheManager,
    entry: LiveRequest,
    state: CacheState,
) -> dict[str, Any]:
    """Fields of one request."""
    data = []
    for i, (pool, tables) in enumerate(zip(state.pools, state.page_tables, strict=True)):
        if entry.is_resident:
            ids = np.asarray(tables.block_ids)[entry.seq_id :: tables.max_seqs]  # Of each group.
            ids = ids[ids >= 0]
            data += [array[ids].tobytes() for array in pool.arrays.values()]
        else:
            chunks = list(map(dict, store_of(manager).stream(f"{entry.cache_id}/{i}").chunks))
            data += [
                b"".join(np.asarray(chunk[x]).tobytes() for chunk in chunks) for x in pool.arrays
            ]
    report, known = entry.compression, entry.known
    return {
        **{name: getattr(entry, name) for name in _ENTRY_FIELDS},
        **{name: getattr(known, name) for name in _KNOWN_FIELDS},
        "tokens": list(known.tokens),
        "longest": list(known.longest),
        "num_shared_with": {
            other.request_id: known.num_shared_with[other.known]
            for other in requests_of(manager)
            if other.known in known.num_shared_with
        },
        "compression": report and dataclasses.replace(report, seconds=0.0),
        "data": data,
    }


def _cached(
    manager: DeviceManager | PagedKvCacheManager, state: CacheState
) -> dict[tuple, dict[str, Any]]:
    """Fields of the cached blocks, by salt and tokens."""
    counts = pool_of(manager).counts
    group = device_of(manager).prefixes.cache.groups.lead
    first, pool = counts.ids.firsts[counts.pools[group]], state.pools[counts.pools[group]]
    return {
        name: {
            "data": [array[block.block_id - first].tobytes() for array in pool.arrays.values()],
            "retention": block.retention,
            "ttl_seconds": node.ttl_seconds,
            "expires_at": node.expires_at,
            "num_users": node.num_users,
            "is_pinned": any(n.is_pinned for n in node.subtree()),
        }
        for name, (node, block) in cached_blocks(manager).items()
    }
