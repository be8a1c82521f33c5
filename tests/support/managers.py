"""Small managers, the tokens of their requests, and snapshots of all that a call can change."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import numpy as np

from ferrum_jax import (
    CacheConfig,
    CacheGeometry,
    FerrumError,
    KvCacheHandle,
    PagedKvCacheManager,
    PrefixCacheConfig,
)
from ferrum_jax.manager import ManagerOptions
from tests.support.caches import payload, put, snapshot
from tests.support.internals import cached_blocks, row_blocks

BLOCK_SIZE, MAX_TOKENS = 3, 15  # Tokens per block, and of the longest request.
BLOCK_BYTES = 2 * 2 * BLOCK_SIZE * 2 * 4  # K and V, layers, tokens, head_dim, float32.
PREFIXES = PrefixCacheConfig(
    max_prefixes=99, min_prefix_length=1, prefix_ttl_seconds=1e6, enable_cross_request_sharing=True
)


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = 100.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def configuration(geometry: Mapping, **config) -> tuple[CacheConfig, CacheGeometry, ManagerOptions]:
    """The arguments of a small manager.

    Args:
      geometry: Fields of `CacheGeometry`.
      **config: Fields of `CacheConfig` and of `ManagerOptions`.
    """
    fields = {field.name for field in dataclasses.fields(ManagerOptions)}
    options = {name: config.pop(name) for name in fields & config.keys()}
    sizes = {"block_size": BLOCK_SIZE, "initial_blocks": config["max_blocks"]}
    model = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
    return (
        CacheConfig(**{**sizes, **config}),
        CacheGeometry(**{**model, "max_sequence_length": MAX_TOKENS, **geometry}),
        ManagerOptions(**options),
    )


def make_manager(*, geometry: Mapping | None = None, **config) -> PagedKvCacheManager:
    """12 blocks of 3 tokens, for 5 requests of at most 15 tokens: they cannot all be full.

    Takes fields of `CacheConfig` and of `ManagerOptions`.
    """
    geometry = {"max_seqs": 5, **(geometry or {})}
    return PagedKvCacheManager(*configuration(geometry, **{"max_blocks": 12, **config}))


def start(manager: PagedKvCacheManager, request_id, num_tokens: int = 0, **limits) -> KvCacheHandle:
    """Allocates a request."""
    return manager.allocate(manager.new_request(request_id, num_tokens, **limits))


def write_tokens(
    manager: PagedKvCacheManager, handle: KvCacheHandle, tokens: Sequence[int], begin: int = 0
) -> None:
    """Writes tokens into all layers of a request, from position `begin` on."""

    def step(state, seq_ids):
        row = int(seq_ids[0])
        places = {(row, begin + i): token for i, token in enumerate(tokens)}
        return put(state, places, num_slots=MAX_TOKENS), None

    manager.run(step, [handle])


def tokens_of(handle: KvCacheHandle) -> list[int]:
    """The token ids that a request holds; keys and values of all layers must agree."""
    sizes = SimpleNamespace(num_kv_heads=handle.num_heads(), head_dim=handle.head_dim())
    first = np.asarray(handle.key_cache(0), np.float32)
    tokens = (first[:, 0, 0] + 256 * first[:, 0, 1]).astype(int).tolist()
    for layer in range(handle.num_layers()):
        got, want = handle.kv_cache(layer), payload(sizes, layer, tokens)
        for have, expected in zip(got, want, strict=True):
            np.testing.assert_array_equal(np.asarray(have, np.float32), expected)
    return tokens


def whole(manager: PagedKvCacheManager) -> tuple:
    """All that a call can change, except the count of refused allocations."""
    leaves = manager.run(lambda state, seq_ids: (state, snapshot(state)), [])
    handles = [
        (name, h.cache_id(), h.num_tokens(), h.stats()) for name, h in manager.list_handles()
    ]
    return (
        [(leaf.dtype, leaf.shape, leaf.tobytes()) for leaf in leaves],
        handles,
        row_blocks(manager),
        cached_prefixes(manager),
        dataclasses.replace(manager.stats(), allocation_failures=0),
    )


def refused(call, *args) -> type[FerrumError] | None:
    """The type of the `FerrumError` that a call raises, or None."""
    try:
        call(*args)
    except FerrumError as error:
        return type(error)
    return None


def cached_prefixes(manager: PagedKvCacheManager) -> dict[tuple, int]:
    """The block of each cached prefix, by salt and tokens."""
    return {name: block.block_id for name, (_, block) in cached_blocks(manager).items()}
