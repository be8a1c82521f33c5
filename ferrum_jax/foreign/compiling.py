"""How functions are compiled to native code, and how XLA comes to call them."""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target

from ferrum_jax import arithmetic
from ferrum_jax.foreign.machine_code import HANDLER, MachineCode, emit

# Only native code calls these functions: not Python, and not numba as a C function.
_NATIVE: dict[str, Any] = {
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
# The order of sums is kept: results must not depend on what LLVM makes of a loop. The largest
# functions are inlined into their callers: a function that is compiled by itself is optimized again
# with every function that calls it, which takes longer.
_OPTIONS: dict[str, Any] = {"fastmath": {"contract", "nsz"}, **_NATIVE}
compiled = njit(**_OPTIONS)
inlined = njit(inline="always", **_OPTIONS)

_INT64 = types.int64
POINTER = types.CPointer(_INT64)
"""Type of a `Pointer` to int64 numbers."""


def compiled_for(result: Any, *parameters: Any) -> Any:
    """Returns a decorator like `compiled` for these types of numba alone.

    Otherwise numba compiles a function once for each constant that is passed to it.
    """
    return njit(result(*parameters), **_OPTIONS)


ceil_div = compiled_for(_INT64, _INT64, _INT64)(arithmetic.ceil_div)


def handler_code(handler: Any, helper: Any = None) -> MachineCode:
    """Compiles a handler, a function that XLA calls.

    Args:
      handler: Python function `(frame) -> error`, all int64: the address of XLA's call frame, and
        that of an error or 0. With a helper, `(frame, helper) -> error`.
      helper: Python function `int64 -> int64` that the handler may call by its address, also from
        other threads; or None.

    Returns:
      The machine code.
    """
    names = (
        {HANDLER: handler} if helper is None else {"ferrum_jax_helper": helper, HANDLER: handler}
    )
    functions = {}
    for name, function in names.items():
        parameters = [types.int64] * (1 + (function is handler and helper is not None))
        functions[name] = njit(types.int64(*parameters), **_NATIVE)(function)
    modules = [f.inspect_llvm(f.signatures[0]) for f in functions.values()]
    layout = llvmlite.binding.parse_assembly(modules[0]).data_layout
    described = {name: f.overloads[f.signatures[0]].fndesc for name, f in functions.items()}
    return emit([*modules, _c_functions(layout, described)])


def _c_functions(data_layout: str, described: dict[str, Any]) -> str:
    """Returns an LLVM module of the C functions `int64 f(int64)` that call numba's functions.

    numba's own C functions (`cfunc`) need its run time.

    Args:
      data_layout: The layout of data that numba uses.
      described: numba's description of each function by the name of the C function. A function that
        takes more than one argument is given the addresses of those before it.
    """
    module = ir.Module()
    module.triple, module.data_layout = llvmlite.binding.get_process_triple(), data_layout
    integer = ir.IntType(64)
    context: Any = cpu_target.target_context
    addresses: list[Any] = []
    for name, called in described.items():
        function = ir.Function(module, ir.FunctionType(integer, [integer]), name)
        builder = ir.IRBuilder(function.append_basic_block())
        callee = context.declare_function(module, called)
        arguments = [*function.args, *addresses][: len(called.argtypes)]
        _, result = context.call_conv.call_function(
            builder, callee, called.restype, called.argtypes, arguments
        )
        builder.ret(result)
        addresses.append(function.ptrtoint(integer))
    return str(module)


@compiled_for(_INT64, _INT64, _INT64, _INT64)
def clamp(x: int, low: int, high: int) -> int:
    """Returns the number from `low` to `high` that is nearest to `x`."""
    if x > high:
        x = high
    return low if x < low else x
