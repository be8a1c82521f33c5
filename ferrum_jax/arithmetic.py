"""Integer arithmetic that the whole package shares."""

from typing import TypeVar

import jax
import numpy as np

_Number = TypeVar("_Number", int, jax.Array, np.ndarray)


def ceil_div(number: _Number, divisor: int) -> _Number:
    """Returns `number / divisor`, rounded up: for integers, arrays of them, and in kernels.

    `pl.cdiv` makes 64 bits of the divisor where `jax_enable_x64` is set, and then refuses them.

    Example:
      >>> [ceil_div(number, 4) for number in (0, 1, 4, 5)]
      [0, 1, 1, 2]
    """
    return (number + divisor - 1) // divisor


def next_power_of_two(number: int) -> int:
    """Returns the smallest power of two that is at least `number`; 1 for 0.

    Example:
      >>> [next_power_of_two(number) for number in (0, 1, 2, 3, 8, 9)]
      [1, 1, 2, 4, 8, 16]
    """
    return 1 << max(0, number - 1).bit_length()
