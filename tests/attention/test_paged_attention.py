"""`paged_attention` under JAX's transformations, and what its programs copy, on CPU."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ferrum_jax.attention import paged_attention, xla
from ferrum_jax.attention.reference import reference_attention
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.ops import write
from tests.support.attention_oracle import assert_right
from tests.support.attention_problems import problem
from tests.support.pools import kv_pool

BACKENDS = pytest.mark.parametrize("backend", [None, "xla"])


@pytest.mark.parametrize("num_queries", [None, 0, 3])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (3, 0), (0, 0)])
def test_without_rows_queries_or_a_table_there_are_zeros(rows, width, num_queries, transform):
    pool = problem().arguments()["pool"]
    shape = (rows, 4, 32) if num_queries is None else (rows, num_queries, 4, 32)
    lens = {
        "block_ids": jnp.zeros((rows, width), jnp.int32),
        "held_lens": jnp.zeros(rows, jnp.int32),
    }
    out = transform(lambda q: paged_attention(q, pool, 0, **lens))(jnp.ones(shape, jnp.bfloat16))
    assert out.shape == shape and out.dtype == jnp.bfloat16 and not out.any()


def test_one_trace_serves_all_layers_and_lengths():
    arguments = problem(held_lens=(30, 12)).arguments()
    traces = []

    @jax.jit
    def attend(layer, held_lens):
        traces.append(layer)
        return paged_attention(**{**arguments, "layer": layer, "held_lens": held_lens})

    for layer, seq_len in itertools.product((1, 0), (30, 7)):
        attend(layer, jnp.minimum(arguments["held_lens"], seq_len))
    assert len(traces) == 1


@BACKENDS
def test_vmap_over_replicas_equals_one_at_a_time(backend):
    replicas = [problem(seed=s, held_lens=(30, 0, 7 + s), num_queries=2) for s in range(2)]
    names = ("q", "pool", "block_ids", "held_lens")
    arguments = [{name: p.arguments()[name] for name in names} for p in replicas]

    def attend(arguments):
        return paged_attention(layer=1, options=replicas[0].options, backend=backend, **arguments)

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *arguments)
    for got, p in zip(jax.jit(jax.vmap(attend))(stacked), replicas, strict=True):
        assert_right(got, p)


@BACKENDS
def test_it_runs_in_scan_over_layers_and_in_a_while_loop(backend):
    arguments = problem(held_lens=(30, 12, 3)).arguments()
    pool, q = arguments.pop("pool"), arguments.pop("q")
    del arguments["layer"]
    pool = jax.tree.map(jnp.nan_to_num, pool)

    def attend(q, layer):
        return paged_attention(q, pool, layer, backend=backend, **arguments)

    one_by_one = functools.reduce(attend, range(pool.num_layers), q)
    scan = functools.partial(lax.scan, lambda q, layer: (attend(q, layer), None))
    scanned, _ = jax.jit(lambda q: scan(q, jnp.arange(pool.num_layers)))(q)
    looped = jax.jit(
        lambda q: lax.while_loop(
            lambda c: c[0] < pool.num_layers, lambda c: (c[0] + 1, attend(c[1], c[0])), (0, q)
        )
    )(q)[1]
    np.testing.assert_allclose(scanned, one_by_one, rtol=0, atol=1e-6)
    np.testing.assert_allclose(looped, one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_queries", [1, 64], ids=["decode", "chunk"])
def test_the_compiled_program_holds_no_copy_of_the_pool(dtype, num_queries):
    kv = jax.ShapeDtypeStruct((2000, 30, 3, 16, 64), storage_dtype(dtype, "cpu"))
    pool = kv_pool(kv, kv, dtype)
    q = jax.ShapeDtypeStruct((8, num_queries, 9, 64), jnp.dtype(dtype))
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 128), (8,))]

    def layer_step(carry, layer, block_ids, held_lens):
        # As in a decoding step, the pool is carried along and written before it is read.
        q, pool = carry
        new = q[:, :1, :3]
        pool = write(pool, layer, held_lens[:, None], new, new)
        return paged_attention(q, pool, layer, block_ids=block_ids, held_lens=held_lens), pool

    def scanned(q, pool, *ints):
        layers = jnp.arange(pool.num_layers)
        return lax.scan(lambda c, layer: (layer_step(c, layer, *ints), None), (q, pool), layers)[0]

    def unrolled(q, pool, *ints):
        return functools.reduce(lambda c, i: layer_step(c, i, *ints), range(3), (q, pool))

    for program in (scanned, unrolled) if num_queries == 1 else (scanned,):
        compiled = jax.jit(program, donate_argnums=1).lower(q, pool, *ints).compile()
        assert f"ferrum_jax_attention_{dtype}" in compiled.as_text()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < num_queries << 20


@pytest.mark.parametrize(
    ("attend", "q_dtype", "dtype", "rounds"),
    [
        (xla.attend, "float32", "float32", False),
        (xla.attend, "float32", "bfloat16", False),
        (xla.attend, "bfloat16", "float32", False),
        (xla.attend, "float16", "float16", False),
        (xla.attend, "bfloat16", "bfloat16", True),
        (reference_attention, "bfloat16", "bfloat16", False),
    ],
)
def test_products_of_float32_are_not_rounded(attend, q_dtype, dtype, rounds):
    call = problem(dtype=dtype).call()
    call = dataclasses.replace(call, q=call.q.astype(q_dtype))
    products = re.findall(r"stablehlo.dot_general.*", jax.jit(attend).lower(call).as_text())
    exact = [product for product in products if "[HIGHEST, HIGHEST]" in product]
    # With numbers of 8 bits only the sum over the items of a row must be exact.
    assert len(products) >= 2 and len(exact) == (1 if rounds else len(products))
