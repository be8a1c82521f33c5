"""The tokens of an item in the pool's dtype.

Float32 keys and values of full vectors are read in place; others are widened a run at a time, and
runs are small, so that their numbers stay in the first-level cache. The tokens of one KV head of a
block are contiguous, and the next block is anywhere in the pool, so the processor does not prefetch
it. Each token's numbers are therefore prefetched `TOKENS_AHEAD` tokens before their use. On a Zen 4
core, a decode step of 32 rows of 256 tokens, 3 heads by 64 in float32, reads 13 to 14 GB/s with it;
a sum of the same blocks reads 15.
"""

from typing import Any

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.item import find_block, weigh
from ferrum_jax.attention.cpu.job import ACC, MAX_TILE_QUERIES
from ferrum_jax.attention.cpu.numbers import widen
from ferrum_jax.attention.cpu.products import add_values, multiply_keys
from ferrum_jax.attention.cpu.runs import (
    LINE_BYTES,
    TOKENS_AHEAD,
    clear_numbers,
    numbers_room,
    places_room,
    run_tokens,
)
from ferrum_jax.foreign.compiling import clamp, compiled, inlined
from ferrum_jax.foreign.memory import address_at, float32s, prefetch_second_level

# Numbers of a run for few queries: so memory is read all the time, not in bursts between products.
# Numbers that are read in place took 7 % longer with 512, and those that are widened 2 % less.
_FEW_IN_PLACE, _FEW_WIDENED = 256, 512


def attend_to(numbers: Any) -> Any:
    """Returns the function that adds the current tile of an item to a softmax.

    Args:
      numbers: Function `address -> pointer` to numbers as the pool stores them; see `widen`.
    """
    is_float32 = numbers is float32s
    few_numbers = _FEW_IN_PLACE if is_float32 else _FEW_WIDENED

    @inlined
    def take_runs(job, item, seen, data, arrays, consume):
        """Takes a tile's keys or values, a run at a time."""
        array, places, room = data
        mine, others = arrays
        token_bytes = job[words.HEAD_DIM] * job[words.NUMBER_BYTES]
        in_place = is_float32 and job[words.HEAD_DIM] == job[words.PADDED_DIM]
        most = _longest_run(job, item, few_numbers)
        i = item[words.START]
        while i < item[words.END]:
            if in_place:
                left = job[words.BLOCK_SIZE] - (item[words.TILE] + i) % job[words.BLOCK_SIZE]
                end = i + clamp(left, 0, min(item[words.END] - i, most))
                address = array + places[i] * token_bytes
                for j in range(i, end):
                    _prefetch(array + places[j + TOKENS_AHEAD] * token_bytes, token_bytes)
            else:
                end = i + min(item[words.END] - i, most)
                address = address_at(room)
                stored = numbers(array)
                for j in range(i, end):
                    _prefetch(array + places[j + TOKENS_AHEAD] * token_bytes, token_bytes)
                    start, out = places[j] * job[words.HEAD_DIM], (j - i) * job[words.PADDED_DIM]
                    for d in range(job[words.HEAD_DIM]):
                        room[out + d] = widen(stored[start + d])
            consume(job, item, seen, (mine, address, others), (i, end))
            i = end

    @inlined
    def attend(job, item, seen, queries, logits, softmax):
        places, room = places_room(), numbers_room()
        clear_numbers(job, room)
        _find_tokens(job, item, places)
        logits_at, acc = address_at(logits), address_at(softmax) + 4 * ACC
        keys, values = (job[words.KEYS], places, room), (job[words.VALUES], places, room)
        take_runs(job, item, seen, keys, (address_at(queries), logits_at), multiply_keys)
        _prefetch_first(job, item, places, job[words.VALUES])
        weigh(job, item, seen, logits, softmax)
        take_runs(job, item, seen, values, (acc, logits_at), add_values)

    return attend


@compiled
def _find_tokens(job, item, places):
    """Fills in which tokens of the pool the tile's tokens are, and the next ones to prefetch."""
    block_size = job[words.BLOCK_SIZE]
    end = clamp(item[words.END_TOKEN] - item[words.TILE], 0, item[words.END] + TOKENS_AHEAD)
    i = item[words.START]
    while i < end:
        token = item[words.TILE] + i
        offset = token % block_size
        place = find_block(job, item, token) * block_size + offset
        for j in range(clamp(block_size - offset, 0, end - i)):
            places[i + j] = place + j
        i += block_size - offset
    for j in range(end, item[words.END] + TOKENS_AHEAD):
        places[j] = places[end - 1]


@compiled
def _longest_run(job, item, few_numbers):
    """Returns the tokens of a run, a multiple of 4."""
    if item[words.COUNT_QUERIES] > MAX_TILE_QUERIES // 2:
        return run_tokens(job)
    return max(few_numbers // job[words.PADDED_DIM] // 4 * 4, 4)


@compiled
def _prefetch_first(job, item, places, array):
    """Prefetches the first tokens of a tile."""
    token_bytes = job[words.HEAD_DIM] * job[words.NUMBER_BYTES]
    first = item[words.START]
    for i in range(first, min(first + TOKENS_AHEAD, item[words.END])):
        _prefetch(array + places[i] * token_bytes, token_bytes)


@compiled
def _prefetch(address, num_bytes):
    """Prefetches the numbers of one token."""
    for line in range(0, num_bytes, LINE_BYTES):
        prefetch_second_level(address + line)
