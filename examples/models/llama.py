"""Llama, Mistral and Qwen 3 in Flax NNX, on any cache, paged or dense."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.models.layers import Angles, Attention, Batch, LanguageModel, Mlp, RMSNorm
from examples.models.shape import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig(ModelConfig):
    """Shape of a Llama-family model: Mistral has a sliding window, Qwen 3 normalizes heads."""


class LlamaLayer(nnx.Module):
    """Attention, then MLP, each normalized before and added after."""

    def __init__(self, config: LlamaConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        self.attention = Attention(config, layer, rngs, dtype)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        self.mlp = Mlp(config, jax.nn.silu, rngs, dtype)

    def __call__(self, x: jax.Array, angles: Angles, batch: Batch) -> tuple[jax.Array, Batch]:
        """Maps [width, R * T] to the same, and the batch to the batch after its write."""
        attended, batch = self.attention(self.attention_norm(x), angles, batch)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), batch


class Llama(LanguageModel):
    """The whole decoder."""

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        super().__init__(config, LlamaLayer, rngs, dtype)
