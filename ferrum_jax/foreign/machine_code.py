"""Machine code: made of LLVM's instructions, and loaded. It needs llvmlite alone.

The code calls functions of the C library, and nothing of numba or of Python, so that a process can
load it that does not import numba.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import llvmlite.binding as llvm

HANDLER = "ferrum_jax_handler"
"""Name of the function that XLA calls."""


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """Machine code for this processor.

    Attributes:
      object_file: The code, in the platform's format of object files.
      names: Functions and variables that the code expects in the process. LLVM may add calls of
        those that every process has, such as `memset`.
    """

    object_file: bytes
    names: tuple[str, ...]

    @property
    def can_be_loaded(self) -> bool:
        """Whether the process has all that the code expects; LLVM ends the process otherwise."""
        _new_engine()  # The first one finds the process's own functions.
        return all(llvm.address_of_symbol(name) is not None for name in self.names)

    def load(self) -> tuple[int, Any]:
        """Loads the code, which can be loaded.

        Returns:
          `(address, keep)`: address of the handler, and objects to keep alive as long as XLA may
          call the handler.
        """
        engine = _new_engine()
        engine.add_object_file(llvm.ObjectFileRef.from_data(self.object_file))
        engine.finalize_object()
        return engine.get_function_address(HANDLER), (engine, self.object_file)


def emit(modules: Sequence[str]) -> MachineCode:
    """Makes machine code of modules of optimized LLVM instructions, one of which defines `HANDLER`.

    Args:
      modules: The modules as text. All functions but the handler become private.
    """
    whole, *others = map(llvm.parse_assembly, modules)
    for other in others:
        whole.link_in(other)
    names = []
    for defined in (*whole.functions, *whole.global_variables):
        if not defined.is_declaration:
            defined.linkage = "external" if defined.name == HANDLER else "private"
        elif not defined.name.startswith("llvm."):  # Those are instructions.
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
