"""The functions of paged attention that users call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NoReturn, Unpack

import jax
import jax.numpy as jnp

from ferrum_jax.attention.backend import AttentionBackend
from ferrum_jax.attention.call import AttentionCall, AttentionRows, attention_call
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.attention.selection import (
    BackendChoice,
    BackendExplanation,
    attend_with,
    choose,
)
from ferrum_jax.attention.sharded import attend_over_mesh
from ferrum_jax.codecs import rotate, unrotate
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat

_PLAIN = AttentionOptions()


def paged_attention(
    q: jax.Array,
    pool: BlockPool,
    layer: jax.Array | int,
    *,
    options: AttentionOptions = _PLAIN,
    backend: AttentionBackend | str | None = None,
    **rows: Unpack[AttentionRows],
) -> jax.Array:
    """Attends from the last tokens of each row to all tokens of the row.

    R rows, T queries per row, Hq query heads, D head dimension, M blocks per row. The keys and
    values of the queries' own tokens must be in the pool already. Rows may share blocks, and
    may be different chunks of one sequence. The time follows the tokens that are seen, not M.

    Logits and their softmax are float32, over its whole range. A token with a logit of
    minus infinity counts as not seen. A query that sees a number that is not finite may become NaN
    throughout; no other query is affected, not even one of the same chunk.

    A program that is exported (`jax.export`) for a GPU or TPU has the kernel for it if that device
    is described meanwhile (`jax.sharding.use_abstract_mesh`, with an `abstract_device`), and XLA's
    operations otherwise. A program with the CPU kernel cannot be exported: give `backend="xla"`.

    Args:
      q: [R, Hq, D] for one query per row, the row's last token; or [R, T, Hq, D], where query t
        of row r has position `held_lens[r] - q_lens[r] + t`.
      pool: Keys and values. Hq is a multiple of its KV heads.
      layer: i32[]. Layer of the pool to read.
      options: Scale, sliding window, soft cap, sinks.
      backend: "cpu" (native code), "gpu" or "tpu" (Pallas), "xla", or an `AttentionBackend` of your
        own. None takes the kernel of the program's platform if it accepts the call, and XLA
        otherwise; `explain_backend` says which.
      block_ids: i32[R, M]. Blocks of each row in order, `NULL_BLOCK` where absent. Like `layer`,
        an id that the pool does not have is read as the nearest one. Unseen blocks are not read.
      held_lens: i32[R]. Tokens of each row, those of the queries included: none if negative, and at
        most as many as M blocks hold.
      q_lens: i32[R]. Queries of each row: none if negative, at most T; T if absent.
      token_formats: i32[R]. The `TokenFormat` of each row; native if absent.

    Returns:
      Shape and dtype of `q`. Zero for queries at `t >= q_lens[r]` and for rows without tokens.

    Raises:
      AssertionError: An argument has the wrong rank, shape or kind of dtype (queries are floats,
        ids and lengths integers, of any width).
      TypeError: A gradient is asked for; or `block_ids` or `held_lens` is missing.
      ValueError: The KV heads do not divide the query heads; a `jax.shard_map` around it checks
        what varies over its mesh; or `backend` is unknown, does not take the call, or returns
        another shape or dtype.

    Example:
      >>> from ferrum_jax.payload import KeyValue
      >>> payload, kv = KeyValue(1, 8, "float32"), jnp.ones((4, 1, 1, 2, 8), jnp.float32)
      >>> pool, q = BlockPool(payload.join(kv, kv), payload), jnp.ones((1, 1, 8), jnp.float32)
      >>> rows = {"block_ids": jnp.asarray([[2, 0, -1]]), "held_lens": jnp.asarray([3])}
      >>> float(paged_attention(q, pool, 0, **rows)[0, 0, 0])
      1.0
    """
    call = attention_call(q, pool, layer, options=options, **rows)
    return _attend_forward(call, backend).reshape(q.shape)


def explain_backend(
    q: jax.Array,
    pool: BlockPool,
    layer: jax.Array | int,
    *,
    options: AttentionOptions = _PLAIN,
    backend: AttentionBackend | str | None = None,
    **rows: Unpack[AttentionRows],
) -> BackendExplanation:
    """Says which backend computes a call of `paged_attention`, and why the others do not.

    Nothing is computed, compiled or registered. So the CPU kernel is named even where numba will
    fail to compile it; after the failure, the reason is the error.

    Args:
      q: As of `paged_attention`, like all other arguments.
      pool: Keys and values.
      layer: i32[]. Layer of the pool to read.
      options: Scale, sliding window, soft cap, sinks.
      backend: Backend that must compute attention.
      block_ids: i32[R, M]. Blocks of each row.
      held_lens: i32[R]. Tokens of each row.
      q_lens: i32[R]. Queries of each row.
      token_formats: i32[R]. The `TokenFormat` of each row.

    Returns:
      One choice for each token format that the pool may hold; `str` of it is to be read.

    Raises:
      AssertionError: As `paged_attention`.
      TypeError: `block_ids` or `held_lens` is missing.
      ValueError: As `paged_attention`.

    Example:
      >>> from ferrum_jax.payload import KeyValue
      >>> payload = KeyValue(num_kv_heads=1, head_dim=8, dtype="float32")
      >>> kv = jnp.ones((4, 1, 1, 2, 8), jnp.float32)
      >>> pool = BlockPool(payload.join(kv, kv), payload)
      >>> q, block_ids = jnp.ones((1, 1, 8), jnp.float32), jnp.asarray([[2, 0, -1]])
      >>> rows = {"block_ids": block_ids, "held_lens": jnp.asarray([3])}
      >>> print(explain_backend(q, pool, 0, backend="xla", **rows))
      Native rows: xla
    """
    choices: dict[TokenFormat, BackendChoice] = {}

    def explain(call: AttentionCall) -> jax.Array:
        choices[call.token_format] = choose(call, backend)
        return jnp.zeros(call.q.shape, call.out_dtype)

    call = attention_call(q, pool, layer, options=options, **rows)
    jax.eval_shape(functools.partial(_attend_by, explain), call)
    return BackendExplanation(tuple(choices.values()))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _attend_forward(call: AttentionCall, backend: AttentionBackend | str | None) -> jax.Array:
    """Computes attention, without a gradient."""
    return _attend_by(functools.partial(attend_with, backend=backend), call)


@_attend_forward.defjvp
def _refuse_gradient(*_: Any) -> NoReturn:
    # Some backends have a gradient and others do not: it would depend on platform and shapes.
    raise TypeError(
        "paged_attention has no gradient: it serves decoding. Use jax.lax.stop_gradient on the "
        "queries and the pool, or a dense attention to train."
    )


def _attend_by(attend: Callable[[AttentionCall], jax.Array], call: AttentionCall) -> jax.Array:
    """Computes attention by a function for one device and one token format."""
    attend = functools.partial(_attend_formats, attend)
    return attend(call) if call.pool.sharding is None else attend_over_mesh(attend, call)


def _attend_formats(attend: Callable[[AttentionCall], jax.Array], call: AttentionCall) -> jax.Array:
    """Attends to the rows of each format that the pool may hold; the other rows are empty then."""
    if call.token_formats is None:
        return attend(call)
    out = jnp.zeros_like(call.q)
    for token_format in call.pool.formats:
        is_meant = call.token_formats == token_format
        held_lens, q_lens = (jnp.where(is_meant, x, 0) for x in (call.held_lens, call.q_lens))
        out += _attend_format(
            attend,
            dataclasses.replace(
                call,
                held_lens=held_lens,
                q_lens=q_lens,
                token_formats=None,
                token_format=token_format,
            ),
        )
    return out


def _attend_format(attend: Callable[[AttentionCall], jax.Array], call: AttentionCall) -> jax.Array:
    """Attends to rows of one format; queries and output are rotated where the rows are."""
    codec, q = call.codec, call.q
    if codec.rotates_keys:
        rotated = rotate(q.astype(jnp.float32)).astype(q.dtype)
        call = dataclasses.replace(call, q=rotated)
    out = attend(call)
    if codec.rotates_values:
        out = unrotate(out, q.dtype)
    return out.astype(q.dtype)
