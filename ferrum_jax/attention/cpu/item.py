"""Attention of one item, in Python that numba compiles, for tokens of any format.

Tokens are taken in tiles: the logits of all queries on a tile's keys, their online softmax, then
the weighted values. `native` reads a tile of numbers in the pool's dtype, and `packed` a tile of
compressed numbers.
"""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.job import (
    ceil_div,
    clamp,
    compiled,
    inlined,
    num_parts,
    tokens_read,
    tokens_seen,
)
from ferrum_jax.attention.cpu.limits import MAX_HEAD_DIM, MAX_QUERIES
from ferrum_jax.attention.cpu.memory import (
    Pointer,
    fetch_add,
    float32s,
    int32s,
    stack_float32s,
    stack_int64s,
)
from ferrum_jax.attention.softmax import LOWEST

TILE_TOKENS = 256
"""Tokens of a tile."""

TOKENS_AHEAD = 32
"""Distance in tokens between the token that is prefetched and the one that is used."""

LINE_BYTES = 64
"""Bytes of a cache line, which one prefetch fetches."""

f32, i32, u32 = np.float32, np.int32, np.uint32

_LOWEST = f32(LOWEST)

# State of an item with X queries, in one array: scaled queries [X, D], and the `Softmax` of the
# queries: acc [X, D], peak [X] and total [X].
_ACC = MAX_QUERIES * MAX_HEAD_DIM
_PEAK = 2 * _ACC
_TOTAL = _PEAK + MAX_QUERIES
_state_room = stack_float32s(_TOTAL + MAX_QUERIES)
logits_room = stack_float32s(MAX_QUERIES * TILE_TOKENS)
places_room = stack_int64s(TILE_TOKENS + TOKENS_AHEAD)

_item_room = stack_int64s(words.NUM_ITEM_WORDS)


def widen(number: Any) -> np.float32:
    """Returns a stored number as float32: uint16 is bfloat16's bits, int16 float16's."""
    raise NotImplementedError(f"{number} is widened in compiled code only.")


@overload(widen)
def _widen(number):
    return {types.float32: _from_float32, types.uint16: _from_bfloat16, types.int16: _from_float16}[
        number
    ]


def _from_float32(number):
    return number


def _from_bfloat16(number):
    return u32(u32(number) << u32(16)).view(f32)


def _from_float16(number):
    sign = u32(u32(u32(number) & u32(0x8000)) << u32(16))
    magnitude = u32(number) & u32(0x7FFF)
    # The exponent's bias is 112 less than float32's.
    bits = u32(u32(magnitude << u32(13)) + u32(112 << 23))
    if magnitude >= u32(0x7C00):  # Infinity and NaN have an exponent of ones.
        bits = u32(bits + u32(112 << 23))
    if magnitude < u32(0x0400):
        # XLA's threads treat subnormal float32 numbers as zero: those of float16 become normal.
        bits = f32(u32(bits + u32(1 << 23)).view(f32) - f32(2.0**-14)).view(u32)
    return u32(bits | sign).view(f32)


# Without "reassoc": the two subtractions below are one subtraction with less rounding.
@njit(fastmath={"contract"}, error_model="numpy")
def _exp(x):
    """Returns e^x within 2 units in the last place, NaN for NaN, 0 below -87; x is cut to 87.

    The polynomial is from Cephes (Moshier, `expf`). A call to a library would keep the loops
    around it from being vectorized to 16 numbers.
    """
    is_zero = x < f32(-87.0)
    x = f32(-87.0) if is_zero else x
    x = f32(87.0) if x > f32(87.0) else x
    power = np.floor(x * f32(1.44269504) + f32(0.5))
    x -= power * f32(0.693359375)
    x -= power * f32(-2.12194440e-4)
    y = f32(1.9875691500e-4)
    y = y * x + f32(1.3981999507e-3)
    y = y * x + f32(8.3334519073e-3)
    y = y * x + f32(4.1665795894e-2)
    y = y * x + f32(1.6666665459e-1)
    y = y * x + f32(5.0000001201e-1)
    y = y * x * x + x + f32(1.0)
    y *= i32(i32(i32(power) + i32(127)) << i32(23)).view(f32)
    return f32(0.0) if is_zero else y


@njit(fastmath={"contract"}, error_model="numpy")
def _soft_capped(logit, soft_cap):
    """Returns `soft_cap * tanh(logit / soft_cap)` within a few units in the last place.

    Near zero it is `logit` times a polynomial from Cephes (Moshier, `tanhf`): the exponential would
    cancel there, and the ratio to a large cap may be too small for float32.
    """
    ratio = logit / soft_cap
    z = ratio * ratio
    y = f32(-5.70498872745e-3)
    y = y * z + f32(2.06390887954e-2)
    y = y * z + f32(-5.37397155531e-2)
    y = y * z + f32(1.33314422036e-1)
    y = y * z + f32(-3.33332819422e-1)
    near = y * z * logit + logit
    far = soft_cap * (f32(1.0) - f32(2.0) / (_exp(f32(2.0) * ratio) + f32(1.0)))
    return near if abs(ratio) < f32(0.625) else far


@njit(fastmath={"nnan", "nsz", "reassoc"}, error_model="numpy")
def _largest(numbers, start, end, largest):
    """Returns the largest number; ignores the rules of NaN, which would prevent vector code."""
    for i in range(start, end):
        largest = numbers[i] if numbers[i] > largest else largest
    return largest


@inlined
def take_item(job: Pointer, index: int, attend: Any) -> None:
    """Computes an item, and writes its row's output if all other parts of the row are done.

    Args:
      job: The job.
      index: Index of the item in the job.
      attend: `attend(job, item, state)` adds the item's tokens to the state, tile by tile.
    """
    item = _item_room()
    state = _state_room()
    _find(job, index, item)
    _load_queries(job, item, state)
    attend(job, item, state)
    if item[words.NUM_PARTS] == 1 or _merge(job, index, item, state):
        _write(job, item, state)


@compiled
def begin_tile(item: Pointer, tile: int) -> None:
    """Makes the tile that begins at a token the item's current tile."""
    item[words.TILE] = tile
    item[words.COUNT] = clamp(item[words.END] - tile, 0, TILE_TOKENS)
    item[words.SEEN_FIRST], item[words.SEEN_END] = 0, item[words.COUNT]


@compiled
def find_block(job: Pointer, item: Pointer, token: int) -> int:
    """Returns the index in the pool, [N * L * H, B, D], of the item's head of a token's block."""
    block_ids = int32s(job[words.BLOCK_IDS])
    block_id = block_ids[item[words.ROW] * job[words.TABLE_WIDTH] + token // job[words.BLOCK_SIZE]]
    # An id out of range would crash the process; reading any block is better.
    block_id = clamp(block_id, 0, job[words.NUM_BLOCKS] - 1)
    layer = block_id * job[words.NUM_LAYERS] + job[words.LAYER]
    return layer * job[words.NUM_KV_HEADS] + item[words.HEAD]


@inlined
def multiply_key(job: Pointer, state: Pointer, key: tuple, logits: Pointer, i: int) -> None:
    """Multiplies the queries with key i of a tile.

    Args:
      job: The job.
      state: State of the item.
      key: Pointer to stored numbers, and the index at which the key begins.
      logits: f32[X, TILE_TOKENS].
      i: Index of the key in the tile.
    """
    numbers, start = key
    head_dim = job[words.HEAD_DIM]
    num_queries = job[words.NUM_QUERIES] * job[words.GROUP]
    # Two queries at a time share the widened numbers.
    for x in range(0, num_queries - 1, 2):
        query, next_query = x * head_dim, (x + 1) * head_dim
        logit, next_logit = f32(0), f32(0)
        for d in range(head_dim):
            number = widen(numbers[start + d])
            logit += state[query + d] * number
            next_logit += state[next_query + d] * number
        logits[x * TILE_TOKENS + i] = logit
        logits[(x + 1) * TILE_TOKENS + i] = next_logit
    if num_queries % 2 == 1:
        query = (num_queries - 1) * head_dim
        logit = f32(0)
        for d in range(head_dim):
            logit += state[query + d] * widen(numbers[start + d])
        logits[(num_queries - 1) * TILE_TOKENS + i] = logit


@inlined
def add_four_values(job: Pointer, state: Pointer, values: tuple, weights: Pointer, i: int) -> None:
    """Adds values i to i + 3 of a tile, weighted; as `add_value`, with four indices."""
    numbers, (v0, v1, v2, v3) = values
    head_dim = job[words.HEAD_DIM]
    for x in range(job[words.NUM_QUERIES] * job[words.GROUP]):
        acc, w = _ACC + x * head_dim, x * TILE_TOKENS + i
        w0, w1, w2, w3 = weights[w], weights[w + 1], weights[w + 2], weights[w + 3]
        for d in range(head_dim):
            first = w0 * widen(numbers[v0 + d]) + w1 * widen(numbers[v1 + d])
            second = w2 * widen(numbers[v2 + d]) + w3 * widen(numbers[v3 + d])
            state[acc + d] += first + second


@inlined
def add_value(job: Pointer, state: Pointer, value: tuple, weights: Pointer, i: int) -> None:
    """Adds value i of a tile, weighted.

    Args:
      job: The job.
      state: State of the item.
      value: Pointer to stored numbers, and the index at which the value begins.
      weights: f32[X, TILE_TOKENS].
      i: Index of the value in the tile.
    """
    numbers, start = value
    head_dim = job[words.HEAD_DIM]
    for x in range(job[words.NUM_QUERIES] * job[words.GROUP]):
        acc, weight = _ACC + x * head_dim, weights[x * TILE_TOKENS + i]
        for d in range(head_dim):
            state[acc + d] += weight * widen(numbers[start + d])


@compiled
def add_value_where_seen(
    job: Pointer, item: Pointer, state: Pointer, value: tuple, weights: Pointer, i: int
) -> None:
    """Adds value i of a tile to the queries that see its token; arguments as of `add_value`.

    Zero times NaN is NaN, so a weight of zero does not keep a value from a query.
    """
    numbers, start = value
    head_dim = job[words.HEAD_DIM]
    token = item[words.TILE] + i
    for x in range(job[words.NUM_QUERIES] * job[words.GROUP]):
        first, end = tokens_seen(job, item[words.ROW], x // job[words.GROUP])
        if first <= token and token < end:
            acc, weight = _ACC + x * head_dim, weights[x * TILE_TOKENS + i]
            for d in range(head_dim):
                state[acc + d] += weight * widen(numbers[start + d])


@compiled
def _find(job, index, item):
    """Fills in the row, head and tokens of an item."""
    part, row, first_part = index // job[words.NUM_KV_HEADS], 0, 0
    first, end = tokens_read(job, 0)
    parts = num_parts(job, end - first)
    while part - first_part >= parts:
        first_part += parts
        row += 1
        first, end = tokens_read(job, row)
        parts = num_parts(job, end - first)
    share = ceil_div(end - first, parts)
    item[words.ROW] = row
    item[words.HEAD] = index % job[words.NUM_KV_HEADS]
    item[words.START] = first + (part - first_part) * share
    item[words.END] = clamp(item[words.START] + share, 0, end)
    item[words.NUM_PARTS] = parts
    item[words.FIRST_PART] = first_part


@compiled
def _query_place(job, item, x):
    """Returns the index of query x of X in the queries and in the output, [R, T, H, G, D]."""
    query, member = x // job[words.GROUP], x % job[words.GROUP]
    row = (item[words.ROW] * job[words.NUM_QUERIES] + query) * job[words.NUM_KV_HEADS] + item[
        words.HEAD
    ]
    return (row * job[words.GROUP] + member) * job[words.HEAD_DIM]


@compiled
def _load_queries(job, item, state):
    """Sets the state to that before the first token."""
    head_dim = job[words.HEAD_DIM]
    scale = float32s(job[words.SCALARS])[0]
    queries = float32s(job[words.QUERIES])
    for x in range(job[words.NUM_QUERIES] * job[words.GROUP]):
        place = _query_place(job, item, x)
        state[_PEAK + x] = _LOWEST
        state[_TOTAL + x] = f32(0)
        for d in range(head_dim):
            state[x * head_dim + d] = queries[place + d] * scale
            state[_ACC + x * head_dim + d] = f32(0)


@compiled
def weigh(job: Pointer, item: Pointer, x: int, logits: Pointer, state: Pointer) -> None:
    """Turns a query's logits on a tile into weights, and rescales the state to the new peak."""
    logits_start = x * TILE_TOKENS
    logits_end = logits_start + item[words.COUNT]
    soft_cap = float32s(job[words.SCALARS])[1]
    if soft_cap > f32(0):
        for i in range(logits_start, logits_end):
            logits[i] = _soft_capped(logits[i], soft_cap)
    first, end = tokens_seen(job, item[words.ROW], x // job[words.GROUP])
    is_live = end > 0
    end = clamp(end - item[words.TILE], 0, item[words.COUNT])
    first = clamp(first - item[words.TILE], 0, end)
    if is_live:
        item[words.SEEN_FIRST] = max(item[words.SEEN_FIRST], first)
        item[words.SEEN_END] = max(min(item[words.SEEN_END], end), item[words.SEEN_FIRST])
    first, end = first + logits_start, end + logits_start
    for i in range(logits_start, first):
        logits[i] = f32(0)
    for i in range(end, logits_end):
        logits[i] = f32(0)
    old_peak = state[_PEAK + x]
    peak = _largest(logits, first, end, old_peak)
    total = f32(0)
    for i in range(first, end):
        weight = _exp(logits[i] - peak)
        logits[i] = weight
        total += weight
    decay = _exp(old_peak - peak)
    state[_PEAK + x] = peak
    state[_TOTAL + x] = state[_TOTAL + x] * decay + total
    for d in range(_ACC + x * job[words.HEAD_DIM], _ACC + (x + 1) * job[words.HEAD_DIM]):
        state[d] *= decay


@compiled
def _merge(job, index, item, state):
    """Stores the state of a part; the last part of a row and head merges all, and returns True."""
    num_queries, head_dim = job[words.NUM_QUERIES] * job[words.GROUP], job[words.HEAD_DIM]
    partials = float32s(job[words.PARTIALS])
    size = num_queries * (head_dim + 2)
    for x in range(num_queries):
        place = index * size + x * (head_dim + 2)
        partials[place] = state[_PEAK + x]
        partials[place + 1] = state[_TOTAL + x]
        for d in range(head_dim):
            partials[place + 2 + d] = state[_ACC + x * head_dim + d]
    counter = item[words.ROW] * job[words.NUM_KV_HEADS] + item[words.HEAD]
    if fetch_add(job[words.PARTS_DONE] + 8 * counter, 1) < item[words.NUM_PARTS] - 1:
        return False
    for x in range(num_queries):
        state[_PEAK + x] = _LOWEST
        state[_TOTAL + x] = f32(0)
        for part in range(item[words.FIRST_PART], item[words.FIRST_PART] + item[words.NUM_PARTS]):
            place = (part * job[words.NUM_KV_HEADS] + item[words.HEAD]) * size + x * (head_dim + 2)
            old_peak, new_peak = state[_PEAK + x], partials[place]
            peak = new_peak if new_peak > old_peak else old_peak
            decay, weight = _exp(old_peak - peak), _exp(new_peak - peak)
            state[_PEAK + x] = peak
            state[_TOTAL + x] = state[_TOTAL + x] * decay + partials[place + 1] * weight
            for d in range(head_dim):
                acc = _ACC + x * head_dim + d
                state[acc] = state[acc] * decay + partials[place + 2 + d] * weight
    return True


@compiled
def _write(job, item, state):
    """Adds the sinks and writes the output; zeros for queries that see no token."""
    head_dim = job[words.HEAD_DIM]
    sinks, out = float32s(job[words.SINKS]), float32s(job[words.OUT])
    for x in range(job[words.NUM_QUERIES] * job[words.GROUP]):
        sink = sinks[item[words.HEAD] * job[words.GROUP] + x % job[words.GROUP]]
        old_peak, total = state[_PEAK + x], state[_TOTAL + x]
        peak = sink if sink > old_peak else old_peak
        decay = _exp(old_peak - peak)
        place = _query_place(job, item, x)
        if total == f32(0):  # The sums may be NaN even then.
            for d in range(head_dim):
                out[place + d] = f32(0)
            continue
        share = decay / (total * decay + _exp(sink - peak))
        for d in range(head_dim):
            out[place + d] = state[_ACC + x * head_dim + d] * share
