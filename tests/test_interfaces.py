"""The contract: every name of the Rust crate, and the behaviour of its records."""

import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest

from ferrum_jax import config, interfaces, policies, records, types
from ferrum_jax.errors import OutOfBlocksError, SequenceTooLongError
from ferrum_jax.interfaces import CacheEvictionPolicy, KvCacheHandle
from ferrum_jax.records import AllocationRequest, BlockTable
from ferrum_jax.types import DataType, Device, MemoryPressure, Priority

# What ferrum-interfaces 0.6 (module kv_cache) declares: traits with the parameters of each
# method, those with a default body marked by a star ...
TRAITS = {
    "KvCacheHandle": """
        block_table() block_table_mut() as_any() device() *num_tokens() num_layers() num_heads()
        head_dim() key_cache(layer) value_cache(layer) *kv_cache(layer) clone_handle() stats()
        is_valid() cache_id()""",
    "KvCacheManager": """
        allocate(request) extend(handle,additional_tokens) deallocate(request_id)
        can_allocate(request) stats() gc() set_pressure_callback(callback) get_handle(request_id)
        list_handles()""",
    "AdvancedKvCacheManager": """
        enable_prefix_caching(config) share_prefix(source,target,shared_tokens)
        swap_out(request_id) swap_in(request_id) compress_cache(request_id,compression_ratio)
        compression_stats()""",
    "BlockAllocator": """
        allocate_blocks(num_blocks) free_blocks(blocks) free_block_count() total_block_count()
        block_size() defragment()""",
    "MultiDeviceCacheManager": """
        supported_devices() set_device_preference(devices) move_cache(request_id,target_device)
        get_cache_device(request_id) rebalance_devices() device_stats()""",
    "CacheEvictionPolicy": """
        select_eviction_candidates(required_memory,active_caches)
        record_access(request_id,access_time) name()""",
}
SUPERTRAITS = {
    "AdvancedKvCacheManager": "KvCacheManager",
    "MultiDeviceCacheManager": "KvCacheManager",
}
# ... structs with their fields ...
STRUCTS = {
    "BlockTable": "physical_blocks sequence_length block_size",
    "CacheHandleStats": "memory_bytes blocks_allocated tokens_stored utilization last_access",
    "AllocationRequest": """
        request_id initial_tokens max_sequence_length num_layers num_heads head_dim device dtype
        priority""",
    "CacheManagerStats": """
        total_memory_bytes used_memory_bytes active_caches total_blocks free_blocks
        cache_hit_rate eviction_count allocation_count allocation_failures""",
    "CacheGcStats": "memory_freed caches_freed gc_time_ms",
    "CompressionStats": """
        compressed_caches memory_saved_bytes avg_compression_ratio avg_compression_time_ms""",
    "PrefixCacheConfig": """
        max_prefixes min_prefix_length prefix_ttl_seconds enable_cross_request_sharing""",
    "MemoryPressureThresholds": "medium_threshold high_threshold critical_threshold",
    "CacheConfig": """
        block_size max_blocks initial_blocks enable_pooling target_devices enable_prefix_caching
        prefix_cache_config enable_multi_device pressure_thresholds""",
}
# ... the methods of structs (logical_to_physical is a field there) ...
METHODS = {
    "BlockTable": """
        new(block_size) num_blocks() blocks_needed_for_length(length,block_size) has_free_space()
        free_tokens() add_blocks(blocks) extend_sequence(additional_tokens)
        logical_to_physical(logical_index)""",
    "AllocationRequest": "estimated_memory_bytes()",
    "LruEvictionPolicy": """
        select_eviction_candidates(required_memory,active_caches)
        record_access(request_id,access_time) name()""",
}
# ... and defaults.
DEFAULTS = {
    "CacheConfig": {
        "block_size": 16,
        "max_blocks": 1000,
        "initial_blocks": 100,
        "enable_pooling": True,
        "target_devices": (Device("cpu"),),
        "enable_prefix_caching": False,
        "prefix_cache_config": None,
        "enable_multi_device": False,
        "pressure_thresholds": config.MemoryPressureThresholds(),
    },
    "MemoryPressureThresholds": dict(
        medium_threshold=0.6, high_threshold=0.8, critical_threshold=0.95
    ),
}


def find(name):
    for module in (interfaces, records, config, policies, types):
        if hasattr(module, name):
            return getattr(module, name)
    raise AssertionError(f"{name} is nowhere")


def spelled(cls, name):
    """Returns "name(parameter,...)" of a method."""
    parameters = inspect.signature(inspect.getattr_static(cls, name).__get__(None, cls)).parameters
    return f"{name}({','.join(p for p in parameters if p not in ('self', 'cls'))})"


@pytest.mark.parametrize("trait", TRAITS)
def test_every_interface_has_the_crates_methods_and_no_other_abstract_one(trait):
    cls = find(trait)
    wanted = TRAITS[trait].split()
    for method in wanted:
        assert spelled(cls, method.strip("*").partition("(")[0]) == method.strip("*")
        assert inspect.getdoc(getattr(cls, method.strip("*").partition("(")[0]))
    duties = {method.partition("(")[0] for method in wanted if not method.startswith("*")}
    if trait in SUPERTRAITS:
        parent = find(SUPERTRAITS[trait])
        assert issubclass(cls, parent)
        duties |= parent.__abstractmethods__
    assert cls.__abstractmethods__ == duties
    with pytest.raises(TypeError, match="abstract"):
        cls()


@pytest.mark.parametrize("struct", STRUCTS)
def test_every_struct_has_the_crates_fields_and_is_frozen(struct):
    cls = find(struct)
    names = STRUCTS[struct].split()
    fields = dataclasses.fields(cls)
    assert [field.name for field in fields[: len(names)]] == names
    required = [f for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    assert {field.name for field in required} <= set(names)
    assert cls.__dataclass_params__.frozen
    for name in STRUCTS[struct].split():
        assert f"{name}:" in inspect.getdoc(cls)


@pytest.mark.parametrize("struct", METHODS)
def test_every_struct_has_the_crates_methods(struct):
    cls = find(struct)
    for method in METHODS[struct].split():
        assert spelled(cls, method.partition("(")[0]) == method


@pytest.mark.parametrize("struct", DEFAULTS)
def test_defaults_are_the_crates(struct):
    assert {
        field.name: getattr(find(struct)(), field.name)
        for field in dataclasses.fields(find(struct))
    } == DEFAULTS[struct]


def test_pressure_levels_are_the_crates():
    assert [level.name for level in MemoryPressure] == ["Low", "Medium", "High", "Critical"]


def test_num_tokens_and_kv_cache_have_defaults():
    table = BlockTable(physical_blocks=(3,), sequence_length=2, block_size=4)
    keys, values = np.zeros(1), np.ones(1)
    required = dict.fromkeys(KvCacheHandle.__abstractmethods__, lambda self: None)
    required["block_table"] = lambda self: table
    required["key_cache"] = lambda self, layer: keys
    required["value_cache"] = lambda self, layer: values
    handle = type("Handle", (KvCacheHandle,), required)()
    assert handle.num_tokens() == 2
    assert handle.kv_cache(0) == (keys, values)


def test_forget_has_a_default():
    required = dict.fromkeys(CacheEvictionPolicy.__abstractmethods__, lambda self: None)
    type("Policy", (CacheEvictionPolicy,), required)().forget("a")


def test_blocks_needed_for_length_rounds_up():
    for length, block_size in itertools.product((0, 1, 15, 16, 17, 100), (1, 3, 16)):
        want = math.ceil(length / block_size)
        assert BlockTable.blocks_needed_for_length(length, block_size) == want


def test_add_blocks_and_extend_sequence_return_new_tables():
    empty = BlockTable.new(4)
    assert (empty.num_blocks(), empty.free_tokens(), empty.has_free_space()) == (0, 0, False)
    roomy = empty.add_blocks([9, 0]).add_blocks([4])
    full = roomy.extend_sequence(12)
    assert (roomy.num_blocks(), roomy.free_tokens(), roomy.sequence_length) == (3, 12, 0)
    assert (full.free_tokens(), full.sequence_length) == (0, 12)
    assert empty == BlockTable.new(4)
    assert [roomy.logical_to_physical(i) for i in range(3)] == [9, 0, 4]
    assert hash(full) == hash(
        BlockTable(physical_blocks=(9, 0, 4), sequence_length=12, block_size=4)
    )


def test_free_tokens_and_extend_sequence_count_dropped_tokens_as_gone():
    table = BlockTable(physical_blocks=(1,), sequence_length=10, block_size=4, num_pruned=7)
    assert table.free_tokens() == 1
    assert table.extend_sequence(1).sequence_length == 11
    with pytest.raises(OutOfBlocksError, match="2 more tokens need 2 blocks; the table holds 1"):
        table.extend_sequence(2)


def test_a_block_table_refuses_more_tokens_than_fit_and_indices_outside():
    table = BlockTable.new(4).add_blocks([1, 6])
    partly_full = table.extend_sequence(7)
    assert partly_full.free_tokens() == 1 and partly_full.has_free_space()
    assert not partly_full.extend_sequence(1).has_free_space()
    assert table.extend_sequence(0) == table
    with pytest.raises(OutOfBlocksError, match="9 more tokens need 3 blocks; the table holds 2"):
        table.extend_sequence(9)
    with pytest.raises(ValueError, match="additional_tokens must be at least 0"):
        table.extend_sequence(-1)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"logical index {index}; the table holds 2"):
            table.logical_to_physical(index)
    with pytest.raises(ValueError, match="must not repeat"):
        table.add_blocks([1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 0}, "block_size must be at least 1"),
        ({"block_size": 4, "sequence_length": -1}, "sequence_length must be at least 0"),
        ({"block_size": 4, "sequence_length": 1}, "sequence_length .1. .* the 0 tokens"),
        ({"block_size": 4, "sequence_length": 1, "num_pruned": 2}, "num_pruned must be below 2"),
        ({"block_size": 4, "physical_blocks": (1, 1)}, "physical_blocks must not repeat"),
        ({"block_size": 4, "physical_blocks": (-1,)}, "physical_blocks must be at least 0"),
        ({"block_size": 4, "physical_blocks": ("1",)}, "physical_blocks must be an integer"),
    ],
)
def test_block_table_refuses_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockTable(**fields)


REQUEST = {
    **{"request_id": "r", "initial_tokens": 5, "max_sequence_length": 10, "num_layers": 2},
    **{"num_heads": 3, "head_dim": 8, "device": Device("cpu"), "dtype": DataType.BF16},
}


def test_estimated_memory_bytes_is_that_of_the_maximum_length():
    request = AllocationRequest(**REQUEST)
    assert request.priority is Priority.Normal
    assert request.estimated_memory_bytes() == 2 * (2 * 3 * 10 * 8) * 2
    assert AllocationRequest(**{**REQUEST, "dtype": "bfloat16"}) == request


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("initial_tokens", -1, "initial_tokens must be at least 0"),
        ("max_sequence_length", 0, "max_sequence_length must be at least 1"),
        ("num_layers", 0, "num_layers must be at least 1"),
        ("num_heads", -3, "num_heads must be at least 1"),
        ("head_dim", 1.5, "head_dim must be an integer"),
        ("device", "cpu", "device must be a Device"),
        ("dtype", "float64", "dtype must be one of"),
        ("priority", 1, "priority must be a Priority"),
        ("request_id", [], "request_id must be hashable"),
    ],
)
def test_allocation_request_names_a_wrong_field(field, value, message):
    with pytest.raises(ValueError, match=message):
        AllocationRequest(**{**REQUEST, field: value})
    with pytest.raises(SequenceTooLongError, match="begins with 11 tokens, .* is 10. Shorten"):
        AllocationRequest(**{**REQUEST, "initial_tokens": 11})
    with pytest.raises(SequenceTooLongError, match="begins with 11 tokens, .* is 10. Shorten"):
        AllocationRequest(**{**REQUEST, "prompt_token_ids": range(11)})
