"""Arithmetic on single numbers: stored numbers widened to float32, and the functions of softmax."""

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

f32, i32, u32 = np.float32, np.int32, np.uint32


def widen(number: Any) -> np.float32:
    """Returns a stored number as float32: uint16 is bfloat16's bits, int16 float16's."""
    raise NotImplementedError(f"{number} is widened in compiled code only.")


@overload(widen)
def _widen(number):
    return {types.float32: _from_float32, types.uint16: _from_bfloat16, types.int16: _from_float16}[
        number
    ]


def _from_float32(number):
    return number


def _from_bfloat16(number):
    return u32(u32(number) << u32(16)).view(f32)


def _from_float16(number):
    sign = u32(u32(u32(number) & u32(0x8000)) << u32(16))
    magnitude = u32(number) & u32(0x7FFF)
    # The exponent's bias is 112 less than float32's.
    bits = u32(u32(magnitude << u32(13)) + u32(112 << 23))
    if magnitude >= u32(0x7C00):  # Infinity and NaN have an exponent of ones.
        bits = u32(bits + u32(112 << 23))
    if magnitude < u32(0x0400):
        # XLA's threads treat subnormal float32 numbers as zero: those of float16 become normal.
        bits = f32(u32(bits + u32(1 << 23)).view(f32) - f32(2.0**-14)).view(u32)
    return u32(bits | sign).view(f32)


# Without "reassoc": the two subtractions below are one subtraction with less rounding.
@njit(fastmath={"contract"}, error_model="numpy")
def exp(x: np.float32) -> np.float32:
    """Returns e^x within 2 units in the last place, NaN for NaN, 0 below -87; x is cut to 87.

    The polynomial is from Cephes (Moshier, `expf`). A call to a library would keep the loops
    around it from being vectorized to 16 numbers.
    """
    is_zero = x < f32(-87.0)
    x = f32(-87.0) if is_zero else x
    x = f32(87.0) if x > f32(87.0) else x
    power = np.floor(x * f32(1.44269504) + f32(0.5))
    x -= power * f32(0.693359375)
    x -= power * f32(-2.12194440e-4)
    y = f32(1.9875691500e-4)
    y = y * x + f32(1.3981999507e-3)
    y = y * x + f32(8.3334519073e-3)
    y = y * x + f32(4.1665795894e-2)
    y = y * x + f32(1.6666665459e-1)
    y = y * x + f32(5.0000001201e-1)
    y = y * x * x + x + f32(1.0)
    y *= i32(i32(i32(power) + i32(127)) << i32(23)).view(f32)
    return f32(0.0) if is_zero else y


@njit(fastmath={"contract"}, error_model="numpy")
def soft_capped(logit: np.float32, soft_cap: np.float32) -> np.float32:
    """Returns `soft_cap * tanh(logit / soft_cap)` within a few units in the last place.

    Near zero it is `logit` times a polynomial from Cephes (Moshier, `tanhf`): the exponential would
    cancel there, and the ratio to a large cap may be too small for float32.
    """
    ratio = logit / soft_cap
    z = ratio * ratio
    y = f32(-5.70498872745e-3)
    y = y * z + f32(2.06390887954e-2)
    y = y * z + f32(-5.37397155531e-2)
    y = y * z + f32(1.33314422036e-1)
    y = y * z + f32(-3.33332819422e-1)
    near = y * z * logit + logit
    far = soft_cap * (f32(1.0) - f32(2.0) / (exp(f32(2.0) * ratio) + f32(1.0)))
    return near if abs(ratio) < f32(0.625) else far
