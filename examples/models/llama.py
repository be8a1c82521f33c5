"""A Llama-family decoder in Flax NNX that works on any cache, paged or dense."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ferrum_jax.attention import AttentionOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Shape of a Llama-family model.

    Attributes:
      vocab_size: Tokens in the vocabulary.
      width: Features of the residual stream.
      num_layers: Decoder layers.
      num_q_heads: Query heads.
      num_kv_heads: Heads that are cached; divides `num_q_heads`.
      head_dim: Features of a head, an even number.
      mlp_width: Hidden features of the gated MLP.
      norm_epsilon: Added to the mean square in RMSNorm.
      rope_base: Base of the rotary frequencies.
      rope_divisors: `head_dim / 2` numbers that divide the rotary frequencies (context
        extension), or None.
      ties_embeddings: Whether the output matrix is the embedding matrix.
      sliding_window: Tokens that a query sees, or None for all before it.
      max_sequence_length: Tokens that the model was trained to hold.
    """

    vocab_size: int
    width: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0
    rope_divisors: tuple[float, ...] | None = None
    ties_embeddings: bool = True
    sliding_window: int | None = None
    max_sequence_length: int = 2048

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads={self.num_q_heads} is not a multiple of "
                f"num_kv_heads={self.num_kv_heads}; query heads are divided evenly among them."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd; RoPE rotates pairs of features.")
        if self.rope_divisors is not None and len(self.rope_divisors) != self.head_dim // 2:
            raise ValueError(
                f"rope_divisors has {len(self.rope_divisors)} entries; RoPE has "
                f"{self.head_dim // 2} frequencies. Give one divisor per frequency."
            )


class CacheBatch(Protocol):
    """The interface of a cache to the model: R rows with up to T new tokens each.

    `ferrum_jax.integrations.PagedBatch` is one; `benchmarks.dense.DenseBatch` is another.
    """

    @property
    def pools(self) -> Any:
        """The cache's arrays, as they are after the writes so far."""
        ...

    @property
    def q_lens(self) -> jax.Array:
        """i32[R]. Valid new tokens of each row."""
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


Batch = TypeVar("Batch", bound=CacheBatch)


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

    Without the barrier XLA folds the transpose into the neighbouring product, which then
    takes its slow path: 14 ms instead of 7 for the output matrix at 32 tokens.
    """
    return jax.lax.optimization_barrier(x.T)


def rotary_angles(positions: jax.Array, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine and sine by which RoPE turns each pair of features.

    Args:
      positions: i32[N].
      config: Gives the base, the divisors and the head size.

    Returns:
      Two f32[head_dim / 2, N].

    References:
      Su et al., "RoFormer", https://arxiv.org/abs/2104.09864, equation 34.
    """
    pairs = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32)
    frequencies = jnp.power(jnp.float32(config.rope_base), -pairs / config.head_dim)
    if config.rope_divisors is not None:
        frequencies = frequencies / jnp.asarray(config.rope_divisors, jnp.float32)
    angles = frequencies[:, None] * positions.astype(jnp.float32)[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
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


class RMSNorm(nnx.Module):
    """Scales every token to unit mean square, then each feature by a learnt factor."""

    def __init__(self, config: LlamaConfig, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones(config.width, dtype))
        self.epsilon = config.norm_epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [width, N] to [width, N]; the mean is taken in float32."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=0, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * self.scale[...][:, None]


class Attention(nnx.Module):
    """Grouped-query attention with keys and values in the batch's cache."""

    def __init__(self, config: LlamaConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        num_heads = config.num_q_heads + 2 * config.num_kv_heads
        q_width = config.num_q_heads * config.head_dim
        self.qkv = _matrix(rngs, num_heads * config.head_dim, config.width, dtype)
        self.out = _matrix(rngs, config.width, q_width, dtype)
        self.config = config
        self.layer = layer

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], batch: Batch
    ) -> tuple[jax.Array, Batch]:
        """Writes the new tokens' keys and values, then attends.

        Args:
          x: [width, R * T].
          angles: Of the new tokens' positions.
          batch: The cache, before this layer's write.

        Returns:
          `([width, R * T], batch)`, the batch after this layer's write.
        """
        config, shape = self.config, batch.positions.shape
        heads = project(x, self.qkv[...]).reshape(-1, config.head_dim, x.shape[1])
        q, k, v = jnp.split(
            heads, (config.num_q_heads, config.num_q_heads + config.num_kv_heads), axis=0
        )
        q, k, v = (
            y.transpose(2, 0, 1).reshape(*shape, -1, config.head_dim)
            for y in (rotate(q, angles), rotate(k, angles), v)
        )
        batch = batch.write(self.layer, k, v)
        options = AttentionOptions(sliding_window=config.sliding_window)
        out = batch.attend(self.layer, q, options)
        return project(turn(out.reshape(x.shape[1], -1)), self.out[...]), batch


class Mlp(nnx.Module):
    """The gated MLP, `down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.gate_up = _matrix(rngs, 2 * config.mlp_width, config.width, dtype)
        self.down = _matrix(rngs, config.width, config.mlp_width, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [width, N] to [width, N]."""
        gate, up = jnp.split(project(x, self.gate_up[...]), 2, axis=0)
        return project(jax.nn.silu(gate) * up, self.down[...])


class DecoderLayer(nnx.Module):
    """Attention, then MLP, each normalised before and added after."""

    def __init__(self, config: LlamaConfig, layer: int, rngs: nnx.Rngs, dtype: DTypeLike) -> None:
        self.attention_norm = RMSNorm(config, dtype)
        self.attention = Attention(config, layer, rngs, dtype)
        self.mlp_norm = RMSNorm(config, dtype)
        self.mlp = Mlp(config, rngs, dtype)

    def __call__(
        self, x: jax.Array, angles: tuple[jax.Array, jax.Array], batch: Batch
    ) -> tuple[jax.Array, Batch]:
        """Maps [width, R * T] to the same, and the batch to the batch after its write."""
        attended, batch = self.attention(self.attention_norm(x), angles, batch)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), batch


class Llama(nnx.Module):
    """The whole decoder. Layers are unrolled: quicker to run than a scan on a CPU.

    Attributes:
      config: Shape of the model.
      embedding: [vocab_size, width].
      layers: The decoder layers.
      norm: The last norm.
      head: [vocab_size, width], or None where the embedding is used.
    """

    def __init__(
        self, config: LlamaConfig, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32
    ) -> None:
        self.config = config
        self.embedding = _matrix(rngs, config.vocab_size, config.width, dtype)
        self.layers = nnx.List(
            [DecoderLayer(config, layer, rngs, dtype) for layer in range(config.num_layers)]
        )
        self.norm = RMSNorm(config, dtype)
        self.head = (
            None
            if config.ties_embeddings
            else _matrix(rngs, config.vocab_size, config.width, dtype)
        )

    def __call__(self, tokens: jax.Array, batch: CacheBatch) -> tuple[jax.Array, Any]:
        """Runs R rows of up to T new tokens through the model.

        Args:
          tokens: i32[R, T]. New tokens; those from `batch.q_lens` on are padding.
          batch: The cache and each token's place in it.

        Returns:
          `(logits, pools)`: f32[R, vocab_size] after each row's last valid token, and the
          cache with the new tokens in it.
        """
        angles = rotary_angles(batch.positions.reshape(-1), self.config)
        x = self.embedding[...].at[tokens.reshape(-1)].get(mode="clip").T
        for layer in self.layers:
            x, batch = layer(x, angles, batch)
        last = jnp.maximum(batch.q_lens - 1, 0)
        x = x.reshape(-1, *tokens.shape)
        x = jnp.take_along_axis(x, last[None, :, None], axis=2, mode="clip")[:, :, 0]
        head = self.embedding if self.head is None else self.head
        return turn(project(self.norm(x), head[...], jnp.float32)), batch.pools


def from_params(config: LlamaConfig, params: Mapping[str, Any]) -> Llama:
    """Makes a model of loaded weights, without initialising any.

    Args:
      config: Shape of the model.
      params: Nested dict of arrays, as `examples.models.weights.load` returns.

    Returns:
      The model.

    Raises:
      ValueError: If a weight is missing or has another shape than `config` says.
    """
    abstract = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(abstract)
    want = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
    have = dict(jax.tree_util.tree_flatten_with_path(dict(params))[0])
    for path, leaf in want:
        found = have.pop(path, None)
        if found is None or found.shape != leaf.shape:
            raise ValueError(
                f"params{jax.tree_util.keystr(path)} must have shape {leaf.shape}, got "
                f"{None if found is None else found.shape}. Load the config and the weights "
                "from the same model."
            )
    nnx.replace_by_pure_dict(state, dict(params))
    return nnx.merge(graphdef, state)


def functional(model: Llama) -> tuple[Callable[..., tuple[jax.Array, Any]], nnx.State]:
    """Splits a model into a pure function and its parameters.

    Args:
      model: The model.

    Returns:
      `(model_fn, params)` with `model_fn(params, tokens, batch) -> (logits, pools)`. Keep
      `model_fn`: `jax.jit` compiles again for another one.
    """
    graphdef, params = nnx.split(model)

    def model_fn(params: nnx.State, tokens: jax.Array, batch: CacheBatch) -> tuple[jax.Array, Any]:
        return nnx.merge(graphdef, params)(tokens, batch)

    return model_fn, params


def _matrix(rngs: nnx.Rngs, rows: int, columns: int, dtype: DTypeLike) -> nnx.Param:
    """A weight [rows, columns] with small random entries."""
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), (rows, columns), dtype))
