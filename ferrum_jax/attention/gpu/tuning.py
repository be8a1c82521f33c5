"""How an attention call is cut into programs of a GPU.

The sizes below were chosen from the compiler's report for an H100 (jax 0.10.2, CUDA 13.5) of
registers and shared memory, which limit the programs on each of its 132 multiprocessors. They are
not yet measured; `python -m benchmarks.gpu_attention --tune` does that.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ferrum_jax.arithmetic import ceil_div, next_power_of_two
from ferrum_jax.attention.call import AttentionCall

# Programs that rows of equal length are split into: two waves of three per multiprocessor.
_PROGRAMS = 2 * 3 * 132

_MAX_SPLITS = 64
# With many rows, a row that is far longer than the others is still split.
_MIN_SPLITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of tiles, and the number of programs among which tokens are divided.

    Attributes:
      tile_queries: Queries per program, the heads of a group counted each; a power of two from 16.
      tile_tokens: Tokens that a program reads at a time; a power of two from 16.
      num_splits: Programs among which the tokens of one tile of queries are divided, in whole tiles
        of tokens; a power of two.
      num_warps: Warps per program, of 32 threads each.
      num_stages: Depth of the compiler's pipeline. A key's address comes from the table, and the
        compiler spends stages on that: with fewer than 5, no key is fetched ahead; with 7, one
        more tile is.
    """

    tile_queries: int
    tile_tokens: int
    num_splits: int
    num_warps: int
    num_stages: int


class _Shape(NamedTuple):
    """Sizes of one row of the table below; names as in `Tiling`."""

    max_tile_queries: int
    tile_tokens: int
    num_warps: int
    num_stages: int


# Keys: bytes of a number in the products, largest head dimension, and whether there are more
# queries than fit in one tile of 16. Beside a row: registers, KiB of shared memory, programs per
# multiprocessor.
# Compressed rows take the same shapes. They need more registers and less memory (one query per row,
# 128 numbers in bfloat16: 96, 38.5, 5 for Int8 and 122, 22.5, 4 for Int4), and no register spills.
_SHAPES = {
    (2, 64, False): _Shape(16, 64, 4, 5),  # 64, 36.5, 6.
    (2, 128, False): _Shape(16, 64, 4, 5),  # 80, 70.5, 3.
    (2, 256, False): _Shape(16, 32, 4, 5),  # 80, 73.2, 3.
    (2, 512, False): _Shape(16, 16, 8, 5),  # 80, 80.6, 2.
    (2, 64, True): _Shape(64, 64, 4, 5),  # 118, 56.5, 3.
    (2, 128, True): _Shape(64, 64, 4, 5),  # 168, 112.5, 2.
    (2, 256, True): _Shape(64, 32, 8, 5),  # 140, 128.2, 1.
    (2, 512, True): _Shape(32, 16, 8, 5),  # 224, 97.1, 1.
    (4, 64, False): _Shape(16, 32, 8, 5),  # 54, 38.3, 4.
    (4, 128, False): _Shape(16, 16, 8, 5),  # 64, 41.2, 4. With 4 warps registers spill.
    (4, 256, False): _Shape(16, 16, 8, 5),  # 59, 81.2, 2.
    (4, 512, False): _Shape(16, 16, 8, 5),  # 116, 161.2, 1.
    (4, 64, True): _Shape(32, 32, 8, 5),  # 61, 44.4, 4.
    (4, 128, True): _Shape(32, 16, 8, 5),  # 71, 50.2, 3.
    (4, 256, True): _Shape(32, 16, 8, 5),  # 109, 98.2, 2.
    (4, 512, True): _Shape(16, 16, 8, 5),  # 164, 193.2, 1.
}

_MIN_WIDTH = min(width for _, width, _ in _SHAPES)

MAX_HEAD_DIM = max(width for _, width, _ in _SHAPES)
"""Numbers of a head, for which there are tiles that fit into shared memory."""


def dot_dtype(call: AttentionCall) -> np.dtype:
    """Returns the dtype in which the kernel multiplies; it holds queries and keys exactly."""
    if call.is_native and call.pool.stored_dtype != call.q.dtype:
        return np.dtype(jnp.float32)
    return call.q.dtype  # Integers of 8 bits fit into all of these dtypes.


def tiling_for(call: AttentionCall) -> Tiling:
    """Chooses sizes for a call, by its shapes alone."""
    rows, num_queries, num_kv_heads, group, head_dim = call.q.shape
    members = num_queries * group
    width = max(_MIN_WIDTH, next_power_of_two(head_dim))
    shape = _SHAPES[dot_dtype(call).itemsize, width, members > 16]
    tile_queries = min(shape.max_tile_queries, max(16, next_power_of_two(members)))
    num_tiles = ceil_div(members, tile_queries)
    wanted = ceil_div(_PROGRAMS, rows * num_kv_heads * num_tiles)
    if num_tiles == 1:
        wanted = max(wanted, _MIN_SPLITS)
    reach = call.reach
    if call.sliding_window is not None:
        reach = min(reach, call.sliding_window + tile_queries)
    num_splits = min(wanted, _MAX_SPLITS, ceil_div(reach, shape.tile_tokens))
    return Tiling(
        tile_queries=tile_queries,
        tile_tokens=shape.tile_tokens,
        num_splits=next_power_of_two(num_splits),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )
