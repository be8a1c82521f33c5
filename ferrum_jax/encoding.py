"""The dtype in which a pool stores its numbers: its own, or unsigned integers with their bits.

On CPU, XLA (jax 0.10) scatters into a bfloat16 or float8 array by converting the whole array to
a wider type and back, which costs the size of the pool for every token written. Unsigned
integers of the same width scatter in place. So a CPU pool stores the bits of such numbers, and
only the vectors that are written or read are cast.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

_SCATTERED_IN_PLACE = (jnp.float16, jnp.float32, jnp.float64)
_BITS = {1: jnp.uint8, 2: jnp.uint16}


def storage_dtype(dtype: DTypeLike, platform: str) -> np.dtype:
    """Returns the dtype in which a pool stores numbers.

    Args:
      dtype: Dtype of the numbers.
      platform: The pool's platform, such as "cpu".

    Returns:
      `dtype`, or an unsigned integer dtype of the same width.

    Example:
      >>> storage_dtype("bfloat16", "cpu"), storage_dtype("bfloat16", "gpu")
      (dtype('uint16'), dtype(bfloat16))
    """
    dtype = jnp.dtype(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype not in _SCATTERED_IN_PLACE
    return jnp.dtype(_BITS[dtype.itemsize]) if narrow and platform == "cpu" else dtype


def round_to(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rounds values to the nearest number of a pool's dtype, ties to even.

    Dtypes of 8 bits or less and integers saturate, as the float8 caches of vLLM do: a value beyond
    the largest finite number, infinity included, becomes that number with its sign. NaN stays NaN,
    or becomes 0 in an integer dtype. Wider floating-point dtypes overflow to infinity (IEEE 754).

    Args:
      values: Numbers of any shape and dtype.
      dtype: The pool's dtype.

    Returns:
      The rounded values, of the same shape, in `dtype`.

    Example:
      >>> round_to(jnp.float32([0.9, -1.7, 500, np.inf]), jnp.dtype("int8")).tolist()
      [1, -2, 127, 127]
    """
    if values.dtype == dtype:
        return values
    if jnp.issubdtype(dtype, jnp.integer):
        return _round_to_integer(values, dtype)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
        largest = float(jnp.finfo(dtype).max)
        is_wide = jnp.issubdtype(values.dtype, jnp.floating) and values.dtype.itemsize > 1
        values = jnp.clip(values if is_wide else values.astype(jnp.float32), -largest, largest)
    return values.astype(dtype)


def encode(values: jax.Array, dtype: np.dtype, storage: np.dtype) -> jax.Array:
    """Rounds values by `round_to`, and returns them as a pool of dtype `storage` stores them."""
    values = round_to(values, dtype)
    return values if storage == dtype else lax.bitcast_convert_type(values, storage)


def decode(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns stored values as numbers of `dtype`; the inverse of `encode`."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


def decode_f32(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns stored values as float32; the conversion is exact."""
    if stored.dtype == jnp.uint16 and dtype == jnp.bfloat16:
        # A bfloat16 is the upper half of a float32: cheaper than a bitcast and a conversion.
        return lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return decode(stored, dtype).astype(jnp.float32)


def _round_to_integer(values: jax.Array, dtype: np.dtype) -> jax.Array:
    """Rounds values to an integer dtype; see `round_to`."""
    info = jnp.iinfo(dtype)
    if jnp.issubdtype(values.dtype, jnp.integer):
        given = jnp.iinfo(values.dtype)
        low, high = max(info.min, given.min), min(info.max, given.max)
        return jnp.clip(values, values.dtype.type(low), values.dtype.type(high)).astype(dtype)
    values = values if values.dtype.itemsize >= 4 else values.astype(jnp.float32)
    values = jnp.rint(jnp.where(jnp.isnan(values), 0, values))
    # A conversion of a number that does not fit depends on the platform.
    least, largest = (np.asarray(x, dtype) for x in (info.min, info.max))
    rounded = jnp.where(values >= float(info.max), largest, values.astype(dtype))
    return jnp.where(values <= float(info.min), least, rounded)
