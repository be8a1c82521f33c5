"""A decoder like Gemma 4 (text) in Flax NNX: two head sizes, and layers that share a cache.

Full layers have larger heads than those with a sliding window, their keys are their values too
before the norms, and RoPE turns a part of their features only. The last layers have no keys and
values: each reads the cache of the last earlier layer of its kind. Gemma 4's per-layer embeddings
and experts are left out: they are no concern of a cache.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.models.gemma3 import Gemma3Layer
from examples.models.layers import (
    Angles,
    Batch,
    LanguageModel,
    RMSNorm,
    matrix,
    project,
    rotate,
    tokens_first,
    turn,
    unit_rms,
)
from examples.models.shape import LayerKind, ModelConfig, Rope
from ferrum_jax.attention import AttentionOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma4Config(ModelConfig):
    """Shape of a model like Gemma 4.

    Attributes:
      num_global_kv_heads: Heads that full layers cache; `num_kv_heads` is that of the others.
      global_head_dim: Features of a head of full layers; `head_dim` is that of the others.
      full_rotated: Share of the features of a full layer's head that RoPE turns.
      local_rope_base: Base of the rotary frequencies of the layers with a sliding window.
      num_kv_shared_layers: Last layers, which read the caches of earlier ones.
      logit_cap: Bound on the logits, `logit_cap * tanh(logits / logit_cap)`.
    """

    norm_epsilon: float = 1e-6
    attention_scale: float | None = 1.0
    rope_base: float = 1_000_000.0
    num_global_kv_heads: int
    global_head_dim: int
    full_rotated: float = 0.25
    local_rope_base: float = 10_000.0
    num_kv_shared_layers: int = 0
    logit_cap: float = 30.0

    def kind(self, layer: int) -> LayerKind:
        """Returns what a layer caches and sees."""
        kind = super().kind(layer)
        if kind.sliding_window is None:
            heads = {"num_kv_heads": self.num_global_kv_heads, "head_dim": self.global_head_dim}
            kind = dataclasses.replace(kind, **heads)
        first_shared = self.num_layers - self.num_kv_shared_layers
        if layer < first_shared:
            return kind
        (*_, owner) = (other for other in range(first_shared) if self.kind(other) == kind)
        return dataclasses.replace(kind, shared_layer=owner)

    def rope(self, layer: int) -> Rope:
        """Returns the rotary frequencies of a layer."""
        if self.kind(layer).sliding_window is not None:
            return Rope(head_dim=self.head_dim, base=self.local_rope_base)
        pairs = self.global_head_dim // 2
        rotated = int(pairs * self.full_rotated)
        divisors = (1.0,) * rotated + (math.inf,) * (pairs - rotated)
        return Rope(head_dim=self.global_head_dim, base=self.rope_base, divisors=divisors)


class Gemma4Attention(nnx.Module):
    """Attention with normalized queries, keys and values.

    Attributes:
      q: [num_q_heads * head_dim, width].
      k: [num_kv_heads * head_dim, width], or None for a layer that reads another's cache.
      v: As `k`; None where values are made of the projected keys too.
      out: [width, num_q_heads * head_dim].
    """

    def __init__(self, config: Gemma4Config, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        kind = config.kind(layer)
        q_width, kv_width = (n * kind.head_dim for n in (config.num_q_heads, kind.num_kv_heads))
        is_full, has_cache = kind.sliding_window is None, kind.shared_layer is None
        self.q = matrix(rngs, q_width, config.width, dtype)
        self.q_norm = RMSNorm(kind.head_dim, config.norm_epsilon, dtype)
        self.k = matrix(rngs, kv_width, config.width, dtype) if has_cache else None
        self.k_norm = RMSNorm(kind.head_dim, config.norm_epsilon, dtype) if has_cache else None
        self.v = matrix(rngs, kv_width, config.width, dtype) if has_cache and not is_full else None
        self.out = matrix(rngs, config.width, q_width, dtype)
        self.config, self.layer, self.kind = config, layer, kind

    def __call__(self, x: jax.Array, angles: Angles, batch: Batch) -> tuple[jax.Array, Batch]:
        """Writes the new tokens' keys and values, if the layer has its own, then attends.

        Args:
          x: [width, R * T].
          angles: Of the new tokens' positions.
          batch: The cache, before this layer's write.

        Returns:
          `([width, R * T], batch)`, the batch after this layer's write.
        """
        if self.k is not None and self.k_norm is not None:
            k = self._heads(x, self.k)
            v = k if self.v is None else self._heads(x, self.v)
            k, v = rotate(self.k_norm(k), angles), unit_rms(v, self.config.norm_epsilon)
            batch = batch.write(self.layer, tokens_first(k, batch), tokens_first(v, batch))
        q = rotate(self.q_norm(self._heads(x, self.q)), angles)
        options = AttentionOptions(
            scale=self.config.attention_scale, sliding_window=self.kind.sliding_window
        )
        out = batch.attend(self.layer, tokens_first(q, batch), options)
        return project(turn(out.reshape(x.shape[1], -1)), self.out[...]), batch

    def _heads(self, x: jax.Array, weight: nnx.Param) -> jax.Array:
        """Projects [width, N] to [heads, head_dim, N]."""
        return project(x, weight[...]).reshape(-1, self.kind.head_dim, x.shape[1])


class Gemma4Layer(Gemma3Layer):
    """Attention, then MLP, each normalized before and after, and added; then scaled.

    Attributes:
      scale: [1]. Factor on the layer's output.
    """

    attention_type = Gemma4Attention

    def __init__(self, config: Gemma4Config, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        super().__init__(config, layer, rngs, dtype)
        self.scale = nnx.Param(jnp.ones(1, dtype))

    def __call__(self, x: jax.Array, angles: Angles, batch: Batch) -> tuple[jax.Array, Batch]:
        """Maps [width, R * T] to the same, and the batch to the batch after its write."""
        x, batch = super().__call__(x, angles, batch)
        return x * self.scale[...].reshape(1, 1), batch


class Gemma4(LanguageModel):
    """The whole decoder; its embedding is scaled, and its logits are bounded."""

    def __init__(
        self, config: Gemma4Config, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        super().__init__(config, Gemma4Layer, rngs, dtype)
        self.logit_cap = config.logit_cap

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Looks up the features [width, N] of tokens i32[N]."""
        x = super().embed(tokens)
        return x * jnp.asarray(self.config.width**0.5, x.dtype)

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps the last layer's output [width, R] to logits f32[R, vocab_size]."""
        return self.logit_cap * jnp.tanh(super().logits(x) / self.logit_cap)
