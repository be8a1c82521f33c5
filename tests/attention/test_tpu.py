"""The TPU kernel: numbers in interpret mode, lowering for two generations, and a full compile.

No TPU is needed. Tests marked `aot` compile for one, which takes libtpu
(`pip install "jax[tpu]"`); without it they are skipped and say so.
"""

import contextlib
import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from ferrum_jax.attention import AttentionOptions, paged_attention
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.attention.tpu import supports, tpu_attention
from ferrum_jax.attention.tpu_tiling import MAX_TILE_BYTES, Tiling, tiling_for
from ferrum_jax.state import BlockPool
from tests.attention.test_paged_attention import VARIANTS, assert_right
from tests.support.attention_oracle import Problem, attention, problem
from tests.support.devices import compile_for_tpu

TPU = types.SimpleNamespace(platform="tpu")
HEADS_128 = {"head_dim": 128, "block_size": 8}
HEADS_64 = {"head_dim": 64, "block_size": 128}
SMALL = Tiling(tile_queries=8, tile_heads=1, tile_blocks=2)
SMALL_DECODE = dataclasses.replace(SMALL, tile_queries=1)

# Interpreted kernels are compiled once and run once.
UNOPTIMIZED = {"xla_backend_optimization_level": 0}


def interpreted(**params):
    """Memory starts as NaN, and a copy is made no sooner than somebody waits for it."""
    return pltpu.force_tpu_interpret_mode(
        pltpu.InterpretParams(uninitialized_memory="nan", dma_execution_mode="on_wait", **params)
    )


def compiled(function):
    return jax.jit(function, compiler_options=UNOPTIMIZED)


def attend(p: Problem, tiling: Tiling | None = None, **params) -> jax.Array:
    inputs = attention_inputs(*p.args(TPU))
    assert supports(inputs)
    with interpreted(**params):
        return compiled(tpu_attention)(inputs, tiling).reshape(p.q.shape)


@pytest.mark.parametrize(
    "shape",
    [
        {"heads": (32, 8), "head_dim": 128, "block_size": 16, "dtype": "bfloat16"},
        {"heads": (9, 3), "head_dim": 64, "block_size": 128, "dtype": "bfloat16"},
        {"heads": (7, 1), "head_dim": 80, "block_size": 128},
        {"heads": (2, 2), "head_dim": 256, "block_size": 24},
        {"heads": (6, 6), "head_dim": 192, "block_size": 256, "num_queries": 3},
        {"heads": (8, 1), "head_dim": 128, "block_size": 40, "num_queries": 3, "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_heads_and_blocks_of_every_size_are_right(shape):
    p = problem(held_lens=(300, 3, 0, 129), q_lens=(3, 1, 0, 2) if "num_queries" in shape else None)
    p = problem(held_lens=p.held_lens, q_lens=p.q_lens, **shape)
    assert_right(attend(p), p)


@pytest.mark.parametrize(
    "variant, shape",
    [
        ("plain", HEADS_64),
        ("sinks", HEADS_64),
        ("all", HEADS_64),
        ("window", HEADS_128),
        ("all", HEADS_128),
    ],
    ids=str,
)
def test_every_variant_of_a_chunk_is_right_across_tiles(variant, shape):
    # 13 queries take two tiles, and the longest row has tokens for three.
    held_lens = np.asarray((37, 0, 2, 20)) * shape["block_size"] // 8
    chunk = {"held_lens": held_lens, "num_queries": 13, "q_lens": (13, 0, 2, 9)}
    p = problem(**shape, **chunk, **VARIANTS[variant])
    block, offset = divmod(int(held_lens[0]) - 1, shape["block_size"])
    p.v[p.block_ids[0, block], p.layer, :, offset, 3] = np.nan  # The last query alone sees it.
    assert_right(attend(p, SMALL), p)


@pytest.mark.parametrize("window", [1, 9])
def test_a_window_starts_at_the_right_token(window):
    p = problem(held_lens=(32, 33, 100, 5), sliding_window=window, **HEADS_128)
    assert_right(attend(p, SMALL_DECODE), p)


def test_lengths_around_every_boundary_are_right():
    # 8 a block, 16 a tile: one less, just so, and one more.
    held_lens = [n + d for n in (8, 16, 32, 48) for d in (-1, 0, 1)]
    p = problem(held_lens=held_lens, heads=(3, 1), **HEADS_128)
    assert_right(attend(p, SMALL_DECODE), p)


def test_what_sees_no_token_gives_zeros_even_with_sinks():
    options = {"num_queries": 4, "q_lens": (4, 2, 4, 0), "sinks": True}
    out = np.asarray(attend(problem(held_lens=(0, 9, 2, 9), **options, **HEADS_128)))
    assert (out[0] == 0).all() and (out[1, 2:] == 0).all() and (out[3] == 0).all()
    assert (out[2, :2] == 0).all() and (out[2, 2:] != 0).any() and (out[1, :2] != 0).any()


def test_blocks_that_fell_out_of_the_window_may_be_gone():
    problems = (
        problem(seed=s, held_lens=(60, 45), sliding_window=9, **HEADS_128) for s in range(99)
    )
    p = next(p for p in problems if 0 not in p.block_ids)  # Whoever read them would read NaN.
    block_ids = p.block_ids.copy()
    for row, seq_len in enumerate(p.held_lens):
        block_ids[row, : (seq_len - 9) // 8] = -1
    assert_right(attend(dataclasses.replace(p, block_ids=block_ids)), p)


def test_a_row_of_nan_leaves_the_others_alone():
    p = problem(held_lens=(70, 70, 5, 70), **HEADS_128)
    clean = attention(p)
    for pool in (p.k, p.v):
        pool[p.block_ids[1]] = np.nan
    out = np.asarray(attend(p, SMALL_DECODE))
    np.testing.assert_allclose(out[[0, 2, 3]], clean[[0, 2, 3]], rtol=0, atol=1e-5)
    assert np.isnan(out[1]).all()


def test_ids_beyond_the_pool_are_read_as_the_last():
    p = problem(held_lens=(30, 30), **HEADS_128)
    num_blocks, num_layers = p.k.shape[:2]
    k, v = np.random.default_rng(1).normal(size=(2, *p.k.shape)).astype(np.float32)
    block_ids = p.block_ids.copy()
    block_ids[0, 1] = num_blocks - 1
    last = dataclasses.replace(p, k=k, v=v, block_ids=block_ids.copy(), layer=num_layers - 1)
    block_ids[0, 1] = num_blocks
    beyond = dataclasses.replace(last, block_ids=block_ids, layer=num_layers)
    np.testing.assert_array_equal(attend(beyond, SMALL_DECODE), attend(last, SMALL_DECODE))


def test_queries_wider_than_the_pool_lose_nothing():
    p = problem(held_lens=(40, 3), dtype="bfloat16", **HEADS_128)
    q, *rest = p.args(TPU)
    wide = np.random.default_rng(0).normal(size=q.shape).astype(np.float32)
    inputs = attention_inputs(jnp.asarray(wide), *rest)
    assert supports(inputs)
    with interpreted():
        out = compiled(tpu_attention)(inputs).reshape(q.shape)
    want = attention(dataclasses.replace(p, q=wide))
    np.testing.assert_allclose(np.asarray(out), want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [HEADS_64, HEADS_128], ids=str)
def test_it_is_right_where_numbers_of_64_bits_are_enabled(shape):
    with jax.enable_x64(True):
        p = problem(num_queries=3, q_lens=(3, 0, 2), **shape, **VARIANTS["all"])
        assert_right(attend(p), p)


def test_no_tile_is_read_while_it_is_written():
    p = problem(held_lens=(70, 0, 20), num_queries=9, q_lens=(9, 0, 2), **HEADS_128)
    assert_right(attend(p, SMALL, detect_races=True), p)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found


def test_it_runs_in_scan_over_layers():
    p = problem(held_lens=(30, 12, 3), **HEADS_128)
    q, pool, _, *tables = p.args(TPU)
    pool = dataclasses.replace(pool, k=jnp.nan_to_num(pool.k), v=jnp.nan_to_num(pool.v))

    def step(q, layer):
        return tpu_attention(attention_inputs(q, pool, layer, *tables)).reshape(q.shape)

    def scan(q):
        return lax.scan(lambda q, layer: (step(q, layer), None), q, jnp.arange(pool.num_layers))[0]

    with interpreted():
        one_by_one = functools.reduce(compiled(step), range(pool.num_layers), q)
        scanned = compiled(scan)(q)
    np.testing.assert_allclose(scanned, one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mapped", ["q", "q pool tables", "q pool tables layer", "q sinks"])
def test_vmap_over_replicas_equals_one_at_a_time(mapped):
    common = {"num_queries": 2, "sinks": True, **HEADS_128}
    replicas = [problem(seed=s, held_lens=(30, 0, 7), **common) for s in range(2)]
    trees = []
    for p in replicas:
        q, pool, layer, block_ids, held_lens, _, options = p.args(TPU)
        trees.append((q, pool, (block_ids, held_lens), jnp.asarray(layer), options))
    names = ("q", "pool", "tables", "layer", "sinks")
    axes = tuple(0 if name in mapped.split() else None for name in names)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    args = [
        many if axis == 0 else one for axis, many, one in zip(axes, stacked, trees[0], strict=True)
    ]

    def run(q, pool, tables, layer, options):
        inputs = attention_inputs(q, pool, layer, *tables, None, options)
        return tpu_attention(inputs).reshape(q.shape)

    with interpreted():
        out = compiled(jax.vmap(run, axes))(*args)
    for i, p in enumerate(replicas):
        options = p.options if "sinks" in mapped else replicas[0].options
        base = p if "pool" in mapped else replicas[0]
        assert_right(out[i], dataclasses.replace(base, q=p.q, options=options))


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
    kv = jax.ShapeDtypeStruct((num_blocks, 4, num_kv_heads, block_size, head_dim), dtype)
    shapes = {
        "q": jax.ShapeDtypeStruct((rows, num_queries, num_q_heads, head_dim), q_dtype or dtype),
        "pool": BlockPool(k=kv, v=kv, dtype=jnp.dtype(dtype)),
        "layer": jax.ShapeDtypeStruct((), jnp.int32),
        "block_ids": jax.ShapeDtypeStruct((rows, max_blocks), jnp.int32),
        "held_lens": jax.ShapeDtypeStruct((rows,), jnp.int32),
        "q_lens": jax.ShapeDtypeStruct((rows,), jnp.int32),
    }
    options = options or AttentionOptions()
    return jax.eval_shape(functools.partial(attention_inputs, options=options), **shapes)


ALL = {"sliding_window": 512, "soft_cap": 30.0, "sinks": jnp.zeros(32)}
CASES = {
    "32/8/128": {},
    "9/3/64": {"heads": (9, 3, 64), "block_size": 128, "max_blocks": 64},
    "64/8/128": {"heads": (64, 8, 128), "rows": 256, "max_blocks": 8192},
    "32/32/128 float32": {"heads": (32, 32, 128), "dtype": "float32"},
    "blocks of 8": {"block_size": 8},
    "blocks of 24": {"block_size": 24},
    "blocks of 4096": {"block_size": 4096, "num_blocks": 100, "num_queries": 600, "rows": 2},
    "float32 256": {"heads": (8, 2, 256), "dtype": "float32", "num_queries": 100},
    "float32 512": {"heads": (8, 2, 512), "dtype": "float32", "num_queries": 300, "rows": 2},
    "72": {"heads": (20, 5, 72), "block_size": 128},
    "71 heads": {"heads": (71, 1, 64), "block_size": 128, "num_queries": 20},
    "wide queries": {"q_dtype": "float32"},
    "many rows": {"rows": 8192, "max_blocks": 32},
    "wide table": {"rows": 2, "max_blocks": 40_000},
    "chunk": {"num_queries": 512, "rows": 4},
    "chunk of 64": {"heads": (9, 3, 64), "block_size": 128, "num_queries": 512, "rows": 4},
    "all options": {"options": AttentionOptions(**ALL), "num_queries": 200},
}


def described(kind: str):
    """As if there were a TPU."""
    device = AbstractDevice(device_kind=kind, platform="tpu", num_cores=1)
    return jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device))


def lowered(inputs: AttentionInputs, kind: str) -> str:
    """What attention becomes for a TPU, wherever this runs."""
    assert supports(inputs)
    with described(kind):
        module = export.export(jax.jit(tpu_attention), platforms=["tpu"])(inputs).mlir_module()
    assert module.count("@tpu_custom_call") == 1
    return module


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize("case", CASES)
def test_it_lowers_and_makes_nothing_of_the_size_of_the_pool(case, kind):
    inputs = abstract_inputs(**CASES[case])
    module = lowered(inputs, kind)
    num_blocks = inputs.pool.num_blocks
    made = re.findall(rf"stablehlo\.(\w+).*-> tensor<{num_blocks}x4x", module)
    # A change of view, where the tokens of a pool come last; the compiler's tests see to that.
    assert made == ([] if inputs.pool.head_dim % 128 == 0 else ["transpose", "transpose"])


@pytest.mark.parametrize("case", ["32/8/128", "9/3/64", "all options"])
def test_it_lowers_where_numbers_of_64_bits_are_enabled(case):
    with jax.enable_x64(True):
        lowered(abstract_inputs(**CASES[case]), "TPU v5 lite")


@pytest.mark.parametrize("is_described", [True, False])
def test_an_exported_program_has_the_kernel_if_a_tpu_is_described(is_described):
    args = problem(**HEADS_128).args(TPU)
    with described("TPU v5 lite") if is_described else contextlib.nullcontext():
        exported = export.export(jax.jit(paged_attention), platforms=["tpu"])(*args)
    assert ("@tpu_custom_call" in exported.mlir_module()) == is_described


@pytest.mark.parametrize(
    "changes",
    [
        {"heads": (8, 8, 640)},
        {"heads": (8, 8, 36), "block_size": 128},
        {"heads": (9, 3, 64), "block_size": 64},
        {"block_size": 12},
        {"block_size": 8192},
        {"dtype": "float16"},
        {"q_dtype": "float16"},
        {"dtype": "float8_e4m3fn"},
        {"dtype": "uint16", "q_dtype": "float32"},
        {"rows": 0},
        {"max_blocks": 0},
        {"rows": 100_000},
        {"max_blocks": 50_000},
        {"heads": (128, 1, 128), "block_size": 1024, "max_blocks": 16_384},
    ],
    ids=str,
)
def test_it_says_what_it_does_not_take(changes):
    assert not supports(abstract_inputs(**changes))


@pytest.mark.parametrize("dtype, rounds", [("float32", False), ("bfloat16", True)])
def test_products_of_float32_are_not_rounded(dtype, rounds):
    jaxpr = str(jax.make_jaxpr(tpu_attention)(abstract_inputs(dtype=dtype)))
    assert jaxpr.count("dot_general[") == 2
    assert jaxpr.count("Precision.HIGHEST") == (0 if rounds else 4)


def test_bits_of_a_cpu_pool_are_not_taken_for_numbers():
    inputs = attention_inputs(*problem(dtype="bfloat16", **HEADS_128).args())
    assert inputs.pool.k.dtype == jnp.uint16
    assert not supports(inputs)


@pytest.mark.parametrize("case", CASES)
def test_tiles_divide_the_work_and_fit_the_memory(case):
    inputs = abstract_inputs(**CASES[case])
    tiling = tiling_for(inputs)
    _, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    members = tiling.tile_queries * group
    assert num_kv_heads % tiling.tile_heads == 0
    assert tiling.tile_queries == num_queries or members % 16 == 0
    assert tiling.tile_heads * members <= 512 or tiling.tile_heads == 1
    pool = inputs.pool
    token_bytes = tiling.tile_heads * head_dim * pool.dtype.itemsize
    assert tiling.tile_blocks * pool.block_size * token_bytes <= MAX_TILE_BYTES
    assert 1 <= tiling.tile_blocks <= inputs.block_ids.shape[1]


COMPILE = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ferrum_jax.attention.tpu import tpu_attention
from tests.attention.test_tpu import CASES, abstract_inputs

topology = topologies.get_topology_desc(platform="tpu", topology_name={topology!r})
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
for case in CASES.values():
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    inputs = jax.tree.map(place, abstract_inputs(**case))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = tpu_attention.lower(inputs).compile().memory_analysis()
    k = inputs.pool.k
    assert memory.temp_size_in_bytes < k.size * k.dtype.itemsize / 2, (case, memory)
    print("compiled", case)
"""


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_it_compiles_and_holds_no_copy_of_the_pool(topology):
    compile_for_tpu(COMPILE.format(topology=topology), len(CASES))
