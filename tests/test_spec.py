"""Specs of layer groups: what is refused, which pools there are, and where a layer is."""

import dataclasses

import numpy as np
import pytest

from ferrum_jax import CacheSpec, KeyValue, LayerGroup, equal_sized, init
from ferrum_jax.types import DataType

KV = KeyValue(2, 8, "float32")
WIDE = KeyValue(1, 16, "bfloat16")
SIZES = {"num_blocks": 10, "block_size": 4, "max_seqs": 2, "max_blocks_per_seq": 5}


def spec_of(*groups, **changes):
    return CacheSpec(groups=groups, **{**SIZES, **changes})


def test_flat_fields_are_shorthand_for_one_group():
    flat = CacheSpec(num_layers=3, num_kv_heads=2, head_dim=8, dtype="float32", **SIZES)
    grouped = spec_of(LayerGroup("all", range(3), KV))
    assert flat.layer_groups == grouped.layer_groups and flat.pools == grouped.pools
    assert flat.layer_map == grouped.layer_map and flat.pool_bytes == grouped.pool_bytes
    assert flat.block_bytes == grouped.block_bytes == 2 * 3 * 2 * 4 * 8 * 4


def test_groups_of_equal_geometry_share_a_pool_and_others_have_their_own():
    spec = spec_of(
        LayerGroup("a", [0, 3], KV),
        LayerGroup("wide", [1], WIDE, num_blocks=3),
        LayerGroup("b", [2, 5], KV, sliding_window=7),
        LayerGroup("short", [4], KV),
    )
    assert [(pool.num_layers, pool.num_blocks, pool.windows) for pool in spec.pools] == [
        (2, 10, (None, 7)),
        (1, 3, (None,)),
        (1, 10, (None,)),
    ]
    places = [(place.group.name, place.pool, place.index) for place in spec.layer_map.places]
    assert places == [("a", 0, 0), ("wide", 1, 0), ("b", 0, 1), ("short", 2, 0)]
    state = init(spec)
    assert [pool.num_blocks for pool in state.pools] == [10, 3, 10]
    assert state.page_tables[0].block_ids.shape == (4, 5)
    assert spec.pool_bytes == sum(pool.num_blocks * pool.block_bytes for pool in spec.pools)
    with pytest.raises(ValueError, match="3 pools with different blocks"):
        _ = spec.block_bytes
    for name in ("pool", "tables"):
        with pytest.raises(ValueError, match=f"3 pools.*instead of `{name}`"):
            getattr(state, name)


@pytest.mark.parametrize("layer", [5, np.int64(5), np.asarray(5, np.int32)])
def test_the_layer_map_finds_a_layer_by_the_number_of_the_model(layer):
    spec = spec_of(LayerGroup("a", [0, 3], KV), LayerGroup("b", [2, 5], WIDE), shared_layers={7: 5})
    assert spec.layer_map.find(layer) == spec.layer_map.find(7) == (1, 1)
    assert spec.layer_map.find(0, "b") == (1, 0)


def test_equal_sized_cuts_groups_of_one_payload_into_equal_parts():
    groups = equal_sized(
        [
            LayerGroup("full", [5, 11], KV),
            LayerGroup("local", range(4), KV, sliding_window=9),
            LayerGroup("wide", range(20, 23), WIDE),
        ]
    )
    assert [(group.name, group.layers, group.sliding_window) for group in groups] == [
        ("full", (5, 11), None),
        ("local/0", (0, 1), 9),
        ("local/1", (2, 3), 9),
        ("wide", (20, 21, 22), None),
    ]
    assert len(spec_of(*groups).pools) == 2


def test_specs_of_equal_groups_are_equal_and_hashable():
    spec = spec_of(LayerGroup("a", [0, 1], KeyValue(2, 8, DataType.FP32)), shared_layers=[(2, 0)])
    same = spec_of(LayerGroup("a", range(2), KV), shared_layers={2: 0})
    assert spec == same and hash(spec) == hash(same)
    assert dataclasses.replace(spec, num_blocks=11).layer_groups == same.layer_groups


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"name": 3}, "name must be a str"),
        ({"layers": []}, "at least one layer"),
        ({"layers": [1, 1]}, "each named once"),
        ({"layers": [-1]}, "layers must be at least 0"),
        ({"layers": 3}, "layers of group 'a' must be a sequence"),
        ({"layers": [True]}, "layers must be an integer"),
        ({"payload": "float32"}, "payload must be a KeyValue"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
    ],
)
def test_a_layer_group_refuses_a_wrong_field(fields, message):
    with pytest.raises(ValueError, match=message):
        LayerGroup(**{"name": "a", "layers": [0], "payload": KV, **fields})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_layers": 2}, "groups and num_layers cannot both be given"),
        ({"groups": [KV]}, "groups must be a LayerGroup"),
        ({"groups": [LayerGroup("a", [0], KV), LayerGroup("a", [1], KV)]}, "different names"),
        ({"groups": [LayerGroup("a", [0], KV), LayerGroup("b", [0], KV)]}, r"Layers \[0\] are in"),
        ({"shared_layers": {0: 1}}, "layer 0 reads the cache of layer 1"),
        ({"shared_layers": {1: 2}}, "layer 1 reads the cache of layer 2"),
        ({"shared_layers": 5}, "shared_layers must map layers to layers"),
        ({"num_blocks": 2**30}, r"num_blocks \* num_layers \* num_kv_heads must be below"),
    ],
)
def test_a_spec_refuses_wrong_groups(fields, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(**{"groups": [LayerGroup("a", [0], KV)], **SIZES, **fields})
