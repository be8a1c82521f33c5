"""A step of a loop on the device: what it computes for each row, and the room that it needs.

R rows of the cache, P chunks of C tokens in a step; see `device_queue`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.integrations.device_queue import Requests, Slots, preempt
from ferrum_jax.integrations.mixed import Spans
from ferrum_jax.ops import extend
from ferrum_jax.ops.indexing import blocks_for, columns
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ


class Plan(NamedTuple):
    """The tokens of one step: chunks of prompts, and a token of each row that decodes.

    Attributes:
      num_new: i32[R]. Tokens of each row.
      is_single: bool[R]. Whether a row's token stands alone.
      first_chunk: i32[R]. The first chunk of each row.
      chunk_slots: i32[P]. The row of each chunk, as an index of R; R for none. None if P is 0.
    """

    num_new: jax.Array
    is_single: jax.Array
    first_chunk: jax.Array
    chunk_slots: jax.Array | None


def plan(requests: Requests, slots: Slots, num_chunks: int, chunk_tokens: int) -> Plan:
    """Divides the chunks of a step among the rows that read their prompts, the oldest first."""
    num_rows = slots.request.size
    pending = slots.pending(requests)
    is_single = pending == 1
    if not num_chunks:
        return Plan(is_single.astype(jnp.int32), is_single, jnp.zeros_like(pending), None)
    wanted = jnp.where(pending > 1, blocks_for(pending, chunk_tokens), 0)
    order = jnp.argsort(slots.age)
    before = jnp.cumsum(wanted[order], dtype=jnp.int32) - wanted[order]
    given = jnp.clip(num_chunks - before, 0, wanted[order])
    ends = jnp.cumsum(given, dtype=jnp.int32)
    of_rows = jnp.zeros((2, num_rows), jnp.int32).at[:, order].set(jnp.stack([given, ends - given]))
    chunk = jnp.arange(num_chunks, dtype=jnp.int32)
    place = jnp.searchsorted(ends, chunk, side="right")
    return Plan(
        num_new=jnp.where(is_single, 1, jnp.minimum(pending, of_rows[0] * chunk_tokens)),
        is_single=is_single,
        first_chunk=of_rows[1],
        chunk_slots=jnp.where(place < num_rows, order[jnp.minimum(place, num_rows - 1)], num_rows),
    )


def make_room(
    state: CacheState, requests: Requests, slots: Slots, shape: tuple[int, int]
) -> tuple[CacheState, Requests, Slots, Plan]:
    """Extends the rows for a step of P chunks of C tokens (`shape`).

    While blocks are short, a request is put back to wait (`preempt`).

    Returns:
      The cache without pools, the queue, the use of the rows, and the plan of the step.
    """
    num_chunks, chunk_tokens = shape
    max_new_tokens = max(1, num_chunks * chunk_tokens)

    def attempt(carry: _Attempt) -> _Attempt:
        state, requests, slots = preempt(carry.state, carry.requests, carry.slots, carry.has_failed)
        num_new = plan(requests, slots, num_chunks, chunk_tokens).num_new
        rows = slots.rows_where(num_new > 0)
        state, ok = extend(state, rows, num_new, max_new_tokens=max_new_tokens)
        return _Attempt(state, requests, slots, ok, ~ok)

    no = jnp.asarray(False)
    done = lax.while_loop(
        lambda carry: ~carry.ok, attempt, _Attempt(state.with_pools(()), requests, slots, no, no)
    )
    planned = plan(done.requests, done.slots, num_chunks, chunk_tokens)
    return done.state, done.requests, done.slots, planned


class _Attempt(NamedTuple):
    """An attempt to extend the rows for a step.

    Attributes:
      state: The cache without pools.
      requests: The queue.
      slots: The use of the rows.
      ok: bool[]. Whether the rows are extended.
      has_failed: bool[]. Whether they were to be, and there was no room.
    """

    state: CacheState
    requests: Requests
    slots: Slots
    ok: jax.Array
    has_failed: jax.Array


def spans_of(
    requests: Requests, slots: Slots, planned: Plan, chunk_tokens: int
) -> tuple[jax.Array, Spans]:
    """Returns the tokens of a planned step, i32[R + P * C], and the spans of rows that they are."""
    num_rows = slots.request.size
    singles = requests.texts[slots.request, slots.num_computed]
    spans = Spans(
        seq_ids=slots.rows_where(planned.is_single),
        ends=slots.num_computed + 1,
        lens=planned.is_single.astype(jnp.int32),
        outputs=jnp.arange(num_rows, dtype=jnp.int32),
    )
    if planned.chunk_slots is None:
        return singles, spans
    of_chunk = jnp.minimum(planned.chunk_slots, num_rows - 1)
    chunk = jnp.arange(of_chunk.size, dtype=jnp.int32)
    done = (chunk - planned.first_chunk[of_chunk]) * chunk_tokens
    lens = jnp.clip(planned.num_new[of_chunk] - done, 0, chunk_tokens)
    lens = jnp.where(planned.chunk_slots < num_rows, lens, 0)
    starts = slots.num_computed[of_chunk] + done
    places = starts[:, None] + columns(chunk_tokens)
    chunks = requests.texts[slots.request[of_chunk][:, None], places]
    last = num_rows + planned.first_chunk * chunk_tokens + planned.num_new - 1
    outputs = jnp.where(planned.is_single, spans.outputs, last)
    chunk_ids = jnp.where(lens > 0, slots.seq_ids[of_chunk], NULL_SEQ)
    spans = dataclasses.replace(spans, outputs=outputs).with_chunks(chunk_ids, starts + lens, lens)
    return jnp.concatenate([singles, chunks.reshape(-1)]), spans
