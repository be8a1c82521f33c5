"""What a model may ask of attention besides the plain softmax."""

import dataclasses
import math

import jax
import numpy as np

from ferrum_jax.checks import check_count, check_number

MAX_WINDOW = np.iinfo(np.int32).max
"""Tokens of the longest window: positions have 32 bits."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Variants of attention, as models define them. Changing a static one recompiles.

    Attributes:
      scale: Factor on `q @ k`; `head_dim ** -0.5` if absent (static).
      sliding_window: Tokens that a query sees, itself included: token i sees j where
        `i - sliding_window < j <= i`. Everything up to i if absent (static).
      soft_cap: Bound on the logits, `soft_cap * tanh(logits / soft_cap)` (static).
      sinks: [Hq]. One logit a query head, which joins the softmax and has no value.

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
            _check_finite("scale", self.scale)
        if self.sliding_window is not None:
            check_count("sliding_window", self.sliding_window)
            if self.sliding_window > MAX_WINDOW:
                raise ValueError(
                    f"sliding_window must be at most {MAX_WINDOW} tokens, got "
                    f"{self.sliding_window}. Leave it None for a window without end."
                )
        if self.soft_cap is not None and not _check_finite("soft_cap", self.soft_cap) > 0:
            raise ValueError(
                f"soft_cap must be positive, got {self.soft_cap}. Leave it None for no cap."
            )

    def scale_for(self, head_dim: int) -> float:
        """Returns the factor on the logits of heads of `head_dim` numbers."""
        return head_dim**-0.5 if self.scale is None else self.scale


def _check_finite(name: str, value: object) -> float:
    """Refuses what is not a finite number."""
    number = check_number(name, value)
    if math.isinf(number):
        raise ValueError(f"{name} must be finite, got {number}. Leave it None for the default.")
    return number
