"""The tokens of an item in the pool's dtype: keys and values are read in place.

The tokens of one KV head of a block are contiguous, and the next block is anywhere in the pool, so
the processor does not prefetch it. Each token's numbers are therefore prefetched `TOKENS_AHEAD`
tokens before their use. On two Zen 5 cores, 16,900 tokens of 3 heads by 64 in float32 went from 10
to 26 GB/s per core with it; a plain sum reads memory at 19 GB/s.
"""

from typing import Any

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.item import (
    LINE_BYTES,
    TILE_TOKENS,
    TOKENS_AHEAD,
    add_four_values,
    add_value,
    add_value_where_seen,
    begin_tile,
    find_block,
    logits_room,
    multiply_key,
    places_room,
    weigh,
)
from ferrum_jax.attention.cpu.job import clamp, compiled, inlined
from ferrum_jax.attention.cpu.memory import prefetch


def attend_to(numbers: Any) -> Any:
    """Returns the function that adds an item's tokens to its state.

    Args:
      numbers: Function `address -> pointer` to numbers as the pool stores them; see `widen`.
    """

    @compiled
    def attend(job, item, state):
        k, v = numbers(job[words.KEYS]), numbers(job[words.VALUES])
        logits, places = logits_room(), places_room()
        for tile in range(item[words.START], item[words.END], TILE_TOKENS):
            begin_tile(item, tile)
            _find_tokens(job, item, places)
            _multiply_keys(job, item, state, (k, places), logits)
            for x in range(job[words.NUM_QUERIES] * job[words.GROUP]):
                weigh(job, item, x, logits, state)
            _add_values(job, item, state, (v, places), logits)

    return attend


@compiled
def _find_tokens(job, item, places):
    """Fills in where the tokens of a tile, and the next ones to prefetch, are in the pool."""
    block_size, head_dim = job[words.BLOCK_SIZE], job[words.HEAD_DIM]
    count = clamp(item[words.END] - item[words.TILE], 0, item[words.COUNT] + TOKENS_AHEAD)
    i = 0
    while i < count:
        token = item[words.TILE] + i
        offset = token % block_size
        place = (find_block(job, item, token) * block_size + offset) * head_dim
        for j in range(clamp(block_size - offset, 0, count - i)):
            places[i + j] = place + j * head_dim
        i += block_size - offset
    for j in range(count, item[words.COUNT] + TOKENS_AHEAD):
        places[j] = places[count - 1]


@compiled
def _prefetch(job, numbers, place):
    """Prefetches the numbers of one token."""
    start = numbers + place * job[words.NUMBER_BYTES]
    for line in range(0, job[words.HEAD_DIM] * job[words.NUMBER_BYTES], LINE_BYTES):
        prefetch(start + line)


@inlined
def _multiply_keys(job, item, state, tokens, logits):
    """Multiplies the queries with the keys of a tile."""
    k, places = tokens
    for i in range(item[words.COUNT]):
        _prefetch(job, job[words.KEYS], places[i + TOKENS_AHEAD])
        multiply_key(job, state, (k, places[i]), logits, i)


@inlined
def _add_values(job, item, state, tokens, logits):
    """Adds the weighted values of a tile, most of them four at a time."""
    v, places = tokens
    first, end = item[words.SEEN_FIRST], item[words.SEEN_END]
    for i in range(0, first):
        add_value_where_seen(job, item, state, (v, places[i]), logits, i)
    for i in range(first, end - 3, 4):
        for j in range(i, i + 4):
            _prefetch(job, job[words.VALUES], places[j + TOKENS_AHEAD])
        four = places[i], places[i + 1], places[i + 2], places[i + 3]
        add_four_values(job, state, (v, four), logits, i)
    for i in range(end - (end - first) % 4, end):
        add_value(job, state, (v, places[i]), logits, i)
    for i in range(end, item[words.COUNT]):
        add_value_where_seen(job, item, state, (v, places[i]), logits, i)
