"""The CPU kernel's helper: takes the items of a job, one after the other, on any thread."""

from ferrum_jax.attention.cpu import job as words
from ferrum_jax.attention.cpu.item import take_item
from ferrum_jax.attention.cpu.native import attend_to
from ferrum_jax.attention.cpu.packed import attend_to_words
from ferrum_jax.foreign.compiling import helper_code
from ferrum_jax.foreign.machine_code import MachineCode
from ferrum_jax.foreign.memory import fetch_add, float32s, int16s, int64s, uint16s

_ATTEND = {
    "float32": attend_to(float32s),
    "bfloat16": attend_to(uint16s),
    "float16": attend_to(int16s),
    "packed_2": attend_to_words(2),
    "packed_4": attend_to_words(4),
}


def compile_part(name: str) -> MachineCode:
    """Compiles the helper for one kind of numbers, which takes a few seconds.

    Args:
      name: `attention_` and the kind of numbers: "float32", "bfloat16" or "float16" for native
        blocks; "packed_2" or "packed_4" for compressed blocks of words of 2 or 4 bytes.

    Returns:
      The machine code of the helper.
    """
    attend = _ATTEND[name.removeprefix("attention_")]

    def helper(job_address):
        job = int64s(job_address)
        index = fetch_add(job_address + 8 * words.NEXT_ITEM, 1)
        while index < job[words.NUM_ITEMS]:
            take_item(job, index, attend)
            fetch_add(job_address + 8 * words.NUM_DONE, 1)
            index = fetch_add(job_address + 8 * words.NEXT_ITEM, 1)
        words.release(job_address)
        return 0

    return helper_code(helper)
