"""One attention call as its threads share it, and how it is cut into items.

A *job* is a run of 64-bit words: counters, addresses of arrays, and sizes. An *item* is a part of
one row for one KV head: long rows are cut into parts, so that a single row keeps every thread busy.
Each thread takes the next item until none is left. The thread that finishes the last part of a row
and head merges the parts.
"""

from numba import njit

from ferrum_jax import arithmetic
from ferrum_jax.attention.cpu.memory import Pointer, int32s

# Only native code calls these functions. NaN and infinity keep their meaning; the order of sums is
# free. The largest functions are inlined into their callers: a function that is compiled by itself
# is optimized again with every function that calls it, which takes 4 seconds instead of 2.
_OPTIONS = {
    "fastmath": {"reassoc", "contract", "arcp", "nsz"},
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
compiled = njit(**_OPTIONS)
inlined = njit(inline="always", **_OPTIONS)
ceil_div = compiled(arithmetic.ceil_div)

# Counters, which threads increment by `fetch_add`.
(NUM_HOLDERS, NEXT_ITEM, NUM_DONE) = range(3)
# Sizes: N, L, H, D of the pool, M of the table, R, T, G of the queries; words of a block of one
# layer and head in `k`, and as many in `v`.
(NUM_BLOCKS, NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM) = range(3, 7)
(TABLE_WIDTH, NUM_ROWS, NUM_QUERIES, GROUP, ARRAY_WORDS) = range(7, 12)
# Numbers of this call.
(LAYER, NUM_ITEMS, PART_TOKENS) = range(12, 15)
# Integers that the caller passes as an argument: the window, tokens per block, bytes of a stored
# number, and for compressed blocks the `VectorLayout` of keys and of values.
(WINDOW, BLOCK_SIZE, NUMBER_BYTES, KEY_LAYOUT, VALUE_LAYOUT) = (15, 16, 17, 18, 21)
NUM_INTEGERS = 9
# A layout's fields, counted from its first.
(FIRST_WORD, VECTOR_WORDS, BITS) = range(3)
# Addresses of the arguments and of the result.
(QUERIES, KEYS, VALUES, BLOCK_IDS, SEQ_LENS, Q_LENS, SINKS, SCALARS, OUT) = range(24, 33)
# Addresses of shared results: how many parts of each row and head are done, and the softmax of
# each item.
(PARTS_DONE, PARTIALS) = range(33, 35)
# Room for the arguments of a function of XLA.
XLA_CALL = 35
NUM_WORDS = XLA_CALL + 6

# The words of an item: its row, head and tokens, and the current tile of the tokens.
(ROW, HEAD, START, END, NUM_PARTS, FIRST_PART, TILE, COUNT) = range(8)
# The tokens of the tile that every query sees, counted in the tile: the first, and one past the
# last.
(SEEN_FIRST, SEEN_END) = range(8, 10)
NUM_ITEM_WORDS = 10


@compiled
def clamp(x: int, low: int, high: int) -> int:
    """Returns the number from `low` to `high` that is nearest to `x`."""
    if x > high:
        x = high
    return low if x < low else x


@compiled
def tokens_seen(job: Pointer, row: int, query: int) -> tuple[int, int]:
    """Returns the first token that a query sees, and one past the last; (0, 0) for none."""
    q_len = int32s(job[Q_LENS])[row]
    # A length beyond the row's blocks is a caller's mistake.
    seq_len = clamp(int32s(job[SEQ_LENS])[row], 0, job[TABLE_WIDTH] * job[BLOCK_SIZE])
    end = seq_len - q_len + query + 1
    if query >= q_len or end < 1:
        return 0, 0
    return clamp(end - job[WINDOW], 0, end), end


@compiled
def tokens_read(job: Pointer, row: int) -> tuple[int, int]:
    """Returns the first token that any query of a row sees, and one past the last."""
    first, end = 0, 0
    for query in range(job[NUM_QUERIES]):
        query_first, query_end = tokens_seen(job, row, query)
        if query_end > 0:
            # Queries are in order: the first one sees the first token, the last one the last.
            if end == 0:
                first = query_first
            end = query_end
    return first, end


@compiled
def num_parts(job: Pointer, num_tokens: int) -> int:
    """Returns the number of parts of a row with `num_tokens` to read; at least one."""
    parts = ceil_div(num_tokens, job[PART_TOKENS])
    return parts if parts > 0 else 1
