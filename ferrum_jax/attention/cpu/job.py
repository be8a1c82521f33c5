"""One attention call as its threads share it, and how it is cut into items.

Tokens are cut into *tiles* by their positions alone: a tile begins at each multiple of
`TILE_TOKENS`. The softmax of a query is computed for each tile by itself, and those of the tiles
are added up in order. So a query's result has the same bits in every batch, whatever the other
rows, the blocks and the threads are.

A *job* is a run of 64-bit words: counters, addresses of arrays, and sizes. An *item* is a part of
one row for one KV head and a few queries: consecutive tiles. Long rows are cut into parts, so that
a single row keeps every thread busy. Each thread takes the next item until none is left. The thread
that finishes the last part adds up the tiles.
"""

from numba import types

from ferrum_jax.foreign.compiling import POINTER, ceil_div, clamp, compiled, compiled_for
from ferrum_jax.foreign.frames import NUM_CALL_WORDS
from ferrum_jax.foreign.memory import Pointer, fetch_add, free, int32s

TILE_TOKENS = 256
"""Tokens of a tile."""

MAX_TILE_QUERIES = 32
"""Queries of an item."""

# The softmax of an item's X queries, in one array: peak [X], total [X], acc [X, P].
(PEAK, TOTAL, ACC) = (0, MAX_TILE_QUERIES, 2 * MAX_TILE_QUERIES)

# Counters, which threads increment by `fetch_add`.
(NUM_HOLDERS, NEXT_ITEM, NUM_DONE) = range(3)
# Sizes: N, L, H, D of the pool, M of the table, R, T, G of the queries; words of a block of one
# layer and head in `k`, and as many in `v`.
(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM) = range(3, 7)
(TABLE_WIDTH, NUM_ROWS, NUM_QUERIES, GROUP, ARRAY_WORDS) = range(7, 12)
# Numbers of this call: layer, items, and tiles of tokens of each; D rounded up to full vectors;
# queries of an item, and items that share the T * G queries of a row and KV head.
(LAYER, NUM_ITEMS, PART_TILES, PADDED_DIM, TILE_QUERIES, QUERY_TILES) = range(12, 18)
# Integers that the caller passes as an argument: the window, tokens per block, bytes of a stored
# number, and for compressed blocks the `VectorLayout` of keys and of values.
(WINDOW, BLOCK_SIZE, NUMBER_BYTES, KEY_LAYOUT, VALUE_LAYOUT) = (18, 19, 20, 21, 24)
NUM_INTEGERS = 9
# A layout's fields, counted from its first.
(FIRST_WORD, VECTOR_WORDS, BITS) = range(3)
# Addresses of the arguments and of the result.
(QUERIES, KEYS, VALUES, BLOCK_IDS, SEQ_LENS, Q_LENS, SINKS, SCALARS, OUT) = range(27, 36)
# Addresses of what threads share: how many parts of each row, head and tile of queries are done,
# the first part and the first softmax of each row, and the softmax of each tile.
(PARTS_DONE, FIRST_OF_ROWS, PARTIALS) = range(36, 39)
# Room for the arguments of a function of XLA.
XLA_CALL = 39
NUM_WORDS = XLA_CALL + NUM_CALL_WORDS

# The words of an item: its row, head, first query of T * G, and number of queries.
(ROW, HEAD, FIRST_QUERY, COUNT_QUERIES) = range(4)
# Tiles of tokens of the whole row, from the first to one past the last, the item's share of them,
# the number of such shares, and the index of the row's first softmax.
(ROW_TILE, ROW_TILE_END, START_TILE, END_TILE, NUM_PARTS, FIRST_PARTIAL) = range(4, 10)
# Tokens that any query of the item sees.
(FIRST_TOKEN, END_TOKEN) = range(10, 12)
# The current tile: its first position, and the tokens to read, counted from there.
(TILE, START, END) = range(12, 15)
NUM_ITEM_WORDS = 15


@compiled_for(types.UniTuple(types.int64, 2), POINTER, types.int64, types.int64, types.int64)
def tokens_seen(job: Pointer, row: int, first_query: int, last_query: int) -> tuple[int, int]:
    """Returns the first token that any of some consecutive queries sees, and one past the last.

    Returns:
      The tokens that queries `first_query` to `last_query` of T see; (0, 0) for none.
    """
    q_len = int32s(job[Q_LENS])[row]
    # A length beyond the row's blocks is a caller's mistake.
    seq_len = clamp(int32s(job[SEQ_LENS])[row], 0, job[TABLE_WIDTH] * job[BLOCK_SIZE])
    position = seq_len - q_len  # Of the first query.
    first_query, last_query = max(first_query, -position), min(last_query, q_len - 1)
    if first_query > last_query:
        return 0, 0
    first = clamp(position + first_query + 1 - job[WINDOW], 0, seq_len)
    return first, position + last_query + 1


@compiled
def tokens_read(job: Pointer, row: int) -> tuple[int, int]:
    """Returns the first token that any query of a row sees, and one past the last."""
    return tokens_seen(job, row, 0, job[NUM_QUERIES] - 1)


@compiled
def tiles_read(job: Pointer, row: int) -> tuple[int, int]:
    """Returns the first tile that any query of a row sees, and one past the last."""
    first, end = tokens_read(job, row)
    return first // TILE_TOKENS, ceil_div(end, TILE_TOKENS)


@compiled
def num_parts(job: Pointer, num_tiles: int) -> int:
    """Returns the number of parts of a row with `num_tiles` to read; at least one."""
    parts = ceil_div(num_tiles, job[PART_TILES])
    return parts if parts > 0 else 1


@compiled
def softmax_numbers(job: Pointer) -> int:
    """Returns the numbers of the softmax of an item's queries."""
    return ACC + job[TILE_QUERIES] * job[PADDED_DIM]


@compiled
def release(job_address: int) -> None:
    """Removes one holder of the job; the last one frees it."""
    if fetch_add(job_address + 8 * NUM_HOLDERS, -1) == 1:
        free(job_address)
