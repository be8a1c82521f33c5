"""Writing to a pool on a TPU: the same numbers, and in place.

No TPU is needed. Tests marked `aot` compile for one, which takes libtpu
(`pip install "jax[tpu]"`); without it they are skipped and say so.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AbstractDevice, AbstractMesh

import ferrum_jax as fj
from ferrum_jax.attention import paged_attention
from ferrum_jax.ops import block_updates, writing
from ferrum_jax.state import BlockPool
from tests.support.devices import compile_for_tpu
from tests.support.pools import kv_pool

LAYERS = 4
ARRAY_BYTES = 1 << 28  # More than a TPU has memory at hand, where a copy would not show.

# Heads, head_dim, block_size.
SHAPES = {
    "8/128, blocks of 16": (8, 128, 16),
    "8/128, blocks of 128": (8, 128, 128),
    "3/64, blocks of 128": (3, 64, 128),
    "8/80, blocks of 128": (8, 80, 128),
}


@pytest.mark.parametrize("shape", [(0,), (1,), (9,), (5, 8)], ids=str)
@pytest.mark.parametrize(
    ("form", "part_bytes"),
    [
        (writing.write_each_vector, 0),
        (writing.write_whole_blocks, 1),  # One block at a time,
        (writing.write_whole_blocks, 1200),  # three,
        (writing.write_whole_blocks, 1 << 20),  # all.
    ],
)
def test_a_tpu_writes_what_others_write(form, part_bytes, shape, monkeypatch):
    monkeypatch.setattr(block_updates, "_PART_BYTES", part_bytes)
    write = jax.jit(lambda *args: form(*args))  # Compiled afresh, for this size of a part.
    rng = np.random.default_rng(0)
    num_blocks, num_layers, heads, block_size, head_dim = (7, 2, 3, 4, 8)
    array = rng.normal(size=(num_blocks, num_layers, heads, block_size, head_dim))
    array = jnp.asarray(array, jnp.float32)
    slots = np.arange(-2 * block_size, (num_blocks + 2) * block_size, dtype=np.int32)
    slots = jnp.asarray(rng.permutation(slots)[: np.prod(shape)].reshape(shape))
    tokens = rng.normal(size=(*shape, heads, head_dim)).astype(np.float32)
    tokens[..., 0, 0] = np.nan
    for layer in (-1, 1, num_layers):
        args = array, jnp.int32(layer), slots, jnp.asarray(tokens)
        np.testing.assert_array_equal(write(*args), writing.write_each_token(*args))


@pytest.mark.parametrize("form", [writing.write_each_vector, writing.write_whole_blocks])
def test_a_tpu_writes_to_each_of_many_replicas(form):
    rng = np.random.default_rng(1)
    arrays = jnp.asarray(rng.normal(size=(3, 4, 1, 2, 4, 8)), jnp.float32)
    slots = jnp.asarray([[3, 14, 5], [-1, 16, 99], [0, 1, 2]], jnp.int32)
    tokens = jnp.asarray(rng.normal(size=(3, 3, 2, 8)), jnp.float32)
    layer = jnp.int32(0)
    together = jax.jit(jax.vmap(form, in_axes=(0, None, 0, 0)))(arrays, layer, slots, tokens)
    for i in range(3):
        alone = writing.write_each_token(arrays[i], layer, slots[i], tokens[i])
        np.testing.assert_array_equal(together[i], alone)


def abstract_pool(name, dtype, place=jax.ShapeDtypeStruct, **fields) -> BlockPool:
    heads, head_dim, block_size = SHAPES[name]
    row = (LAYERS, heads, block_size, head_dim)
    num_blocks = ARRAY_BYTES // int(np.prod(row)) // jnp.dtype(dtype).itemsize
    kv: Any = place((num_blocks, *row), jnp.dtype(dtype))
    return kv_pool(kv, kv, dtype, **fields)


def write_args(pool, num_tokens, place=jax.ShapeDtypeStruct):
    kv = place((num_tokens, pool.num_kv_heads, pool.head_dim), pool.dtype)
    return pool, place((), jnp.int32), place((num_tokens,), jnp.int32), kv, kv


def decode_step(pool, x, slots, block_ids, seq_lens):
    """Each layer writes a token a row, then attends."""

    def use_layer(carry, layer):
        pool, x = carry
        kv = x[:, : pool.num_kv_heads]
        pool = fj.write(pool, layer, slots, kv, -kv)
        seen = paged_attention(x, pool, layer, block_ids=block_ids, held_lens=seq_lens)
        return (pool, x + seen), None

    carry, _ = lax.scan(use_layer, (pool, x), jnp.arange(LAYERS, dtype=jnp.int32))
    return carry


def step_args(pool, place):
    rows = 8
    x = place((rows, 4 * pool.num_kv_heads, pool.head_dim), pool.dtype)
    ids = (place(shape, jnp.int32) for shape in ((rows,), (rows, 16), (rows,)))
    return pool, x, *ids


@pytest.mark.parametrize(
    ("shape", "platform", "window"),
    [
        ("8/128, blocks of 16", "tpu", [2]),  # A row of one head.
        ("3/64, blocks of 128", "tpu", [1, 2, 3]),  # A block of one layer.
        ("8/128, blocks of 16", "cuda", [1, 2]),  # All heads of a token.
        ("3/64, blocks of 128", "cuda", [1, 2]),
    ],
)
def test_each_platform_is_given_the_form_that_it_writes_in_place(shape, platform, window):
    device = AbstractDevice(device_kind="TPU v5 lite", platform="tpu", num_cores=1)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=device)):
        args = write_args(abstract_pool(shape, "bfloat16"), 16)
        module = export.export(jax.jit(fj.write), platforms=[platform])(*args).mlir_module()
    forms = re.findall(r"scatter.*?update_window_dims = (\[.*?\]).*?operand_dims = \[0, 1", module)
    assert forms == [str(window)] * 2


COMPILE = """
import functools, re
import jax, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ferrum_jax as fj
from tests.ops.test_storage_tpu import (
    ARRAY_BYTES, SHAPES, abstract_pool, decode_step, step_args, write_args
)

topology = topologies.get_topology_desc(platform="tpu", topology_name={topology!r})

def compiled(function, args, mesh):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, donate_argnums=0).lower(*args).compile()

def check(compiled, pool, num_devices=1):
    memory, text = compiled.memory_analysis(), compiled.as_text()
    pool_bytes = 2 * ARRAY_BYTES // num_devices
    assert memory.temp_size_in_bytes < pool_bytes / 50, memory
    assert memory.alias_size_in_bytes > 0.99 * pool_bytes, memory
    shape = ",".join(map(str, (*keys(pool).shape[:2], pool.num_kv_heads // num_devices)))
    assert not re.findall(rf"\\w+\\[{{shape}},.* (?:copy|transpose|reshape)\\(", text)
    assert not re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text)

for name in SHAPES:
    mesh = Mesh(np.array(topology.devices[:1]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    place = functools.partial(jax.ShapeDtypeStruct, sharding=here)
    for dtype in ("bfloat16", "float32"):
        pool = abstract_pool(name, dtype, place)
        for num_tokens in (1, 16, 1024):
            check(compiled(fj.write, write_args(pool, num_tokens, place), mesh), pool)
        step = compiled(decode_step, step_args(pool, place), mesh)
        check(step, pool)
        assert "attend_tiles" in step.as_text()
    print("compiled", name)

mesh = Mesh(np.array(topology.devices), ("x",))
over_heads = NamedSharding(mesh, PartitionSpec(None, None, "x"))
everywhere = functools.partial(
    jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec())
)
for name in ("8/128, blocks of 16", "8/80, blocks of 128"):
    place = functools.partial(jax.ShapeDtypeStruct, sharding=over_heads)
    pool = abstract_pool(name, "bfloat16", place, sharding=over_heads)
    check(compiled(fj.write, write_args(pool, 16, everywhere), mesh), pool, mesh.size)
    print("compiled", name, "sharded")
"""


@pytest.mark.aot
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
def test_a_tpu_writes_in_place_alone_and_inside_a_decode_step(topology):
    compile_for_tpu(COMPILE.format(topology=topology), len(SHAPES) + 2)
