"""Products of an item's queries with a run of a tile's tokens, as float32 numbers in memory.

A few queries at a time share the numbers in registers. Tokens that none of them sees are left out,
and a value is added only to the queries that see its token: zero times NaN is NaN.
"""

from numba import types

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.job import (
    MAX_TILE_QUERIES,
    TILE_TOKENS,
    tokens_seen,
)
from ferrum_jax.attention.cpu.vectors import (
    KEYS_AT_ONCE,
    LANES,
    QUERIES_AT_ONCE,
    add_1,
    add_2,
    add_3,
    add_4,
    add_wide_1,
    add_wide_2,
    add_wide_3,
    add_wide_4,
    multiply_1,
    multiply_2,
    multiply_3,
    multiply_4,
)
from ferrum_jax.foreign.compiling import clamp, compiled, compiled_for, inlined
from ferrum_jax.foreign.memory import Pointer

_INT64_TRIPLE = types.UniTuple(types.int64, 3)

LOGITS_STRIDE = TILE_TOKENS + LANES
"""Numbers from the logits of one query to those of the next: a few more may be written."""

# What each query of an item sees of the current tile, and what any and all of the queries see that
# share numbers, the first of which has the index: first tokens and ends, counted in the tile.
(_FIRST, _END, _ANY_FIRST, _ANY_END, _ALL_FIRST, _ALL_END) = range(
    0, 6 * MAX_TILE_QUERIES, MAX_TILE_QUERIES
)
NUM_SEEN_WORDS = 6 * MAX_TILE_QUERIES


@compiled
def see_tile(job: Pointer, item: Pointer, seen: Pointer) -> None:
    """Fills in what the queries of an item see of the current tile."""
    row, tile, group = item[words.ROW], item[words.TILE], job[words.GROUP]
    count, first_query, tile_end = (
        item[words.COUNT_QUERIES],
        item[words.FIRST_QUERY],
        item[words.END],
    )
    for x in range(0, count, QUERIES_AT_ONCE):
        any_first, any_end, all_first, all_end = TILE_TOKENS, 0, 0, TILE_TOKENS
        for member in range(x, min(x + QUERIES_AT_ONCE, count)):
            query = (first_query + member) // group
            first, end = tokens_seen(job, row, query, query)
            end = clamp(end - tile, 0, tile_end)
            first = clamp(first - tile, 0, end)
            seen[_FIRST + member], seen[_END + member] = first, end
            if first < end:
                any_first = min(any_first, first)
            any_end = max(any_end, end)
            all_first, all_end = max(all_first, first), min(all_end, end)
        seen[_ANY_FIRST + x], seen[_ANY_END + x] = any_first, any_end
        seen[_ALL_FIRST + x], seen[_ALL_END + x] = all_first, max(all_first, all_end)


@compiled
def seen_by(seen: Pointer, x: int) -> tuple[int, int]:
    """Returns the first token of the tile that query x of an item sees, and one past the last."""
    return seen[_FIRST + x], seen[_END + x]


@inlined
def multiply_keys(
    job: Pointer, item: Pointer, seen: Pointer, numbers: tuple, run: tuple[int, int]
) -> None:
    """Multiplies the queries with a run of keys.

    Args:
      job: The job.
      item: The item.
      seen: What its queries see of the tile.
      numbers: Addresses of the queries [X, P], the run's keys [run, P] and the logits
        [X, LOGITS_STRIDE], all float32; P is D rounded up, with zeros.
      run: First token of the run, counted in the tile, and one past the last.
    """
    queries, keys, logits = numbers
    start, end = run
    dim, stride = job[words.PADDED_DIM], 4 * job[words.PADDED_DIM]
    last = keys + (end - start - 1) * stride
    count = item[words.COUNT_QUERIES]
    for x in range(0, count, QUERIES_AT_ONCE):
        num_queries = min(QUERIES_AT_ONCE, count - x)
        any_first, any_end = seen[_ANY_FIRST + x], seen[_ANY_END + x]
        first = start + (max(any_first, start) - start) // KEYS_AT_ONCE * KEYS_AT_ONCE
        for i in range(first, min(any_end, end), KEYS_AT_ONCE):
            key = keys + (i - start) * stride
            # After the last key of a run, it is multiplied again.
            four = (
                key,
                min(key + stride, last),
                min(key + 2 * stride, last),
                min(key + 3 * stride, last),
            )
            out = logits + 4 * (x * LOGITS_STRIDE + i)
            _multiply(num_queries, queries + x * stride, four, out, dim)


@inlined
def add_values(
    job: Pointer, item: Pointer, seen: Pointer, numbers: tuple, run: tuple[int, int]
) -> None:
    """Adds a run of weighted values to the queries that see them; arguments as `multiply_keys`.

    The numbers are the addresses of the sums [X, P], the run's values [run, P], and the weights
    [X, LOGITS_STRIDE].
    """
    start, end = run
    dim = job[words.PADDED_DIM]
    count = item[words.COUNT_QUERIES]
    for x in range(0, count, QUERIES_AT_ONCE):
        num_queries = min(QUERIES_AT_ONCE, count - x)
        if seen[_ANY_FIRST + x] >= end or seen[_ANY_END + x] <= start:
            continue
        all_first = clamp(seen[_ALL_FIRST + x], start, end)
        all_end = clamp(seen[_ALL_END + x], start, end)
        for query in range(x, x + num_queries):
            first, last = max(seen[_FIRST + query], start), min(seen[_END + query], all_first)
            if first < last:
                _add_run(1, query, numbers, (start, first, last), dim)
        if all_first < all_end:
            _add_run(num_queries, x, numbers, (start, all_first, all_end), dim)
        for query in range(x, x + num_queries):
            first, last = max(seen[_FIRST + query], all_end), min(seen[_END + query], end)
            if first < last:
                _add_run(1, query, numbers, (start, first, last), dim)


@inlined
def _multiply(num_queries, queries, keys, logits, dim):
    """Multiplies 1 to 4 queries with 4 keys."""
    stride = 4 * LOGITS_STRIDE
    if num_queries == 4:
        multiply_4(queries, keys, logits, dim, stride)
    elif num_queries == 3:
        multiply_3(queries, keys, logits, dim, stride)
    elif num_queries == 2:
        multiply_2(queries, keys, logits, dim, stride)
    else:
        multiply_1(queries, keys, logits, dim, stride)


@inlined
def _add(num_queries, sums, weights, values, count, dim):
    """Adds weighted values to the sums of 1 to 4 queries, 64 or 16 numbers at a time."""
    stride = 4 * LOGITS_STRIDE
    wide_end = 4 * dim // 256 * 256
    for byte in range(0, wide_end, 256):
        if num_queries == 4:
            add_wide_4(sums + byte, weights, values + byte, count, dim, stride)
        elif num_queries == 3:
            add_wide_3(sums + byte, weights, values + byte, count, dim, stride)
        elif num_queries == 2:
            add_wide_2(sums + byte, weights, values + byte, count, dim, stride)
        else:
            add_wide_1(sums + byte, weights, values + byte, count, dim, stride)
    for byte in range(wide_end, 4 * dim, 64):
        if num_queries == 4:
            add_4(sums + byte, weights, values + byte, count, dim, stride)
        elif num_queries == 3:
            add_3(sums + byte, weights, values + byte, count, dim, stride)
        elif num_queries == 2:
            add_2(sums + byte, weights, values + byte, count, dim, stride)
        else:
            add_1(sums + byte, weights, values + byte, count, dim, stride)


@compiled_for(types.void, types.int64, types.int64, _INT64_TRIPLE, _INT64_TRIPLE, types.int64)
def _add_run(num_queries, x, numbers, run, dim):
    """Adds values from a first to a last one to queries x and following."""
    sums, values, weights = numbers
    start, first, last = run
    _add(
        num_queries,
        sums + 4 * x * dim,
        weights + 4 * (x * LOGITS_STRIDE + first),
        values + 4 * (first - start) * dim,
        last - first,
        dim,
    )
