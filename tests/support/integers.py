"""Integers of all dtypes, and their edges."""

import numpy as np

DTYPES = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
MOST, LEAST = 2**31 - 1, -(2**31)


def edges(dtype):
    """Numbers of a dtype, many of them on an edge that matters."""
    info = np.iinfo(dtype)
    near = {x + d for x in (0, 5, 12, 15, 36, MOST, LEAST, 2**32, 2**33 + 1) for d in (-1, 0, 1, 2)}
    near |= {-(2**32) + 1, info.min, info.min + 1, info.max, info.max - 1}
    return [x for x in near if info.min <= x <= info.max]
