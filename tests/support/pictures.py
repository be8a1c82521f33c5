"""All that a manager holds, by request and by cached prefix: what a failure may not change.

Two pictures are equal where every request has the same bytes, tokens and standing, and every
cached prefix the same bytes, whichever blocks and rows they lie in. `require_as_before` allows
what is done to make room besides: cached prefixes that nobody uses go, requests are swapped out
bit for bit, and the pool grows.
"""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from ferrum_jax import PagedKvCacheManager
from ferrum_jax.manager.handle import Entry
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import RequestId

_ENTRY_FIELDS = (
    "is_resident",
    "shape",
    "num_computed_tokens",
    "max_computed_tokens",
    "num_cached_tokens",
    "num_retained_tokens",
    "retention",
    "may_be_cached",
    "last_access",
)


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a manager of one device holds.

    Attributes:
      requests: Each request, field by field; `data` is every byte of its blocks.
      cached: Each cached block, by salt and tokens, field by field.
      num_taken: Blocks that callers hold by themselves.
      counts: How many blocks there are, and what was done so far.
    """

    requests: dict[RequestId, dict[str, Any]]
    cached: dict[tuple, dict[str, Any]]
    num_taken: int
    counts: dict[str, Any]


def picture(manager: PagedKvCacheManager) -> Picture:
    """Checks a manager, and returns what it holds; freed blocks must be zero."""
    manager.check()
    cache, prefixes, stats = manager._cache, manager._prefixes, manager.stats()
    pool, tables = jax.device_get((cache.state.pool, cache.state.tables))
    for array in (pool.k, pool.v):
        assert not array[tables.ref_counts == 0].any(), "a free block has bytes"
    return Picture(
        requests={
            name: _request(manager, entry, pool, tables.block_ids)
            for name, entry in manager._entries.items()
        },
        cached=_cached(manager, pool),
        num_taken=len(cache.counts.taken),
        counts={
            "num_blocks": stats.total_blocks,
            "growth_count": stats.growth_count,
            "preemption_count": stats.preemption_count,
            "num_gone": stats.eviction_count + stats.expiration_count,
            "allocation_count": stats.allocation_count,
            "num_prompt_tokens": prefixes.num_prompt_tokens,
            "num_reused_tokens": prefixes.num_reused_tokens,
        },
    )


def require_as_before(
    before: Picture, after: Picture, may_end: Collection[RequestId] = (), *, may_cache: bool = False
) -> None:
    """Raises AssertionError unless nothing has changed but that room was made.

    Args:
      before: What was.
      after: What is.
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
    done = "allocation_count", "num_prompt_tokens", "num_reused_tokens"
    assert not any(more[name] for name in done)


def _request(
    manager: PagedKvCacheManager, entry: Entry, pool: Any, block_ids: np.ndarray
) -> dict[str, Any]:
    """One request, field by field."""
    if entry.is_resident:
        ids = block_ids[entry.seq_id]
        ids = ids[ids >= 0]
        data = [array[ids].tobytes() for array in (pool.k, pool.v)]
    else:
        payload, _ = manager._swapping._store.peek(entry.cache_id)
        chunks = [dict(chunk) for chunk in payload.chunks]
        data = [b"".join(np.asarray(chunk[x]).tobytes() for chunk in chunks) for x in ("k", "v")]
    report = entry.compression
    return {
        **{name: getattr(entry, name) for name in _ENTRY_FIELDS},
        "tokens": list(entry.tokens),
        "known_tokens": list(entry.known_tokens),
        "kin": {other.request_id: length for other, length in entry.kin.items()},
        "compression": report and dataclasses.replace(report, seconds=0.0),
        "data": data,
    }


def _cached(manager: PagedKvCacheManager, pool: Any) -> dict[tuple, dict[str, Any]]:
    """The cached blocks, by salt and tokens."""
    cached, size = {}, manager.block_size()
    for node in manager._prefixes.cache.forest.nodes():
        path = list(node.path())[::-1]
        tokens = TokenIds.from_packed(b"".join(n.packed for n in path))
        for block in node.blocks:
            key = path[0].salt, tuple(tokens[: (block.logical_index + 1) * size])
            cached[key] = {
                "data": [array[block.block_id].tobytes() for array in (pool.k, pool.v)],
                "retention": block.retention,
                "ttl_seconds": node.ttl_seconds,
                "expires_at": node.expires_at,
                "num_users": node.num_users,
                "is_pinned": any(n.is_pinned for n in node.subtree()),
            }
    return cached
