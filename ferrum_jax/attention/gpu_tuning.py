"""How an attention call is cut into programs of a GPU.

The sizes below were chosen from what the compiler says of them for an H100 (jax 0.10.2, CUDA
13.5): registers, shared memory, and so the programs that fit on one of its 132 multiprocessors.
They are not yet measured; `python -m benchmarks.gpu_attention --tune` does that.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.types import TokenFormat

# Programs that rows of equal length are split into: two waves of three a multiprocessor.
_PROGRAMS = 2 * 3 * 132

_MAX_SPLITS = 64
# Where there are rows enough, one that is far longer than the others is still split.
_MIN_SPLITS = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of tiles, and programs among which they are shared out.

    Attributes:
      tile_queries: Queries a program, the heads of a group counted each; a power of two from 16.
      tile_tokens: Tokens a program reads at a time; a power of two from 16.
      num_splits: Programs among which the tokens of one tile of queries are shared out, in whole
        tiles of tokens; a power of two.
      num_warps: Warps a program, of 32 threads each.
      num_stages: Depth of the compiler's pipeline. A key's address comes from the table, and the
        compiler spends stages on that: with fewer than 5, no key is fetched ahead; 7 fetch one
        tile more.
    """

    tile_queries: int
    tile_tokens: int
    num_splits: int
    num_warps: int
    num_stages: int


class _Shape(NamedTuple):
    max_tile_queries: int
    tile_tokens: int
    num_warps: int
    num_stages: int


# By bytes of a number in the products, head dimension (up to) and whether there are more queries
# than fit one tile of 16. Beside it: registers, KiB of shared memory, programs a multiprocessor.
# Compressed rows take the same shapes. They need more registers and less memory (one query a row,
# 128 numbers in bfloat16: 96, 38.5, 5 for Int8 and 122, 22.5, 4 for Int4), and none spills.
_SHAPES = {
    (2, 64, False): _Shape(16, 64, 4, 5),  # 64, 36.5, 6.
    (2, 128, False): _Shape(16, 64, 4, 5),  # 80, 70.5, 3.
    (2, 256, False): _Shape(16, 32, 4, 5),  # 80, 73.2, 3.
    (2, 64, True): _Shape(64, 64, 4, 5),  # 118, 56.5, 3.
    (2, 128, True): _Shape(64, 64, 4, 5),  # 168, 112.5, 2.
    (2, 256, True): _Shape(64, 32, 8, 5),  # 140, 128.2, 1.
    (4, 64, False): _Shape(16, 32, 8, 5),  # 54, 38.3, 4.
    (4, 128, False): _Shape(16, 16, 8, 5),  # 64, 41.2, 4. With 4 warps registers spill.
    (4, 256, False): _Shape(16, 16, 8, 5),  # 59, 81.2, 2.
    (4, 64, True): _Shape(32, 32, 8, 5),  # 61, 44.4, 4.
    (4, 128, True): _Shape(32, 16, 8, 5),  # 71, 50.2, 3.
    (4, 256, True): _Shape(32, 16, 8, 5),  # 109, 98.2, 2.
}


def dot_dtype(inputs: AttentionInputs, token_format: TokenFormat) -> np.dtype:
    """Returns the dtype in which the kernel multiplies: one that holds queries and keys exactly."""
    if token_format == TokenFormat.Native and inputs.pool.k.dtype != inputs.q.dtype:
        return np.dtype(jnp.float32)
    return inputs.q.dtype  # Integers of 8 bits fit into any.


def tiling_for(inputs: AttentionInputs, token_format: TokenFormat = TokenFormat.Native) -> Tiling:
    """Chooses sizes for a call, by its shapes alone."""
    rows, num_queries, num_kv_heads, group, head_dim = inputs.q.shape
    members = num_queries * group
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    shape = _SHAPES[dot_dtype(inputs, token_format).itemsize, width, members > 16]
    tile_queries = min(shape.max_tile_queries, max(16, _power_of_two(members)))
    num_tiles = -(-members // tile_queries)
    wanted = -(-_PROGRAMS // (rows * num_kv_heads * num_tiles))
    if num_tiles == 1:
        wanted = max(wanted, _MIN_SPLITS)
    reach = inputs.reach(token_format)
    if inputs.options.sliding_window is not None:
        reach = min(reach, inputs.options.sliding_window + tile_queries)
    return Tiling(
        tile_queries=tile_queries,
        tile_tokens=shape.tile_tokens,
        num_splits=_power_of_two(min(wanted, _MAX_SPLITS, -(-reach // shape.tile_tokens))),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
    )


def _power_of_two(number: int) -> int:
    """Returns the least power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()
