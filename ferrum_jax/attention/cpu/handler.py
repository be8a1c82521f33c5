"""The CPU kernel as XLA calls it: a handler with the interface of XLA's foreign functions.

XLA passes one address, that of a call frame, a structure that `xla/ffi/api/c_api.h` of jaxlib
defines. All its fields are read as 64-bit words. The frame has a table of functions; one of them
schedules helpers on XLA's thread pool.

The handler cuts the call into items and works on them like its helpers until no item is left. It
then waits only for items that a helper has begun, not for a helper to start: otherwise a pool could
deadlock, all its threads waiting in handlers. A helper that starts late finds nothing to do. The
job outlives the call for such a helper: its last holder frees it.

Nothing here touches Python objects, so threads do not need the interpreter's lock.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.item import MAX_TILE_NUMBERS, softmax_numbers, take_item
from ferrum_jax.attention.cpu.job import (
    MAX_TILE_QUERIES,
    TILE_TOKENS,
    ceil_div,
    clamp,
    compiled,
    num_parts,
    tiles_read,
    tokens_read,
)
from ferrum_jax.attention.cpu.machine_code import HANDLER, MachineCode, emit
from ferrum_jax.attention.cpu.memory import (
    call,
    fetch,
    fetch_add,
    float32s,
    free,
    int16s,
    int32s,
    int64s,
    malloc,
    sched_yield,
    text,
    uint16s,
)
from ferrum_jax.attention.cpu.native import attend_to
from ferrum_jax.attention.cpu.packed import attend_to_words
from ferrum_jax.attention.cpu.vectors import LANES, QUERIES_AT_ONCE

# Version of the structures below. Later minor versions append fields, and XLA promises to support
# an older handler for a year; it refuses to register an unsupported one.
_MAJOR_VERSION, _MINOR_VERSION = 0, 3

# Fields of a call frame, of a buffer, and of the table of functions, as indices of words.
_EXTENSION, _FUNCTIONS, _CONTEXT, _NUM_ARGS, _ARGS, _NUM_RESULTS, _RESULTS = 1, 2, 3, 7, 9, 12, 14
_DATA, _SHAPE = 3, 5
_CREATE_ERROR, _DESTROY_ERROR, _SCHEDULE, _NUM_THREADS = 6, 8, 17, 18
_METADATA = 1  # An extension that asks the handler for its version.
_INVALID_ARGUMENT, _RESOURCE_EXHAUSTED = 3, 8

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

# Neither function is called from Python, or by numba as a C function.
_INT64 = types.int64
_OPTIONS = {"error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

_ATTEND = {
    "float32": attend_to(float32s),
    "bfloat16": attend_to(uint16s),
    "float16": attend_to(int16s),
    "packed_2": attend_to_words(2),
    "packed_4": attend_to_words(4),
}


def compile_handler(numbers: str) -> MachineCode:
    """Compiles the handler for one kind of numbers, which takes a few seconds.

    Args:
      numbers: "float32", "bfloat16" or "float16" for native blocks; "packed_2" or "packed_4" for
        compressed blocks of words of 2 or 4 bytes.

    Returns:
      The machine code of the handler.
    """
    attend = _ATTEND[numbers]

    @njit(_INT64(_INT64), **_OPTIONS)
    def helper(job_address):
        job = int64s(job_address)
        index = fetch_add(job_address + 8 * words.NEXT_ITEM, 1)
        while index < job[words.NUM_ITEMS]:
            take_item(job, index, attend)
            fetch_add(job_address + 8 * words.NUM_DONE, 1)
            index = fetch_add(job_address + 8 * words.NEXT_ITEM, 1)
        _release(job_address)
        return 0

    @njit(_INT64(_INT64, _INT64), **_OPTIONS)
    def handler(frame_address, helper_address):
        frame = int64s(frame_address)
        if _answers_metadata(frame):
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
        _release(job_address)
        return 0

    (in_helper,), (in_handler,) = helper.signatures, handler.signatures
    instructions = helper.inspect_llvm(in_helper), handler.inspect_llvm(in_handler)
    layout = llvmlite.binding.parse_assembly(instructions[0]).data_layout
    described = helper.overloads[in_helper].fndesc, handler.overloads[in_handler].fndesc
    return emit([*instructions, _c_functions(layout, *described)])


def _c_functions(data_layout: str, helper: Any, handler: Any) -> str:
    """Returns an LLVM module of the C functions `int64 f(int64)` that call numba's functions.

    numba's own C functions (`cfunc`) need its run time.

    Args:
      data_layout: The layout of data that numba uses.
      helper: numba's description of the helper.
      handler: numba's description of the handler, which also takes the address of the helper.
    """
    module = ir.Module()
    module.triple, module.data_layout = llvmlite.binding.get_process_triple(), data_layout
    integer = ir.IntType(64)
    context: Any = cpu_target.target_context

    def define(name: str, called: Any, *more: Any) -> Any:
        function = ir.Function(module, ir.FunctionType(integer, [integer]), name)
        builder = ir.IRBuilder(function.append_basic_block())
        callee = context.declare_function(module, called)
        arguments = [*function.args, *more]
        _, result = context.call_conv.call_function(
            builder, callee, called.restype, called.argtypes, arguments
        )
        builder.ret(result)
        return function

    address = define("ferrum_jax_attention_helper", helper).ptrtoint(integer)
    define(HANDLER, handler, address)
    return str(module)


@compiled
def _answers_metadata(frame):
    """Answers XLA's query for the handler's version; returns whether the call was that query."""
    extension = frame[_EXTENSION]
    if extension == 0 or int32s(extension + 8)[0] != _METADATA:
        return False
    metadata = int64s(int64s(extension)[3])
    metadata[3] = _MAJOR_VERSION | (_MINOR_VERSION << 32)
    metadata[4] = 0  # No traits.
    return True


@compiled
def _begin(frame, job_address, helper_address):
    """Fills in the job and schedules helpers; returns XLA's error, or 0."""
    job = int64s(job_address)
    if frame[_NUM_ARGS] != 10 or frame[_NUM_RESULTS] != 1:
        return _error(frame, job_address, _wrong_arguments(), _INVALID_ARGUMENT)
    _read_arguments(frame, job)
    job[words.XLA_CALL + 5] = 1
    _ask(frame, job_address, _NUM_THREADS, 4, (job_address + 8 * (words.XLA_CALL + 5), 0))
    num_threads = job[words.XLA_CALL + 5]
    _cut_queries(job)
    num_bytes, num_partials = _cut_tokens(job, num_threads)

    num_counters = job[words.NUM_ROWS] * job[words.NUM_KV_HEADS] * job[words.QUERY_TILES]
    num_words = num_counters + 2 * job[words.NUM_ROWS]
    shared = malloc(8 * num_words + 4 * softmax_numbers(job) * num_partials)
    if shared == 0:
        return _error(frame, job_address, _no_memory(), _RESOURCE_EXHAUSTED)
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
        if not _ask(frame, job_address, _SCHEDULE, 5, (helper_address, job_address)):
            fetch_add(job_address + 8 * words.NUM_HOLDERS, -1)
            break
    return 0


@compiled
def _read_arguments(frame, job):
    """Fills in the addresses of the arguments, and their sizes."""
    args = int64s(frame[_ARGS])
    job[words.QUERIES] = int64s(args[_QUERIES])[_DATA]
    job[words.KEYS] = int64s(args[_KEYS])[_DATA]
    job[words.VALUES] = int64s(args[_VALUES])[_DATA]
    job[words.BLOCK_IDS] = int64s(args[_BLOCK_IDS])[_DATA]
    job[words.SEQ_LENS] = int64s(args[_SEQ_LENS])[_DATA]
    job[words.Q_LENS] = int64s(args[_Q_LENS])[_DATA]
    job[words.SINKS] = int64s(args[_SINKS])[_DATA]
    job[words.SCALARS] = int64s(args[_SCALARS])[_DATA]
    job[words.OUT] = int64s(int64s(frame[_RESULTS])[0])[_DATA]
    pool_shape = int64s(int64s(args[_KEYS])[_SHAPE])
    job[words.NUM_BLOCKS] = pool_shape[0]
    job[words.NUM_LAYERS] = pool_shape[1]
    job[words.NUM_KV_HEADS] = pool_shape[2]
    job[words.HEAD_DIM] = pool_shape[4]
    job[words.ARRAY_WORDS] = pool_shape[3] * pool_shape[4]
    q_shape = int64s(int64s(args[_QUERIES])[_SHAPE])
    job[words.NUM_ROWS] = q_shape[0]
    job[words.NUM_QUERIES] = q_shape[1]
    job[words.GROUP] = q_shape[3]
    job[words.TABLE_WIDTH] = int64s(int64s(args[_BLOCK_IDS])[_SHAPE])[1]
    integers = int32s(int64s(args[_INTEGERS])[_DATA])
    for i in range(words.NUM_INTEGERS):
        job[words.WINDOW + i] = integers[i]
    job[words.LAYER] = clamp(int32s(int64s(args[_LAYER])[_DATA])[0], 0, pool_shape[1] - 1)


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


@compiled
def _release(job_address):
    """Removes one holder of the job; the last one frees it."""
    if fetch_add(job_address + 8 * words.NUM_HOLDERS, -1) == 1:
        free(job_address)


@compiled
def _ask(frame, job_address, function, num_fields, arguments):
    """Calls a function of XLA with two arguments; returns whether it succeeded."""
    address = job_address + 8 * words.XLA_CALL
    call_fields = int64s(address)
    call_fields[0], call_fields[1] = 8 * num_fields, 0
    call_fields[2] = frame[_CONTEXT]
    call_fields[3], call_fields[4] = arguments
    error = call(int64s(frame[_FUNCTIONS])[function], address)
    if error == 0:
        return True
    call_fields[0], call_fields[1], call_fields[2] = 24, 0, error
    call(int64s(frame[_FUNCTIONS])[_DESTROY_ERROR], address)
    return False


@compiled
def _error(frame, job_address, message, code):
    """Returns an error of XLA, which owns it from then on."""
    address = job_address + 8 * words.XLA_CALL
    call_fields = int64s(address)
    call_fields[0], call_fields[1] = 28, 0
    call_fields[2], call_fields[3] = message, code
    return call(int64s(frame[_FUNCTIONS])[_CREATE_ERROR], address)
