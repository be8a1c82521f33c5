"""The tokens of an item in compressed blocks: unpacked a run at a time, and then used.

Runs are small, so that their numbers stay in the first-level cache. The scale of a vector
multiplies the logit or the weight instead of the numbers. `codecs.packed` says where vectors
and scales are.

One Zen 5 core, reading from memory, takes 0.5 to 0.9 of the time of native float32 tokens, and 0.9
to 1.3 of that of bfloat16 tokens: the arithmetic on float32 numbers takes the most time.
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
    widen,
)
from ferrum_jax.attention.cpu.job import clamp, compiled, inlined
from ferrum_jax.attention.cpu.limits import MAX_HEAD_DIM, MIN_VECTOR_WORDS
from ferrum_jax.attention.cpu.memory import (
    float32s,
    int16s,
    prefetch,
    stack_float32s,
    unpacker,
)

_RUN_NUMBERS = 8 * MAX_HEAD_DIM  # 16 KB; 8 and 32 KB took a few percent longer.
_numbers_room = stack_float32s(_RUN_NUMBERS)
_scales_room = stack_float32s(TILE_TOKENS)


def attend_to_words(word_bytes: int) -> Any:
    """Returns the function that adds an item's tokens, of any compressed format, to its state.

    Args:
      word_bytes: Bytes of a stored number of the pool, 2 or 4.
    """
    unpack, read_scales = _unpack_from(word_bytes), _read_scales_from(word_bytes)

    @compiled
    def attend(job, item, state):
        logits, places = logits_room(), places_room()
        scales, numbers = _scales_room(), _numbers_room()
        run_tokens = _RUN_NUMBERS // job[words.HEAD_DIM] // 4 * 4
        num_queries = job[words.NUM_QUERIES] * job[words.GROUP]
        for tile in range(item[words.START], item[words.END], TILE_TOKENS):
            begin_tile(item, tile)
            count = item[words.COUNT]
            _find_vectors(job, item, words.KEY_LAYOUT, places)
            read_scales(job, item, words.KEY_LAYOUT, scales)
            for start in range(0, count, run_tokens):
                run = start, clamp(start + run_tokens, 0, count)
                unpack(job, words.KEY_LAYOUT, places, run, numbers)
                _multiply_keys(job, state, numbers, run, logits)
            _scale(num_queries, count, scales, logits)
            for x in range(num_queries):
                weigh(job, item, x, logits, state)
            _find_vectors(job, item, words.VALUE_LAYOUT, places)
            read_scales(job, item, words.VALUE_LAYOUT, scales)
            _scale(num_queries, count, scales, logits)
            for start in range(0, count, run_tokens):
                run = start, clamp(start + run_tokens, 0, count)
                unpack(job, words.VALUE_LAYOUT, places, run, numbers)
                _add_values(job, item, state, (numbers, run), logits)

    return attend


@compiled
def _find_vectors(job, item, layout, places):
    """Fills in the addresses of a tile's vectors, and of the next ones to prefetch."""
    num_tokens, vector_words = job[words.BLOCK_SIZE], job[layout + words.VECTOR_WORDS]
    count = clamp(item[words.END] - item[words.TILE], 0, item[words.COUNT] + TOKENS_AHEAD)
    i = 0
    while i < count:
        token = item[words.TILE] + i
        offset = token % num_tokens
        k_start, v_start = _find_words(job, item, token)
        first_word = job[layout + words.FIRST_WORD] + offset * vector_words
        for j in range(clamp(num_tokens - offset, 0, count - i)):
            # No vector reaches from one array into the other: B * D is a multiple of its words.
            word = first_word + j * vector_words
            start = k_start if word < job[words.ARRAY_WORDS] else v_start
            places[i + j] = start + word * job[words.NUMBER_BYTES]
        i += num_tokens - offset
    for j in range(count, item[words.COUNT] + TOKENS_AHEAD):
        places[j] = places[count - 1]


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
        num_tokens, count = job[words.BLOCK_SIZE], item[words.COUNT]
        # The scales of a block follow its vectors.
        first_scale = job[layout + words.FIRST_WORD] + num_tokens * job[layout + words.VECTOR_WORDS]
        i = 0
        while i < count:
            token = item[words.TILE] + i
            offset = token % num_tokens
            end = clamp(i + num_tokens - offset, i, count)
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
def _scale(num_queries, count, scales, logits):
    """Multiplies logits, or weights, by the scales of their vectors."""
    for x in range(num_queries):
        for i in range(count):
            logits[x * TILE_TOKENS + i] *= scales[i]


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
                prefetch(places[i + TOKENS_AHEAD] + byte)
            for word in range(0, vector_words - num_words + 1, num_words):
                unpack_words(places[i] + word_bytes * word, numbers, place + word, vector_words)
            if vector_words % num_words != 0:
                # The last words are unpacked together with some of the words before them.
                word = vector_words - num_words
                unpack_words(places[i] + word_bytes * word, numbers, place + word, vector_words)
            place += job[words.HEAD_DIM]

    return unpack_run


@inlined
def _multiply_keys(job, state, numbers, run, logits):
    """Multiplies the queries with a run of keys."""
    head_dim = job[words.HEAD_DIM]
    start, end = run
    for i in range(start, end):
        multiply_key(job, state, (numbers, (i - start) * head_dim), logits, i)


@inlined
def _add_values(job, item, state, values, logits):
    """Adds a run of weighted values, most of them four at a time."""
    numbers, (start, stop) = values
    head_dim = job[words.HEAD_DIM]
    first = clamp(item[words.SEEN_FIRST], start, stop)
    end = clamp(item[words.SEEN_END], first, stop)
    for i in range(start, first):
        add_value_where_seen(job, item, state, (numbers, (i - start) * head_dim), logits, i)
    for i in range(first, end - 3, 4):
        v = (i - start) * head_dim
        four = v, v + head_dim, v + 2 * head_dim, v + 3 * head_dim
        add_four_values(job, state, (numbers, four), logits, i)
    for i in range(end - (end - first) % 4, end):
        add_value(job, state, (numbers, (i - start) * head_dim), logits, i)
    for i in range(end, stop):
        add_value_where_seen(job, item, state, (numbers, (i - start) * head_dim), logits, i)
