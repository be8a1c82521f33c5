"""The native code that writes tokens, as XLA calls it."""

from ferrum_jax.foreign import frames
from ferrum_jax.foreign.compiling import compiled, handler_code
from ferrum_jax.foreign.machine_code import MachineCode
from ferrum_jax.foreign.memory import Pointer, copy, free, int32s, int64s, malloc, text

# Arguments in order; the result is the pool, in the same memory as the argument.
(_POOL, _LAYER, _SLOTS, _TOKENS, _NUMBER_BYTES) = range(5)

_wrong_arguments = text("Writing tokens got other arguments than this version of it takes.")


def compile_part(name: str) -> MachineCode:
    """Compiles the handler, the only part."""
    del name
    return handler_code(_handler)


def _handler(frame_address):
    frame = int64s(frame_address)
    if frames.answers_metadata(frame):
        return 0
    if not frames.has_counts(frame, 5, 1):
        room = malloc(8 * frames.NUM_CALL_WORDS)
        error = frames.error(frame, room, _wrong_arguments(), frames.INVALID_ARGUMENT)
        free(room)
        return error
    num_layers = frames.shape(frame, _POOL)[1]
    layer = int32s(frames.argument(frame, _LAYER))[0]
    if 0 <= layer < num_layers:
        _write(frame, layer)
    return 0


@compiled
def _write(frame: Pointer, layer: int) -> None:
    """Copies each token's heads into its slot; tokens for no slot are left out."""
    shape = frames.shape(frame, _POOL)
    num_blocks, num_layers, num_heads, block_size = shape[0], shape[1], shape[2], shape[3]
    vector_bytes = shape[4] * int32s(frames.argument(frame, _NUMBER_BYTES))[0]
    pool, tokens = frames.result(frame, 0), frames.argument(frame, _TOKENS)
    slots = int32s(frames.argument(frame, _SLOTS))
    for i in range(frames.shape(frame, _SLOTS)[0]):
        slot = slots[i]
        if slot < 0 or slot >= num_blocks * block_size:
            continue
        first_head = (slot // block_size * num_layers + layer) * num_heads
        for head in range(num_heads):
            vector = (first_head + head) * block_size + slot % block_size
            source = tokens + (i * num_heads + head) * vector_bytes
            copy(pool + vector * vector_bytes, source, vector_bytes)
