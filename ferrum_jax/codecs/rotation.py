"""Rotation of vectors by a Hadamard matrix, which spreads outliers over all numbers.

The matrix R is its own inverse, so that (q R) · (k R) = q · k: instead of rotating keys and values
back, attention rotates queries and its output (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike


def rotate(x: jax.Array) -> jax.Array:
    """Multiplies vectors (f32[..., D]) by the Hadamard matrix, which is its own inverse."""
    # With lower precision, accelerators round float32 before they multiply.
    return jnp.matmul(x, jnp.asarray(_hadamard(x.shape[-1])), precision=lax.Precision.HIGHEST)


def unrotate(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rotates decoded vectors (f32[..., D]) back, and clips them to the finite range of `dtype`.

    Rounding can make a number near the largest one of the dtype larger than that.
    """
    return jnp.clip(rotate(x), -max_number(dtype), max_number(dtype))


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Returns f32[size, size], orthogonal and symmetric.

    If the size is not a power of two, the matrix is block-diagonal, with blocks of the largest
    power of two that divides it.
    """
    order = size & -size
    matrix = np.ones((1, 1))
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = np.kron(np.eye(size // order), matrix)
    return (matrix / np.sqrt(order)).astype(np.float32)


def max_number(dtype: DTypeLike) -> float:
    """Returns the largest finite number of a dtype."""
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return float(info(dtype).max)
