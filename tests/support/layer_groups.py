"""Small caches of several layer groups, their oracle, and what each group holds of a row."""

import dataclasses

from ferrum_jax import CacheSpec, CacheState, KeyValue, LayerGroup
from tests.support.caches import num_rows, read_tokens, tiny_spec
from tests.support.oracle import OracleCache, OracleGroup

SMALL = KeyValue(num_kv_heads=1, head_dim=2, dtype="float32")
LARGE = KeyValue(num_kv_heads=2, head_dim=4, dtype="float32")


def one_pool_spec(**changes) -> CacheSpec:
    """Layers with a window of 4 tokens and layers without one, which take blocks of one pool."""
    groups = (
        LayerGroup("local", (2, 0), SMALL, sliding_window=4),
        LayerGroup("full", (1, 3), SMALL),
    )
    return tiny_spec(**{"groups": groups, "num_blocks": 20, "max_blocks_per_seq": 6, **changes})


def windows_spec(**changes) -> CacheSpec:
    """A window of 1 token and a window of a whole block; no group holds all tokens."""
    groups = (
        LayerGroup("one", (0,), SMALL, sliding_window=1),
        LayerGroup("block", (1,), SMALL, sliding_window=3),
    )
    return tiny_spec(**{"groups": groups, "num_blocks": 14, "max_blocks_per_seq": 7, **changes})


def two_pools_spec(**changes) -> CacheSpec:
    """Two windows in one pool, and layers of another size in a pool with more blocks."""
    groups = (
        LayerGroup("short", (4,), SMALL, sliding_window=2),
        LayerGroup("large", (0, 2), LARGE, num_blocks=16),
        LayerGroup("long", (1,), SMALL, sliding_window=7),
    )
    return tiny_spec(**{"groups": groups, "max_blocks_per_seq": 6, **changes})


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a group is: its pool, its number among the pool's groups, its layers.

    `layers` are the model's own numbers, each with the number by which `put` encodes the layer.
    """

    group: LayerGroup
    pool: int
    part: int
    layers: dict[int, int]


def places_of(spec: CacheSpec) -> list[Place]:
    """The groups of a cache, pool by pool: the order in which `put` writes them."""
    pools = {}
    for group in spec.layer_groups:
        kind = (group.payload, len(group.layers), group.num_blocks or spec.num_blocks)
        pools.setdefault(kind, []).append(group)
    places, number = [], 0
    for pool, groups in enumerate(pools.values()):
        for part, group in enumerate(groups):
            numbers = range(number, number + len(group.layers))
            number += len(numbers)
            layers = dict(zip(group.layers, numbers, strict=True))
            places.append(Place(group, pool, part, layers))
    return places


def oracle_of(spec: CacheSpec) -> OracleCache:
    """The oracle of an empty cache; its groups are in the order of `places_of`."""
    places = places_of(spec)
    sizes = {place.pool: place.group.num_blocks or spec.num_blocks for place in places}
    return OracleCache(
        num_blocks=list(sizes.values()),
        block_size=spec.block_size,
        max_seqs=spec.max_seqs,
        max_blocks_per_seq=spec.max_blocks_per_seq,
        groups=[OracleGroup(place.pool, place.group.sliding_window) for place in places],
    )


def group_contents(spec: CacheSpec, state: CacheState, row: int) -> dict[str, list[int]]:
    """The token ids that each group holds of a row; 0 for a released token."""
    return {
        place.group.name: read_tokens(state, row, state.pools[place.pool], place.layers)
        for place in places_of(spec)
    }


def blocks_of(spec: CacheSpec, state: CacheState, row: int) -> dict[str, list[int]]:
    """The ids of the blocks that a row holds in each group."""
    blocks = {}
    for place in places_of(spec):
        tables = state.page_tables[place.pool]
        ids = tables.block_ids[place.part * num_rows(state) + row]
        blocks[place.group.name] = [block for block in ids.tolist() if block >= 0]
    return blocks


def num_free(state: CacheState) -> list[int]:
    """Number of free blocks of each pool."""
    return [int(tables.num_free) for tables in state.page_tables]
