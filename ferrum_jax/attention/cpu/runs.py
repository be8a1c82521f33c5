"""Runs of a tile's tokens: their numbers are widened or unpacked before they are used."""

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.job import TILE_TOKENS
from ferrum_jax.attention.cpu.limits import MAX_HEAD_DIM
from ferrum_jax.attention.cpu.numbers import f32
from ferrum_jax.foreign.compiling import compiled
from ferrum_jax.foreign.memory import Pointer, stack_float32s, stack_int64s

TOKENS_AHEAD = 16
"""Distance in tokens between the token that is prefetched and the one that is used."""

LINE_BYTES = 64
"""Bytes of a cache line, which one prefetch fetches."""

_RUN_NUMBERS = 8 * MAX_HEAD_DIM  # 16 KB; 8 and 32 KB took a few percent longer.

numbers_room = stack_float32s(_RUN_NUMBERS)
places_room = stack_int64s(TILE_TOKENS + TOKENS_AHEAD)


@compiled
def run_tokens(job: Pointer) -> int:
    """Returns the tokens of a run, for which there is room; a multiple of 4."""
    return _RUN_NUMBERS // job[words.PADDED_DIM] // 4 * 4


@compiled
def clear_numbers(job: Pointer, numbers: Pointer) -> None:
    """Sets the numbers of a run to zero, if those of a token do not fill its vectors."""
    if job[words.HEAD_DIM] < job[words.PADDED_DIM]:
        for d in range(_RUN_NUMBERS):
            numbers[d] = f32(0)
