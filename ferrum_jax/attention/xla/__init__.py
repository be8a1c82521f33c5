"""Attention in plain XLA operations: the backend for every platform, and for every call.

Only blocks that rows hold are read. The tokens of one head of a block lie together and are read as
*strips* of a few consecutive tokens. The last strip of each sequence may be partly filled. These
strips are read first, those of all rows at once, and only these may have slots that were never
written. The full strips before them are cut into *items*, runs of strips of one row, and a loop
takes several items per turn, of any rows. Its trip count is the number of items, so the time
follows the tokens that are read: neither the width of the table nor the longest row.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.attention.xla.rows import attend_rows

name = "xla"

_STATE_BYTES = 1 << 20


def accepts(call: AttentionCall) -> str | None:
    """Returns None: XLA computes every call."""
    del call
    return None


def prepare(call: AttentionCall) -> str | None:
    """Returns None: nothing is to be prepared."""
    del call
    return None


@jax.jit
def attend(call: AttentionCall) -> jax.Array:
    """Computes attention with an online softmax over the strips that the rows hold.

    Args:
      call: Checked arguments; letters as in `AttentionCall`.

    Returns:
      [R, T, H, G, D], dtype `call.out_dtype`. Zero where a query sees no token.
    """
    if call.is_empty:
        return jnp.zeros(call.q.shape, call.out_dtype)
    # Every turn passes over the softmax state of all rows, so a large state (long chunks) is
    # cheaper taken row by row.
    if call.q.shape[0] == 1 or call.q.size * 4 <= _STATE_BYTES:
        return _attend_if_any(call)

    def attend_row(row: tuple[jax.Array, ...]) -> jax.Array:
        q, block_ids, held_lens, q_lens = (x[None] for x in row)
        alone = dataclasses.replace(
            call, q=q, block_ids=block_ids, held_lens=held_lens, q_lens=q_lens
        )
        return _attend_if_any(alone)[0]

    return lax.map(attend_row, (call.q, call.block_ids, call.held_lens, call.q_lens))


def _attend_if_any(call: AttentionCall) -> jax.Array:
    """Computes attention of rows; skips compressed ones if all are empty.

    In a pool of several formats, the rows of the other formats have length 0 in a call.
    """
    if call.is_native:
        return attend_rows(call)

    def see_nothing(call: AttentionCall) -> jax.Array:
        return jnp.zeros(call.q.shape, call.out_dtype)

    return lax.cond(jnp.any(call.held_lens > 0), attend_rows, see_nothing, call)


def attend_replicas(
    axis_size: int, is_mapped: Sequence[Any], call: AttentionCall
) -> tuple[jax.Array, bool]:
    """The rule of `jax.custom_batching.custom_vmap` for kernels that have no rule of their own.

    Args:
      axis_size: Number of replicas.
      is_mapped: For each argument of the kernel, the call first, whether its arrays are mapped.
      call: The arguments of all replicas.

    Returns:
      `(out, True)`: [replicas, R, T, H, G, D], and that it is mapped.
    """
    axes = jax.tree.map(lambda is_mapped: 0 if is_mapped else None, is_mapped[0])
    return jax.vmap(attend, in_axes=(axes,), axis_size=axis_size)(call), True
