"""A decoder like gpt-oss in Flax NNX: every second layer has a window, and all have sinks.

A sink is a learnt logit per query head that takes its share of the softmax and adds no value. The
MLP is a mixture of experts. gpt-oss's way to extend contexts (YaRN) is left out.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.models.layers import (
    Angles,
    Attention,
    Batch,
    LanguageModel,
    RMSNorm,
    matrix,
    project,
)
from examples.models.shape import ModelConfig
from ferrum_jax.attention import AttentionOptions

GATE_SLOPE, GATE_LIMIT = 1.702, 7.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptOssConfig(ModelConfig):
    """Shape of a model like gpt-oss.

    Attributes:
      num_experts: MLPs of each layer, each of `mlp_width` hidden features.
      num_used_experts: Experts that a token uses.
    """

    ties_embeddings: bool = False
    rope_base: float = 150_000.0
    num_experts: int
    num_used_experts: int


class GptOssAttention(Attention):
    """Grouped-query attention with biases and sinks.

    Attributes:
      qkv_bias: [heads * head_dim].
      out_bias: [width].
      sinks: [num_q_heads].
    """

    def __init__(self, config: GptOssConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        super().__init__(config, layer, rngs, dtype)
        self.qkv_bias = nnx.Param(jnp.zeros(self.qkv.shape[0], dtype))
        self.out_bias = nnx.Param(jnp.zeros(config.width, dtype))
        self.sinks = nnx.Param(jnp.zeros(config.num_q_heads, dtype))

    def project_in(self, x: jax.Array) -> jax.Array:
        """Projects [width, N] to the queries, keys and values [heads * head_dim, N]."""
        return super().project_in(x) + self.qkv_bias[...][:, None]

    def project_out(self, x: jax.Array) -> jax.Array:
        """Projects what the query heads attended to, [num_q_heads * head_dim, N], to [width, N]."""
        return super().project_out(x) + self.out_bias[...][:, None]

    def options(self) -> AttentionOptions:
        """Returns the variant of attention that this layer computes."""
        return dataclasses.replace(super().options(), sinks=self.sinks[...])


class Experts(nnx.Module):
    """Several gated MLPs, of which each token uses those that the router scores highest.

    Every expert computes every token here; a serving engine would compute the chosen ones only.
    """

    def __init__(self, config: GptOssConfig, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        experts, inner, width = config.num_experts, config.mlp_width, config.width
        self.router = matrix(rngs, experts, width, dtype)
        self.router_bias = nnx.Param(jnp.zeros(experts, dtype))
        self.gate_up = matrix(rngs, experts * 2 * inner, width, dtype)
        self.gate_up_bias = nnx.Param(jnp.zeros(experts * 2 * inner, dtype))
        self.down = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (experts, width, inner), dtype)
        )
        self.down_bias = nnx.Param(jnp.zeros((experts, width), dtype))
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [width, N] to [width, N]."""
        num_experts, num_tokens = self.config.num_experts, x.shape[1]
        scores = project(x, self.router[...]) + self.router_bias[...][:, None]
        best, chosen = jax.lax.top_k(scores.T, self.config.num_used_experts)
        rows = jnp.arange(num_tokens)[:, None]
        shares = jnp.zeros_like(scores.T).at[rows, chosen].set(jax.nn.softmax(best, axis=-1))

        hidden = project(x, self.gate_up[...]) + self.gate_up_bias[...][:, None]
        gate, up = jnp.split(hidden.reshape(num_experts, -1, num_tokens), 2, axis=1)
        gate, up = jnp.minimum(gate, GATE_LIMIT), jnp.clip(up, -GATE_LIMIT, GATE_LIMIT)
        hidden = gate * jax.nn.sigmoid(GATE_SLOPE * gate) * (up + 1)
        out = jnp.einsum("ewi,ein->ewn", self.down[...], hidden) + self.down_bias[...][:, :, None]
        return jnp.einsum("ne,ewn->wn", shares, out)


class GptOssLayer(nnx.Module):
    """Attention, then experts, each normalized before and added after."""

    def __init__(self, config: GptOssConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        self.attention = GptOssAttention(config, layer, rngs, dtype)
        self.mlp_norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        self.experts = Experts(config, rngs, dtype)

    def __call__(self, x: jax.Array, angles: Angles, batch: Batch) -> tuple[jax.Array, Batch]:
        """Maps [width, R * T] to the same, and the batch to the batch after its write."""
        attended, batch = self.attention(self.attention_norm(x), angles, batch)
        x = x + attended
        return x + self.experts(self.mlp_norm(x)), batch


class GptOss(LanguageModel):
    """The whole decoder."""

    def __init__(
        self, config: GptOssConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        super().__init__(config, GptOssLayer, rngs, dtype)
