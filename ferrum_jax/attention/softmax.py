"""The online softmax that all kernels compute: its state, and the arithmetic on logits."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LOWEST = float(jnp.finfo(jnp.float32).min)
"""First value of a running maximum of logits: finite, because infinity less itself is NaN."""

_LINEAR_RATIO = (
    1e-4  # The tanh of a smaller ratio is the ratio: they differ by a third of its cube.
)

# A cap as large as this leaves the differences of finite logits as they are, or huge. The
# reciprocal of a larger cap is too small for a normal float32.
_UNBENDING_CAP = 2.0**126


class Softmax(NamedTuple):
    """The state of an online softmax, for any leading axes X; arrays, or references to them.

    Attributes:
      peak: f32[X]. Largest logit so far, at least `LOWEST`.
      total: f32[X]. Sum of `exp(logit - peak)`.
      acc: f32[X, D]. Sum of the values, each weighted by its `exp(logit - peak)`.
    """

    peak: Any
    total: Any
    acc: Any


def is_seen(
    key_position: jax.Array, query_position: jax.Array, sliding_window: int | None
) -> jax.Array:
    """Returns bool, whether keys are seen by queries; positions are i32, broadcast to one shape."""
    seen = key_position <= query_position
    if sliding_window is not None:
        seen &= key_position > query_position - sliding_window
    return seen


def soft_capped(logits: jax.Array, soft_cap: float) -> jax.Array:
    """Returns `soft_cap * tanh(logits / soft_cap)`.

    Args:
      logits: f32[...]. Logits of any size, infinite ones included.
      soft_cap: The bound, from `AttentionOptions.float32_soft_cap`.
    """
    if soft_cap >= _UNBENDING_CAP:
        return jnp.clip(logits, LOWEST, -LOWEST)
    ratio = logits * (1.0 / soft_cap)
    # The ratio to a large cap may be too small for float32, which makes zero of it.
    return jnp.where(jnp.abs(ratio) < _LINEAR_RATIO, logits, soft_cap * jnp.tanh(ratio))
