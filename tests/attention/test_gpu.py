import dataclasses
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractDevice, AbstractMesh

from ferrum_jax.attention import AttentionOptions, gpu_kernel
from ferrum_jax.attention.gpu import gpu_attention, supports
from ferrum_jax.attention.gpu_tuning import Tiling, tiling_for
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK, TokenFormat
from tests.attention.test_paged_attention import VARIANTS, assert_right, random_problem
from tests.support.attention_oracle import Problem, attention, problem

# jax 0.11 says so whenever it lowers a kernel for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

# Where there is a GPU the same tests run the compiled kernels.
INTERPRET = jax.default_backend() != "gpu"
GPU = types.SimpleNamespace(platform="gpu")
SMALL = Tiling(tile_queries=16, tile_tokens=16, num_splits=4, num_warps=4, num_stages=5)


# Interpreted kernels are compiled once and run once.
UNOPTIMIZED = {"xla_backend_optimization_level": 0} if INTERPRET else None


def run(inputs: AttentionInputs, tiling: Tiling | None = None, **kwargs) -> jax.Array:
    kernel = functools.partial(gpu_attention, tiling=tiling, interpret=INTERPRET, **kwargs)
    return jax.jit(kernel, compiler_options=UNOPTIMIZED)(inputs)


def attend(p: Problem, tiling: Tiling | None = None) -> jax.Array:
    inputs = attention_inputs(*p.args(GPU))
    assert supports(inputs)
    return run(inputs, tiling).reshape(p.q.shape)


@pytest.mark.parametrize("seed", range(16))
def test_it_agrees_with_float64_loops_over_the_grid_of_the_other_kernels(seed):
    p = random_problem(seed)
    assert_right(attend(p), p)


@pytest.mark.parametrize(
    "heads, head_dim, block_size, dtype",
    [
        ((32, 8), 128, 16, "bfloat16"),
        ((9, 3), 64, 8, "bfloat16"),
        ((7, 1), 96, 32, "float16"),
        ((34, 2), 80, 64, "float32"),
        ((2, 2), 256, 128, "float16"),
    ],
)
def test_heads_and_blocks_of_every_size_are_right(heads, head_dim, block_size, dtype):
    shape = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": dtype}
    p = problem(held_lens=(150, 1, 0, 64), **shape)
    assert_right(attend(p), p)


@pytest.mark.parametrize("variant", ["plain", "window", "sinks", "all"])
def test_every_variant_of_a_chunk_is_right_across_tiles_and_splits(variant):
    # 13 queries of 2 heads a group take two tiles, and 70 tokens five more.
    p = problem(held_lens=(70, 0, 20), num_queries=13, q_lens=(13, 0, 2), **VARIANTS[variant])
    assert_right(attend(p, SMALL), p)


@pytest.mark.parametrize("window", [1, 16, 17])
def test_a_window_starts_at_the_right_token(window):
    p = problem(held_lens=(32, 33, 300), block_size=16, sliding_window=window)
    assert_right(attend(p, SMALL), p)


def test_the_longest_window_is_none():
    p = problem(held_lens=(1, 9), num_queries=4, q_lens=(4, 4), sliding_window=2**31 - 1)
    assert_right(attend(p, SMALL), p)


def test_lengths_around_every_boundary_are_right():
    # 16 a tile, 64 the four splits of one: one less, just so, and one more.
    held_lens = [n + d for n in (16, 32, 64, 128) for d in (-1, 0, 1)]
    p = problem(held_lens=held_lens, block_size=8, heads=(3, 1))
    assert_right(attend(p, SMALL), p)


@pytest.mark.parametrize("sinks", [False, True])
def test_what_sees_no_token_gives_zeros(sinks):
    options = {"num_queries": 4, "q_lens": (4, 2, 4, 0), "sinks": sinks}
    p = problem(held_lens=(0, 9, 2, 9), **options)
    out = np.asarray(attend(p))
    assert (out[0] == 0).all() and (out[1, 2:] == 0).all() and (out[3] == 0).all()
    assert (out[2, :2] == 0).all() and (out[2, 2:] != 0).any() and (out[1, :2] != 0).any()


@pytest.mark.parametrize("window", [None, 9])
def test_what_no_row_holds_may_be_nan_and_what_fell_out_of_the_window_gone(window):
    problems = (problem(seed=s, held_lens=(60, 45), sliding_window=window) for s in range(100))
    p = next(p for p in problems if 0 not in p.block_ids)  # Masked tokens read block 0, if any.
    assert np.isnan(p.k[0]).all() and np.isnan(p.v[0]).all()
    block_ids = p.block_ids.copy()
    for row, seq_len in enumerate(p.held_lens):
        block_ids[row, : (seq_len - (window or seq_len)) // 4] = -1
    assert_right(attend(dataclasses.replace(p, block_ids=block_ids)), p)


def test_a_row_of_nan_leaves_the_others_alone():
    p = problem(held_lens=(70, 70, 70), block_size=16)
    clean = attention(p)
    for pool in (p.k, p.v):
        pool[p.block_ids[1, 0]] = np.nan
    out = np.asarray(attend(p, SMALL))
    np.testing.assert_allclose(out[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-5)
    assert np.isnan(out[1]).all()


def full_pool(**changes) -> Problem:
    """Rows of 30 tokens; a pool that holds a number wherever one may look."""
    p = problem(held_lens=(30, 30, 30, 30), **changes)
    k, v = np.random.default_rng(1).normal(size=(2, *p.k.shape)).astype(np.float32)
    return dataclasses.replace(p, k=k, v=v)


def test_ids_and_lengths_beyond_the_pool_and_the_table_are_read_as_the_last():
    p = full_pool(spare_width=0)
    num_blocks, num_layers = p.k.shape[:2]
    reach = p.block_ids.shape[1] * p.k.shape[3]  # Two tiles.
    block_ids, held_lens = p.block_ids.copy(), p.held_lens.copy()
    block_ids[0, 2:4], block_ids[1, 2:4] = num_blocks - 1, 0
    held_lens[2] = reach
    last = {"block_ids": block_ids.copy(), "held_lens": held_lens.copy(), "layer": num_layers - 1}
    want = attend(dataclasses.replace(p, **last), SMALL)
    block_ids[0, 2:4], block_ids[1, 2:4] = (num_blocks, 10**9), (NULL_BLOCK, -(10**9))
    held_lens[2] = reach + 3
    beyond = {"block_ids": block_ids, "held_lens": held_lens, "layer": num_layers}
    np.testing.assert_array_equal(attend(dataclasses.replace(p, **beyond), SMALL), want)


def test_ids_and_lengths_that_cannot_be_spoil_their_own_row_only():
    p = full_pool(num_queries=2, sliding_window=9)
    block_ids, held_lens = p.block_ids.copy(), p.held_lens.copy()
    block_ids[0] = np.iinfo(np.int32).max
    held_lens[1], held_lens[2] = np.iinfo(np.int32).max, np.iinfo(np.int32).min
    bad = dataclasses.replace(p, block_ids=block_ids, held_lens=held_lens)
    out = np.asarray(attend(bad, SMALL))
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[3], np.asarray(attend(p, SMALL))[3])


def test_queries_wider_than_the_pool_lose_nothing():
    p = problem(held_lens=(40, 3), dtype="bfloat16")
    q, *rest = p.args(GPU)
    wide = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)
    inputs = attention_inputs(jnp.asarray(wide), *rest)
    assert supports(inputs)
    out = run(inputs).reshape(q.shape)
    want = attention(dataclasses.replace(p, q=wide))
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=1e-5)


def test_it_runs_in_scan_over_layers_and_in_a_while_loop_and_under_vmap():
    p = problem(held_lens=(30, 12, 3))
    q, pool, _, block_ids, held_lens, q_lens, options = p.args(GPU)
    pool = dataclasses.replace(pool, k=jnp.nan_to_num(pool.k), v=jnp.nan_to_num(pool.v))

    def step(q, layer):
        inputs = attention_inputs(q, pool, layer, block_ids, held_lens, q_lens, options)
        return gpu_attention(inputs, interpret=INTERPRET).reshape(q.shape)

    one_by_one = q
    for layer in range(pool.num_layers):
        one_by_one = step(one_by_one, layer)

    def looped(q):
        scanned, _ = lax.scan(lambda q, layer: (step(q, layer), None), q, jnp.arange(2))
        return lax.while_loop(
            lambda c: c[0] < pool.num_layers, lambda c: (c[0] + 1, step(c[1], c[0])), (2, scanned)
        )[1]

    out = jax.jit(jax.vmap(looped), compiler_options=UNOPTIMIZED)(jnp.stack([q, jnp.flip(q)]))
    np.testing.assert_allclose(out[0], one_by_one, rtol=0, atol=1e-6)


def abstract_inputs(
    *,
    heads=(32, 8, 128),
    rows=16,
    num_queries=1,
    dtype="bfloat16",
    q_dtype=None,
    num_blocks=1000,
    block_size=16,
    max_blocks=512,
    options=None,
) -> AttentionInputs:
    """Shapes alone."""
    num_q_heads, num_kv_heads, head_dim = heads

    def pool() -> BlockPool:
        kv = jnp.zeros((num_blocks, 4, num_kv_heads, block_size, head_dim), dtype)
        return BlockPool(k=kv, v=kv, dtype=jnp.dtype(dtype))

    shapes = {
        "q": jax.ShapeDtypeStruct((rows, num_queries, num_q_heads, head_dim), q_dtype or dtype),
        "pool": jax.eval_shape(pool),
        "layer": jax.ShapeDtypeStruct((), jnp.int32),
        "block_ids": jax.ShapeDtypeStruct((rows, max_blocks), jnp.int32),
        "held_lens": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "q_lens": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    options = options or AttentionOptions()
    return jax.eval_shape(functools.partial(attention_inputs, options=options), **shapes)


def lowered_for_h100(function, *args) -> str:
    """What `function` becomes for an H100, wherever this runs."""
    h100 = AbstractDevice(device_kind="NVIDIA H100", platform="gpu", num_cores=132)
    checks = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=h100)):
        lower = export.export(jax.jit(function), platforms=["cuda"], disabled_checks=checks)
        return lower(*args).mlir_module()


LOWERED = {
    "32/8/128": {},
    "9/3/64": {"heads": (9, 3, 64), "rows": 1},
    "64/8/128": {"heads": (64, 8, 128), "rows": 256, "max_blocks": 8192},
    "batch of 512": {"rows": 512, "block_size": 128, "max_blocks": 1024},
    "float16 80": {"heads": (20, 5, 80), "dtype": "float16", "block_size": 8},
    "float32 96": {"heads": (6, 6, 96), "dtype": "float32"},
    "256": {"heads": (16, 1, 256), "block_size": 64},
    "chunk": {"num_queries": 512, "rows": 4},
    "chunk float32 256": {"num_queries": 100, "heads": (8, 2, 256), "dtype": "float32"},
    "all options": {
        "options": AttentionOptions(sliding_window=512, soft_cap=30.0, sinks=jnp.zeros(32))
    },
}


@pytest.mark.parametrize("case", LOWERED)
def test_it_lowers_for_an_h100_and_neither_copies_nor_gathers_the_pool(case):
    inputs = abstract_inputs(**LOWERED[case])
    assert supports(inputs)
    module = lowered_for_h100(gpu_attention, inputs)
    assert module.count("__gpu$xla.gpu.triton") == 2
    operations = set(re.findall(r"stablehlo\.(\w+)", module))
    assert not operations & {"transpose", "gather", "copy", "dynamic_slice", "pad", "concatenate"}


@pytest.mark.parametrize("token_format", [TokenFormat.Native, TokenFormat.Int8])
def test_offsets_into_pools_beyond_4_gib_have_64_bits(token_format, monkeypatch, capsys):
    def offset_bits(pool_bytes):
        num_blocks = pool_bytes // (4 * 8 * 16 * 128 * 2)
        inputs = abstract_inputs(num_blocks=num_blocks)
        tiling = tiling_for(inputs)
        lowered_for_h100(lambda i: gpu_kernel.attend_spans(i, token_format, tiling), inputs)
        width = 128 if token_format == TokenFormat.Native else 64
        tile = rf"tensor<64x{width}x"
        pattern = rf"tt\.addptr .*{tile}!tt.ptr<bf16>>, {tile}i(\d+)>"
        return re.findall(pattern, capsys.readouterr().out)

    printing = functools.partial(gpu_kernel.pl.pallas_call, debug=True)
    monkeypatch.setattr(gpu_kernel.pl, "pallas_call", printing)
    assert offset_bits((4 << 30) + (1 << 20)) == ["64", "64"]
    assert offset_bits(1 << 30) == ["32", "32"]


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": (8, 8, 320)},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "uint16", "q_dtype": "float32"},
        {"dtype": "int8", "q_dtype": "float32"},
        {"dtype": "float64"},
        {"rows": 0},
        {"max_blocks": 0},
        {"block_size": 1, "num_blocks": 1 << 26},  # 2**31 vectors.
        {"max_blocks": (1 << 27) - 1},  # Nearly 2**31 tokens.
    ],
    ids=str,
)
def test_it_says_what_it_does_not_take(changes):
    with jax.enable_x64(changes.get("dtype") == "float64"):
        assert not supports(abstract_inputs(**changes))


def test_bits_of_a_cpu_pool_are_not_taken_for_numbers():
    inputs = attention_inputs(*problem(dtype="bfloat16").args())
    assert inputs.pool.k.dtype == jnp.uint16
    assert not supports(inputs)


def test_splits_follow_the_work_at_hand():
    def splits(**shapes):
        return tiling_for(abstract_inputs(**shapes)).num_splits

    assert splits(rows=1) == 64
    assert splits(rows=16) == 8
    assert splits(rows=512) == 4
    assert splits(rows=1, max_blocks=8) == 2  # 128 tokens in tiles of 64.
    assert splits(rows=1, options=AttentionOptions(sliding_window=100)) == 2
    assert splits(rows=4, num_queries=1024) == 1


COMPILE = """
import itertools
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ferrum_jax.attention.gpu import gpu_attention
from tests.attention.test_gpu import COMPILED, FORMATS, H100, abstract_inputs

topology = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config=H100
)
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
for case, token_format in itertools.product(COMPILED, FORMATS):
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    inputs = jax.tree.map(place, abstract_inputs(**case))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = gpu_attention.lower(inputs, token_format=token_format)
        memory = lowered.compile().memory_analysis()
    k = inputs.pool.k
    assert memory.temp_size_in_bytes < k.size * k.dtype.itemsize / 2, memory
    print("compiled", case, token_format)
"""
# The rows of the table of tile sizes.
COMPILED = [
    {"heads": (8, 2, head_dim), "dtype": dtype, "num_queries": num_queries, "num_blocks": 10_000}
    for head_dim in (64, 96, 256)
    for dtype in ("bfloat16", "float32")
    for num_queries in (1, 40)
]
FORMATS = [TokenFormat.Native, TokenFormat.Int8]
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048 core_count: 132
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 fpus_per_core: 128
  shared_memory_per_block_optin: 232448
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability { major: 9 minor: 0 }
}
platform_name: "CUDA"
runtime_version { major: 13 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def test_it_compiles_for_an_h100_within_its_registers_and_shared_memory():
    needed = {"jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"}
    absent = needed - {package.name for package in importlib.metadata.distributions()}
    if absent:
        pytest.skip(f"compiling for CUDA without a GPU needs {sorted(absent)}")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("compiled") == len(COMPILED) * len(FORMATS)
