"""Attention whose keys and values lie in the blocks of a pool."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.attention import gpu, native, tpu
from ferrum_jax.attention.inputs import AttentionInputs, attention_inputs
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.attention.sharded import attend_over_mesh
from ferrum_jax.attention.xla import xla_attention
from ferrum_jax.formats import rotate, unrotate
from ferrum_jax.ops.platforms import traced_platforms
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat

__all__ = ["AttentionOptions", "paged_attention"]

_PLAIN = AttentionOptions()


def paged_attention(
    q: jax.Array,
    pool: BlockPool,
    layer: jax.Array | int,
    block_ids: jax.Array,
    held_lens: jax.Array,
    q_lens: jax.Array | None = None,
    options: AttentionOptions = _PLAIN,
    formats: jax.Array | None = None,
) -> jax.Array:
    """Attends from the last tokens of each row to all of its tokens.

    R rows, T queries a row, Hq query heads, D head dimension, M blocks a row. The keys and
    values of the queries' own tokens must be in the pool already. Rows may share blocks, and
    may be different chunks of one sequence. The time follows the rows' lengths, not M.

    Logits and their softmax are float32, over its whole range. A token whose logit is minus
    infinity counts as not seen. A query that sees a number that is not finite may get NaN
    throughout; no other query is changed by it, not even one of the same chunk.

    A program may be exported (`jax.export`) for a GPU or TPU that is not here. It has the kernel
    for it if one is described meanwhile, by `jax.sharding.use_abstract_mesh` with a mesh that has
    an `abstract_device`, and XLA's operations otherwise. For "cpu" JAX refuses to export where
    numba serves, since that code is in this process only.

    Args:
      q: [R, Hq, D] for one query a row, the row's last token; or [R, T, Hq, D], where query t
        of row r sits at position `held_lens[r] - q_lens[r] + t`.
      pool: Keys and values. Hq is a multiple of its KV heads.
      layer: i32[]. Layer of the pool to read.
      block_ids: i32[R, M]. Blocks of each row in order, `NULL_BLOCK` where absent. Like `layer`,
        an id that the pool does not have is read as the nearest that it has.
      held_lens: i32[R]. Tokens of each row, the queries' own included: none if negative, and at
        most what M blocks hold.
      q_lens: i32[R]. Queries of each row: none if negative, at most T; T if absent.
      options: Scale, sliding window, soft cap, sinks.
      formats: i32[R]. The `TokenFormat` of each row; native if absent.

    Returns:
      Shape and dtype of `q`. Zero for queries at `t >= q_lens[r]` and for rows without tokens.

    Raises:
      AssertionError: An argument has the wrong rank, shape or kind of dtype: queries are floats,
        ids and lengths integers, of any width.
      TypeError: A gradient is asked for.
      ValueError: The pool's KV heads do not divide the query heads; or this is inside a
        `jax.shard_map` that checks what varies over its mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> import numpy as np
      >>> kv = jnp.ones((4, 1, 1, 2, 8), jnp.float32)  # 4 blocks of 2 tokens
      >>> pool = BlockPool(k=kv, v=kv, dtype=np.dtype("float32"))
      >>> q = jnp.ones((1, 1, 8), jnp.float32)
      >>> out = paged_attention(q, pool, 0, jnp.asarray([[2, 0, -1]]), jnp.asarray([3]))
      >>> out.shape, float(out[0, 0, 0])
      ((1, 1, 8), 1.0)
    """
    inputs = attention_inputs(q, pool, layer, block_ids, held_lens, q_lens, options, formats)
    return _attend_forward(inputs).reshape(q.shape)


@jax.custom_jvp
def _attend_forward(inputs: AttentionInputs) -> jax.Array:
    """Attends where the pool is: on one device, or over its mesh."""
    is_sharded = inputs.pool.sharding is not None
    return attend_over_mesh(_attend, inputs) if is_sharded else _attend(inputs)


@_attend_forward.defjvp
def _refuse_gradient(*_: Any) -> NoReturn:
    # Some paths have one and some do not: it would depend on the platform and on the shapes.
    raise TypeError(
        "paged_attention has no gradient: it serves decoding. Use jax.lax.stop_gradient on the "
        "queries and the pool, or a dense attention to train."
    )


def _attend(inputs: AttentionInputs) -> jax.Array:
    """Attends to the rows of each format that the pool may hold, others being empty meanwhile."""
    if inputs.formats is None:
        return _attend_in(TokenFormat.Native, inputs)
    out = jnp.zeros_like(inputs.q)
    for token_format in inputs.pool.formats:
        is_meant = inputs.formats == token_format
        held_lens, q_lens = (jnp.where(is_meant, x, 0) for x in (inputs.held_lens, inputs.q_lens))
        rows = dataclasses.replace(inputs, held_lens=held_lens, q_lens=q_lens, formats=None)
        if token_format == TokenFormat.Native:
            out += _attend_in(token_format, rows)
        else:
            out += _attend_compressed(token_format, rows)
    return out


def _attend_compressed(token_format: TokenFormat, inputs: AttentionInputs) -> jax.Array:
    """Attends to compressed rows: where these are rotated, queries and output are instead."""
    layout, q = inputs.pool.layout(token_format), inputs.q
    if layout.k.is_rotated:
        q = rotate(q.astype(jnp.float32)).astype(q.dtype)
    out = _attend_in(token_format, dataclasses.replace(inputs, q=q))
    if layout.v.is_rotated:
        out = unrotate(out, q.dtype)
    return out.astype(q.dtype)


def _attend_in(token_format: TokenFormat, inputs: AttentionInputs) -> jax.Array:
    """Leaves the kernel to the platform that a program is lowered for."""
    kernels, platforms = {}, traced_platforms()
    is_native = token_format == TokenFormat.Native
    if "cpu" in platforms and native.supports(inputs, token_format):
        kernels["cpu"] = _specialized(native.native_attention, token_format)
    if "gpu" in platforms and gpu.supports(inputs):
        kernels["cuda"] = _specialized(gpu.gpu_attention, token_format)
    if "tpu" in platforms and is_native and tpu.supports(inputs):
        kernels["tpu"] = tpu.tpu_attention
    default = _specialized(xla_attention, token_format)
    if not kernels:
        return default(inputs)
    return lax.platform_dependent(inputs, default=default, **kernels)


@functools.cache
def _specialized(
    kernel: Callable[..., jax.Array], token_format: TokenFormat
) -> Callable[[AttentionInputs], jax.Array]:
    """Returns a kernel for one format, the same object each time: JAX knows it again by that."""
    return functools.partial(kernel, token_format=token_format)
