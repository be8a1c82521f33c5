"""Attention through the cache for Flax Linen models.

A Linen module whose call is `(tokens, batch) -> (logits, pool)` needs no adapter: its bound
`module.apply` is a model function, and its variables are the parameters. It is hashable if the
module's attributes are.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.integrations.batch import PagedBatch, Rotary, attend_new


class PagedAttention(nn.Module):
    """Causal self-attention through the cache, with `nn.MultiHeadDotProductAttention`'s names.

    Parameters have the names and shapes of that module's, so a checkpoint of either loads into
    the other (keys and values have fewer heads if `num_kv_heads` is given).

    Attributes:
      num_heads: Query heads.
      layer: The cache's layer to use, each layer of a model its own.
      num_kv_heads: Heads of keys and values, which divide `num_heads`; as many if absent.
      qkv_features: Numbers of all query heads together; those of the input if absent.
      out_features: Numbers of the output; those of the input if absent.
      use_bias: Whether the projections have a bias.
      normalize_qk: Whether queries and keys go through a layer norm.
      dtype: What is computed in; follows input and parameters if absent.
      param_dtype: What parameters are made in.
      kernel_init: How kernels are made.
      rotary: Turns queries and keys by their positions, `(x [R, T, H, D], positions i32[R, T])
        -> x`. Positions of padding are -1.
      options: Scale, sliding window, soft cap, sinks.

    Example:
      >>> PagedAttention(num_heads=4, num_kv_heads=2, layer=0).use_bias
      True
    """

    num_heads: int
    layer: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    normalize_qk: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = nn.linear.default_kernel_init
    rotary: Rotary | None = None
    options: AttentionOptions | None = None

    @nn.compact
    def __call__(self, x: jax.Array, batch: PagedBatch) -> tuple[jax.Array, PagedBatch]:
        """Stores the new tokens' keys and values, and lets the tokens see their sequences.

        Args:
          x: [R, T, features]. New tokens.
          batch: Where they belong.

        Returns:
          `(y, batch)`: y is [R, T, out_features], and the batch is to be given to what follows.

        Raises:
          ValueError: `num_heads` does not divide `qkv_features`, or `num_kv_heads` `num_heads`.
        """
        num_kv_heads = self.num_kv_heads or self.num_heads
        qkv_features = self.qkv_features or x.shape[-1]
        if qkv_features % self.num_heads or self.num_heads % num_kv_heads:
            raise ValueError(
                f"num_heads must divide qkv_features, and num_kv_heads num_heads; got "
                f"num_heads={self.num_heads}, {qkv_features=}, {num_kv_heads=}."
            )
        head_dim = qkv_features // self.num_heads
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        dense = functools.partial(
            nn.DenseGeneral, use_bias=self.use_bias, kernel_init=self.kernel_init, **dtypes
        )
        q = dense((self.num_heads, head_dim), name="query")(x)
        k = dense((num_kv_heads, head_dim), name="key")(x)
        v = dense((num_kv_heads, head_dim), name="value")(x)
        if self.normalize_qk:
            q = nn.LayerNorm(use_bias=False, name="query_ln", **dtypes)(q)
            k = nn.LayerNorm(use_bias=False, name="key_ln", **dtypes)(k)
        seen, batch = attend_new(
            batch, self.layer, (q, k, v), rotary=self.rotary, options=self.options
        )
        out = dense(self.out_features or x.shape[-1], axis=(-2, -1), name="out")
        return out(seen), batch
