"""Attention on a GPU by Pallas kernels, for the calls that they take."""

import functools
import importlib.util

import jax
import jax.numpy as jnp

from ferrum_jax.attention.backend import (
    first_unmet,
    refuse_dtypes,
    refuse_format,
    refuse_platform,
)
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.gpu.tuning import MAX_HEAD_DIM, Tiling, tiling_for
from ferrum_jax.checks import INT32_LIMIT

name = "gpu"

_FLOATS = (jnp.float16, jnp.bfloat16, jnp.float32)
_MAX_TILE_TOKENS = 1024  # Far more than any tile has.


def accepts(call: AttentionCall) -> str | None:
    """Returns None if the kernels take a call, or the reason why not."""
    return refuse_platform(name) or refuse_shapes(call)


def refuse_shapes(call: AttentionCall) -> str | None:
    """Returns why the kernels do not take a call, on any platform; None if they take it.

    Queries and pool may be float16, bfloat16 or float32. All block sizes, groups, batches, options
    and integer formats are taken.
    """
    head_dim = call.pool.head_dim
    return first_unmet(
        (not call.is_empty, "there are no queries, or no blocks to read"),
        (head_dim <= MAX_HEAD_DIM, f"heads have {head_dim} numbers; {MAX_HEAD_DIM} may"),
        (_is_addressable(call), "the pool or the table has too many tokens for 32-bit indices"),
        # jax 0.11 announces that the backend will be removed.
        (
            importlib.util.find_spec("jax.experimental.pallas.triton") is not None,
            "this version of jax has no Triton backend of Pallas",
        ),
    ) or (refuse_dtypes(call, _FLOATS) or refuse_format(call))


def _is_addressable(call: AttentionCall) -> bool:
    """Returns whether indices have 32 bits; offsets have 64 if needed.

    These are the index of a token's vector in the pool, and the position of each token of a row,
    including those that would fill the row's last tile.
    """
    pool = call.pool
    num_vectors = pool.num_blocks * pool.num_layers * pool.num_kv_heads * pool.block_size
    row_tokens = call.block_ids.shape[1] * pool.slots_per_block + _MAX_TILE_TOKENS
    return max(num_vectors, row_tokens) < INT32_LIMIT


def prepare(call: AttentionCall) -> str | None:
    """Returns None: nothing is to be prepared."""
    del call
    return None


@functools.partial(jax.jit, static_argnames=("tiling", "interpret"))
def attend(call: AttentionCall, tiling: Tiling | None = None, interpret: bool = False) -> jax.Array:
    """Computes attention with a softmax in float32, each row's tokens divided among programs.

    Args:
      call: A call that was accepted; letters as in `AttentionCall`.
      tiling: Sizes of tiles (static); `tiling_for(call)` if absent.
      interpret: Whether to run on any platform, slowly, to test (static).

    Returns:
      [R, T, H, G, D], dtype `call.out_dtype`. Zero where a query sees no token.
    """
    # Imported late: later versions of JAX may lack what this file imports.
    from ferrum_jax.attention.gpu.kernel import attend_spans
    from ferrum_jax.attention.gpu.merging import merge_splits

    tiling = tiling_for(call) if tiling is None else tiling
    partial = attend_spans(call, tiling, interpret)
    sinks = None if call.sinks is None else call.sinks.reshape(-1)
    return merge_splits(partial, sinks, call.out_dtype, interpret).reshape(call.q.shape)
