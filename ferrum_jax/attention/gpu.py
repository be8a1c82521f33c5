"""Attention through pages on a GPU, for the calls that its kernels take."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from ferrum_jax.attention.gpu_tuning import Tiling, tiling_for
from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.types import TokenFormat

_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)
_MAX_HEAD_DIM = 256
_MAX_TILE_TOKENS = 1024  # Far more than any tile has.


def supports(inputs: AttentionInputs) -> bool:
    """Returns whether `gpu_attention` takes a call, as far as its shapes and dtypes tell.

    Queries and pool may be float16, bfloat16 or float32, stored natively; heads have at most 256
    numbers. All block sizes, groups, batches, options and formats are taken.
    """
    return (
        inputs.q.dtype in _FLOATS
        and inputs.pool.dtype in _FLOATS
        and inputs.pool.k.dtype == inputs.pool.dtype
        and inputs.pool.head_dim <= _MAX_HEAD_DIM
        and min(*inputs.q.shape, *inputs.block_ids.shape, *inputs.pool.k.shape) > 0
        and _is_addressable(inputs)
        # jax 0.11 announces that the backend will go.
        and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )


def _is_addressable(inputs: AttentionInputs) -> bool:
    """Returns whether the index of a token's vector has 32 bits; offsets have 64 if need be.

    So has the position of each token of a row, and of those that would fill its last tile.
    """
    pool = inputs.pool
    row_tokens = inputs.block_ids.shape[1] * pool.slots_per_block + _MAX_TILE_TOKENS
    return max(pool.k.size // pool.head_dim, row_tokens) < 1 << 31


@functools.partial(jax.jit, static_argnames=("token_format", "tiling", "interpret"))
def gpu_attention(
    inputs: AttentionInputs,
    token_format: TokenFormat = TokenFormat.Native,
    tiling: Tiling | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention with a softmax in float32, each row's tokens shared out among programs.

    Args:
      inputs: Checked arguments that `supports` accepts; letters as there.
      token_format: How the rows' tokens are written (static). What is rotated stays so.
      tiling: Sizes of tiles (static); `tiling_for` the call if absent.
      interpret: Whether to run on any platform, slowly, to test (static).

    Returns:
      [R, T, H, G, D], dtype `inputs.out_dtype`. Zero where a query sees no token.
    """
    # Not above: later versions of JAX may lack what this file imports.
    from ferrum_jax.attention.gpu_kernel import attend_spans
    from ferrum_jax.attention.gpu_merging import merge_splits

    tiling = tiling_for(inputs, token_format) if tiling is None else tiling
    partial = attend_spans(inputs, token_format, tiling, interpret)
    sinks = None if inputs.sinks is None else inputs.sinks.reshape(-1)
    dtype = inputs.out_dtype(token_format)
    return merge_splits(partial, sinks, dtype, interpret).reshape(inputs.q.shape)
