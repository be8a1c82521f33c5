"""Parts of the decoders that all families share, from RoPE to the loop over the layers.

Activations are stored features first, [features, N] for N tokens, which XLA runs best on a CPU.
"""

from collections.abc import Callable
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.models.shape import ModelConfig, Rope
from ferrum_jax.attention import AttentionOptions


class CacheBatch(Protocol):
    """The interface of a cache to the model: R rows with up to T new tokens each.

    `ferrum_jax.integrations.PagedBatch` is one; `benchmarks.dense.DenseBatch` is another.
    """

    @property
    def pools(self) -> Any:
        """The cache's arrays, as they are after the writes so far."""
        ...

    @property
    def num_tokens(self) -> int:
        """T, the most new tokens of a row."""
        ...

    @property
    def positions(self) -> jax.Array:
        """i32[R, T]. Position of each new token in its sequence."""
        ...

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> Self:
        """Stores keys and values [R, T, num_kv_heads, head_dim] of one layer."""
        ...

    def attend(self, layer: int, q: jax.Array, options: AttentionOptions) -> jax.Array:
        """Attends queries [R, T, num_q_heads, head_dim] to what the layer holds."""
        ...

    def last(self, x: jax.Array) -> jax.Array:
        """Selects from [R, T, ...] what the next tokens are predicted from, each row's last."""
        ...


Batch = TypeVar("Batch", bound=CacheBatch)
Angles = tuple[jax.Array, jax.Array]


def matrix(rngs: nnx.Rngs, rows: int, columns: int, dtype: DTypeLike) -> nnx.Param:
    """Returns a weight [rows, columns] with small random entries."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, columns), dtype))


def project(x: jax.Array, weight: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Multiplies every token's features by a weight matrix.

    Args:
      x: [in, N]. Features first, tokens second.
      weight: [out, in].
      dtype: Type to accumulate in and return; that of `x` if absent.

    Returns:
      [out, N].
    """
    # Features first is the layout that XLA runs best on a CPU: neither operand is transposed.
    # All matrices of a 135M model, float32, two cores, at 1 | 8 | 32 tokens, in ms:
    # `weight @ x` 11 | 23 | 36, `x @ weight.T` 13 | 31 | 48, `x @ weight[in, out]` 15 | 21 | 41;
    # at 512 tokens they differ by 5 %. Separate q, k, v, gate and up cost 17 % more at 1 token.
    return jnp.matmul(weight, x, preferred_element_type=dtype)


def turn(x: jax.Array) -> jax.Array:
    """Transposes a small matrix in memory.

    Without the barriers XLA folds the transpose into the product before or after it, which then
    takes its slow path: 14 ms instead of 7 for SmolLM2's output matrix at 32 tokens, and 40 times
    as long at 2 tokens.
    """
    return jax.lax.optimization_barrier(jax.lax.optimization_barrier(x).T)


def rotary_angles(positions: jax.Array, rope: Rope) -> Angles:
    """Computes the cosine and sine by which RoPE turns each pair of features.

    Args:
      positions: i32[N].
      rope: The frequencies.

    Returns:
      Two f32[head_dim / 2, N].

    References:
      Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, equation 34.
    """
    pairs = jnp.arange(0, rope.head_dim, 2, dtype=jnp.float32)
    frequencies = jnp.power(jnp.float32(rope.base), -pairs / rope.head_dim)
    if rope.divisors is not None:
        frequencies = frequencies / jnp.asarray(rope.divisors, jnp.float32)
    angles = frequencies[:, None] * positions.astype(jnp.float32)[None, :]
    return computed_once(jnp.cos(angles)), computed_once(jnp.sin(angles))


def computed_once(x: jax.Array) -> jax.Array:
    """Returns f32[F, N] as it is; XLA computes it once, not in each layer that uses it.

    XLA on CPU fuses cosines into what multiplies by them, for every head: that took 6 % of a decode
    step, and 4 % of a long one. It fuses nothing into a product, such as this with the identity.
    """
    return jnp.matmul(jnp.eye(len(x), dtype=x.dtype), x, precision="highest")


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Applies RoPE in the rotate-half convention: feature i pairs with i + head_dim / 2.

    Args:
      x: [heads, head_dim, N].
      angles: What `rotary_angles` returns.

    Returns:
      [heads, head_dim, N].
    """
    cos, sin = (angle[None].astype(x.dtype) for angle in angles)
    first, second = jnp.split(x, 2, axis=1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)


def unit_rms(x: jax.Array, epsilon: float) -> jax.Array:
    """Scales the features [..., features, N] of every token to unit mean square, in float32."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-2, keepdims=True) + epsilon)
    return wide.astype(x.dtype)


class RMSNorm(nnx.Module):
    """Scales every token to unit mean square, then each feature by a learnt factor."""

    def __init__(self, num_features: int, epsilon: float, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(num_features, dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., num_features, N] to the same."""
        scale = self.scale[...].reshape(*[1] * (x.ndim - 2), -1, 1)
        return unit_rms(x, self.epsilon) * scale


class Attention(nnx.Module):
    """Grouped-query attention with keys and values in the batch's cache.

    Attributes:
      qkv: [heads * head_dim, width]. Query heads, then key heads, then value heads.
      out: [width, num_q_heads * head_dim].
      q_norm: Norm of each query head, or None.
      k_norm: Norm of each key head, or None.
    """

    def __init__(self, config: ModelConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        kind = config.kind(layer)
        num_heads = config.num_q_heads + 2 * kind.num_kv_heads
        q_width = config.num_q_heads * kind.head_dim
        self.qkv = matrix(rngs, num_heads * kind.head_dim, config.width, dtype)
        self.out = matrix(rngs, config.width, q_width, dtype)
        norm = (kind.head_dim, config.norm_epsilon, dtype)
        self.q_norm = RMSNorm(*norm) if config.normalizes_heads else None
        self.k_norm = RMSNorm(*norm) if config.normalizes_heads else None
        self.config, self.layer, self.kind = config, layer, kind

    def __call__(self, x: jax.Array, angles: Angles, batch: Batch) -> tuple[jax.Array, Batch]:
        """Writes the new tokens' keys and values, then attends.

        Args:
          x: [width, R * T].
          angles: Of the new tokens' positions.
          batch: The cache, before this layer's write.

        Returns:
          `([width, R * T], batch)`, the batch after this layer's write.
        """
        num_q_heads, num_kv_heads = self.config.num_q_heads, self.kind.num_kv_heads
        heads = self.project_in(x).reshape(-1, self.kind.head_dim, x.shape[1])
        q, k, v = jnp.split(heads, (num_q_heads, num_q_heads + num_kv_heads), axis=0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (tokens_first(y, batch) for y in (q, k, v))
        batch = batch.write(self.layer, k, v)
        out = batch.attend(self.layer, q, self.options())
        return self.project_out(turn(out.reshape(x.shape[1], -1))), batch

    def project_in(self, x: jax.Array) -> jax.Array:
        """Projects [width, N] to the queries, keys and values [heads * head_dim, N]."""
        return project(x, self.qkv[...])

    def project_out(self, x: jax.Array) -> jax.Array:
        """Projects what the query heads attended to, [num_q_heads * head_dim, N], to [width, N]."""
        return project(x, self.out[...])

    def options(self) -> AttentionOptions:
        """Returns the variant of attention that this layer computes."""
        return AttentionOptions(
            scale=self.config.attention_scale, sliding_window=self.kind.sliding_window
        )


def tokens_first(heads: jax.Array, batch: CacheBatch) -> jax.Array:
    """Reorders heads [heads, head_dim, R * T] as a cache takes them, [R, T, heads, head_dim]."""
    return heads.transpose(2, 0, 1).reshape(-1, batch.num_tokens, *heads.shape[:2])


class Mlp(nnx.Module):
    """The gated MLP, `down(activation(gate(x)) * up(x))`."""

    def __init__(
        self,
        config: ModelConfig,
        activation: Callable[[jax.Array], jax.Array],
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ) -> None:
        self.gate_up = matrix(rngs, 2 * config.mlp_width, config.width, dtype)
        self.down = matrix(rngs, config.width, config.mlp_width, dtype)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [width, N] to [width, N]."""
        gate, up = jnp.split(project(x, self.gate_up[...]), 2, axis=0)
        return project(self.activation(gate) * up, self.down[...])


class LanguageModel(nnx.Module):
    """A whole decoder. Layers are unrolled: quicker to run than a scan on a CPU.

    Attributes:
      config: Shape of the model.
      embedding: [vocab_size, width].
      layers: The decoder layers. Each maps `(x, angles, batch)` to `(x, batch)`.
      norm: The last norm.
      head: [vocab_size, width], or None where the embedding is used.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_type: Callable[..., nnx.Module],
        rngs: nnx.Rngs,
        dtype: DTypeLike,
    ) -> None:
        self.config = config
        self.embedding = matrix(rngs, config.vocab_size, config.width, dtype)
        layers = range(config.num_layers)
        self.layers = nnx.List([layer_type(config, layer, rngs, dtype) for layer in layers])
        self.norm = RMSNorm(config.width, config.norm_epsilon, dtype)
        shape = (config.vocab_size, config.width)
        self.head = None if config.ties_embeddings else matrix(rngs, *shape, dtype)

    def __call__(self, tokens: jax.Array, batch: CacheBatch) -> tuple[jax.Array, Any]:
        """Runs R rows of up to T new tokens through the model.

        Args:
          tokens: i32[R, T]. New tokens; those without a position are padding.
          batch: The cache and each token's place in it.

        Returns:
          `(logits, pools)`: f32[R, vocab_size] after what `batch.last` selects, and the
          cache with the new tokens in it.
        """
        positions = batch.positions.reshape(-1)
        ropes = [self.config.rope(layer) for layer in range(self.config.num_layers)]
        angles = {rope: rotary_angles(positions, rope) for rope in dict.fromkeys(ropes)}
        x = self.embed(tokens.reshape(-1))
        for layer, rope in zip(self.layers, ropes, strict=True):
            x, batch = layer(x, angles[rope], batch)
        last = batch.last(x.T.reshape(*tokens.shape, -1))
        return self.logits(last.T), batch.pools

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Looks up the features [width, N] of tokens i32[N]."""
        return self.embedding[...].at[tokens].get(mode="clip").T

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps the last layer's output [width, R] to logits f32[R, vocab_size]."""
        head = self.embedding if self.head is None else self.head
        return turn(project(self.norm(x), head[...], jnp.float32))
