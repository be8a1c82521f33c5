"""How functions are compiled to native code, and how XLA comes to call them."""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target

from ferrum_jax import arithmetic
from ferrum_jax.foreign.machine_code import HANDLER, HELPER, MachineCode, emit

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


def handler_code(handler: Any) -> MachineCode:
    """Compiles a handler, a function that XLA calls.

    Args:
      handler: Python function `frame -> error`, both int64: the address of XLA's call frame, and
        that of an error or 0. Or `(frame, helper) -> error`, which is given the address of the
        helper, another part of its code.
    """
    return _code_of(HANDLER, handler)


def helper_code(helper: Any) -> MachineCode:
    """Compiles a helper, a function that a handler calls by its address.

    Args:
      helper: Python function `int64 -> int64`.
    """
    return _code_of(HELPER, helper)


def _code_of(name: str, function: Any) -> MachineCode:
    """Compiles a function as the C function `int64 name(int64)`.

    numba's own C functions (`cfunc`) need its run time.
    """
    num_parameters = function.__code__.co_argcount
    signature = _INT64(*[_INT64] * num_parameters)
    compiled_function = njit(signature, **_NATIVE)(function)
    instructions = compiled_function.inspect_llvm(signature.args)
    described = compiled_function.overloads[signature.args].fndesc

    module = ir.Module()
    module.triple = llvmlite.binding.get_process_triple()
    module.data_layout = llvmlite.binding.parse_assembly(instructions).data_layout
    integer = ir.IntType(64)
    context: Any = cpu_target.target_context
    of_c = ir.FunctionType(integer, [integer])
    outer = ir.Function(module, of_c, name)
    builder = ir.IRBuilder(outer.append_basic_block())
    arguments: list[Any] = list(outer.args)
    if num_parameters > 1:
        arguments.append(ir.Function(module, of_c, HELPER).ptrtoint(integer))
    callee = context.declare_function(module, described)
    _, result = context.call_conv.call_function(
        builder, callee, described.restype, described.argtypes, arguments
    )
    builder.ret(result)
    return emit([instructions, str(module)])


@compiled_for(_INT64, _INT64, _INT64, _INT64)
def clamp(x: int, low: int, high: int) -> int:
    """Returns the number from `low` to `high` that is nearest to `x`."""
    if x > high:
        x = high
    return low if x < low else x
