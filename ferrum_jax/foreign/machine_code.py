"""Machine code: made of LLVM's instructions, and loaded. It needs llvmlite alone.

The code calls functions of the C library, and nothing of numba or of Python, so that a process can
load it that does not import numba.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm

HANDLER, HELPER = "ferrum_jax_handler", "ferrum_jax_helper"
"""Names of the function that XLA calls, and of one that it calls and that may be another part."""


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """Machine code for this processor.

    Attributes:
      object_file: The code, in the platform's format of object files.
      names: Functions and variables that the code expects in the process, beside the helper. LLVM
        may add calls of those that every process has, such as `memset`.
    """

    object_file: bytes
    names: tuple[str, ...]

    @property
    def can_be_loaded(self) -> bool:
        """Whether the process has all that the code expects; LLVM ends the process otherwise."""
        _new_engine()  # The first one finds the process's own functions.
        return all(llvm.address_of_symbol(name) is not None for name in self.names)


def load(parts: Sequence[MachineCode]) -> tuple[int, Any]:
    """Loads a function.

    Args:
      parts: Its parts, which can be loaded; one has the handler.

    Returns:
      `(address, keep)`: address of the handler, and objects to keep alive as long as XLA may call
      the handler.
    """
    engine = _new_engine()
    for part in parts:
        engine.add_object_file(llvm.ObjectFileRef.from_data(part.object_file))
    engine.finalize_object()
    return engine.get_function_address(HANDLER), (engine, parts)


def emit(modules: Sequence[str]) -> MachineCode:
    """Makes machine code of modules of optimized LLVM instructions.

    Args:
      modules: The modules as text. All functions but the handler and its helper become private.
    """
    whole, *others = map(llvm.parse_assembly, modules)
    for other in others:
        whole.link_in(other)
    names = []
    for defined in (*whole.functions, *whole.global_variables):
        if not defined.is_declaration:
            is_called = defined.name in (HANDLER, HELPER)
            defined.linkage = "external" if is_called else "private"
        elif defined.name != HELPER and not defined.name.startswith("llvm."):  # An instruction.
            names.append(defined.name)
    return MachineCode(_target_machine().emit_object(whole), tuple(names))


def _new_engine() -> Any:
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), _target_machine())


def _target_machine() -> Any:
    """Returns LLVM's description of this processor, with the options that numba uses."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    return target.create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="static" if target.name.startswith("x86") else "default",
        codemodel="jitdefault",
        jit=True,
    )
