"""The TPU kernel: lowering for two generations, `vmap`, and a full compile.

No TPU is needed. Tests marked `aot` compile for one, which takes libtpu
(`pip install "jax[tpu]"`); without it they are skipped and say so.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ferrum_jax.attention import paged_attention, tpu
from ferrum_jax.attention.call import attention_call
from ferrum_jax.attention.tpu.tiling import MAX_TILE_BYTES, tiling_for
from tests.support.attention_kernels import (
    TPU_CASES,
    UNOPTIMIZED,
    abstract_call,
    interpreted,
    lowered,
)
from tests.support.attention_oracle import assert_right
from tests.support.attention_problems import problem
from tests.support.devices import compile_for_tpu

HEADS_128 = {"head_dim": 128, "block_size": 8}


def test_it_runs_in_scan_over_layers():
    arguments = problem(held_lens=(30, 12, 3), **HEADS_128).arguments("tpu")
    pool, q = arguments.pop("pool"), arguments.pop("q")
    del arguments["layer"]
    pool = jax.tree.map(jnp.nan_to_num, pool)
    compiled = functools.partial(jax.jit, compiler_options=UNOPTIMIZED)

    def step(q, layer):
        return tpu.attend(attention_call(q, pool, layer, **arguments)).reshape(q.shape)

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
        x = p.arguments("tpu")
        tables = {name: x[name] for name in ("block_ids", "held_lens")}
        trees.append((x["q"], x["pool"], tables, jnp.asarray(x["layer"]), x["options"]))
    names = ("q", "pool", "tables", "layer", "sinks")
    axes = tuple(0 if name in mapped.split() else None for name in names)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
    args = [
        many if axis == 0 else one for axis, many, one in zip(axes, stacked, trees[0], strict=True)
    ]

    def run(q, pool, tables, layer, options):
        return tpu.attend(attention_call(q, pool, layer, options=options, **tables)).reshape(
            q.shape
        )

    with interpreted():
        out = jax.jit(jax.vmap(run, axes), compiler_options=UNOPTIMIZED)(*args)
    for i, p in enumerate(replicas):
        options = p.options if "sinks" in mapped else replicas[0].options
        base = p if "pool" in mapped else replicas[0]
        assert_right(out[i], base.replace(q=p.q, options=options))


def run_on_tpu(call):
    assert tpu.accepts(call) is None
    return tpu.attend(call)


@pytest.mark.parametrize("device", ["tpu", "tpu v6"])
@pytest.mark.parametrize("case", TPU_CASES)
def test_it_lowers_and_makes_nothing_of_the_size_of_the_pool(case, device):
    call = abstract_call(**TPU_CASES[case])
    module = lowered(device, "tpu", run_on_tpu, call)
    assert module.count("@tpu_custom_call") == 1
    made = re.findall(rf"stablehlo\.(\w+).*-> tensor<{call.pool.num_blocks}x4x", module)
    # A change of view, where the tokens of a pool come last; the tests that compile check that.
    assert made == ([] if call.pool.head_dim % 128 == 0 else ["transpose", "transpose"])


@pytest.mark.parametrize("case", ["32/8/128", "9/3/64", "all options"])
def test_it_lowers_where_numbers_of_64_bits_are_enabled(case):
    with jax.enable_x64(True):
        module = lowered("tpu", "tpu", run_on_tpu, abstract_call(**TPU_CASES[case]))
    assert module.count("@tpu_custom_call") == 1


@pytest.mark.parametrize("device", ["tpu", None], ids=["described", "not described"])
def test_an_exported_program_has_the_kernel_if_a_tpu_is_described(device):
    arguments = problem(**HEADS_128).arguments("tpu")
    module = lowered(device, "tpu", paged_attention, **arguments)
    assert ("@tpu_custom_call" in module) == (device is not None)


@pytest.mark.parametrize("dtype, rounds", [("float32", False), ("bfloat16", True)])
def test_products_of_float32_are_not_rounded(dtype, rounds):
    jaxpr = str(jax.make_jaxpr(tpu.attend)(abstract_call(dtype=dtype)))
    assert jaxpr.count("dot_general[") == 2
    assert jaxpr.count("Precision.HIGHEST") == (0 if rounds else 4)


@pytest.mark.parametrize("case", TPU_CASES)
def test_tiles_divide_the_work_and_fit_the_memory(case):
    call = abstract_call(**TPU_CASES[case])
    tiling = tiling_for(call)
    _, num_queries, num_kv_heads, group, head_dim = call.q.shape
    members = tiling.tile_queries * group
    assert num_kv_heads % tiling.tile_heads == 0
    assert tiling.tile_queries == num_queries or members % 16 == 0
    assert tiling.tile_heads * members <= 512 or tiling.tile_heads == 1
    pool = call.pool
    token_bytes = tiling.tile_heads * head_dim * pool.dtype.itemsize
    assert tiling.tile_blocks * pool.block_size * token_bytes <= MAX_TILE_BYTES
    assert 1 <= tiling.tile_blocks <= call.block_ids.shape[1]


COMPILE = """
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ferrum_jax.attention import tpu
from tests.support.attention_kernels import TPU_CASES, abstract_call
from tests.support.pools import keys

topology = topologies.get_topology_desc(platform="tpu", topology_name={topology!r})
mesh = Mesh(np.array(topology.devices[:1]), ("x",))
sharding = NamedSharding(mesh, PartitionSpec())
for case in TPU_CASES.values():
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    call = jax.tree.map(place, abstract_call(**case))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        memory = tpu.attend.lower(call).compile().memory_analysis()
    k = keys(call.pool)
    assert memory.temp_size_in_bytes < k.size * k.dtype.itemsize / 2, (case, memory)
    print("compiled", case)
"""


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_it_compiles_and_holds_no_copy_of_the_pool(topology):
    compile_for_tpu(COMPILE.format(topology=topology), len(TPU_CASES))
