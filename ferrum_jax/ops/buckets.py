"""Pads sizes to powers of two, so that a program is compiled per bucket, not per size.

Up to a size of n there are at most `2 + log2(n)` programs.
"""

from collections.abc import Sequence

import jax
import numpy as np
from jax.core import Tracer

from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.types import NULL_SEQ


def pad_to_power_of_two(values: np.ndarray, fill_value: int) -> np.ndarray:
    """Returns a copy of values [P] in int32, padded to a power of two; [0] stays [0]."""
    padded = np.full(next_power_of_two(values.size) if values.size else 0, fill_value, np.int32)
    padded[: values.size] = values
    return padded


def stack_to_power_of_two(
    rows: Sequence[Sequence[int]], fill_value: int, at_least: int = 0
) -> np.ndarray:
    """Returns lists of ids as i32[len(rows), P], P a power of two that is not below `at_least`.

    Args:
      rows: The lists.
      fill_value: What stands behind the end of each list.
      at_least: Lower bound of P.
    """
    size = next_power_of_two(max(at_least, *map(len, rows)))
    stacked = np.full((len(rows), size), fill_value, np.int32)
    for padded, ids in zip(stacked, rows, strict=True):
        padded[: len(ids)] = ids
    return stacked


def pad_host_ids(*columns: jax.Array | np.ndarray) -> tuple[jax.Array | np.ndarray, ...]:
    """Pads columns (i32[P] each) to a power of two with `NULL_SEQ`, which equals `NULL_BLOCK`.

    If a column is on the device, all are returned unchanged: to pad it would take a program per P.
    """
    if any(isinstance(column, jax.Array) for column in columns):
        return columns
    size = columns[0].size
    if not size or size == next_power_of_two(size):
        return columns
    return tuple(pad_to_power_of_two(np.asarray(column), NULL_SEQ) for column in columns)


def first_rows(x: jax.Array, num_rows: int) -> jax.Array:
    """Returns `x[:num_rows]` on the device of `x`, without compiling a program per number.

    Unless all rows are asked for, this waits for the array and copies it through the host. A
    program per number is compiled under an outer `jit`, and for an array with rows divided
    among devices or partly in another process.
    """
    if num_rows == x.shape[0]:
        return x
    if not _has_whole_rows(x):
        return x[:num_rows]
    return jax.device_put(np.asarray(x)[:num_rows], x.sharding)


def _has_whole_rows(x: jax.Array) -> bool:
    """Returns whether this process has the whole array, and each device has all of its rows."""
    if isinstance(x, Tracer):
        return False
    return x.is_fully_addressable and x.sharding.shard_shape(x.shape)[0] == x.shape[0]
