"""The GPU kernels: lowering and compiling for an H100, and how a call is cut into programs."""

import dataclasses
import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ferrum_jax.attention import AttentionOptions, gpu, paged_attention
from ferrum_jax.attention.call import attention_call
from ferrum_jax.attention.gpu import kernel
from ferrum_jax.attention.gpu.tuning import tiling_for
from ferrum_jax.types import TokenFormat
from tests.support.attention_kernels import INTERPRET, UNOPTIMIZED, abstract_call, lowered, run_gpu
from tests.support.attention_oracle import attention
from tests.support.attention_problems import problem
from tests.support.devices import compile_elsewhere

# jax 0.11 says so whenever it lowers a kernel for a GPU.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
_, INT8, INT8_INT4, INT4 = TokenFormat


def test_queries_wider_than_the_pool_lose_nothing():
    p = problem(held_lens=(40, 3), dtype="bfloat16")
    wide = np.random.default_rng(0).normal(size=p.q.shape).astype(np.float32)
    call = attention_call(**{**p.arguments("gpu"), "q": jnp.asarray(wide)})
    out = jax.jit(run_gpu, compiler_options=UNOPTIMIZED if INTERPRET else None)(call)
    want = attention(dataclasses.replace(p, q=wide))
    np.testing.assert_allclose(np.asarray(out).reshape(want.shape), want, rtol=0, atol=1e-5)


def test_it_runs_in_scan_over_layers_and_in_a_while_loop_and_under_vmap():
    arguments = problem(held_lens=(30, 12, 3)).arguments("gpu")
    pool, q = arguments.pop("pool"), arguments.pop("q")
    del arguments["layer"]
    pool = jax.tree.map(jnp.nan_to_num, pool)

    def step(q, layer):
        call = attention_call(q, pool, layer, **arguments)
        return gpu.attend(call, interpret=INTERPRET).reshape(q.shape)

    one_by_one = functools.reduce(step, range(pool.num_layers), q)

    def looped(q):
        scanned, _ = lax.scan(lambda q, layer: (step(q, layer), None), q, jnp.arange(2))
        return lax.while_loop(
            lambda c: c[0] < pool.num_layers, lambda c: (c[0] + 1, step(c[1], c[0])), (2, scanned)
        )[1]

    out = jax.jit(jax.vmap(looped), compiler_options=UNOPTIMIZED)(jnp.stack([q, jnp.flip(q)]))
    np.testing.assert_allclose(out[0], one_by_one, rtol=0, atol=1e-6)


ALL_OPTIONS = AttentionOptions(sliding_window=512, soft_cap=30.0, sinks=jnp.zeros(32))
LOWERED = {
    "32/8/128": {},
    "9/3/64": {"heads": (9, 3, 64), "rows": 1},
    "64/8/128": {"heads": (64, 8, 128), "rows": 256, "max_blocks": 8192},
    "batch of 512": {"rows": 512, "block_size": 128, "max_blocks": 1024},
    "float16 80": {"heads": (20, 5, 80), "dtype": "float16", "block_size": 8},
    "float32 96": {"heads": (6, 6, 96), "dtype": "float32"},
    "256": {"heads": (16, 1, 256), "block_size": 64},
    "512": {"heads": (8, 1, 512)},
    "chunk": {"num_queries": 512, "rows": 4},
    "chunk float32 256": {"num_queries": 100, "heads": (8, 2, 256), "dtype": "float32"},
    "chunk of 512": {"num_queries": 100, "heads": (8, 2, 512)},
    "float32 512": {"heads": (8, 2, 512), "dtype": "float32", "rows": 1},
    "all options": {"options": ALL_OPTIONS},
    "Int8": {"token_format": INT8},
    "Int8Int4": {"token_format": INT8_INT4, "heads": (9, 3, 64), "rows": 1},
    "Int4": {"token_format": INT4, "block_size": 128},
    "Int8 of 256": {"token_format": INT8, "heads": (16, 1, 256)},
    "Int4 of 512": {"token_format": INT4, "heads": (8, 2, 512)},
    "Int8Int4 of 80": {"token_format": INT8_INT4, "heads": (20, 5, 80), "dtype": "float16"},
    "Int4 of float32": {"token_format": INT4, "heads": (9, 3, 64), "dtype": "float32"},
    "chunk of Int8": {"token_format": INT8, "num_queries": 512, "rows": 4},
    "chunk of Int8Int4": {"token_format": INT8_INT4, "num_queries": 512, "dtype": "float32"},
    "Int4, all options": {"token_format": INT4, "options": ALL_OPTIONS},
}


@pytest.mark.parametrize("case", LOWERED)
def test_it_lowers_for_an_h100_and_neither_copies_nor_decodes_the_pool(case):
    call = abstract_call(**LOWERED[case])
    module = lowered("gpu", "cuda", run_on_gpu, call)
    assert module.count("__gpu$xla.gpu.triton") == 2
    # Since jax 0.11 a mesh has an attribute, `{stablehlo.mesh = ..`, that is no operation.
    operations = set(re.findall(r"(?<!\{)stablehlo\.(\w+)", module))
    assert operations <= {"reshape", "constant", "broadcast_in_dim", "convert", "custom_call"}


def run_on_gpu(call):
    assert gpu.accepts(call) is None
    return gpu.attend(call)


@pytest.mark.parametrize("device", ["gpu", None], ids=["described", "not described"])
def test_an_exported_program_has_the_kernel_for_rows_of_every_format(device):
    call = abstract_call()
    formats = jax.ShapeDtypeStruct((16,), jnp.int32)
    rows = {"block_ids": call.block_ids, "held_lens": call.held_lens, "token_formats": formats}
    pool = dataclasses.replace(call.pool, formats=tuple(TokenFormat))
    q = jax.ShapeDtypeStruct((16, 32, 128), jnp.bfloat16)
    module = lowered(device, "cuda", paged_attention, q, pool, call.layer, **rows)
    assert module.count("__gpu$xla.gpu.triton") == (2 * len(TokenFormat) if device else 0)


@pytest.mark.parametrize("token_format", [TokenFormat.Native, INT8], ids=lambda x: x.name)
def test_offsets_into_pools_beyond_4_gib_have_64_bits(token_format, monkeypatch, capsys):
    def offset_bits(pool_bytes):
        num_blocks = pool_bytes // (4 * 8 * 16 * 128 * 2)
        call = abstract_call(num_blocks=num_blocks, token_format=token_format)
        tiling = tiling_for(call)
        lowered("gpu", "cuda", lambda call: kernel.attend_spans(call, tiling), call)
        width = 128 if token_format == TokenFormat.Native else 64
        tile = rf"tensor<64x{width}x"
        pattern = rf"tt\.addptr .*{tile}!tt.ptr<bf16>>, {tile}i(\d+)>"
        return re.findall(pattern, capsys.readouterr().out)

    printing = functools.partial(kernel.pl.pallas_call, debug=True)
    monkeypatch.setattr(kernel.pl, "pallas_call", printing)
    assert offset_bits((4 << 30) + (1 << 20)) == ["64", "64"]
    assert offset_bits(1 << 30) == ["32", "32"]


def test_splits_follow_the_work():
    def splits(**shapes):
        return tiling_for(abstract_call(**shapes)).num_splits

    assert splits(rows=1) == 64
    assert splits(rows=16) == 8
    assert splits(rows=512) == 4
    assert splits(rows=1, max_blocks=8) == 2  # 128 tokens in tiles of 64.
    assert splits(rows=1, options=AttentionOptions(sliding_window=100)) == 2
    assert splits(rows=4, num_queries=1024) == 1


COMPILE = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ferrum_jax.attention import gpu
from ferrum_jax.types import TokenFormat
from tests.support.attention_kernels import abstract_call
from tests.support.pools import keys

topology = topologies.get_topology_desc(
    platform="cuda", topology_name="h100", topology="1x1x1", target_config={h100!r}
)
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
for case in {cases!r}:
    for token_format in (TokenFormat.Native, TokenFormat.Int8):
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        call = jax.tree.map(place, abstract_call(**case, token_format=token_format))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            memory = gpu.attend.lower(call).compile().memory_analysis()
        k = keys(call.pool)
        assert memory.temp_size_in_bytes < k.size * k.dtype.itemsize / 2, memory
        print("compiled", case, token_format)
"""
# The rows of the table of tile sizes.
COMPILED = [
    {"heads": (8, 2, head_dim), "dtype": dtype, "num_queries": num_queries, "num_blocks": 10_000}
    for head_dim in (64, 96, 256, 512)
    for dtype in ("bfloat16", "float32")
    for num_queries in (1, 40)
]
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
    program = COMPILE.format(cases=COMPILED, h100=H100)
    compile_elsewhere(program, 2 * len(COMPILED), CUDA_VISIBLE_DEVICES="-1")
