import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ferrum_jax.attention import paged_attention
from ferrum_jax.attention.inputs import attention_inputs
from ferrum_jax.attention.reference import reference_attention
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.state import BlockPool
from tests.support.attention_oracle import Problem, attention, problem


def reference(q, *args):
    return reference_attention(attention_inputs(q, *args)).reshape(q.shape)


KERNELS = pytest.mark.parametrize("kernel", [paged_attention, reference], ids=["fast", "reference"])


def assert_right(out: jax.Array, p: Problem) -> None:
    want = attention(p)
    assert out.shape == p.q.shape
    assert out.dtype == jnp.dtype(p.dtype)
    bound = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[p.dtype]
    scale = 1.0 if p.dtype == "float32" else max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=bound * scale)


def random_problem(seed: int) -> Problem:
    """A problem drawn from the whole grid, most often small."""
    rng = np.random.default_rng(seed)
    num_kv_heads = int(rng.choice([1, 2, 3, 8]))
    group = int(rng.choice([1, 2, 3, 4]))
    block_size = int(rng.choice([1, 2, 5, 8, 16, 24, 32, 100, 256]))
    longest = int(rng.choice([3 * block_size + 1, 40, 300]))
    rows = int(rng.integers(1, 6))
    held_lens = rng.integers(0, longest + 1, rows)
    num_queries = None if rng.random() < 0.5 else int(rng.choice([1, 3, 8, 33]))
    q_lens = None
    if num_queries is not None:
        q_lens = np.minimum(rng.integers(0, num_queries + 1, rows), held_lens)
    return problem(
        seed=seed,
        held_lens=held_lens,
        num_queries=num_queries,
        q_lens=q_lens,
        heads=(num_kv_heads * group, num_kv_heads),
        head_dim=int(rng.choice([32, 64, 80, 128, 256])),
        block_size=block_size,
        dtype=str(rng.choice(["float32", "float32", "bfloat16", "float16"])),
        scale=None if rng.random() < 0.7 else 0.3,
        sliding_window=None if rng.random() < 0.6 else int(rng.choice([1, 7, 64, 500])),
        soft_cap=None if rng.random() < 0.7 else 5.0,
        sinks=rng.random() < 0.3,
    )


@pytest.mark.parametrize("seed", range(40))
def test_the_fast_kernel_agrees_with_float64_loops(seed):
    p = random_problem(seed)
    assert_right(paged_attention(*p.args()), p)


@pytest.mark.parametrize("seed", range(40, 48))
def test_the_reference_agrees_with_float64_loops(seed):
    p = random_problem(seed)
    assert_right(jax.jit(reference)(*p.args()), p)


VARIANTS = {
    "plain": {},
    "scale": {"scale": 0.5},
    "window": {"sliding_window": 6},
    "cap": {"soft_cap": 2.0},
    "sinks": {"sinks": True},
    "all": {"scale": 0.5, "sliding_window": 6, "soft_cap": 2.0, "sinks": True},
}


@KERNELS
@pytest.mark.parametrize("num_queries", [None, 5], ids=["decode", "chunk"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_agrees_with_float64_loops(kernel, num_queries, variant):
    q_lens = None if num_queries is None else (5, 0, 2)
    p = problem(num_queries=num_queries, q_lens=q_lens, **VARIANTS[variant])
    assert_right(jax.jit(kernel)(*p.args()), p)


@pytest.mark.parametrize("window", [1, 15, 16, 17, 31, 32, 33, 200])
def test_a_window_starts_at_the_right_token(window):
    p = problem(held_lens=(32, 33, 300), block_size=16, sliding_window=window)
    assert_right(paged_attention(*p.args()), p)


def test_lengths_around_every_boundary_are_right():
    # 16 a strip, 128 an item: one less, just so, and one more.
    held_lens = [n + d for n in (16, 32, 128, 144, 272) for d in (-1, 0, 1)]
    p = problem(held_lens=held_lens, block_size=16, heads=(2, 1))
    assert_right(paged_attention(*p.args()), p)


def test_more_rows_than_items_a_turn_are_right():
    rng = np.random.default_rng(1)
    p = problem(held_lens=rng.integers(0, 400, 40), block_size=16, heads=(3, 1))
    assert_right(paged_attention(*p.args()), p)


def test_long_chunks_of_many_rows_are_right():
    # Enough softmax state for the rows to be taken one by one.
    p = problem(
        held_lens=(150, 90, 0, 64),
        num_queries=64,
        q_lens=(64, 50, 0, 64),
        heads=(16, 2),
        head_dim=128,
        block_size=16,
    )
    assert p.q.size * 4 > 1 << 20
    assert_right(paged_attention(*p.args()), p)


def test_a_row_without_tokens_gives_zeros_even_with_sinks():
    p = problem(held_lens=(0, 3, 0), sinks=True)
    out = np.asarray(paged_attention(*p.args()))
    assert (out[[0, 2]] == 0).all() and (out[1] != 0).any()


@KERNELS
def test_a_length_beyond_the_table_ends_with_the_table(kernel):
    p = problem(held_lens=(8, 3), block_size=4, spare_width=0)
    beyond = dataclasses.replace(p, held_lens=np.asarray([2**31 - 1, 3], np.int32))
    got, want = np.asarray(kernel(*beyond.args())), np.asarray(kernel(*p.args()))
    np.testing.assert_array_equal(got, want)


def test_no_rows_hold_anything():
    p = problem(held_lens=(0, 0))
    assert (np.asarray(paged_attention(*p.args())) == 0).all()


@pytest.mark.parametrize("num_queries", [None, 0, 3])
@pytest.mark.parametrize(("rows", "width"), [(0, 4), (3, 0), (0, 0)])
def test_without_rows_queries_or_a_table_there_are_zeros(rows, width, num_queries, transform):
    _, pool, *_ = problem().args()
    shape = (rows, 4, 32) if num_queries is None else (rows, num_queries, 4, 32)
    ints = jnp.zeros((rows, width), jnp.int32), jnp.zeros(rows, jnp.int32)
    out = transform(lambda q: paged_attention(q, pool, 0, *ints))(jnp.ones(shape, jnp.bfloat16))
    assert out.shape == shape and out.dtype == jnp.bfloat16 and not out.any()


def test_queries_beyond_q_lens_give_zeros():
    p = problem(held_lens=(9, 9, 9), num_queries=4, q_lens=(4, 2, 0))
    out = np.asarray(paged_attention(*p.args()))
    assert (out[1, 2:] == 0).all() and (out[2] == 0).all() and (out[1, :2] != 0).any()


def test_queries_before_the_sequence_began_give_zeros():
    p = problem(held_lens=(2,), num_queries=4, q_lens=(4,))
    out = np.asarray(paged_attention(*p.args()))
    assert (out[0, :2] == 0).all() and (out[0, 2:] != 0).any()


def test_rows_may_share_blocks():
    p = problem(held_lens=(24, 20, 17), block_size=4)
    block_ids = p.block_ids.copy()
    block_ids[1, :4] = block_ids[2, :4] = block_ids[0, :4]
    p = dataclasses.replace(p, block_ids=block_ids)
    assert_right(paged_attention(*p.args()), p)


def test_rows_may_be_chunks_of_one_sequence():
    whole = problem(held_lens=(12,), num_queries=12, q_lens=(12,))
    chunks = dataclasses.replace(
        whole,
        q=whole.q.reshape(3, 4, *whole.q.shape[2:]),
        block_ids=np.repeat(whole.block_ids, 3, axis=0),
        held_lens=np.asarray([4, 8, 12], np.int32),
        q_lens=np.asarray([4, 4, 4], np.int32),
    )
    at_once = paged_attention(*whole.args())
    in_chunks = paged_attention(*chunks.args())
    np.testing.assert_allclose(in_chunks.reshape(at_once.shape), at_once, rtol=0, atol=1e-6)


def test_a_row_of_nan_leaves_the_others_alone():
    p = problem(held_lens=(70, 70, 70), block_size=16)
    bad = p.block_ids[1, 0]
    clean = attention(p)
    for pool in (p.k, p.v):
        pool[bad] = np.nan
    out = np.asarray(paged_attention(*p.args()))
    np.testing.assert_allclose(out[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-5)
    assert np.isnan(out[1]).all()


def test_blocks_that_fell_out_of_the_window_may_be_gone():
    p = problem(held_lens=(60, 45), block_size=4, sliding_window=9)
    block_ids = p.block_ids.copy()
    for row, seq_len in enumerate(p.held_lens):
        block_ids[row, : (seq_len - 9) // 4] = -1
    gone = dataclasses.replace(p, block_ids=block_ids)
    assert_right(paged_attention(*gone.args()), p)


def test_one_trace_serves_all_layers_and_lengths():
    p = problem(held_lens=(30, 12))
    q, pool, _, block_ids, held_lens, q_lens, options = p.args()
    traces = []

    @jax.jit
    def attend(layer, held_lens):
        traces.append(layer)
        return paged_attention(q, pool, layer, block_ids, held_lens, q_lens, options)

    for layer, seq_len in itertools.product((1, 0), (30, 7)):
        attend(layer, jnp.minimum(held_lens, seq_len))
    assert len(traces) == 1


def test_vmap_over_replicas_equals_one_at_a_time():
    replicas = [problem(seed=s, held_lens=(30, 0, 7 + s), num_queries=2) for s in range(2)]
    options, layer = replicas[0].options, 1
    q, k, v, block_ids, held_lens = (
        jnp.stack([jnp.asarray(getattr(p, name)) for p in replicas])
        for name in ("q", "k", "v", "block_ids", "held_lens")
    )

    def attend(q, k, v, block_ids, held_lens):
        pool = BlockPool(k=k, v=v, dtype=np.dtype("float32"))
        return paged_attention(q, pool, layer, block_ids, held_lens, options=options)

    out = jax.jit(jax.vmap(attend))(q, k, v, block_ids, held_lens)
    for got, p in zip(out, replicas, strict=True):
        assert_right(got, p)


def test_it_runs_in_scan_over_layers_and_in_a_while_loop():
    p = problem(held_lens=(30, 12, 3))
    q, pool, _, block_ids, held_lens, _, _ = p.args()
    pool = dataclasses.replace(pool, k=jnp.nan_to_num(pool.k), v=jnp.nan_to_num(pool.v))
    layers = jnp.arange(pool.num_layers)

    def attend(q, layer):
        return paged_attention(q, pool, layer, block_ids, held_lens), None

    one_by_one = q
    for layer in range(pool.num_layers):
        one_by_one, _ = attend(one_by_one, layer)
    scanned, _ = jax.jit(lambda q: lax.scan(attend, q, layers))(q)
    looped = jax.jit(
        lambda q: lax.while_loop(
            lambda c: c[0] < pool.num_layers, lambda c: (c[0] + 1, attend(c[1], c[0])[0]), (0, q)
        )
    )(q)[1]
    np.testing.assert_allclose(scanned, one_by_one, rtol=0, atol=1e-6)
    np.testing.assert_allclose(looped, one_by_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("num_queries", [1, 64], ids=["decode", "chunk"])
def test_the_compiled_program_holds_no_copy_of_the_pool(dtype, num_queries):
    storage = jnp.uint16 if dtype == "bfloat16" else jnp.dtype(dtype)
    pool_kv = jax.ShapeDtypeStruct((2000, 30, 3, 16, 64), storage)
    pool = BlockPool(k=pool_kv, v=pool_kv, dtype=jnp.dtype(dtype))
    q = jax.ShapeDtypeStruct((8, num_queries, 9, 64), jnp.dtype(dtype))
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 128), (8,))]

    def all_layers(q, pool, block_ids, held_lens):
        def attend(carry, layer):
            # As in a decoding step, the pool is carried along and written before it is read.
            q, pool = carry
            pool = dataclasses.replace(pool, k=pool.k.at[jnp.arange(8), layer, :, 0].set(0))
            return (paged_attention(q, pool, layer, block_ids, held_lens), pool), None

        return lax.scan(attend, (q, pool), jnp.arange(pool.num_layers))[0]

    compiled = jax.jit(all_layers, donate_argnums=1).lower(q, pool, *ints).compile()
    pool_bytes = 2 * pool_kv.size * pool_kv.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < pool_bytes / 10


@pytest.mark.parametrize(
    ("attend", "q_dtype", "dtype", "rounds"),
    [
        (xla_attention, "float32", "float32", False),
        (xla_attention, "float32", "bfloat16", False),
        (xla_attention, "bfloat16", "float32", False),
        (xla_attention, "float16", "float16", False),
        (xla_attention, "bfloat16", "bfloat16", True),
        (reference_attention, "bfloat16", "bfloat16", False),
    ],
)
def test_products_of_float32_are_not_rounded(attend, q_dtype, dtype, rounds):
    q, *args = problem(dtype=dtype).args()
    inputs = attention_inputs(q.astype(q_dtype), *args)
    products = re.findall(r"stablehlo.dot_general.*", jax.jit(attend).lower(inputs).as_text())
    exact = [product for product in products if "[HIGHEST, HIGHEST]" in product]
    # With numbers of 8 bits only the sum over the items of a row must be exact.
    assert len(products) >= 2 and len(exact) == (1 if rounds else len(products))
