"""Instructions that numba lacks: memory by address, atomic counters, arrays on the stack.

Each function here works only inside code that numba compiles, and becomes one or two LLVM
instructions. Addresses are int64; a pointer is indexed like an array, without a bounds check.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

_VECTOR_NUMBERS = 16  # Float32 numbers of the widest vector registers.

Pointer: TypeAlias = Any
"""Numbers in memory, as compiled code sees them."""

Emit: TypeAlias = Callable[..., Any]
"""Writes instructions: `(context, builder, *values) -> value`."""


def instruction(result: Any, *parameters: Any) -> Callable[[Emit], Any]:
    """Returns a decorator: a function that emits instructions becomes one for compiled code."""

    def decorate(emit: Emit) -> Any:
        def codegen(context: Any, builder: Any, _: Any, values: Any) -> Any:
            value = emit(context, builder, *values)
            return context.get_dummy_value() if result is types.void else value

        def define(typing_context: Any, *_: Any) -> Any:
            return result(*parameters), codegen

        names = ["typing_context", *(f"value_{i}" for i in range(len(parameters)))]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
        vars(define)["__signature__"] = signature
        define.__name__, define.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(define)

    return decorate


def _pointers_to(element: Any, machine_element: Any) -> Any:
    """Returns a function `address -> pointer` to elements of a type."""

    @instruction(types.CPointer(element), types.int64)
    def at(context: Any, builder: Any, address: Any) -> Any:
        """Returns a pointer to the numbers at an address."""
        return builder.inttoptr(address, machine_element.as_pointer())

    return at


float32s = _pointers_to(types.float32, _F32)
uint16s = _pointers_to(types.uint16, _I16)
int16s = _pointers_to(types.int16, _I16)
int32s = _pointers_to(types.int32, _I32)
int64s = _pointers_to(types.int64, _I64)


def _room_for(element: Any, machine_element: Any, count: int) -> Any:
    """Returns a function `() -> pointer` that reserves `count` elements on the stack."""

    @instruction(types.CPointer(element))
    def room(context: Any, builder: Any) -> Any:
        """Returns a pointer to uninitialized room on the stack of the calling function."""
        size = ir.Constant(_I64, count)
        pointer = cgutils.alloca_once(builder, machine_element, size=size)
        pointer.align = 64
        return pointer

    return room


@instruction(types.int64, types.CPointer(types.float32))
def address_at(context: Any, builder: Any, pointer: Any) -> Any:
    """Returns the address of a pointer to float32 numbers."""
    return builder.ptrtoint(pointer, _I64)


def stack_float32s(count: int) -> Any:
    """Returns a function `() -> pointer` that reserves `count` float32 on the stack."""
    return _room_for(types.float32, _F32, count)


def stack_int64s(count: int) -> Any:
    """Returns a function `() -> pointer` that reserves `count` int64 on the stack."""
    return _room_for(types.int64, _I64, count)


@instruction(types.int64, types.int64, types.int64)
def fetch_add(context: Any, builder: Any, address: Any, value: Any) -> Any:
    """Adds to an int64 that threads share; returns the value before."""
    pointer = builder.inttoptr(address, _I64.as_pointer())
    return builder.atomic_rmw("add", pointer, value, "seq_cst")


@instruction(types.float32, types.float32, types.float32, types.float32)
def fused(context: Any, builder: Any, x: Any, y: Any, z: Any) -> Any:
    """Returns `x * y + z`, rounded once where the processor can."""
    kind = ir.FunctionType(_F32, [_F32] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fmuladd.f32")
    return builder.call(function, [x, y, z])


@instruction(types.int64, types.int64)
def fetch(context: Any, builder: Any, address: Any) -> Any:
    """Reads an int64 that threads share."""
    pointer = builder.inttoptr(address, _I64.as_pointer())
    return builder.load_atomic(pointer, "seq_cst", 8)


def _prefetch_into(level: int) -> Any:
    """Returns a function `address -> None` that starts to fetch a line into a level of cache."""

    @instruction(types.void, types.int64)
    def prefetch(context: Any, builder: Any, address: Any) -> Any:
        """Starts to fetch a cache line; an invalid address does no harm."""
        arguments = [cgutils.voidptr_t, _I32, _I32, _I32]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), arguments), "llvm.prefetch.p0"
        )
        read, locality, data = (ir.Constant(_I32, x) for x in (0, 4 - level, 1))
        pointer = builder.inttoptr(address, cgutils.voidptr_t)
        builder.call(function, [pointer, read, locality, data])

    return prefetch


# The first level waits for few lines at once: on a Zen 4 core, blocks of 4 KB from anywhere in
# memory were read at 10 GB/s through it, and at 15 GB/s if they came into the second level first.
# Code that computes more than it reads, as `packed`, is a few percent faster with the first.
prefetch_first_level, prefetch_second_level = _prefetch_into(1), _prefetch_into(2)


def unpacker(word_bytes: int, bits: int, num_words: int) -> Any:
    """Returns a function that unpacks a few consecutive words.

    The function is `(address, numbers, place, stride) -> None`: the lowest bits of the words at an
    address become the float32 numbers from `place` on, the next bits those from `place + stride`
    on, and so on. LLVM does not vectorize a plain loop here, so vectors are written out.

    Args:
      word_bytes: Bytes per word, 2 or 4.
      bits: Bits per number, its sign included.
      num_words: Words at a time, a power of two.
    """
    num_planes = 8 * word_bytes // bits
    planes_at_once = min(max(_VECTOR_NUMBERS // num_words, 1), num_planes)
    packed = ir.VectorType({2: _I16, 4: _I32}[word_bytes], num_words)
    one_plane = ir.VectorType(_F32, num_words)

    def unpack_planes(builder: Any, taken: Any, plane: int) -> Any:
        planes = range(plane, plane + planes_at_once)
        left = [32 - bits * (p + 1) for p in planes for _ in range(num_words)]
        right = _int32_vector([32 - bits] * len(left))
        shifted = builder.ashr(builder.shl(taken, _int32_vector(left)), right)
        return builder.sitofp(shifted, ir.VectorType(_F32, len(left)))

    @instruction(types.void, types.int64, types.CPointer(types.float32), types.int64, types.int64)
    def unpack(
        context: Any, builder: Any, address: Any, numbers: Any, place: Any, stride: Any
    ) -> Any:
        taken = builder.load(builder.inttoptr(address, packed.as_pointer()))
        taken.align = word_bytes
        if word_bytes == 2:
            taken = builder.sext(taken, ir.VectorType(_I32, num_words))
        copies = _int32_vector(list(range(num_words)) * planes_at_once)
        taken = builder.shuffle_vector(taken, taken, copies)
        for plane in range(0, num_planes, planes_at_once):
            found = unpack_planes(builder, taken, plane)
            for first in range(0, planes_at_once * num_words, num_words):
                mine = _int32_vector(list(range(first, first + num_words)))
                out = builder.bitcast(builder.gep(numbers, [place]), one_plane.as_pointer())
                builder.store(builder.shuffle_vector(found, found, mine), out).align = 4
                place = builder.add(place, stride)

    return unpack


def _int32_vector(numbers: list[int]) -> Any:
    return ir.Constant(ir.VectorType(_I32, len(numbers)), numbers)


@instruction(types.void, types.int64, types.int64, types.int64)
def copy(context: Any, builder: Any, target: Any, source: Any, num_bytes: Any) -> Any:
    """Copies bytes from one address to another; they do not overlap."""
    to, origin = (builder.inttoptr(x, cgutils.voidptr_t) for x in (target, source))
    cgutils.raw_memcpy(builder, to, origin, num_bytes, 1)


@instruction(types.int64, types.int64, types.int64)
def call(context: Any, builder: Any, function: Any, argument: Any) -> Any:
    """Calls the C function `int64 function(int64 argument)` at an address."""
    signature = ir.FunctionType(_I64, [_I64])
    return builder.call(builder.inttoptr(function, signature.as_pointer()), [argument])


def text(characters: str) -> Any:
    """Returns a function `() -> address` of a constant C string."""

    @instruction(types.int64)
    def address(context: Any, builder: Any) -> Any:
        return builder.ptrtoint(context.insert_const_string(builder.module, characters), _I64)

    return address


malloc = types.ExternalFunction("malloc", types.int64(types.int64))
free = types.ExternalFunction("free", types.void(types.int64))
sched_yield = types.ExternalFunction("sched_yield", types.int32())
