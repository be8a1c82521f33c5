"""Arithmetic that kernels share."""

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = float(jnp.finfo(jnp.float32).min)
"""First value of a running maximum of logits: finite, because infinity less itself is NaN."""

_LINEAR_RATIO = 1e-4  # A tanh of less is its argument: they differ by a third of its cube.

# So large a cap leaves all differences of finite logits either as they are, or huge. The reciprocal
# of a larger one is too small for a normal float32.
_UNBENDING_CAP = 2.0**126


def divide_up(number: jax.Array, divisor: int) -> jax.Array:
    """Returns i32[], `number` by `divisor`, rounded up.

    `pl.cdiv` makes 64 bits of the divisor where `jax_enable_x64` is set, and then refuses them.
    """
    return (number + divisor - 1) // divisor


def soft_capped(logits: jax.Array, soft_cap: float) -> jax.Array:
    """Returns `soft_cap * tanh(logits / soft_cap)`.

    Args:
      logits: f32[...]. Logits of any size, infinite ones too.
      soft_cap: The bound, as `AttentionOptions.float32_soft_cap` gives it.
    """
    if soft_cap >= _UNBENDING_CAP:
        return jnp.clip(logits, LOWEST, -LOWEST)
    ratio = logits * (1.0 / soft_cap)
    # The ratio to a large cap may be too small for float32, which makes zero of it.
    return jnp.where(jnp.abs(ratio) < _LINEAR_RATIO, logits, soft_cap * jnp.tanh(ratio))


def multiply_heads(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Returns f32[h, Q, ...], x [h, Q, n] times y head by head, where n is y's axis `axis`."""
    return lax.dot_general(
        x,
        y,
        (((2,), (axis,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )
