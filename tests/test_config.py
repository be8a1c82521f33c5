"""Configuration: defaults, checks, and the files that `load_config` reads."""

import dataclasses
import fractions
import math
import pathlib
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.config import (
    CacheConfig,
    MemoryPressureThresholds,
    PrefixCacheConfig,
    load_config,
)
from ferrum_jax.geometry import CacheGeometry
from ferrum_jax.layers import LayerGroup
from ferrum_jax.payload import KeyValue
from ferrum_jax.spec import CacheSpec
from ferrum_jax.types import DataType, Device, MemoryPressure

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.toml"))
MODEL = {"num_layers": 2, "num_kv_heads": 3, "head_dim": 8}
GEOMETRY = {**MODEL, "dtype": "bfloat16", "max_seqs": 4, "max_sequence_length": 33}
SIZES = {"num_blocks": 10, "block_size": 4, "max_seqs": 4, "max_blocks_per_seq": 9}
SPEC = {**MODEL, **SIZES, "dtype": jnp.bfloat16}
PREFIX = {
    **{"max_prefixes": 8, "min_prefix_length": 16, "prefix_ttl_seconds": 60},
    "enable_cross_request_sharing": True,
}
NOT_COUNTS = [0, -1, 1.0, "4", True, None]
GOOD_FILE = """
[model]
num_layers = 2
num_kv_heads = 3
head_dim = 8
dtype = "bfloat16"

[limits]
max_seqs = 4
max_sequence_length = 33
"""
FULL_FILE = (
    """
[cache]
block_size = 8
max_blocks = 64
initial_blocks = 32
enable_pooling = false
target_devices = ["cuda:1", "cpu"]
enable_prefix_caching = true
enable_multi_device = true
[cache.prefix_cache_config]
max_prefixes = 8
min_prefix_length = 16
prefix_ttl_seconds = 60
enable_cross_request_sharing = true
[cache.pressure_thresholds]
high_threshold = 0.7
"""
    + GOOD_FILE
)


@pytest.fixture
def write(tmp_path):
    def write_text(text):
        path = tmp_path / "cache.toml"
        path.write_bytes(text.encode(errors="surrogateescape"))
        return path

    return write_text


@pytest.mark.parametrize(
    "value",
    [
        CacheConfig(),
        MemoryPressureThresholds(),
        PrefixCacheConfig(**PREFIX),
        CacheGeometry(**GEOMETRY),
        CacheSpec(**SPEC),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_config_is_frozen_and_hashable(value):
    assert hash(value) == hash(dataclasses.replace(value))
    assert value == dataclasses.replace(value)
    field = dataclasses.fields(value)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, 1)
    with pytest.raises(TypeError, match="positional"):
        type(value)(1)


@pytest.mark.parametrize("value", NOT_COUNTS)
@pytest.mark.parametrize(
    ("cls", "fields"),
    [
        (CacheConfig, {"block_size": 16, "max_blocks": 1000, "initial_blocks": 100}),
        (CacheGeometry, GEOMETRY),
        (CacheSpec, SPEC),
        (PrefixCacheConfig, {k: PREFIX[k] for k in ("max_prefixes", "min_prefix_length")}),
    ],
    ids=lambda part: part.__name__ if isinstance(part, type) else "",
)
def test_a_config_names_a_size_below_one(cls, fields, value):
    given = PREFIX if cls is PrefixCacheConfig else fields
    for name in fields:
        if name != "dtype":
            with pytest.raises(ValueError, match=f"^{name} must be"):
                cls(**{**given, name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_blocks": 99}, r"initial_blocks \(100\) must not exceed max_blocks \(99\)"),
        ({"enable_pooling": 1}, "enable_pooling must be true or false"),
        ({"enable_multi_device": None}, "enable_multi_device must be true or false"),
        ({"target_devices": ()}, "target_devices must list at least one Device"),
        ({"target_devices": ("cpu",)}, "target_devices must list at least one Device"),
        ({"target_devices": 3}, "target_devices must list at least one Device"),
        ({"target_devices": (Device("cpu"),) * 2}, "target_devices must be distinct"),
        ({"enable_prefix_caching": True}, "prefix_cache_config must be given"),
        ({"prefix_cache_config": PREFIX}, "prefix_cache_config must be a PrefixCacheConfig"),
        ({"pressure_thresholds": 0.5}, "pressure_thresholds must be a MemoryPressureThresholds"),
    ],
)
def test_cache_config_names_a_wrong_field(fields, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**fields)


def test_cache_config_accepts_numpy_integers_and_lists():
    assert CacheConfig(block_size=np.int32(8)) == CacheConfig(block_size=8)
    devices = [Device("gpu", 1), Device("cpu")]
    assert CacheConfig(target_devices=devices).target_devices == tuple(devices)


@pytest.mark.parametrize("seconds", [0, -1, math.nan, "60", True])
def test_prefix_cache_config_needs_a_positive_ttl_and_has_no_defaults(seconds):
    with pytest.raises(ValueError, match="prefix_ttl_seconds must be"):
        PrefixCacheConfig(**{**PREFIX, "prefix_ttl_seconds": seconds})
    assert PrefixCacheConfig(**{**PREFIX, "prefix_ttl_seconds": math.inf})
    with pytest.raises(TypeError, match="max_prefixes.*min_prefix_length"):
        PrefixCacheConfig()


@pytest.mark.parametrize(
    ("used", "want"),
    [(0, "Low"), (59, "Low"), (60, "Medium"), (79, "Medium"), (80, "High"), (94, "High")]
    + [(95, "Critical"), (100, "Critical")],
)
def test_thresholds_level_rises_at_each_threshold(used, want):
    assert MemoryPressureThresholds().level(used, 100) is MemoryPressure[want]


def test_thresholds_level_of_an_empty_pool_is_low():
    thresholds = MemoryPressureThresholds(medium_threshold=0.0)
    assert thresholds.level(0, 10) is thresholds.level(0, 0) is MemoryPressure.Low
    assert thresholds.level(1, 10) is MemoryPressure.Medium


@pytest.mark.parametrize(("used", "total"), [(-1, 10), (11, 10), (1, 0)])
def test_thresholds_level_refuses_an_impossible_pool(used, total):
    with pytest.raises(ValueError, match="used must be between 0 and total"):
        MemoryPressureThresholds().level(used, total)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"medium_threshold": -0.1}, "medium_threshold must be between 0 and 1"),
        ({"critical_threshold": 1.1}, "critical_threshold must be between 0 and 1"),
        ({"high_threshold": 0.6}, r"high_threshold \(0.6\) must be above medium_threshold"),
        ({"critical_threshold": 0.7}, "critical_threshold .* must be above high_threshold"),
        ({"high_threshold": "0.7"}, "high_threshold must be a number"),
        *(
            ({"high_threshold": number}, "high_threshold must be a number")
            for number in (math.nan, True, np.True_, np.float32("nan"), 0.5 + 0j, None)
        ),
    ],
)
def test_thresholds_must_increase_within_zero_and_one(fields, message):
    with pytest.raises(ValueError, match=message):
        MemoryPressureThresholds(**fields)


def test_thresholds_may_be_any_real_number():
    want = MemoryPressureThresholds(medium_threshold=0.5)
    for number in (np.float32(0.5), np.float64(0.5), fractions.Fraction(1, 2)):
        assert MemoryPressureThresholds(medium_threshold=number) == want


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.bfloat16, DataType.BF16, jnp.dtype("bfloat16")])
def test_spec_normalizes_its_dtype(dtype):
    spec = CacheSpec(**{**SPEC, "dtype": dtype})
    assert isinstance(spec.dtype, np.dtype)
    assert spec == CacheSpec(**SPEC) and hash(spec) == hash(CacheSpec(**SPEC))
    with pytest.raises(ValueError, match="dtype must name a type"):
        CacheSpec(**{**SPEC, "dtype": None})


def test_spec_block_bytes_and_pool_bytes():
    spec = CacheSpec(**SPEC)
    pool = np.zeros((2, 10, 2, 3, 4, 8), np.float16)  # K and V of N, L, H, B, D
    assert spec.block_bytes == pool[:, 0].nbytes
    assert spec.pool_bytes == pool.nbytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_blocks": 2**20, "num_layers": 2**6, "num_kv_heads": 2**5},
            r"num_blocks \* num_layers \* num_kv_heads must be below 2\*\*31",
        ),
        ({"num_blocks": 2**26, "block_size": 32}, r"num_blocks \* block_size must be below"),
        (
            {"max_blocks_per_seq": 2**29},
            r"max_blocks_per_seq \* block_size must be .* got 2147483648. Lower max_blocks_per_seq",
        ),
    ],
)
def test_spec_refuses_sizes_that_an_int32_cannot_index(fields, message):
    with pytest.raises(ValueError, match=message):
        CacheSpec(**{**SPEC, **fields})


def test_geometry_spec_has_rows_for_the_longest_sequence():
    geometry = CacheGeometry(**GEOMETRY)
    assert geometry.dtype is DataType.BF16
    assert geometry.spec(num_blocks=10, block_size=4) == CacheSpec(**SPEC)
    assert geometry.spec(10, block_size=33).max_blocks_per_seq == 1
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        geometry.spec(10, block_size=0)


def test_load_config_uses_the_defaults(write):
    config, geometry = load_config(write(GOOD_FILE))
    assert config == CacheConfig()
    assert geometry == CacheGeometry(**GEOMETRY)


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte order mark"])
def test_load_config_reads_every_field(write, mark):
    config, _ = load_config(str(write(mark + FULL_FILE)))
    assert config == CacheConfig(
        block_size=8,
        max_blocks=64,
        initial_blocks=32,
        enable_pooling=False,
        target_devices=(Device("gpu", 1), Device("cpu")),
        enable_prefix_caching=True,
        prefix_cache_config=PrefixCacheConfig(**PREFIX),
        enable_multi_device=True,
        pressure_thresholds=MemoryPressureThresholds(high_threshold=0.7),
    )


@pytest.mark.parametrize(
    ("cut", "paste", "message"),
    [
        ("[model]", "[modle]", "unknown key 'modle' in the file; use one of cache, model, limits"),
        ("num_kv_heads", "num_heads", r"unknown key 'num_heads' in \[model\]; .*num_kv_heads"),
        ("max_seqs", "max_rows", r"unknown key 'max_rows' in \[limits\]; use one of max_seqs"),
        ("[model]", "[cache]\nblocksize = 4\n[model]", r"'blocksize' in \[cache\]; .*block_size"),
        ("head_dim = 8\n", "", r"\[model\] lacks head_dim"),
        ("[limits]\nmax_seqs = 4\nmax_sequence_length = 33\n", "", r"\[limits\] lacks max_seqs"),
        ("[model]", "cache = 3\n[model]", r"\[cache\] must be a table"),
        ("max_seqs = 4", "max_seqs = 0", "max_seqs must be at least 1, got 0"),
        ("max_seqs = 4", "max_seqs = ", "Invalid value"),
        ("max_seqs = 4", f"max_seqs = {10**30}", "max_seqs must be below 2147483648, got 1000"),
        ("max_seqs = 4", f"max_seqs = {'9' * 5000}", "Exceeds the limit"),
        ("[model]", f"[cache]\nmax_blocks = {2**31}\n[model]", "max_blocks must be below 2147"),
        ("max_seqs = 4", "max_seqs = " + "[" * 10_000, "nested too deeply"),
        ("[model]", "# \udcff\n[model]", "'utf-8' codec can't decode byte 0xff"),
        ('"bfloat16"', '"float4"', "dtype must name a type"),
        ("[model]", "[cache]\ntarget_devices = 'cpu'\n[model]", "target_devices must be a list"),
        ("[model]", "[cache]\ntarget_devices = ['xpu']\n[model]", "platform must be one of"),
        ("[model]", "[cache]\npressure_thresholds = 1\n[model]", "thresholds. must be a table"),
        ("[model]", "[cache.pressure_thresholds]\nlow = 0\n[model]", "'low' in .*; .*medium_"),
        ("[model]", "[cache.prefix_cache_config]\nmax_prefixes = 1\n[model]", "lacks min_prefix"),
    ],
)
def test_load_config_names_the_file_and_the_wrong_key(write, cut, paste, message):
    assert cut in GOOD_FILE
    path = write(GOOD_FILE.replace(cut, paste))
    with pytest.raises(ValueError, match=rf"cache\.toml: .*{message}"):
        load_config(path)


@pytest.mark.parametrize(
    "table", ["cache", "model", "limits", "cache.prefix_cache_config", "cache.pressure_thresholds"]
)
def test_load_config_names_the_file_and_a_value_of_a_wrong_type(write, table):
    parsed = tomllib.loads(FULL_FILE)
    for step in table.split("."):
        parsed = parsed[step]
    lines = FULL_FILE.splitlines()
    start = lines.index(f"[{table}]")
    for number, name in enumerate(parsed, start=start + 1):
        if lines[number].startswith("["):
            break  # Nested tables have their own case.
        texts = "-1", "0.5", "1e400", "nan", "'x'", "[1]", "{a = 1}", "1979-05-27", f"{10**400}"
        for value in texts:
            path = write("\n".join([*lines[:number], f"{name} = {value}", *lines[number + 1 :]]))
            try:
                load_config(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                assert name in str(error)
            else:
                assert name in ("prefix_ttl_seconds", "max_prefixes", "min_prefix_length") or (
                    name.endswith("_threshold") and value == "0.5"
                )


GROUPS_FILE = """
[[model.groups]]
name = "full"
layers = [1]
num_kv_heads = 3
head_dim = 8
dtype = "bfloat16"

[[model.groups]]
name = "local"
layers = [0]
num_kv_heads = 3
head_dim = 8
dtype = "bfloat16"
sliding_window = 4

[model.shared_layers]
2 = 1

[limits]
max_seqs = 4
max_sequence_length = 33
"""


def test_load_config_reads_layer_groups(write):
    _, geometry = load_config(write(GROUPS_FILE))
    payload = KeyValue(3, 8, "bfloat16")
    groups = LayerGroup("full", [1], payload), LayerGroup("local", [0], payload, 4)
    limits = {"max_seqs": 4, "max_sequence_length": 33}
    assert geometry == CacheGeometry(groups=groups, shared_layers={2: 1}, **limits)
    want = CacheSpec(groups=groups, shared_layers={2: 1}, **SIZES)
    assert geometry.spec(num_blocks=10, block_size=4) == want
    described = geometry.num_layers, geometry.num_kv_heads, geometry.head_dim, geometry.dtype
    assert described == (2, 3, 8, DataType.BF16)


@pytest.mark.parametrize(
    ("cut", "paste", "message"),
    [
        ('name = "full"\n', "", r"\[\[model.groups\]\] lacks name"),
        ('name = "full"', "name = 'full'\nwindow = 3", r"unknown key 'window' in \[\[model.groups"),
        ("layers = [1]", "layers = [0]", r"Layers \[0\] are in two layer groups"),
        ("layers = [1]", "layers = 1", "layers of group 'full' must be a sequence"),
        ("layers = [1]", "layers = [1]\nnum_blocks = 0", "num_blocks must be"),
        ("2 = 1", "2 = 7", "layer 2 reads the cache of layer 7"),
        ("[model.shared_layers]", "[model.other]", r"unknown key 'other' in \[model\]"),
        (GROUPS_FILE[: GROUPS_FILE.index("[model.sh")], "[model]\ngroups = 3\n", "must be tables"),
    ],
)
def test_load_config_names_what_is_wrong_with_a_layer_group(write, cut, paste, message):
    assert cut in GROUPS_FILE
    path = write(GROUPS_FILE.replace(cut, paste, 1))
    with pytest.raises(ValueError, match=rf"cache\.toml: .*{message}"):
        load_config(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 2}, "num_kv_heads is 3 in the groups, and 2 was given"),
        ({"dtype": "float32"}, "dtype is .* in the groups"),
        ({"groups": [3]}, "groups must be a LayerGroup"),
        ({"max_seqs": 0}, "max_seqs must be at least 1"),
    ],
)
def test_a_geometry_of_groups_names_a_wrong_field(fields, message):
    group = LayerGroup("full", [1], KeyValue(3, 8, "bfloat16"))
    with pytest.raises(ValueError, match=message):
        CacheGeometry(**{"groups": [group], "max_seqs": 4, "max_sequence_length": 33, **fields})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_load_config_of_a_shipped_file(path):
    config, geometry = load_config(path)
    assert geometry.spec(config.max_blocks, config.block_size).pool_bytes > 0
    text = path.read_text()
    assert text.startswith("# ")
    assert sum(len(table) for table in tomllib.loads(text).values()) <= 12


@pytest.mark.parametrize(
    ("name", "parameters_in_billions", "memory_gib"),
    [("llama3-8b-80gb", 8.03, 0.75 * 79.6), ("llama3.2-3b-v5e", 3.21, 15.0)],
)
def test_a_shipped_file_fits_its_device_beside_the_weights(
    name, parameters_in_billions, memory_gib
):
    config, geometry = load_config(CONFIGS[0].parent / f"{name}.toml")
    weight_bytes = parameters_in_billions * 1e9 * 2
    pool_bytes = geometry.spec(config.max_blocks, config.block_size).pool_bytes
    assert weight_bytes + pool_bytes + 2 * 2**30 < memory_gib * 2**30
