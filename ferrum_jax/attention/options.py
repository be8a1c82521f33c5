"""Variants of attention that a model may ask for."""

import dataclasses
import math

import jax
import numpy as np

from ferrum_jax.checks import check_count, check_number

MAX_WINDOW = np.iinfo(np.int32).max
"""Tokens of the longest sliding window: positions have 32 bits."""

# Kernels multiply by the scale and by its reciprocals in float32.
_MIN_SCALE, _MAX_SCALE = 1e-37, 1e37

# Caps beyond these bounds give the same softmax of float32 logits as the bounds.
_MIN_SOFT_CAP, _MAX_SOFT_CAP = 2.0**-100, float(np.finfo(np.float32).max)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Variants of attention, as models define them. A change of a static one recompiles.

    Attributes:
      scale: Factor on `q @ k`, zero or from 1e-37 to 1e37 in magnitude; `head_dim ** -0.5` if
        absent (static).
      sliding_window: Tokens that a query sees, itself included: token i sees j where
        `i - sliding_window < j <= i`. All tokens up to i if absent (static).
      soft_cap: Bound on the logits, `soft_cap * tanh(logits / soft_cap)` (static).
      sinks: [Hq]. One logit per query head, which is added to the softmax with the value zero.

    Example:
      >>> AttentionOptions(sliding_window=512).sliding_window
      512
    """

    scale: float | None = dataclasses.field(default=None, metadata={"static": True})
    sliding_window: int | None = dataclasses.field(default=None, metadata={"static": True})
    soft_cap: float | None = dataclasses.field(default=None, metadata={"static": True})
    sinks: jax.Array | None = None

    def __post_init__(self):
        if self.scale is not None:
            scale = _check_finite("scale", self.scale)
            if scale != 0 and not _MIN_SCALE <= abs(scale) <= _MAX_SCALE:
                raise ValueError(
                    f"scale must be zero or from {_MIN_SCALE} to {_MAX_SCALE} in magnitude, got "
                    f"{scale}: logits are float32. Scale the queries as well."
                )
            object.__setattr__(self, "scale", scale)
        if self.sliding_window is not None:
            check_count("sliding_window", self.sliding_window)
            if self.sliding_window > MAX_WINDOW:
                raise ValueError(
                    f"sliding_window must be at most {MAX_WINDOW} tokens, got "
                    f"{self.sliding_window}. Leave it None for no window."
                )
        if self.soft_cap is not None:
            soft_cap = _check_finite("soft_cap", self.soft_cap)
            if soft_cap <= 0:
                raise ValueError(
                    f"soft_cap must be positive, got {soft_cap}. Leave it None for no cap."
                )
            object.__setattr__(self, "soft_cap", soft_cap)

    @property
    def float32_soft_cap(self) -> float | None:
        """The soft cap, or the nearest number by which float32 can be divided."""
        if self.soft_cap is None:
            return None
        return min(max(self.soft_cap, _MIN_SOFT_CAP), _MAX_SOFT_CAP)

    def scale_for(self, head_dim: int) -> float:
        """Returns the factor on the logits.

        Args:
          head_dim: Numbers per head.
        """
        return head_dim**-0.5 if self.scale is None else self.scale


def _check_finite(name: str, value: object) -> float:
    """Returns a finite number; raises ValueError for any other value."""
    number = check_number(name, value)
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, got {number}. Leave it None for the default.")
    return number
