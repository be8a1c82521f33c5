"""Attention to compressed rows: blocks of random words, decoded by numpy, beside float64 loops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.attention import cpu, paged_attention
from ferrum_jax.codecs import codec_for
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import TokenFormat
from tests.support.attention_kernels import INTERPRET, attend
from tests.support.attention_oracle import attention
from tests.support.attention_problems import (
    VARIANTS,
    PackedProblem,
    encoded,
    packed_problem,
    problem,
)
from tests.support.pools import kv_pool

_, INT8, INT8_INT4, INT4 = TokenFormat
DTYPES = ["float32", "bfloat16", "float16"]
LENS = {"held_lens": (70, 0, 150, 1), "max_len": 150}
DECODE = {"heads": (4, 2), **LENS}
CHUNK = {"num_queries": 5, "q_lens": (5, 0, 2, 1), **LENS, **VARIANTS["all"]}
# Each format in each dtype, and each number of planes in a word.
SHAPES = [
    (INT8, "bfloat16", {"head_dim": 128, **DECODE}),
    (INT8, "float32", {"head_dim": 80, **CHUNK}),
    (INT8, "float16", {"head_dim": 64, **CHUNK}),
    (INT8_INT4, "bfloat16", {"head_dim": 64, **CHUNK}),
    (INT8_INT4, "float32", {"head_dim": 128, **DECODE}),
    (INT8_INT4, "float16", {"head_dim": 80, **DECODE}),
    (INT4, "bfloat16", {"head_dim": 80, **DECODE}),
    (INT4, "float32", {"head_dim": 64, **CHUNK}),
    (INT4, "float16", {"head_dim": 128, **CHUNK}),
]
ODD = [
    (INT8, "float16", {"head_dim": 512, "block_size": 1, "heads": (2, 2), "max_len": 40}),
    (
        INT8_INT4,
        "bfloat16",
        {"head_dim": 72, "block_size": 5, "heads": (5, 1), "sliding_window": 7},
    ),
    (INT4, "float32", {"head_dim": 96, "block_size": 100, "heads": (6, 3), "max_len": 900}),
    (INT8_INT4, "float32", {"head_dim": 256, "block_size": 2, "heads": (3, 3), "soft_cap": 5.0}),
]


def assert_right(kernel: str, p: PackedProblem) -> None:
    out = attend(kernel, p)
    is_rotated = p.token_format != INT8
    assert out.dtype == jnp.dtype("float32" if is_rotated else p.dtype)
    # The GPU kernel multiplies values in bfloat16 also for queries of float16.
    bound = 1e-5 if p.dtype == "float32" else 2e-2
    np.testing.assert_allclose(np.asarray(out, np.float64), attention(p), rtol=0, atol=bound)


@pytest.mark.parametrize(("token_format", "dtype", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["xla", "cpu", "gpu"])
def test_compressed_rows_agree_with_float64_loops(kernel, token_format, dtype, shape):
    queries = "float32"
    if kernel == "gpu":
        # XLA on CPU computes with bfloat16 in float32, where words that look like NaN are lost.
        # The words of float16 are the same.
        queries, dtype = dtype, "float16" if INTERPRET and dtype == "bfloat16" else dtype
    for seed in range(2):
        lens = np.random.default_rng(seed).integers(0, 151, 4) if seed else shape["held_lens"]
        shape = {**shape, "held_lens": lens, "block_size": 16}
        p = packed_problem(token_format, seed=seed, dtype=queries, pool_dtype=dtype, **shape)
        assert_right(kernel, p)


@pytest.mark.parametrize(("token_format", "dtype", "shape"), ODD, ids=str)
@pytest.mark.parametrize("kernel", ["xla", "cpu"])
def test_odd_shapes_agree_with_float64_loops(kernel, token_format, dtype, shape):
    shape = {"max_len": 300, **shape}
    for seed in range(2):
        held_lens = np.random.default_rng(seed).integers(0, shape["max_len"] + 1, 3)
        lens = {"held_lens": held_lens, "num_queries": 2, "sinks": True}
        assert_right(
            kernel, packed_problem(token_format, seed=seed, pool_dtype=dtype, **lens, **shape)
        )


@pytest.mark.parametrize("token_format", [INT8, INT8_INT4, INT4], ids=lambda x: x.name)
@pytest.mark.parametrize("window", [None, 257])
def test_long_rows_are_cut_into_parts_and_merged_on_cpu(token_format, window):
    # A tile is 256 tokens, and a part of 64 numbers no fewer than 128.
    held_lens = [n + d for n in (256, 512, 2560) for d in (-1, 0, 1)]
    p = packed_problem(token_format, held_lens=held_lens, block_size=16, sliding_window=window)
    assert_right("cpu", p)


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_reach_into_the_array_of_values_are_found(dtype):
    p = packed_problem(INT8_INT4, pool_dtype=dtype, held_lens=(200, 199))
    layout = p.pool.codec(INT8_INT4)
    assert layout.num_tokens * layout.k.num_words > layout.half_words
    assert_right("cpu", p)


@pytest.mark.parametrize("token_format", [INT8, INT8_INT4, INT4], ids=lambda x: x.name)
def test_wrong_ids_and_lengths_spoil_their_own_row_only(token_format):
    p = packed_problem(token_format, held_lens=(30, 30, 30, 30), num_queries=2)
    want = attention(p)[3]
    block_ids, held_lens = p.block_ids.copy(), p.held_lens.copy()
    block_ids[0] = np.iinfo(np.int32).max
    block_ids[1] = np.iinfo(np.int32).min
    held_lens[2] = np.iinfo(np.int32).max
    bad = attend("cpu", p.replace(block_ids=block_ids, held_lens=held_lens))
    np.testing.assert_allclose(bad[3], want, rtol=0, atol=1e-5)
    attend("cpu", p.replace(layer=10**9)).block_until_ready()


def encoded_problem(token_format, dtype, *, offset=0.0, **shape) -> PackedProblem:
    """Rows that are rounded to a format after an offset was added to their values."""
    layout = codec_for(token_format, KeyValue(1, shape["head_dim"], dtype), 16)
    p = problem(block_size=layout.num_tokens, dtype=dtype, **shape)
    p.v[...] += offset
    return encoded(token_format, 16, p, dtype)


@pytest.mark.parametrize("kernel", ["xla", "cpu", "gpu"])
def test_a_value_that_is_not_finite_is_kept_from_queries_that_do_not_see_it(kernel):
    layout = codec_for(INT8, KeyValue(1, 64, "float32"), 16)
    lens = {"held_lens": (50, 9), "num_queries": 3, "q_lens": (3, 2)}
    p = problem(block_size=layout.num_tokens, head_dim=64, **lens)
    for row, seq_len in enumerate(p.held_lens):
        block, offset = divmod(int(seq_len) - 1, layout.num_tokens)
        p.v[p.block_ids[row, block], :, :, offset, 7] = np.inf
    p = encoded(INT8, 16, p, "float32")
    out, want = np.asarray(attend(kernel, p)), attention(p)
    is_finite = np.isfinite(out).all((2, 3))
    np.testing.assert_array_equal(is_finite, [[True, True, False], [True, False, True]])
    np.testing.assert_allclose(out[is_finite], want[is_finite], rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_value_that_is_not_finite_makes_queries_that_see_it_nan_on_gpu(dtype):
    offset = np.zeros(128)
    offset[3] = np.inf
    p = encoded_problem(INT8, dtype, offset=offset, head_dim=128, **DECODE)
    out = np.asarray(attend("gpu", p))
    has_tokens = p.held_lens > 0
    assert np.isnan(out[has_tokens]).all() and not out[~has_tokens].any()


def test_values_that_are_still_rotated_may_be_larger_than_float16_holds_on_gpu():
    p = encoded_problem(INT4, "float16", offset=2e4, head_dim=128, **DECODE)
    assert np.nanmax(p.v) > 65504
    out = np.asarray(attend("gpu", p), np.float64)
    np.testing.assert_allclose(out, attention(p), rtol=2e-2, atol=1e3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_program_calls_one_kernel_for_native_rows_and_one_for_all_others(dtype):
    kv = jnp.zeros((12, 1, 2, 8, 64), storage_dtype(dtype, "cpu"))
    pool = kv_pool(kv, kv, dtype, formats=tuple(TokenFormat))
    ints = jnp.zeros(4, jnp.int32)
    rows = {"block_ids": jnp.zeros((4, 3), jnp.int32), "held_lens": ints, "token_formats": ints}
    text = jax.jit(paged_attention).lower(jnp.zeros((4, 4, 64)), pool, 0, **rows).as_text()
    width = jnp.dtype(dtype).itemsize
    for numbers, num_calls in ((dtype, 1), (f"packed_{width}", 3), (f"packed_{6 - width}", 0)):
        assert text.count(f"@ferrum_jax_attention_{numbers}(") == num_calls


def test_vmap_over_replicas_equals_one_at_a_time_on_cpu():
    replicas = [packed_problem(INT8_INT4, seed=seed, num_queries=2) for seed in range(2)]
    calls = [p.call() for p in replicas]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *calls)
    for unmapped in ((), ("layer", "q_lens")):  # Arguments that are equal may be shared.
        axes = jax.tree.map(lambda _: 0, stacked)
        axes = dataclasses.replace(axes, **dict.fromkeys(unmapped))
        args = dataclasses.replace(stacked, **{name: getattr(calls[0], name) for name in unmapped})
        for got, p in zip(jax.vmap(cpu.attend, in_axes=(axes,))(args), replicas, strict=True):
            want = attention(p)
            np.testing.assert_allclose(got.reshape(want.shape), want, rtol=0, atol=1e-5)
