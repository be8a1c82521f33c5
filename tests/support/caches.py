"""Small caches with tokens that can be recognized, and comparison of states bit for bit."""

import collections
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import ferrum_jax as fj
from ferrum_jax import CacheSpec, CacheState
from ferrum_jax.state import BlockPool

EXCHANGE = r" (all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\("
"""Collective operations in the text of a compiled program."""


def tiny_spec(**changes) -> CacheSpec:
    """12 blocks of 3 tokens for 5 rows of at most 5 blocks: they cannot all be full.

    Layers of one size, unless `groups` are given.
    """
    layers = {"num_layers": 2, "num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
    sizes = {"num_blocks": 12, "block_size": 3, "max_seqs": 5, "max_blocks_per_seq": 5}
    return CacheSpec(**{**({} if "groups" in changes else layers), **sizes, **changes})


def lies_over(array: jax.Array, spec: PartitionSpec) -> bool:
    """Whether an array is divided over its mesh as `spec` says; axes of type Explicit spell out
    each dimension.
    """
    return array.sharding.is_equivalent_to(NamedSharding(array.sharding.mesh, spec), array.ndim)


def snapshot(tree) -> list[np.ndarray]:
    """Copies every leaf to the host; the arrays may be donated afterwards."""
    return [np.array(leaf, copy=True) for leaf in jax.tree.leaves(tree)]


def same_bits(tree, leaves: Sequence[np.ndarray]) -> bool:
    """Whether `tree` is what `snapshot` saw, in every bit of every leaf."""
    return all(
        now.dtype == then.dtype and now.tobytes() == then.tobytes()
        for now, then in zip(snapshot(tree), leaves, strict=True)
    )


def payload(pool: BlockPool, layer: int, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values f32[T, H, D] that encode token, layer and head, exact even in bfloat16.

    Token ids are from 1 to 65535 (0 is all zeros); D is even.
    """
    ids = np.asarray(tokens, np.int64).reshape(-1, 1, 1)
    digits = np.where(np.arange(pool.head_dim) % 2, ids // 256, ids % 256)
    scale = 2.0 ** (layer + 8 * np.arange(pool.num_kv_heads))[:, None]
    k = (digits * scale).astype(np.float32)
    return k, -k / 2


def slots_of(
    state: CacheState, places: Iterable[tuple[int, int]], pool: int = 0, group: int = 0
) -> np.ndarray:
    """Slots of the tokens at (row, place among those that it holds), computed from the tables.

    They are those in a pool's group, both given by their index; negative for a released token.
    """
    tables, slots = state.page_tables[pool], []
    first_row = group * num_rows(state)
    block_ids, formats = np.asarray(tables.block_ids), np.asarray(tables.token_formats)
    for row, place in places:
        index, offset = divmod(place, tables.block_sizes[formats[first_row + row]])
        block = block_ids[first_row + row, index]
        slots.append(-1 if block < 0 else block * state.pools[pool].slots_per_block + offset)
    return np.asarray(slots, np.int32)


def put(
    state: CacheState, writes: Mapping[tuple[int, int], int], num_slots: int | None = None
) -> CacheState:
    """Writes tokens at (row, position) in all layers of all groups, padded to `num_slots` slots.

    A token is encoded with the layer's number in the order of pools, groups and layers.
    """
    tokens = list(writes.values())
    padding = (num_slots or len(tokens)) - len(tokens)
    pools, number = [], 0
    for i, (pool, tables) in enumerate(zip(state.pools, state.page_tables, strict=True)):
        for group in range(len(tables.windows)):
            slots = np.pad(slots_of(state, writes, i, group), (0, padding), constant_values=-1)
            for layer in range(pool.num_layers):
                pool = fj.write(pool, layer, slots, *payload(pool, number, tokens + [1] * padding))
                number += 1
        pools.append(pool)
    return state.with_pools(pools)


def filled(spec: CacheSpec, rows: Mapping[int, int]) -> CacheState:
    """A cache with the given number of tokens per row; token p of row r is 100 (r + 1) + p."""
    state, ok = fj.allocate(fj.init(spec), list(rows), list(rows.values()))
    assert bool(ok)
    places = [(row, position) for row, length in rows.items() for position in range(length)]
    return put(state, {(row, p): 100 * (row + 1) + p for row, p in places})


def contents(state: CacheState, row: int) -> list[int]:
    """The token ids that a row holds in a cache of one group; 0 for a released token."""
    layers = range(state.pool.num_layers)
    return read_tokens(state, row, state.pool, dict(zip(layers, layers, strict=True)))


def read_tokens(
    state: CacheState, row: int, pool: BlockPool, layers: Mapping[int, int]
) -> list[int]:
    """The token ids that all of these layers hold of a row.

    `layers` are the model's own numbers of layers, each with the number by which `put` encoded it.
    """
    length = int(state.page_tables[0].held_lens[row])
    tokens = None
    for layer, number in layers.items():
        got = [np.asarray(x, np.float32) for x in fj.gather(state, layer, row)]
        if tokens is None:
            digits = got[0][:length, 0, :2] / 2.0**number
            tokens = (digits @ [1, 256]).astype(int).tolist()
        for have, want in zip(got, payload(pool, number, tokens), strict=True):
            np.testing.assert_array_equal(have[:length], want)
            assert not have[length:].any(), "not zero beyond the length"
    return tokens


def num_rows(state: CacheState) -> int:
    """How many sequences a cache has room for."""
    tables = state.page_tables[0]
    return tables.block_ids.shape[0] // len(tables.windows)


def num_free(state: CacheState) -> int:
    """Number of free blocks."""
    return int(state.tables.num_free)


def held_lens(state: CacheState) -> list[int]:
    """Tokens of each row."""
    return np.asarray(state.tables.held_lens).tolist()


_num_events: collections.Counter[str] = collections.Counter()
_PROBE = "/tests/probe"


def _count(event: str, seconds: float, **_) -> None:
    _num_events[event] += 1


jax.monitoring.register_event_duration_secs_listener(_count)


def num_compilations() -> int:
    """How many programs this process has compiled so far.

    Raises:
      AssertionError: Somebody has removed all listeners of JAX, so that none are counted.
    """
    before = _num_events[_PROBE]
    jax.monitoring.record_event_duration_secs(_PROBE, 0.0)
    assert _num_events[_PROBE] > before, "jax.monitoring.clear_event_listeners was called"
    return sum(n for event, n in _num_events.items() if event.endswith("backend_compile_duration"))
