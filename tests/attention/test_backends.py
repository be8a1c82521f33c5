"""Every backend on random data of few shapes, beside float64 loops."""

import numpy as np
import pytest

from ferrum_jax.types import NULL_BLOCK
from tests.support.attention_kernels import ALL_KERNELS, attend
from tests.support.attention_oracle import assert_right
from tests.support.attention_problems import CATALOGUE, VARIANTS, problem, random_problem

INT32 = np.iinfo(np.int32)
KERNELS = pytest.mark.parametrize("kernel", ALL_KERNELS)

# Which shapes of the catalogue a kernel takes, and how many problems of each.
TAKEN = {
    "reference": (["decode", "chunk with all options"], 3),
    "xla": (list(CATALOGUE), 6),
    "cpu": (list(CATALOGUE), 8),
    "gpu": (["chunk with all options"], 3),
    "gpu of default tiling": (list(CATALOGUE), 2),
    "tpu": (["chunk with all options"], 2),
    "tpu of default tiling": (["decode with all options"], 2),
}
CASES = [(kernel, name) for kernel, (names, _) in TAKEN.items() for name in names]

# One shape for all tests below, so that each kernel is compiled for it once or twice.
SHAPE = {"max_len": 72, "head_dim": 128, "block_size": 8}


@pytest.mark.parametrize(("kernel", "name"), CASES)
def test_a_backend_agrees_with_float64_loops(kernel, name):
    for seed in range(TAKEN[kernel][1]):
        p = random_problem(name, seed)
        assert_right(attend(kernel, p), p)


@pytest.mark.parametrize("variant", VARIANTS)
@KERNELS
def test_every_variant_of_a_chunk_agrees_with_float64_loops(kernel, variant):
    if kernel in ("gpu", "tpu") and variant in ("scale", "cap"):
        pytest.skip("compiling it takes long, and the variant `all` has it")
    lens = {"held_lens": (70, 0, 2, 20), "num_queries": 5, "q_lens": (5, 0, 2, 3)}
    p = problem(**SHAPE, **lens, **VARIANTS[variant])
    assert_right(attend(kernel, p), p)


@pytest.mark.parametrize(
    ("kernel", "windows"),
    [("xla", (1, 15, 16, 17, 33)), ("cpu", (1, 16, 17)), ("gpu", (1, 17)), ("tpu", (1, 9))],
)
def test_a_sliding_window_starts_at_the_right_token(kernel, windows):
    for window in windows:
        shape = {**SHAPE, "block_size": 16, "max_len": 140}
        p = problem(held_lens=(32, 33, 140, 5), sliding_window=window, **shape)
        assert_right(attend(kernel, p), p)


@KERNELS
def test_lengths_around_every_boundary_are_right(kernel):
    # Of blocks, strips, items, tiles and splits: one less, just so, and one more.
    held_lens = [n + d for n in (16, 32, 64, 128, 144) for d in (-1, 0, 1)]
    p = problem(held_lens=held_lens, block_size=16, heads=(3, 1), head_dim=128)
    assert_right(attend(kernel, p), p)


@KERNELS
def test_rows_may_share_blocks_and_be_chunks_of_one_sequence(kernel):
    p = problem(held_lens=(24, 20, 17, 24), num_queries=5, q_lens=(5, 5, 5, 0), **SHAPE)
    block_ids = p.block_ids.copy()
    block_ids[1:3] = block_ids[0]
    p = p.replace(block_ids=block_ids)
    assert_right(attend(kernel, p), p)


@KERNELS
def test_blocks_outside_the_sliding_window_may_be_gone(kernel):
    problems = (
        problem(seed=s, held_lens=(60, 45, 0, 9), sliding_window=9, **SHAPE) for s in range(99)
    )
    p = next(p for p in problems if 0 not in p.block_ids)  # An absent block is read as block 0.
    assert np.isnan(p.k[0]).all() and np.isnan(p.v[0]).all()
    block_ids = p.block_ids.copy()
    for row, seq_len in enumerate(p.held_lens):
        block_ids[row, : max(seq_len - 9, 0) // 8] = NULL_BLOCK
    assert_right(attend(kernel, p.replace(block_ids=block_ids)), p)


# Shapes that one backend treats in its own way.


@pytest.mark.parametrize(
    ("kernel", "shape"),
    [
        # XLA: more rows than items per turn; and a state so large that rows are taken one by one.
        ("xla", {"held_lens": [*range(0, 400, 10)], "block_size": 16, "heads": (3, 1)}),
        (
            "xla",
            {
                **{"held_lens": (150, 90, 0, 64), "num_queries": 64, "q_lens": (64, 50, 0, 64)},
                **{"heads": (16, 2), "head_dim": 128, "block_size": 16},
            },
        ),
        # GPU: groups that fill no tile, and the longest window.
        ("gpu of default tiling", {"heads": (7, 1), "head_dim": 96, "dtype": "float16"}),
        ("gpu of default tiling", {"heads": (34, 2), "head_dim": 80, "block_size": 64}),
        ("gpu", {"held_lens": (1, 9), "num_queries": 4, "sliding_window": INT32.max}),
        # TPU: tokens last, groups that fill no tile, and blocks of every kind.
        (
            "tpu of default tiling",
            {"heads": (9, 3), "head_dim": 64, "block_size": 128, "dtype": "bfloat16"},
        ),
        ("tpu of default tiling", {"heads": (7, 1), "head_dim": 80, "block_size": 128}),
        ("tpu of default tiling", {"heads": (2, 2), "head_dim": 256, "block_size": 24}),
        (
            "tpu of default tiling",
            {"heads": (6, 6), "head_dim": 192, "block_size": 256, "num_queries": 3},
        ),
        (
            "tpu",
            {
                **{"held_lens": (592, 0, 32, 320), "num_queries": 13, "q_lens": (13, 0, 2, 9)},
                **{"head_dim": 64, "block_size": 128},
                **VARIANTS["all"],
            },
        ),
    ],
    ids=str,
)
def test_odd_shapes_are_right(kernel, shape):
    p = problem(**{"held_lens": (300, 3, 0, 129), **shape})
    assert_right(attend(kernel, p), p)


@pytest.mark.parametrize("window", [None, 1, 257, 3000])
def test_long_rows_are_cut_into_parts_and_merged_on_cpu(window):
    # A part has at least 256 tokens of 32 numbers, as has a tile.
    held_lens = [n + d for n in (256, 512, 2560) for d in (-1, 0, 1)]
    chunk = {"num_queries": 3, "sinks": window == 3000} if window != 257 else {}
    p = problem(held_lens=held_lens, block_size=16, sliding_window=window, **chunk)
    assert_right(attend("cpu", p), p)
