"""Attention through pages on a GPU, for the calls that its kernels take."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from ferrum_jax.attention.gpu_tuning import Tiling, tiling_for
from ferrum_jax.attention.inputs import AttentionInputs
from ferrum_jax.state import BlockPool

_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)
_MAX_HEAD_DIM = 256


def supports(inputs: AttentionInputs) -> bool:
    """Returns whether `gpu_attention` takes a call, as far as its shapes and dtypes tell.

    Queries and pool may be float16, bfloat16 or float32, stored natively; heads have at most 256
    numbers. All block sizes, groups, batches and options are taken.
    """
    return (
        inputs.q.dtype in _FLOATS
        and inputs.pool.dtype in _FLOATS
        and inputs.pool.k.dtype == inputs.pool.dtype
        and inputs.pool.head_dim <= _MAX_HEAD_DIM
        and min(*inputs.q.shape, *inputs.block_ids.shape, *inputs.pool.k.shape) > 0
        and _is_addressable(inputs.pool)
        # jax 0.11 announces that the backend will go.
        and importlib.util.find_spec("jax.experimental.pallas.triton") is not None
    )


def _is_addressable(pool: BlockPool) -> bool:
    """Returns whether the offsets that Pallas computes reach all of a pool.

    It takes 64 bits for arrays of more than 4 GiB and signed 32 bits otherwise, which is too few
    for more than 2 Gi numbers of one byte. The index of a token's vector always has 32 bits.
    """
    pool_bytes = pool.k.size * pool.k.dtype.itemsize
    wide = pool_bytes > 1 << 32
    return (wide or pool.k.size <= 1 << 31) and pool.k.size // pool.head_dim < 1 << 31


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def gpu_attention(
    inputs: AttentionInputs,
    tiling: Tiling | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Computes attention with a softmax in float32, each row's tokens shared out among programs.

    Args:
      inputs: Checked arguments that `supports` accepts; letters as there. Or, with `scales`,
        arguments whose pool holds int8.
      tiling: Sizes of tiles; `tiling_for(inputs)` if absent.
      scales: For pools of int8, two arrays [N, L, H, B]: factors on the keys and on the values of
        each token.
      interpret: Whether to run on any platform, slowly, to test.

    Returns:
      [R, T, H, G, D], dtype of the queries. Zero where a query sees no token.

    Raises:
      ValueError: The pool is too large for its dtype.
    """
    # Not above: later versions of JAX may lack what this file imports.
    from ferrum_jax.attention.gpu_kernel import attend_spans, merge_splits

    if not _is_addressable(inputs.pool):
        raise ValueError(
            f"A pool of shape {inputs.pool.k.shape} and dtype {inputs.pool.k.dtype} has more "
            "numbers than the kernel can address (2**31 if they take 4 GiB or less). "
            "Make several pools, or one with fewer blocks."
        )
    tiling = tiling_for(inputs) if tiling is None else tiling
    out, lse = attend_spans(inputs, tiling, scales, interpret)
    sinks = None if inputs.sinks is None else inputs.sinks.reshape(-1)
    return merge_splits(out, lse, sinks, inputs.q.dtype, interpret).reshape(inputs.q.shape)
