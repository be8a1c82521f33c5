import concurrent.futures
import dataclasses
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numba
import numpy as np
import pytest
from jax import lax

from ferrum_jax.attention import AttentionOptions, native, native_handler, paged_attention
from ferrum_jax.attention.inputs import attention_inputs
from ferrum_jax.attention.native import native_attention, supports
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.encoding import encode, storage_dtype
from ferrum_jax.ops import write
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK
from tests.support.attention_oracle import Problem, attention, problem

DTYPES = ["float32", "bfloat16", "float16"]


def attend(q, *args):
    inputs = attention_inputs(q, *args)
    assert supports(inputs)
    return native_attention(inputs).reshape(q.shape)


def assert_right(out: jax.Array, p: Problem) -> None:
    want = attention(p)
    assert out.shape == p.q.shape
    assert out.dtype == jnp.dtype(p.dtype)
    bound = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}[p.dtype]
    scale = 1.0 if p.dtype == "float32" else max(1.0, np.abs(want).max())
    np.testing.assert_allclose(np.asarray(out, np.float64), want, rtol=0, atol=bound * scale)


def random_problem(seed: int) -> Problem:
    """A problem drawn from all that the kernel takes, most often small."""
    rng = np.random.default_rng(seed)
    num_kv_heads, group = int(rng.choice([1, 2, 3, 8])), int(rng.choice([1, 2, 3, 4]))
    block_size = int(rng.choice([1, 2, 5, 8, 16, 24, 32, 100, 256]))
    longest = int(rng.choice([3 * block_size + 1, 40, 300, 900]))
    rows = int(rng.integers(1, 6))
    held_lens = rng.integers(0, longest + 1, rows)
    num_queries = None if rng.random() < 0.6 else int(rng.choice([1, 2, 4]))
    q_lens = None
    if num_queries is not None:
        q_lens = np.minimum(rng.integers(0, num_queries + 1, rows), held_lens)
    return problem(
        seed=seed,
        held_lens=held_lens,
        num_queries=num_queries,
        q_lens=q_lens,
        heads=(num_kv_heads * group, num_kv_heads),
        head_dim=int(rng.choice([7, 32, 64, 80, 128, 256])),
        block_size=block_size,
        dtype=str(rng.choice(["float32", "float32", "bfloat16", "float16"])),
        scale=None if rng.random() < 0.7 else 0.3,
        sliding_window=None if rng.random() < 0.6 else int(rng.choice([1, 7, 64, 500])),
        soft_cap=None if rng.random() < 0.7 else 5.0,
        sinks=rng.random() < 0.3,
    )


@pytest.mark.parametrize("seed", range(60))
def test_it_agrees_with_float64_loops(seed):
    p = random_problem(seed)
    assert_right(attend(*p.args()), p)


@pytest.mark.parametrize("num_queries", [None, 5], ids=["decode", "chunk"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"scale": 0.5},
        {"sliding_window": 6},
        {"soft_cap": 2.0},
        {"sinks": True},
        {"scale": 0.5, "sliding_window": 6, "soft_cap": 2.0, "sinks": True},
    ],
    ids=lambda variant: "+".join(variant) or "plain",
)
def test_every_variant_agrees_with_float64_loops(num_queries, variant):
    q_lens = None if num_queries is None else (5, 0, 2)
    p = problem(num_queries=num_queries, q_lens=q_lens, **variant)
    assert_right(jax.jit(attend)(*p.args()), p)


@pytest.mark.parametrize("num_queries", [None, 3], ids=["decode", "chunk"])
@pytest.mark.parametrize("window", [None, 1, 255, 256, 257, 3000])
def test_long_rows_are_cut_and_put_together(num_queries, window):
    # A part has at least 256 tokens of 32 numbers, as has a tile.
    held_lens = [n + d for n in (256, 512, 2560) for d in (-1, 0, 1)]
    p = problem(
        held_lens=held_lens,
        block_size=16,
        num_queries=num_queries,
        sliding_window=window,
        sinks=window == 3000,
    )
    assert_right(attend(*p.args()), p)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_stored_number_is_widened_exactly(dtype):
    # A row of one token gives that token's values back.
    every = np.arange(1 << 16, dtype=np.uint16).reshape(1, 1, 256, 1, 256)
    values = np.asarray(lax.bitcast_convert_type(jnp.asarray(every), jnp.dtype(dtype)))
    v = every if dtype == "bfloat16" else values
    pool = BlockPool(k=jnp.zeros_like(jnp.asarray(v)), v=jnp.asarray(v), dtype=jnp.dtype(dtype))
    q = jnp.ones((1, 256, 256), jnp.float32)
    out = attend(q, pool, 0, jnp.asarray([[0]]), jnp.asarray([1]), None, AttentionOptions())
    want = values.astype(np.float32).reshape(out.shape)
    tiny = np.abs(want) < np.finfo(np.float32).tiny  # Processors may flush these to zero.
    np.testing.assert_array_equal(np.where(tiny, 0, np.asarray(out)), np.where(tiny, 0, want))


def test_rows_without_tokens_or_queries_give_zeros():
    p = problem(held_lens=(0, 9, 9, 2), num_queries=4, q_lens=(4, 2, 0, 4), sinks=True)
    out = np.asarray(attend(*p.args()))
    zero = (out == 0).all(axis=(2, 3))
    np.testing.assert_array_equal(
        zero, [[True] * 4, [False, False, True, True], [True] * 4, [True, True, False, False]]
    )


def test_rows_may_share_blocks():
    p = problem(held_lens=(24, 20, 17), block_size=4)
    block_ids = p.block_ids.copy()
    block_ids[1, :4] = block_ids[2, :4] = block_ids[0, :4]
    p = dataclasses.replace(p, block_ids=block_ids)
    assert_right(attend(*p.args()), p)


@pytest.mark.parametrize("seq_len", [70, 2000])
def test_a_row_of_nan_leaves_the_others_alone(seq_len):
    p = problem(held_lens=(seq_len,) * 3, block_size=16)
    bad = p.block_ids[1, 0]
    clean = attention(p)
    for pool in (p.k, p.v):
        pool[bad] = np.nan
    out = np.asarray(attend(*p.args()))
    np.testing.assert_allclose(out[[0, 2]], clean[[0, 2]], rtol=0, atol=1e-5)
    assert np.isnan(out[1]).all()


def test_blocks_that_fell_out_of_the_window_may_be_gone():
    p = problem(held_lens=(60, 45), block_size=4, sliding_window=9)
    block_ids = p.block_ids.copy()
    for row, seq_len in enumerate(p.held_lens):
        block_ids[row, : (seq_len - 9) // 4] = NULL_BLOCK
    gone = dataclasses.replace(p, block_ids=block_ids)
    assert_right(attend(*gone.args()), p)


def test_ids_and_lengths_that_cannot_be_spoil_their_own_row_only():
    p = problem(held_lens=(30, 30, 30, 30), num_queries=2)
    block_ids, held_lens = p.block_ids.copy(), p.held_lens.copy()
    block_ids[0] = np.iinfo(np.int32).max
    block_ids[1] = np.iinfo(np.int32).min
    held_lens[2] = np.iinfo(np.int32).max
    bad = dataclasses.replace(p, block_ids=block_ids, held_lens=held_lens)
    out = np.asarray(attend(*bad.args()))
    np.testing.assert_allclose(out[3], attention(p)[3], rtol=0, atol=1e-5)
    attend(*dataclasses.replace(p, layer=10**9).args()).block_until_ready()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_program_holds_no_copy_of_the_pool(dtype):
    pool_kv = jax.ShapeDtypeStruct((2000, 30, 3, 16, 64), storage_dtype(dtype, "cpu"))
    pool = BlockPool(k=pool_kv, v=pool_kv, dtype=jnp.dtype(dtype))
    q = jax.ShapeDtypeStruct((8, 9, 64), jnp.dtype(dtype))
    ints = [jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((8, 128), (8,))]

    def layer_step(carry, layer, block_ids, held_lens):
        # As in a decoding step, the pool is carried along and written before it is read.
        q, pool = carry
        new = q[:, None, :3]
        pool = write(pool, layer, held_lens[:, None], new, new)
        return paged_attention(q, pool, layer, block_ids, held_lens), pool

    def scanned(q, pool, *ints):
        layers = jnp.arange(pool.num_layers)
        return lax.scan(lambda c, layer: (layer_step(c, layer, *ints), None), (q, pool), layers)[0]

    def unrolled(q, pool, *ints):
        carry = q, pool
        for layer in range(4):
            carry = layer_step(carry, layer, *ints)
        return carry

    for program in (scanned, unrolled):
        compiled = jax.jit(program, donate_argnums=1).lower(q, pool, *ints).compile()
        assert f"ferrum_jax_attention_{dtype}" in compiled.as_text()
        memory = compiled.memory_analysis()
        assert memory is not None
        assert memory.temp_size_in_bytes < 1 << 20


def test_it_runs_in_scan_over_layers_and_in_a_while_loop(transform):
    p = problem(held_lens=(30, 12, 3))
    q, pool, _, *rest = p.args()
    pool = dataclasses.replace(pool, k=jnp.nan_to_num(pool.k), v=jnp.nan_to_num(pool.v))
    layers = jnp.arange(pool.num_layers)

    def step(q, layer):
        return attend(q, pool, layer, *rest), None

    one_by_one = q
    for layer in range(pool.num_layers):
        one_by_one, _ = step(one_by_one, layer)
    scanned, _ = transform(lambda q: lax.scan(step, q, layers))(q)
    looped = transform(
        lambda q: lax.while_loop(
            lambda c: c[0] < pool.num_layers, lambda c: (c[0] + 1, step(c[1], c[0])[0]), (0, q)
        )
    )(q)[1]
    np.testing.assert_allclose(scanned, one_by_one, rtol=0, atol=1e-6)
    np.testing.assert_allclose(looped, one_by_one, rtol=0, atol=1e-6)


def test_vmap_over_replicas_equals_one_at_a_time():
    replicas = [problem(seed=s, held_lens=(30, 0, 7 + s), num_queries=2) for s in range(2)]
    options, layer = replicas[0].options, 1
    arrays = [
        jnp.stack([jnp.asarray(getattr(p, name)) for p in replicas])
        for name in ("q", "k", "v", "block_ids", "held_lens")
    ]

    def one(q, k, v, block_ids, held_lens):
        pool = BlockPool(k=k, v=v, dtype=np.dtype("float32"))
        return paged_attention(q, pool, layer, block_ids, held_lens, options=options)

    for got, p in zip(jax.jit(jax.vmap(one))(*arrays), replicas, strict=True):
        assert_right(got, p)


def test_many_threads_may_attend_at_once():
    p = problem(held_lens=(3000, 800, 5), block_size=16)
    args = p.args()
    twice = jax.jit(lambda q, *args: (attend(q, *args), attend(-q, *args)))
    want = twice(*args)
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for got in threads.map(lambda _: twice(*args), range(200)):
            for x, y in zip(got, want, strict=True):
                np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def small_inputs(**changes):
    p = problem(**changes)
    return attention_inputs(*p.args())


def test_what_it_does_not_do_is_left_to_xla():
    assert supports(small_inputs())
    assert not supports(small_inputs(num_queries=9, q_lens=(5, 0, 9)))  # 18 queries a KV head.
    inputs = small_inputs()
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        k = encode(jnp.zeros_like(inputs.pool.k), jnp.dtype(dtype), storage_dtype(dtype, "cpu"))
        pool = BlockPool(k=k, v=k, dtype=jnp.dtype(dtype))
        assert not supports(dataclasses.replace(inputs, pool=pool))


def test_without_numba_xla_attends(monkeypatch):
    p = problem()
    monkeypatch.setattr(native, "_has_numba", lambda: False)
    program = jax.jit(lambda *args: paged_attention(*args)).lower(*p.args())
    assert "ferrum_jax_attention" not in program.as_text()
    assert_right(program.compile()(*p.args()), p)


def test_numba_is_not_imported_before_it_is_needed():
    code = "import ferrum_jax, sys; assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def as_if_new(monkeypatch):
    """Native attention as it is in a process that has not yet used it."""
    for name in ("_is_importable", "_is_registered"):
        afresh = functools.cache(getattr(native, name).__wrapped__)
        monkeypatch.setattr(native, name, afresh)


def is_done_without(p, message):
    """Whether attention says so once, and then is right."""
    with pytest.warns(RuntimeWarning, match=message) as warnings:
        out = [jax.jit(lambda *args: paged_attention(*args))(*p.args()) for _ in range(2)]
    for x in out:
        assert_right(x, p)
    return len(warnings) == 1


def test_a_handler_that_xla_refuses_is_done_without(as_if_new, monkeypatch):
    def refuse(*_, **__):
        raise jax.errors.JaxRuntimeError("its version is too old")

    monkeypatch.setattr(jax.ffi, "register_ffi_target", refuse)
    assert is_done_without(problem(), "slower.*too old")


def test_a_numba_that_cannot_compile_is_done_without(as_if_new, monkeypatch):
    def fail(_):
        raise numba.errors.TypingError("untyped global name")

    monkeypatch.setattr(native_handler, "compile_handler", fail)
    assert is_done_without(problem(dtype="bfloat16"), "slower.*untyped global name")


def test_a_numba_that_cannot_be_imported_is_done_without(as_if_new, monkeypatch):
    monkeypatch.setitem(sys.modules, native_handler.__name__, None)
    assert is_done_without(problem(), "slower.*ModuleNotFoundError")


def test_wrong_arguments_are_an_error_not_a_crash():
    inputs = small_inputs()
    assert supports(inputs)
    call = jax.ffi.ffi_call("ferrum_jax_attention_float32", inputs.q)
    with pytest.raises(Exception, match="other arguments"):
        call(inputs.q, inputs.pool.k)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_platforms_do_not_call_it(platform):
    args = problem().args()
    assert supports(attention_inputs(*args))
    exported = jax.export.export(jax.jit(paged_attention), platforms=[platform])(*args)
    assert "ferrum_jax_attention" not in exported.mlir_module()


def test_no_program_that_calls_it_is_exported():
    with pytest.raises(ValueError, match="custom call"):
        jax.export.export(jax.jit(paged_attention), platforms=["cpu"])(*problem().args())


def test_it_equals_xla_attention_on_a_full_batch():
    rng = np.random.default_rng(0)
    p = problem(held_lens=rng.integers(100, 2000, 16), heads=(9, 3), head_dim=64, block_size=16)
    inputs = attention_inputs(*p.args())
    np.testing.assert_allclose(native_attention(inputs), xla_attention(inputs), rtol=0, atol=1e-6)
