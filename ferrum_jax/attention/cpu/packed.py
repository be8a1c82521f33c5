"""The tokens of an item in compressed blocks: unpacked a run at a time, and then used.

Runs are small, so that their numbers stay in the first-level cache. The scale of a vector
multiplies the logit or the weight instead of the numbers. `codecs.packed` says where vectors
and scales are.

One Zen 5 core, reading from memory, takes 0.5 to 0.9 of the time of native float32 tokens, and 0.9
to 1.3 of that of bfloat16 tokens: the arithmetic on float32 numbers takes the most time.
"""

from typing import Any

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.item import find_block, weigh
from ferrum_jax.attention.cpu.job import ACC, TILE_TOKENS
from ferrum_jax.attention.cpu.limits import MIN_VECTOR_WORDS
from ferrum_jax.attention.cpu.numbers import widen
from ferrum_jax.attention.cpu.products import LOGITS_STRIDE, add_values, multiply_keys, seen_by
from ferrum_jax.attention.cpu.runs import (
    LINE_BYTES,
    TOKENS_AHEAD,
    clear_numbers,
    numbers_room,
    places_room,
    run_tokens,
)
from ferrum_jax.foreign.compiling import clamp, compiled, inlined
from ferrum_jax.foreign.memory import (
    address_at,
    float32s,
    int16s,
    prefetch_first_level,
    stack_float32s,
    unpacker,
)

_scales_room = stack_float32s(TILE_TOKENS)


def attend_to_words(word_bytes: int) -> Any:
    """Returns the function that adds the current tile, of any compressed format, to a softmax.

    Args:
      word_bytes: Bytes of a stored number of the pool, 2 or 4.
    """
    unpack, read_scales = _unpack_from(word_bytes), _read_scales_from(word_bytes)

    @inlined
    def take_runs(job, item, seen, rooms, arrays, layout, consume):
        """Unpacks and takes a tile's keys or values, a run at a time."""
        places, room = rooms
        mine, others = arrays
        for start in range(item[words.START], item[words.END], run_tokens(job)):
            run = start, clamp(start + run_tokens(job), 0, item[words.END])
            unpack(job, layout, places, run, room)
            consume(job, item, seen, (mine, address_at(room), others), run)

    @compiled
    def attend(job, item, seen, queries, logits, softmax):
        places, scales, room = places_room(), _scales_room(), numbers_room()
        rooms, logits_at = (places, room), address_at(logits)
        clear_numbers(job, room)
        _find_vectors(job, item, words.KEY_LAYOUT, places)
        read_scales(job, item, words.KEY_LAYOUT, scales)
        keys = address_at(queries), logits_at
        take_runs(job, item, seen, rooms, keys, words.KEY_LAYOUT, multiply_keys)
        _scale(item, seen, scales, logits)
        weigh(job, item, seen, logits, softmax)
        _find_vectors(job, item, words.VALUE_LAYOUT, places)
        read_scales(job, item, words.VALUE_LAYOUT, scales)
        _scale(item, seen, scales, logits)
        values = address_at(softmax) + 4 * ACC, logits_at
        take_runs(job, item, seen, rooms, values, words.VALUE_LAYOUT, add_values)

    return attend


@compiled
def _find_vectors(job, item, layout, places):
    """Fills in the addresses of a tile's vectors, and of the next ones to prefetch."""
    num_tokens, vector_words = job[words.BLOCK_SIZE], job[layout + words.VECTOR_WORDS]
    end = clamp(item[words.END_TOKEN] - item[words.TILE], 0, item[words.END] + TOKENS_AHEAD)
    i = item[words.START]
    while i < end:
        token = item[words.TILE] + i
        offset = token % num_tokens
        k_start, v_start = _find_words(job, item, token)
        first_word = job[layout + words.FIRST_WORD] + offset * vector_words
        for j in range(clamp(num_tokens - offset, 0, end - i)):
            # No vector reaches from one array into the other: B * D is a multiple of its words.
            word = first_word + j * vector_words
            start = k_start if word < job[words.ARRAY_WORDS] else v_start
            places[i + j] = start + word * job[words.NUMBER_BYTES]
        i += num_tokens - offset
    for j in range(end, item[words.END] + TOKENS_AHEAD):
        places[j] = places[end - 1]


@compiled
def _find_words(job, item, token):
    """Returns the address of word 0 of a token's block, for words in `k` and for words in `v`.

    The words of a block are counted over both arrays: those in `v` follow those in `k`.
    """
    block_bytes = job[words.ARRAY_WORDS] * job[words.NUMBER_BYTES]
    block = find_block(job, item, token) * block_bytes
    return job[words.KEYS] + block, job[words.VALUES] + block - block_bytes


def _read_scales_from(word_bytes: int) -> Any:
    """Returns the function that reads the scales of a tile's vectors."""
    numbers = {2: int16s, 4: float32s}[word_bytes]

    @compiled
    def read_scales(job, item, layout, scales):
        num_tokens, last = job[words.BLOCK_SIZE], item[words.END]
        # The scales of a block follow its vectors.
        first_scale = job[layout + words.FIRST_WORD] + num_tokens * job[layout + words.VECTOR_WORDS]
        i = item[words.START]
        while i < last:
            token = item[words.TILE] + i
            offset = token % num_tokens
            end = clamp(i + num_tokens - offset, i, last)
            k_start, v_start = _find_words(job, item, token)
            first = first_scale + offset
            first_in_v = clamp(i + job[words.ARRAY_WORDS] - first, i, end)
            stored = numbers(k_start + first * word_bytes)
            for j in range(i, first_in_v):
                scales[j] = widen(stored[j - i])
            stored = numbers(v_start + first * word_bytes)
            for j in range(first_in_v, end):
                scales[j] = widen(stored[j - i])
            i = end

    return read_scales


@compiled
def _scale(item, seen, scales, logits):
    """Multiplies logits, or weights, by the scales of their vectors."""
    for x in range(item[words.COUNT_QUERIES]):
        first, end = seen_by(seen, x)
        for i in range(first, end):
            logits[x * LOGITS_STRIDE + i] *= scales[i]


def _unpack_from(word_bytes: int) -> Any:
    """Returns the function that unpacks a run of vectors of 8 or 4 bits, one after the other."""
    few, many = MIN_VECTOR_WORDS, 2 * MIN_VECTOR_WORDS
    bytes_by_few, bytes_by_many = (_unpack_by(word_bytes, 8, n) for n in (few, many))
    halves_by_few, halves_by_many = (_unpack_by(word_bytes, 4, n) for n in (few, many))

    @compiled
    def unpack(job, layout, places, run, numbers):
        is_long = job[layout + words.VECTOR_WORDS] >= many
        if job[layout + words.BITS] == 8:
            if is_long:
                bytes_by_many(job, layout, places, run, numbers)
            else:
                bytes_by_few(job, layout, places, run, numbers)
        elif is_long:
            halves_by_many(job, layout, places, run, numbers)
        else:
            halves_by_few(job, layout, places, run, numbers)

    return unpack


def _unpack_by(word_bytes: int, bits: int, num_words: int) -> Any:
    """Returns the function that unpacks a run of vectors, a few words at a time.

    Args:
      word_bytes: Bytes per word.
      bits: Bits per number.
      num_words: Words at a time, at most those of the shortest vector.
    """
    unpack_words = unpacker(word_bytes, bits, num_words)

    @inlined
    def unpack_run(job, layout, places, run, numbers):
        vector_words = job[layout + words.VECTOR_WORDS]
        place = 0
        for i in range(run[0], run[1]):
            for byte in range(0, word_bytes * vector_words, LINE_BYTES):
                prefetch_first_level(places[i + TOKENS_AHEAD] + byte)
            for word in range(0, vector_words - num_words + 1, num_words):
                unpack_words(places[i] + word_bytes * word, numbers, place + word, vector_words)
            if vector_words % num_words != 0:
                # The last words are unpacked together with some of the words before them.
                word = vector_words - num_words
                unpack_words(places[i] + word_bytes * word, numbers, place + word, vector_words)
            place += job[words.PADDED_DIM]

    return unpack_run
