"""Paged attention for Flax Linen models.

A Linen module, called as `(tokens, batch) -> (logits, pools)`, needs no adapter: `module.apply` is
a model function, and the module's variables are the parameters. Keep one module: the `apply` of
another one, even an equal one, is another function, which compiles again. It is hashable if the
module's attributes are.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.decoding.batch import PagedBatch, Rotary, attend_new


class PagedAttention(nn.Module):
    """Causal self-attention on the cache, like `nn.MultiHeadDotProductAttention`.

    Parameters have the names and shapes of that module's, so a checkpoint of either loads into
    the other (keys and values have fewer heads if `num_kv_heads` is given).

    Attributes:
      num_heads: Number of query heads.
      layer: Layer of the cache, different for each layer of the model.
      num_kv_heads: Number of key/value heads, a divisor of `num_heads`; `num_heads` if None.
      qkv_features: Features of all query heads together; those of the input if None.
      out_features: Features of the output; those of the input if None.
      use_bias: Whether the projections have a bias.
      normalize_qk: Whether queries and keys pass through a layer norm.
      dtype: Dtype of the computation; that of input and parameters if None.
      param_dtype: Dtype of the parameters.
      kernel_init: Initializer of the kernels.
      rotary: Rotary embedding of queries and keys, `(x [R, T, H, D], positions i32[R, T]) -> x`;
        none if None. Padding has position -1.
      options: Scale, sliding window, soft cap and sinks; plain attention if None.

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
        """Caches the new tokens' keys and values, and attends to their sequences.

        Args:
          x: [R, T, features]. Activations of the new tokens.
          batch: Rows of the new tokens.

        Returns:
          `(y, batch)`. y: [R, T, out_features]. batch: The batch for the next layer.

        Raises:
          ValueError: `num_heads` does not divide `qkv_features`, or `num_kv_heads` does not divide
            `num_heads`.
        """
        num_kv_heads = self.num_kv_heads or self.num_heads
        qkv_features = self.qkv_features or x.shape[-1]
        if qkv_features % self.num_heads or self.num_heads % num_kv_heads:
            raise ValueError(
                "num_heads must divide qkv_features, and num_kv_heads must divide num_heads; got "
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
