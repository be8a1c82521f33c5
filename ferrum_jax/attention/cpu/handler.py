"""The CPU kernel as XLA calls it: a handler with the interface of XLA's foreign functions.

The handler cuts the call into items and works on them like its helpers until no item is left. It
then waits only for items that a helper has begun, not for a helper to start: otherwise a pool could
deadlock, all its threads waiting in handlers. A helper that starts late finds nothing to do. The
job outlives the call for such a helper: its last holder frees it.

Nothing here touches Python objects, so threads do not need the interpreter's lock.
"""

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.job import (
    MAX_TILE_QUERIES,
    TILE_TOKENS,
    num_parts,
    softmax_numbers,
    tiles_read,
    tokens_read,
)
from ferrum_jax.attention.cpu.limits import MAX_TILE_NUMBERS
from ferrum_jax.attention.cpu.vectors import LANES, QUERIES_AT_ONCE
from ferrum_jax.foreign import frames
from ferrum_jax.foreign.compiling import ceil_div, clamp, compiled, handler_code
from ferrum_jax.foreign.machine_code import MachineCode
from ferrum_jax.foreign.memory import (
    call,
    fetch,
    fetch_add,
    free,
    int32s,
    int64s,
    malloc,
    sched_yield,
    text,
)

# Arguments in order. The scalars are f32[2], scale and soft cap (0 for none); the integers are
# i32[9], those of the job.
(_QUERIES, _KEYS, _VALUES, _LAYER, _BLOCK_IDS, _SEQ_LENS, _Q_LENS, _SINKS, _SCALARS, _INTEGERS) = (
    range(10)
)

_THREAD_ITEMS = 32  # Parts per thread that balance the load; each costs about a microsecond.
_MIN_PART_BYTES = 1 << 16  # 4 microseconds at the speed of memory.
_SPINS = 1000  # Turns of waiting before the thread yields the processor.

_wrong_arguments = text("Paged attention got other arguments than this version of it takes.")
_no_memory = text("Paged attention found no memory for its bookkeeping.")


def compile_part(name: str) -> MachineCode:
    """Compiles the handler, which serves numbers of any kind; the helper is another part."""
    del name
    return handler_code(_handler)


def _handler(frame_address, helper_address):
    frame = int64s(frame_address)
    if frames.answers_metadata(frame):
        return 0
    job_address = malloc(8 * words.NUM_WORDS)
    job = int64s(job_address)
    error = _begin(frame, job_address, helper_address)
    if error != 0:
        free(job_address)
        return error
    num_items = job[words.NUM_ITEMS]
    call(helper_address, job_address)
    _wait(job_address, num_items)
    free(job[words.PARTS_DONE])
    words.release(job_address)
    return 0


@compiled
def _begin(frame, job_address, helper_address):
    """Fills in the job and schedules helpers; returns XLA's error, or 0."""
    job = int64s(job_address)
    room = job_address + 8 * words.XLA_CALL
    if not frames.has_counts(frame, 10, 1):
        return frames.error(frame, room, _wrong_arguments(), frames.INVALID_ARGUMENT)
    _read_arguments(frame, job)
    num_threads = frames.num_threads(frame, room)
    _cut_queries(job)
    num_bytes, num_partials = _cut_tokens(job, num_threads)

    num_counters = job[words.NUM_ROWS] * job[words.NUM_KV_HEADS] * job[words.QUERY_TILES]
    num_words = num_counters + 2 * job[words.NUM_ROWS]
    shared = malloc(8 * num_words + 4 * softmax_numbers(job) * num_partials)
    if shared == 0:
        return frames.error(frame, room, _no_memory(), frames.RESOURCE_EXHAUSTED)
    job[words.PARTS_DONE] = shared
    job[words.FIRST_OF_ROWS] = shared + 8 * num_counters
    job[words.PARTIALS] = shared + 8 * num_words
    counters = int64s(shared)
    for i in range(num_counters):
        counters[i] = 0
    _number_rows(job)

    job[words.NEXT_ITEM] = 0
    job[words.NUM_DONE] = 0
    job[words.NUM_HOLDERS] = 2  # The handler, which helps and then waits.
    num_helpers = min(num_threads, job[words.NUM_ITEMS], num_bytes // _MIN_PART_BYTES) - 1
    for _ in range(num_helpers):
        fetch_add(job_address + 8 * words.NUM_HOLDERS, 1)
        if not frames.schedule(frame, room, helper_address, job_address):
            fetch_add(job_address + 8 * words.NUM_HOLDERS, -1)
            break
    return 0


@compiled
def _read_arguments(frame, job):
    """Fills in the addresses of the arguments, and their sizes."""
    job[words.QUERIES] = frames.argument(frame, _QUERIES)
    job[words.KEYS] = frames.argument(frame, _KEYS)
    job[words.VALUES] = frames.argument(frame, _VALUES)
    job[words.BLOCK_IDS] = frames.argument(frame, _BLOCK_IDS)
    job[words.SEQ_LENS] = frames.argument(frame, _SEQ_LENS)
    job[words.Q_LENS] = frames.argument(frame, _Q_LENS)
    job[words.SINKS] = frames.argument(frame, _SINKS)
    job[words.SCALARS] = frames.argument(frame, _SCALARS)
    job[words.OUT] = frames.result(frame, 0)
    pool_shape = frames.shape(frame, _KEYS)
    job[words.NUM_BLOCKS] = pool_shape[0]
    job[words.NUM_LAYERS] = pool_shape[1]
    job[words.NUM_KV_HEADS] = pool_shape[2]
    job[words.HEAD_DIM] = pool_shape[4]
    job[words.ARRAY_WORDS] = pool_shape[3] * pool_shape[4]
    q_shape = frames.shape(frame, _QUERIES)
    job[words.NUM_ROWS] = q_shape[0]
    job[words.NUM_QUERIES] = q_shape[1]
    job[words.GROUP] = q_shape[3]
    job[words.TABLE_WIDTH] = frames.shape(frame, _BLOCK_IDS)[1]
    integers = int32s(frames.argument(frame, _INTEGERS))
    for i in range(words.NUM_INTEGERS):
        job[words.WINDOW + i] = integers[i]
    job[words.LAYER] = clamp(int32s(frames.argument(frame, _LAYER))[0], 0, pool_shape[1] - 1)


@compiled
def _cut_queries(job):
    """Cuts the queries of a row and KV head into tiles of about the same size."""
    padded_dim = ceil_div(job[words.HEAD_DIM], LANES) * LANES
    num_queries = job[words.NUM_QUERIES] * job[words.GROUP]
    most = min(MAX_TILE_NUMBERS // padded_dim, MAX_TILE_QUERIES)
    most = most // QUERIES_AT_ONCE * QUERIES_AT_ONCE
    share = ceil_div(num_queries, ceil_div(num_queries, most))
    job[words.PADDED_DIM] = padded_dim
    job[words.TILE_QUERIES] = ceil_div(share, QUERIES_AT_ONCE) * QUERIES_AT_ONCE
    job[words.QUERY_TILES] = ceil_div(num_queries, job[words.TILE_QUERIES])


@compiled
def _cut_tokens(job, num_threads):
    """Cuts rows into enough items for the threads.

    Returns `(num_bytes, num_partials)`: the bytes that all items read, and the tiles of the rows
    that are cut.
    """
    heads = job[words.NUM_KV_HEADS] * job[words.QUERY_TILES]
    num_tokens = 0
    for row in range(job[words.NUM_ROWS]):
        first, end = tokens_read(job, row)
        num_tokens += (end - first) * heads
    job[words.PART_TILES] = max(num_tokens // (_THREAD_ITEMS * num_threads * TILE_TOKENS), 1)
    num_items, num_partials = 0, 0
    for row in range(job[words.NUM_ROWS]):
        first, end = tiles_read(job, row)
        parts = num_parts(job, end - first)
        num_items += parts * heads
        if parts > 1:
            num_partials += (end - first) * heads
    job[words.NUM_ITEMS] = num_items
    return num_tokens * 2 * job[words.HEAD_DIM] * job[words.NUMBER_BYTES], num_partials


@compiled
def _number_rows(job):
    """Fills in the first part and the first softmax of each row, both counted for one head."""
    first_of_rows = int64s(job[words.FIRST_OF_ROWS])
    part, partial = 0, 0
    for row in range(job[words.NUM_ROWS]):
        first_of_rows[2 * row], first_of_rows[2 * row + 1] = part, partial
        first, end = tiles_read(job, row)
        parts = num_parts(job, end - first)
        part += parts
        if parts > 1:
            partial += end - first


@compiled
def _wait(job_address, num_items):
    """Waits for the items that helpers have begun."""
    spins = 0
    while fetch(job_address + 8 * words.NUM_DONE) < num_items:
        spins += 1
        if spins > _SPINS:
            sched_yield()
