"""Gemma 3 (text) in Flax NNX: five layers with a sliding window to one that sees all tokens."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.models.layers import Angles, Attention, Batch, LanguageModel, Mlp, RMSNorm
from examples.models.shape import ModelConfig, Rope


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3Config(ModelConfig):
    """Shape of a Gemma 3 model.

    Attributes:
      local_rope_base: Base of the rotary frequencies of the layers with a sliding window;
        `rope_base` and `rope_divisors` are those of the others.
    """

    norm_epsilon: float = 1e-6
    normalizes_heads: bool = True
    rope_base: float = 1_000_000.0
    local_rope_base: float = 10_000.0

    def rope(self, layer: int) -> Rope:
        """Returns the rotary frequencies of a layer."""
        if self.kind(layer).sliding_window is None:
            return super().rope(layer)
        return Rope(head_dim=self.head_dim, base=self.local_rope_base)


def gelu(x: jax.Array) -> jax.Array:
    """Returns the Gaussian error linear unit, approximated by tanh, of each number."""
    return jax.nn.gelu(x, approximate=True)


class Gemma3Layer(nnx.Module):
    """Attention, then MLP, each normalized before and after, and added."""

    attention_type: ClassVar[Callable[..., nnx.Module]] = Attention

    def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        norm = (config.width, config.norm_epsilon, dtype)
        self.attention_norm = RMSNorm(*norm)
        self.attention = self.attention_type(config, layer, rngs, dtype)
        self.attention_out_norm = RMSNorm(*norm)
        self.mlp_norm = RMSNorm(*norm)
        self.mlp = Mlp(config, gelu, rngs, dtype)
        self.mlp_out_norm = RMSNorm(*norm)

    def __call__(self, x: jax.Array, angles: Angles, batch: Batch) -> tuple[jax.Array, Batch]:
        """Maps [width, R * T] to the same, and the batch to the batch after its write."""
        attended, batch = self.attention(self.attention_norm(x), angles, batch)
        x = x + self.attention_out_norm(attended)
        return x + self.mlp_out_norm(self.mlp(self.mlp_norm(x))), batch


class Gemma3(LanguageModel):
    """The whole decoder; its embedding is scaled by the root of its width."""

    def __init__(
        self, config: Gemma3Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        super().__init__(config, Gemma3Layer, rngs, dtype)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Looks up the features [width, N] of tokens i32[N]."""
        x = super().embed(tokens)
        return x * jnp.asarray(self.config.width**0.5, x.dtype)
