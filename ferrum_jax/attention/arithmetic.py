"""Arithmetic inside kernels, where numbers keep the 32 bits that they came with."""

import jax


def divide_up(number: jax.Array, divisor: int) -> jax.Array:
    """Returns i32[], `number` by `divisor`, rounded up.

    `pl.cdiv` makes 64 bits of the divisor where `jax_enable_x64` is set, and then refuses them.
    """
    return (number + divisor - 1) // divisor
