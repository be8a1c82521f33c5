"""How a pool stores its numbers: natively, or as bits where the backend needs it.

On CPU, XLA (jax 0.10) scatters into a bfloat16 or float8 array by converting the whole array to
a wider type and back, which costs the size of the pool for every token written. Unsigned
integers of the same width scatter in place. So a CPU pool keeps such numbers as their bits, and
only the rows that are written or read are cast. Nothing outside this file knows.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

_SCATTERED_IN_PLACE = (jnp.float16, jnp.float32, jnp.float64)
_BITS = {1: jnp.uint8, 2: jnp.uint16}


def storage_dtype(dtype: DTypeLike, platform: str) -> np.dtype:
    """Returns the dtype in which a pool on `platform` keeps numbers of `dtype`.

    Example:
      >>> storage_dtype("bfloat16", "cpu"), storage_dtype("bfloat16", "gpu")
      (dtype('uint16'), dtype(bfloat16))
    """
    dtype = jnp.dtype(dtype)
    narrow = jnp.issubdtype(dtype, jnp.floating) and dtype not in _SCATTERED_IN_PLACE
    return jnp.dtype(_BITS[dtype.itemsize]) if narrow and platform == "cpu" else dtype


def encode(values: jax.Array, dtype: np.dtype, storage: np.dtype) -> jax.Array:
    """Rounds values to `dtype` and returns them as they are stored (dtype `storage`)."""
    values = values.astype(dtype)
    return values if storage == dtype else lax.bitcast_convert_type(values, storage)


def decode(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns stored rows as numbers of `dtype`; the inverse of `encode`."""
    return stored if stored.dtype == dtype else lax.bitcast_convert_type(stored, dtype)


def decode_f32(stored: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns stored rows as float32, exactly."""
    if stored.dtype == jnp.uint16 and dtype == jnp.bfloat16:
        # A bfloat16 is the upper half of a float32: cheaper than a bitcast and a conversion.
        return lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32)
    return decode(stored, dtype).astype(jnp.float32)
