"""The two products of attention on vectors of 16 numbers, as LLVM instructions.

The order of every sum is written out, so that it is the same for a query alone and among others:

- A logit is the sum of 16 lanes, lane j that of the products of numbers j, j + 16, and so on.
- An output number is the sum over tokens in their order.

Where registers are narrower, LLVM splits vectors. That changes no result.
"""

from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils

from ferrum_jax.attention.softmax import LOWEST
from ferrum_jax.foreign.memory import instruction

LANES = 16
"""Float32 numbers of a vector."""

KEYS_AT_ONCE = 4
"""Keys that `multiply` takes."""

QUERIES_AT_ONCE = 4 if llvmlite.binding.get_host_cpu_features().get("avx512f") else 1
"""Most queries that share a key or value in registers."""

_I64, _F32 = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_VECTOR_BYTES = 4 * LANES


def _load(builder: Any, address: Any, kind: Any = _VECTOR) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=4)


def _store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def _at(builder: Any, address: Any, index: Any, stride: Any) -> Any:
    """Returns the address of an element; index and stride may be Python's."""
    index, stride = (_I64(x) if isinstance(x, int) else x for x in (index, stride))
    return builder.add(address, builder.mul(index, stride))


def _add_product(builder: Any, total: Any, x: Any, y: Any) -> None:
    """Adds a product to a variable, rounded once where the processor can."""
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
    builder.store(builder.call(function, [x, y, builder.load(total)]), total)


def _variable(builder: Any, value: Any) -> Any:
    """Returns a variable of a vector, which LLVM keeps in a register."""
    variable = cgutils.alloca_once(builder, _VECTOR)
    builder.store(value, variable)
    return variable


def _shuffled(builder: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    """Returns a vector of lanes of `x`, and from its length on of `y`."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes)
    return builder.shuffle_vector(x, y, mask)


def _fold_lanes(builder: Any, x: Any, combine: Any) -> Any:
    """Combines the two halves of a vector."""
    count = x.type.count // 2
    first, second = (
        _shuffled(builder, x, x, list(range(start, start + count))) for start in (0, count)
    )
    return combine(first, second)


def _add_lanes(builder: Any, totals: list[Any]) -> Any:
    """Adds the lanes of each of 4 vectors; returns a vector of the 4 sums.

    Lanes 0 and 2 of each quarter are added first, lanes 1 and 3, then these two, and then quarters,
    which processors do without moving numbers between quarters.
    """

    def add_pairs(x: Any, y: Any) -> Any:
        low, high = (
            [quarter + lane for quarter in range(0, LANES, 4) for lane in lanes]
            for lanes in ((0, LANES, 1, LANES + 1), (2, LANES + 2, 3, LANES + 3))
        )
        return builder.fadd(_shuffled(builder, x, y, low), _shuffled(builder, x, y, high))

    x, y = (add_pairs(*totals[first : first + 2]) for first in (0, 2))
    low, high = (
        [quarter + lane for quarter in range(0, LANES, 4) for lane in lanes]
        for lanes in ((0, 1, LANES, LANES + 1), (2, 3, LANES + 2, LANES + 3))
    )
    sums = builder.fadd(_shuffled(builder, x, y, low), _shuffled(builder, x, y, high))
    return _fold_lanes(builder, _fold_lanes(builder, sums, builder.fadd), builder.fadd)


def _multiply(num_queries: int) -> Any:
    """Returns the function that multiplies a few queries with 4 keys.

    It is `(queries, (key, key, key, key), logits, dim, stride) -> None`: all are addresses but
    `dim`, the numbers of a query, a multiple of 16, and `stride`, the bytes between the logits of
    two queries. The 4 logits of a query lie together.
    """
    addresses = types.UniTuple(types.int64, KEYS_AT_ONCE)

    @instruction(types.void, types.int64, addresses, types.int64, types.int64, types.int64)
    def multiply(
        _: Any, builder: Any, queries: Any, keys: Any, logits: Any, dim: Any, stride: Any
    ) -> None:
        keys = cgutils.unpack_tuple(builder, keys)
        zero = ir.Constant(_VECTOR, None)
        totals = [[_variable(builder, zero) for _ in keys] for _ in range(num_queries)]
        query_bytes = builder.mul(dim, _I64(4))
        with cgutils.for_range(builder, builder.udiv(dim, _I64(LANES))) as loop:
            offset = builder.mul(loop.index, _I64(_VECTOR_BYTES))
            key_numbers = [_load(builder, builder.add(key, offset)) for key in keys]
            for x, query_totals in enumerate(totals):
                query = builder.add(_at(builder, queries, x, query_bytes), offset)
                query_numbers = _load(builder, query)
                for total, numbers in zip(query_totals, key_numbers, strict=True):
                    _add_product(builder, total, query_numbers, numbers)
        for x, query_totals in enumerate(totals):
            sums = _add_lanes(builder, [builder.load(total) for total in query_totals])
            _store(builder, sums, _at(builder, logits, x, stride))

    return multiply


def _add_weighted(num_queries: int, num_vectors: int) -> Any:
    """Returns the function that adds weighted values to a few queries' sums.

    It is `(sums, weights, values, count, dim, stride) -> None`: the first three are addresses,
    `count` the number of values, `dim` the numbers from one value or query to the next, and
    `stride` the bytes between the weights of two queries. It takes `num_vectors` vectors of a
    value.
    """

    @instruction(types.void, *[types.int64] * 6)
    def add_weighted(
        _: Any,
        builder: Any,
        sums: Any,
        weights: Any,
        values: Any,
        count: Any,
        dim: Any,
        stride: Any,
    ) -> None:
        value_bytes = builder.mul(dim, _I64(4))
        places = [
            [
                _at(builder, _at(builder, sums, x, value_bytes), v, _VECTOR_BYTES)
                for v in range(num_vectors)
            ]
            for x in range(num_queries)
        ]
        totals = [[_variable(builder, _load(builder, place)) for place in row] for row in places]
        with cgutils.for_range(builder, count) as loop:
            value = _at(builder, values, loop.index, value_bytes)
            numbers = [
                _load(builder, _at(builder, value, v, _VECTOR_BYTES)) for v in range(num_vectors)
            ]
            for x, row in enumerate(totals):
                weight = _at(builder, _at(builder, weights, x, stride), loop.index, 4)
                weight = _load(builder, weight, _F32)
                lane = builder.insert_element(
                    ir.Constant(_VECTOR, ir.Undefined), weight, ir.IntType(32)(0)
                )
                zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
                weight = builder.shuffle_vector(lane, lane, zeros)
                for total, number in zip(row, numbers, strict=True):
                    _add_product(builder, total, weight, number)
        for place_row, total_row in zip(places, totals, strict=True):
            for place, total in zip(place_row, total_row, strict=True):
                _store(builder, builder.load(total), place)

    return add_weighted


def _reducer(start: float, name: str) -> Any:
    """Returns the function `(address, count) -> result` that combines float32 numbers.

    Args:
      start: Number to start with.
      name: "fadd" for the sum, or "largest", which ignores NaN.
    """

    def combine(builder: Any, x: Any, y: Any) -> Any:
        if name == "fadd":
            return builder.fadd(x, y)
        return builder.select(builder.fcmp_ordered(">", y, x), y, x)

    @instruction(types.float32, types.int64, types.int64)
    def reduce(_: Any, builder: Any, address: Any, count: Any) -> Any:
        """Combines numbers at an address; their count is a multiple of 16."""
        result = _variable(builder, ir.Constant(_VECTOR, [start] * LANES))
        with cgutils.for_range(builder, builder.udiv(count, _I64(LANES))) as loop:
            numbers = _load(builder, _at(builder, address, loop.index, _VECTOR_BYTES))
            builder.store(combine(builder, builder.load(result), numbers), result)
        found = builder.load(result)
        while isinstance(found.type, ir.VectorType) and found.type.count > 1:
            found = _fold_lanes(builder, found, lambda x, y: combine(builder, x, y))
        return builder.extract_element(found, ir.IntType(32)(0))

    return reduce


add_numbers = _reducer(0.0, "fadd")
largest_number = _reducer(LOWEST, "largest")
multiply_1, multiply_2, multiply_3, multiply_4 = (_multiply(n) for n in (1, 2, 3, 4))
add_1, add_2, add_3, add_4 = (_add_weighted(n, 1) for n in (1, 2, 3, 4))
add_wide_1, add_wide_2, add_wide_3, add_wide_4 = (_add_weighted(n, 4) for n in (1, 2, 3, 4))
