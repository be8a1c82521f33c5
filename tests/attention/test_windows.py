"""Sliding windows: blocks below the window are not read, and the work follows the window."""

import jax.numpy as jnp
import numba
import numpy as np
import pytest

from ferrum_jax.attention.cpu import job
from ferrum_jax.attention.gpu import kernel as gpu_kernel
from ferrum_jax.attention.gpu import tuning
from ferrum_jax.attention.tpu import step as tpu_step
from ferrum_jax.attention.tpu import tiling as tpu_tiling
from ferrum_jax.attention.xla.strips import cut
from ferrum_jax.foreign.memory import int64s
from ferrum_jax.types import NULL_BLOCK, TokenFormat
from tests.support.attention_kernels import ALL_KERNELS, attend
from tests.support.attention_oracle import assert_right
from tests.support.attention_problems import VARIANTS, Problem, packed_problem, problem
from tests.support.pools import keys, values, with_arrays

INT32 = np.iinfo(np.int32)
WINDOW = 6  # Of `VARIANTS`.
ROWS = 4

# `test_backends` has programs for the shape of these chunks. Of each kernel, how many problems.
CHUNK = {"max_len": 72, "head_dim": 128, "block_size": 8, "num_queries": 5}
SEEDS = {"reference": 3, "xla": 8, "cpu": 8, "gpu": 4, "tpu": 3}


def random_rows(seed: int, max_len: int, num_queries: int) -> dict:
    rng = np.random.default_rng(seed)
    held_lens = rng.integers(0, max_len + 1, ROWS)
    q_lens = np.minimum(rng.integers(0, num_queries + 1, ROWS), held_lens)
    return {"seed": seed, "held_lens": held_lens, "q_lens": q_lens}


def first_tokens(p: Problem) -> np.ndarray:
    """The first token that any query of each row sees; the row's length if it has no queries."""
    first = np.maximum(p.held_lens - p.q_lens + 1 - p.options.sliding_window, 0)
    return np.where(p.q_lens > 0, first, p.held_lens)


def released(p: Problem) -> Problem:
    """The problem without what lies below the window: poison in the pool, any id in the table.

    Ids that the pool does not have are read as the nearest ones, so poison is there as well.
    """
    rng = np.random.default_rng(0)
    num_blocks, block_size = p.k.shape[0], p.k.shape[3]
    k, v, block_ids = p.k.copy(), p.v.copy(), p.block_ids.copy()
    spare = sorted(set(range(num_blocks)) - set(block_ids.ravel()))
    order = np.arange(num_blocks)
    for end, block in zip((0, num_blocks - 1), (spare[0], spare[-1]), strict=True):
        order[[end, block]] = order[[block, end]]
    k, v = k[order], v[order]
    block_ids = np.where(block_ids == NULL_BLOCK, NULL_BLOCK, np.argsort(order)[block_ids])
    for row, first in enumerate(first_tokens(p)):
        gone, offset = divmod(int(first), block_size)
        poison = rng.choice([np.nan, np.inf, -np.inf], 2)
        for x, number in zip((k, v), poison, strict=True):
            x[block_ids[row, :gone]] = number
            if offset:
                x[block_ids[row, gone], :, :, :offset] = number
        wild = rng.choice([NULL_BLOCK, num_blocks, INT32.min, INT32.max], gone)
        keeps_id = rng.random(gone) < 0.3
        block_ids[row, :gone] = np.where(keeps_id, block_ids[row, :gone], wild)
    return p.replace(k=k, v=v, block_ids=block_ids.astype(np.int32))


@pytest.mark.parametrize("kernel", ALL_KERNELS)
@pytest.mark.parametrize("variant", ["window", "all"])
def test_no_number_below_the_window_reaches_a_result(kernel, variant):
    for seed in range(SEEDS[kernel]):
        p = problem(**CHUNK, **random_rows(seed, 72, 5), **VARIANTS[variant])
        assert_right(attend(kernel, released(p)), p)


@pytest.mark.parametrize("kernel", ["xla", "cpu", "gpu"])
def test_no_compressed_block_below_the_window_is_followed(kernel):
    shape = {"head_dim": 64, "num_queries": 3, "max_len": 150, "sliding_window": 20}
    for seed in range(SEEDS[kernel]):
        p = packed_problem(TokenFormat.Int8, **shape, **random_rows(seed, 150, 3))
        block_ids = p.block_ids.copy()
        for row, first in enumerate(first_tokens(p)):
            block_ids[row, : first // p.k.shape[3]] = NULL_BLOCK
        k, v = (np.asarray(half(p.pool)).copy() for half in (keys, values))
        gone = np.setdiff1d(np.arange(k.shape[0]), block_ids)
        k[gone], v[gone] = np.nan, np.nan
        poisoned = with_arrays(p.pool, jnp.asarray(k), jnp.asarray(v))
        assert_right(attend(kernel, p.replace(block_ids=block_ids, pool=poisoned)), p)


@pytest.mark.parametrize(
    "kernel", ["reference", "xla", "cpu", "gpu of default tiling", "tpu of default tiling"]
)
def test_heads_of_512_numbers_are_right(kernel):
    shape = {"max_len": 72, "head_dim": 512, "block_size": 8, "num_queries": 3}
    for seed in range(2):
        p = problem(**shape, **random_rows(seed, 72, 3), sliding_window=20, soft_cap=5.0)
        assert_right(attend(kernel, released(p)), p)


@numba.njit
def _tokens_read(address, row):
    return job.tokens_read(int64s(address), row)


def read_by_cpu(call) -> int:
    q_lens, held_lens = np.asarray(call.q_lens), np.asarray(call.held_lens)
    words = np.zeros(job.NUM_WORDS, np.int64)
    words[job.Q_LENS], words[job.SEQ_LENS] = q_lens.ctypes.data, held_lens.ctypes.data
    words[job.TABLE_WIDTH], words[job.NUM_QUERIES] = call.block_ids.shape[1], call.q.shape[1]
    words[job.BLOCK_SIZE], words[job.WINDOW] = call.tokens_per_block, call.sliding_window
    first, end = _tokens_read(words.ctypes.data, 0)
    return end - first


def read_by_xla(call) -> int:
    strips = cut(call)
    first, last = strips.before_last()
    return int(last[0] + 1 - first[0]) * strips.size


def read_by_gpu(call) -> int:
    tiling = tuning.tiling_for(call)
    sizes = gpu_kernel.sizes_of(call, tiling)
    q_len = call.q_lens[0]
    splits = np.arange(tiling.num_splits)
    begin, end = gpu_kernel.span_of(splits, 0, q_len, call.held_lens[0] - q_len, sizes)
    return int(np.maximum(end - begin, 0).sum())


def read_by_tpu(call) -> int:
    sizes = tpu_tiling.sizes_of(call, tpu_tiling.tiling_for(call))
    scalars = tpu_step.Scalars(call.layer.reshape(1), call.held_lens, call.q_lens)
    share = tpu_step.share_of(np.int32(0), scalars, call.block_ids[:1], sizes)
    return int(share.end - share.first_block * call.pool.block_size)


@pytest.mark.parametrize("num_queries", [1, 8])
@pytest.mark.parametrize(
    ("read", "granule"), [(read_by_cpu, 1), (read_by_xla, 16), (read_by_gpu, 1), (read_by_tpu, 16)]
)
def test_the_tokens_that_are_read_follow_the_window(read, granule, num_queries):
    window, shape = 512, {"heads": (1, 1), "head_dim": 8, "block_size": 16}
    for held_len in (16384, 1000):
        p = problem(held_lens=(held_len,), num_queries=num_queries, sliding_window=window, **shape)
        seen = window + num_queries - 1
        assert seen <= read(p.call()) <= seen + 2 * (granule - 1)
