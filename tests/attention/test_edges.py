"""Every backend over the whole range of its arguments, beside float64 loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.attention.call import attention_call
from tests.support.attention_kernels import attend
from tests.support.attention_oracle import attention
from tests.support.attention_problems import Problem, problem

ROWS, BLOCKS_PER_ROW, BLOCK_SIZE, HEAD_DIM = 6, 4, 40, 128
NUM_BLOCKS, NUM_LAYERS, HEADS = ROWS * BLOCKS_PER_ROW + 2, 2, (4, 2)
INT32 = np.iinfo(np.int32)

# Either equal, or so far apart that one weight is 1 in spite of rounding to float32.
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
    """Rows whose logits are of one kind each, with any int32 as length, id and layer."""
    rng = np.random.default_rng(seed)
    scale = options.get("scale", HEAD_DIM**-0.5)
    shape = (NUM_BLOCKS, NUM_LAYERS, HEADS[1], BLOCK_SIZE)
    k = rng.normal(size=(*shape, HEAD_DIM)).astype(np.float32)
    v = rng.normal(size=(*shape, HEAD_DIM)).astype(np.float32)
    q = rng.normal(size=(ROWS, num_queries, HEADS[0], HEAD_DIM)).astype(np.float32)
    q *= 0.5 / abs(scale or 1)
    # Ids out of range are read as block 0 or the last one, whose numbers suit every kind of row.
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
    """Finite numbers must be right; a query that sees a number that is not finite may be NaN."""
    got, want = np.asarray(out).reshape(p.q.shape), attention(p)
    is_bad = ~np.isfinite(want)
    sees_bad = is_bad.any(-1, keepdims=True)
    np.testing.assert_allclose(*(np.where(sees_bad, 0, x) for x in (got, want)), rtol=0, atol=2e-5)
    if p.options.sinks is not None:  # A value of weight zero may be ignored.
        is_bad &= np.asarray(p.options.sinks < 100)[:, None]
    assert not np.isfinite(got[is_bad]).any()


ALL = {"scale": -0.5, "soft_cap": 1e8, "sliding_window": 70, "sinks": True}
FEW = [(3, {"scale": 1.0}), (1, ALL), (3, ALL)]
MANY = [*FEW, (1, {"scale": 1.0}), (3, {"soft_cap": 1e37, "scale": 1.0}), (3, {"scale": 2.0**-60})]
EVERY = [
    *MANY,
    (3, {"scale": 0.0}),
    (3, {"scale": 2.0**60, "soft_cap": 50.0}),
    *((2, {"soft_cap": cap, "scale": -1.0}) for cap in (1e-300, 1e-3, 1e4, 1e6, 1e30, 1e300)),
]
CASES = {"reference": FEW[-1:], "xla": MANY, "cpu": EVERY, "gpu": FEW[:2], "tpu": FEW[1:]}


@pytest.mark.parametrize(
    ("kernel", "num_queries", "options"),
    [(kernel, *case) for kernel, cases in CASES.items() for case in cases],
    ids=str,
)
def test_a_backend_agrees_with_float64_loops_for_all_numbers(kernel, num_queries, options):
    for seed in range({"tpu": 2, "gpu": 4}.get(kernel, 6)):
        p = edge_problem(seed, num_queries, **options)
        assert_right(attend(kernel, p), p)


@pytest.mark.parametrize("kernel", ["reference", "xla", "cpu", "gpu"])
def test_a_backend_is_right_where_numbers_of_64_bits_are_enabled(kernel):
    p = edge_problem(0, 3, **ALL)
    with jax.enable_x64(True):
        assert_right(attend(kernel, p), p)


INTEGERS = ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_integers_of_every_dtype_become_the_nearest_int32(dtype):
    p = problem(num_queries=2, q_lens=(2, 1, 2))
    arguments = p.arguments()
    limits = np.iinfo(dtype)
    wanted = [min(limits.max, 2**40 + 3), max(limits.min, -(2**40) - 3), 5]
    near = np.clip(wanted, INT32.min, INT32.max).astype(np.int32)
    for in_jax in (False, True):
        with jax.enable_x64(in_jax):
            numbers = (jnp if in_jax else np).asarray(wanted, dtype)
            rows = {"block_ids": numbers[:, None], "held_lens": numbers, "q_lens": numbers}
            got = attention_call(**{**arguments, "layer": numbers[0], **rows})
        for name in ("layer", "block_ids", "held_lens", "q_lens"):
            assert getattr(got, name).dtype == jnp.int32
        assert int(got.layer) == near[0]
        np.testing.assert_array_equal(got.block_ids[:, 0], near)
        np.testing.assert_array_equal(got.held_lens, np.maximum(near, 0))
        np.testing.assert_array_equal(got.q_lens, np.clip(near, 0, 2))
