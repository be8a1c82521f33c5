"""A part of code that takes a moment to compile."""

import time

from ferrum_jax.foreign.machine_code import MachineCode


def compile_part(name):
    time.sleep(1)
    return MachineCode(f"{name} by another process".encode(), ())
