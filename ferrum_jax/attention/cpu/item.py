"""Attention of one item, in Python that numba compiles, for tokens of any format.

Tokens are taken in tiles: the logits of all queries on a tile's keys, their softmax, then the
weighted values. `native` reads a tile of numbers in the pool's dtype, and `packed` a tile of
compressed numbers.
"""

from typing import Any

from numba import types

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.job import (
    ACC,
    MAX_TILE_QUERIES,
    PEAK,
    TILE_TOKENS,
    TOTAL,
    num_parts,
    softmax_numbers,
    tiles_read,
    tokens_seen,
)
from ferrum_jax.attention.cpu.limits import MAX_TILE_NUMBERS
from ferrum_jax.attention.cpu.numbers import exp, f32, soft_capped
from ferrum_jax.attention.cpu.products import LOGITS_STRIDE, NUM_SEEN_WORDS, see_tile, seen_by
from ferrum_jax.attention.cpu.vectors import LANES, add_numbers, largest_number
from ferrum_jax.attention.softmax import LOWEST
from ferrum_jax.foreign.compiling import ceil_div, clamp, compiled, compiled_for, inlined
from ferrum_jax.foreign.memory import (
    Pointer,
    address_at,
    fetch_add,
    float32s,
    fused,
    int32s,
    int64s,
    stack_float32s,
    stack_int64s,
)

_LOWEST = f32(LOWEST)

_softmax_room = stack_float32s(ACC + MAX_TILE_NUMBERS)
_queries_room = stack_float32s(MAX_TILE_NUMBERS)
_logits_room = stack_float32s(MAX_TILE_QUERIES * LOGITS_STRIDE)
_item_room = stack_int64s(words.NUM_ITEM_WORDS)
_seen_room = stack_int64s(NUM_SEEN_WORDS)


@inlined
def take_item(job: Pointer, index: int, attend: Any) -> None:
    """Computes an item, and writes the output if all other parts of the row are done.

    Args:
      job: The job.
      index: Index of the item in the job.
      attend: `attend(job, item, seen, queries, logits, softmax)` adds the current tile to a softmax
        in its first state.
    """
    item, seen = _item_room(), _seen_room()
    queries, logits = _queries_room(), _logits_room()
    tile_softmax, softmax = _softmax_room(), _softmax_room()
    _find(job, index, item)
    _clear(job, item, softmax)
    if item[words.COUNT_QUERIES] > 0:
        _load_queries(job, item, queries)
        for tile in range(item[words.START_TILE], item[words.END_TILE]):
            if not _begin_tile(item, tile):
                continue
            see_tile(job, item, seen)
            if item[words.NUM_PARTS] > 1:
                mine = float32s(_partial(job, item, tile))
            else:
                mine = float32s(address_at(tile_softmax))
            _clear(job, item, mine)
            attend(job, item, seen, queries, logits, mine)
            if item[words.NUM_PARTS] == 1:
                _add_softmax(job, item, softmax, mine)
    if item[words.NUM_PARTS] == 1:
        _write(job, item, softmax)
    elif _is_last_part(job, item):
        for tile in range(item[words.ROW_TILE], item[words.ROW_TILE_END]):
            if _begin_tile(item, tile):
                _add_softmax(job, item, softmax, float32s(_partial(job, item, tile)))
        _write(job, item, softmax)


@compiled
def find_block(job: Pointer, item: Pointer, token: int) -> int:
    """Returns the index in the pool, [N * L * H, B, D], of the item's head of a token's block."""
    block_ids = int32s(job[words.BLOCK_IDS])
    block_id = block_ids[item[words.ROW] * job[words.TABLE_WIDTH] + token // job[words.BLOCK_SIZE]]
    # An id out of range would crash the process; reading any block is better.
    block_id = clamp(block_id, 0, job[words.NUM_BLOCKS] - 1)
    layer = block_id * job[words.NUM_LAYERS] + job[words.LAYER]
    return layer * job[words.NUM_KV_HEADS] + item[words.HEAD]


@compiled
def weigh(job: Pointer, item: Pointer, seen: Pointer, logits: Pointer, softmax: Pointer) -> None:
    """Turns the logits on a tile into weights, and sets the peaks and totals of the tile."""
    soft_cap = float32s(job[words.SCALARS])[1]
    for x in range(item[words.COUNT_QUERIES]):
        first, end = seen_by(seen, x)
        if first >= end:
            continue
        first, end = first + x * LOGITS_STRIDE, end + x * LOGITS_STRIDE
        if soft_cap > f32(0):
            for i in range(first, end):
                logits[i] = soft_capped(logits[i], soft_cap)
        # Vectors begin at the same positions for every query.
        start, stop = first // LANES * LANES, ceil_div(end, LANES) * LANES
        _fill(logits, start, first, _LOWEST)
        _fill(logits, end, stop, _LOWEST)
        peak = largest_number(address_at(logits) + 4 * start, stop - start)
        for i in range(start, stop):
            logits[i] = exp(logits[i] - peak)
        _fill(logits, start, first, f32(0))
        _fill(logits, end, stop, f32(0))
        softmax[PEAK + x] = peak
        softmax[TOTAL + x] = add_numbers(address_at(logits) + 4 * start, stop - start)


@compiled_for(types.void, types.CPointer(types.float32), types.int64, types.int64, types.float32)
def _fill(numbers, start, end, number):
    for i in range(start, end):
        numbers[i] = number


@compiled
def _find(job, index, item):
    """Fills in the row, head, queries and tiles of an item."""
    query_tiles, num_kv_heads = job[words.QUERY_TILES], job[words.NUM_KV_HEADS]
    part, first_of_rows = index // (num_kv_heads * query_tiles), int64s(job[words.FIRST_OF_ROWS])
    row, row_end = 0, job[words.NUM_ROWS]  # The part is of one of these rows.
    while row_end - row > 1:
        middle = (row + row_end) // 2
        if first_of_rows[2 * middle] <= part:
            row = middle
        else:
            row_end = middle
    first_part, partials = first_of_rows[2 * row], first_of_rows[2 * row + 1]
    first, end = tiles_read(job, row)
    parts = num_parts(job, end - first)
    share = ceil_div(end - first, parts)
    query = index % query_tiles * job[words.TILE_QUERIES]
    live = int32s(job[words.Q_LENS])[row] * job[words.GROUP]
    item[words.ROW] = row
    item[words.HEAD] = index // query_tiles % num_kv_heads
    item[words.FIRST_QUERY] = query
    item[words.COUNT_QUERIES] = clamp(live - query, 0, job[words.TILE_QUERIES])
    item[words.ROW_TILE], item[words.ROW_TILE_END] = first, end
    item[words.START_TILE] = clamp(first + (part - first_part) * share, first, end)
    item[words.END_TILE] = clamp(item[words.START_TILE] + share, first, end)
    item[words.NUM_PARTS] = parts
    item[words.FIRST_PARTIAL] = partials * num_kv_heads * query_tiles
    last = query + item[words.COUNT_QUERIES] - 1
    item[words.FIRST_TOKEN], item[words.END_TOKEN] = tokens_seen(
        job, row, query // job[words.GROUP], last // job[words.GROUP]
    )


@compiled
def _begin_tile(item, tile):
    """Makes a tile the item's current one; returns whether the item's queries see any of it."""
    item[words.TILE] = tile * TILE_TOKENS
    item[words.START] = clamp(item[words.FIRST_TOKEN] - item[words.TILE], 0, TILE_TOKENS)
    item[words.END] = clamp(item[words.END_TOKEN] - item[words.TILE], 0, TILE_TOKENS)
    return item[words.START] < item[words.END]


@compiled
def _partial(job, item, tile):
    """Returns the address of the softmax of one tile of tokens, of a row that is cut into parts."""
    index = (tile - item[words.ROW_TILE]) * job[words.NUM_KV_HEADS] + item[words.HEAD]
    query_tile = item[words.FIRST_QUERY] // job[words.TILE_QUERIES]
    index = item[words.FIRST_PARTIAL] + index * job[words.QUERY_TILES] + query_tile
    return job[words.PARTIALS] + 4 * index * softmax_numbers(job)


@compiled
def _query_place(job, item, x):
    """Returns the index of an item's query in the queries and in the output, [R, T, H, G, D]."""
    query = item[words.FIRST_QUERY] + x
    query, member = query // job[words.GROUP], query % job[words.GROUP]
    row = (item[words.ROW] * job[words.NUM_QUERIES] + query) * job[words.NUM_KV_HEADS] + item[
        words.HEAD
    ]
    return (row * job[words.GROUP] + member) * job[words.HEAD_DIM]


@compiled
def _load_queries(job, item, queries):
    """Fills in the item's queries, scaled, with zeros up to full vectors."""
    head_dim, padded_dim = job[words.HEAD_DIM], job[words.PADDED_DIM]
    scale = float32s(job[words.SCALARS])[0]
    stored = float32s(job[words.QUERIES])
    for x in range(item[words.COUNT_QUERIES]):
        place, start = _query_place(job, item, x), x * padded_dim
        for d in range(head_dim):
            queries[start + d] = stored[place + d] * scale
        _fill(queries, start + head_dim, start + padded_dim, f32(0))


@compiled
def _clear(job, item, softmax):
    """Sets a softmax to its first state."""
    count = item[words.COUNT_QUERIES]
    _fill(softmax, PEAK, PEAK + count, _LOWEST)
    _fill(softmax, TOTAL, TOTAL + count, f32(0))
    _fill(softmax, ACC, ACC + count * job[words.PADDED_DIM], f32(0))


@compiled
def _add_softmax(job, item, softmax, more):
    """Adds the softmax of later tokens to that of the tokens before them."""
    padded_dim = job[words.PADDED_DIM]
    for x in range(item[words.COUNT_QUERIES]):
        old_peak, new_peak = softmax[PEAK + x], more[PEAK + x]
        peak = new_peak if new_peak > old_peak else old_peak
        decay, weight = exp(old_peak - peak), exp(new_peak - peak)
        softmax[PEAK + x] = peak
        softmax[TOTAL + x] = fused(softmax[TOTAL + x], decay, more[TOTAL + x] * weight)
        for d in range(ACC + x * padded_dim, ACC + (x + 1) * padded_dim):
            softmax[d] = fused(softmax[d], decay, more[d] * weight)


@compiled
def _is_last_part(job, item):
    """Counts a part of the row as done; returns whether all are."""
    query_tile = item[words.FIRST_QUERY] // job[words.TILE_QUERIES]
    counter = item[words.ROW] * job[words.NUM_KV_HEADS] + item[words.HEAD]
    counter = counter * job[words.QUERY_TILES] + query_tile
    return fetch_add(job[words.PARTS_DONE] + 8 * counter, 1) == item[words.NUM_PARTS] - 1


@compiled
def _write(job, item, softmax):
    """Adds the sinks and writes the output; zeros for queries that see no token."""
    head_dim, group = job[words.HEAD_DIM], job[words.GROUP]
    padded_dim, count = job[words.PADDED_DIM], item[words.COUNT_QUERIES]
    sinks, out = float32s(job[words.SINKS]), float32s(job[words.OUT])
    num_queries = job[words.NUM_QUERIES] * group - item[words.FIRST_QUERY]
    for x in range(min(num_queries, job[words.TILE_QUERIES])):
        place = _query_place(job, item, x)
        if x >= count or softmax[TOTAL + x] == f32(0):  # The sums may be NaN even then.
            _fill(out, place, place + head_dim, f32(0))
            continue
        old_peak, total = softmax[PEAK + x], softmax[TOTAL + x]
        sink = sinks[item[words.HEAD] * group + (item[words.FIRST_QUERY] + x) % group]
        peak = sink if sink > old_peak else old_peak
        decay = exp(old_peak - peak)
        share = decay / fused(total, decay, exp(sink - peak))
        acc = ACC + x * padded_dim
        for d in range(head_dim):
            out[place + d] = softmax[acc + d] * share
