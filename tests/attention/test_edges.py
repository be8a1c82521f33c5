"""Every kernel over the whole range of its arguments, beside float64 loops."""

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.attention import AttentionOptions, native
from ferrum_jax.attention.gpu import gpu_attention
from ferrum_jax.attention.gpu_tuning import Tiling as GpuTiling
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.attention.reference import reference_attention
from ferrum_jax.attention.tpu import tpu_attention
from ferrum_jax.attention.tpu_tiling import Tiling as TpuTiling
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.formats import block_layout
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat
from tests.attention.test_tpu import interpreted
from tests.support.attention_oracle import Problem, attention, problem

ROWS, BLOCKS_PER_ROW, BLOCK_SIZE, HEAD_DIM = 6, 4, 40, 128
NUM_BLOCKS, NUM_LAYERS, HEADS = ROWS * BLOCKS_PER_ROW + 2, 2, (4, 2)
INT32 = np.iinfo(np.int32)

# Either equal or so far apart that one weight is 1, whatever float32 rounds.
FAR_APART = np.asarray([0, 3, 40, 8e9, 2e30, 3e30, 4e30, 5e30, 3e38], np.float32)
LOW = np.asarray([-2e30, -3e30, -4e30, -5e30, -3e38], np.float32)
INFINITE = np.asarray([np.inf, -np.inf, 3, -3e38, -np.inf, -np.inf], np.float32)


def keys_of(rng: np.random.Generator, kind: str, sign: float, shape: tuple) -> np.ndarray:
    """Keys whose logits, with a query that is 1 and then zeros, have the sign of their first."""
    k = rng.normal(size=(*shape, HEAD_DIM)).astype(np.float32)
    if kind == "far apart":
        k[..., 0] = rng.choice(np.concatenate([FAR_APART, -FAR_APART]), shape)
    elif kind == "low":
        k[..., 0] = rng.choice(LOW, shape) * sign
    elif kind == "infinite":
        k[..., 0] = rng.choice(INFINITE[rng.integers(0, INFINITE.size, 3)], shape)
    return k


def edge_problem(seed: int, num_queries: int, *, sinks: bool = False, **options) -> Problem:
    """Rows of logits of one kind each, and lengths, ids and a layer that may be any int32."""
    rng = np.random.default_rng(seed)
    scale = options.get("scale", HEAD_DIM**-0.5)
    shape = (NUM_BLOCKS, NUM_LAYERS, HEADS[1], BLOCK_SIZE)
    k = rng.normal(size=(*shape, HEAD_DIM)).astype(np.float32)
    v = rng.normal(size=(*shape, HEAD_DIM)).astype(np.float32)
    q = rng.normal(size=(ROWS, num_queries, HEADS[0], HEAD_DIM)).astype(np.float32)
    q *= 0.5 / abs(scale or 1)
    # Blocks 0 and the last, which ids out of range are read as, suit every kind of row.
    block_ids = rng.permutation(np.arange(1, NUM_BLOCKS - 1)).reshape(ROWS, BLOCKS_PER_ROW)
    for row in range(ROWS):
        kind = str(rng.choice(["usual", "spoiled", "far apart", "low", "infinite"]))
        held = block_ids[row]
        k[held] = keys_of(rng, kind, np.sign(scale) or 1, k[held].shape[:-1])
        if kind == "spoiled":
            for x, share in ((k, 0.01), (v, 0.05)):
                x[held, ..., rng.integers(HEAD_DIM)] = np.where(
                    rng.random(x[held].shape[:-1]) < share, rng.choice([np.nan, np.inf]), 1
                )
        elif kind != "usual":
            q[row] = np.eye(1, HEAD_DIM) / max(abs(scale), 1)
    held = rng.integers(0, BLOCKS_PER_ROW * BLOCK_SIZE + 1, ROWS)
    wild = (INT32.min, INT32.min + 1, -1, 0, 1, INT32.max - 1, INT32.max)
    is_wild = rng.random((2, ROWS)) < 0.2
    held_lens = np.where(is_wild[0], rng.choice(wild, ROWS), held)
    q_lens = np.where(is_wild[1], rng.choice(wild, ROWS), rng.integers(0, num_queries + 1, ROWS))
    block_ids = np.where(rng.random(block_ids.shape) < 0.05, rng.choice(wild), block_ids)
    if sinks:
        heads = rng.normal(size=HEADS[0])
        heads = np.where(rng.random(HEADS[0]) < 0.3, rng.choice([-np.inf, -3e38, 3e38]), heads)
        options["sinks"] = jnp.asarray(heads, jnp.float32)
    return Problem(
        q=q,
        k=k,
        v=v,
        layer=int(rng.choice([0, 1, 1, *wild])),
        block_ids=block_ids.astype(np.int32),
        held_lens=held_lens.astype(np.int32),
        q_lens=q_lens.astype(np.int32),
        dtype="float32",
        options=AttentionOptions(**options),
    )


def assert_right(out: jax.Array, p: Problem) -> None:
    """What is finite must be so, but for queries that see what is not: these may be all NaN."""
    got, want = np.asarray(out).reshape(p.q.shape), attention(p)
    is_bad = ~np.isfinite(want)
    sees_bad = is_bad.any(-1, keepdims=True)
    np.testing.assert_allclose(*(np.where(sees_bad, 0, x) for x in (got, want)), rtol=0, atol=2e-5)
    if p.options.sinks is not None:  # A value of no weight need not be taken.
        is_bad &= np.asarray(p.options.sinks < 100)[:, None]
    assert not np.isfinite(got[is_bad]).any()


GPU_TILING = GpuTiling(tile_queries=16, tile_tokens=32, num_splits=2, num_warps=4, num_stages=5)
TPU_TILING = TpuTiling(tile_queries=3, tile_heads=2, tile_blocks=2)


def in_tpu_kernel(inputs: AttentionInputs) -> jax.Array:
    tiling = dataclasses.replace(TPU_TILING, tile_queries=inputs.q.shape[1])
    return tpu_attention(inputs, tiling)


KERNELS = {
    "reference": reference_attention,
    "xla": xla_attention,
    "native": native.native_attention,
    "gpu": functools.partial(gpu_attention, tiling=GPU_TILING, interpret=True),
    "tpu": in_tpu_kernel,
}
ALL = {"scale": -0.5, "soft_cap": 1e8, "sliding_window": 70, "sinks": True}
FEW = [(3, {"scale": 1.0}), (1, ALL), (3, ALL)]
MANY = [
    *FEW,
    (1, {"scale": 1.0}),
    (3, {"soft_cap": 1e37, "scale": 1.0}),
    (3, {"scale": 2.0**-60}),
]
EVERY = [
    *MANY,
    (3, {"scale": 0.0}),
    (3, {"scale": 2.0**60, "soft_cap": 50.0}),
    *((2, {"soft_cap": cap, "scale": -1.0}) for cap in (1e-300, 1e-3, 1e4, 1e6, 1e30, 1e300)),
]
CASES = {"reference": FEW[-1:], "xla": MANY, "native": EVERY, "gpu": FEW[:2], "tpu": FEW[1:]}


@functools.cache
def compiled(kernel: str):
    level = 0 if kernel in ("gpu", "tpu") else None  # Compiled once and run a few times.
    options = level if level is None else {"xla_backend_optimization_level": level}
    return jax.jit(KERNELS[kernel], compiler_options=options)


@pytest.mark.parametrize(
    ("kernel", "num_queries", "options"),
    [(kernel, *case) for kernel, cases in CASES.items() for case in cases],
    ids=str,
)
def test_every_kernel_agrees_with_float64_loops_for_all_numbers(kernel, num_queries, options):
    for seed in range({"tpu": 3, "gpu": 6}.get(kernel, 10)):
        p = edge_problem(seed, num_queries, **options)
        inputs = attention_inputs(*p.args())
        assert kernel != "native" or native.supports(inputs)
        with interpreted() if kernel == "tpu" else contextlib.nullcontext():
            assert_right(compiled(kernel)(inputs), p)


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_dtype_become_the_nearest_int32(dtype):
    p = problem(num_queries=2, q_lens=(2, 1, 2))
    q, pool, *_ = p.args()
    limits = np.iinfo(dtype)
    wanted = [min(limits.max, 2**40 + 3), max(limits.min, -(2**40) - 3), 5]
    near = np.clip(wanted, INT32.min, INT32.max).astype(np.int32)
    for in_jax in (False, True):
        with jax.enable_x64(in_jax):
            numbers = (jnp if in_jax else np).asarray(wanted, dtype)
            args = numbers[0], numbers[:, None], numbers, numbers
            got = attention_inputs(q, pool, *args, AttentionOptions())
        for name in ("layer", "block_ids", "held_lens", "q_lens"):
            assert getattr(got, name).dtype == jnp.int32
        assert int(got.layer) == near[0]
        np.testing.assert_array_equal(got.block_ids[:, 0], near)
        np.testing.assert_array_equal(got.held_lens, np.maximum(near, 0))
        np.testing.assert_array_equal(got.q_lens, np.clip(near, 0, 2))


@pytest.mark.parametrize("kernel", ["reference", "xla", "native", "gpu"])
def test_every_kernel_is_right_where_numbers_of_64_bits_are_enabled(kernel):
    p = edge_problem(0, 3, **ALL)
    with jax.enable_x64(True):
        inputs = attention_inputs(*p.args())
        assert kernel != "native" or native.supports(inputs)
        assert_right(compiled(kernel)(inputs), p)


@pytest.mark.parametrize("kernel", ["xla", "native", "gpu"])
def test_a_compressed_value_that_is_not_finite_is_kept_from_queries_that_do_not_see_it(kernel):
    token_format = TokenFormat.Int8
    layout = block_layout(token_format, block_size=16, head_dim=64, dtype="float32")
    lens = {"held_lens": (50, 9), "num_queries": 3, "q_lens": (3, 2)}
    p = problem(block_size=layout.num_tokens, head_dim=64, **lens)
    for row, seq_len in enumerate(p.held_lens):
        block, offset = divmod(int(seq_len) - 1, layout.num_tokens)
        p.v[p.block_ids[row, block], :, :, offset, 7] = np.inf
    halves = layout.encode(jnp.asarray(p.k), jnp.asarray(p.v), jnp.float32)
    k, v = (np.asarray(x) for x in layout.decode(*halves))
    p = dataclasses.replace(p, k=k, v=v)
    pool = BlockPool(*halves, dtype=np.dtype("float32"))
    q, _, *rest = p.args()
    inputs = attention_inputs(q, pool, *rest)
    assert kernel != "native" or native.supports(inputs, token_format)
    tiling = {} if kernel != "gpu" else {"tiling": dataclasses.replace(GPU_TILING, num_splits=1)}
    out = functools.partial(KERNELS[kernel], token_format=token_format, **tiling)(inputs)
    assert_right(out, p)
    is_finite = np.isfinite(np.asarray(out).reshape(p.q.shape)).all((2, 3))
    np.testing.assert_array_equal(is_finite, [[True, True, False], [True, False, True]])
