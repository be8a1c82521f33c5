"""Integer arithmetic that the whole package shares."""

from __future__ import annotations

import operator
from typing import Any, TypeVar

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


class PerPool(tuple[int, ...]):
    """A number of blocks for each pool of a cache; immutable.

    Example:
      >>> free, needed = PerPool([5, 2]), PerPool([3, 3])
      >>> str(free - needed), needed.fits_in(free), free.total
      ('2 + -1', False, 7)
    """

    __slots__ = ()

    @property
    def total(self) -> int:
        """Blocks of all pools."""
        return sum(self)

    def __add__(self, other: Any) -> PerPool:
        """Adds pool by pool."""
        if len(self) == 1:  # Nearly all caches: half the time.
            return PerPool((self[0] + other[0],))
        return PerPool(map(operator.add, self, other))

    def __sub__(self, other: PerPool) -> PerPool:
        """Subtracts pool by pool."""
        if len(self) == 1:
            return PerPool((self[0] - other[0],))
        return PerPool(map(operator.sub, self, other))

    def __str__(self) -> str:
        """Returns the numbers, joined by +."""
        return " + ".join(map(str, self))

    def times(self, factor: int) -> PerPool:
        """Returns `factor` times each number."""
        if len(self) == 1:
            return PerPool((factor * self[0],))
        return PerPool([factor * number for number in self])

    def at_most(self, other: PerPool) -> PerPool:
        """Returns the smaller number in each pool."""
        return PerPool(map(min, self, other))

    def at_least_zero(self) -> PerPool:
        """Returns each number, or 0 where it is negative."""
        return PerPool([max(0, number) for number in self])

    @property
    def any_positive(self) -> bool:
        """Whether a pool has a number above 0."""
        return self[0] > 0 if len(self) == 1 else any(number > 0 for number in self)

    def helps(self, missing: PerPool) -> bool:
        """Returns whether a pool that lacks blocks has some."""
        if len(self) == 1:
            return self[0] > 0 and missing[0] > 0
        return any(number > 0 and lacks > 0 for number, lacks in zip(self, missing, strict=True))

    def fits_in(self, room: PerPool) -> bool:
        """Returns whether no number is larger than that of `room`."""
        if len(self) == 1:
            return self[0] <= room[0]
        return all(map(operator.le, self, room))
