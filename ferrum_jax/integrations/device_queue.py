"""A queue of requests in device memory: who starts, what a step computes, who has to wait again.

Everything here is data on the device, for a loop inside `jit`. Q requests, R rows of the cache that
they may use, P chunks of C tokens in a step.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.integrations.mixed import Spans
from ferrum_jax.ops import extend, free
from ferrum_jax.ops.indexing import blocks_for, columns
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import NULL_SEQ

WAITING, RUNNING, DONE, FAILED = range(4)
"""States of a request."""


class Requests(NamedTuple):
    """The queue, in the order in which requests start.

    Attributes:
      texts: i32[Q, L]. Tokens of each prompt, then its new ones.
      lens: i32[Q]. Tokens of each text.
      status: i32[Q]. `WAITING`, `RUNNING`, `DONE` or `FAILED`.
    """

    texts: jax.Array
    lens: jax.Array
    status: jax.Array

    @property
    def are_unfinished(self) -> jax.Array:
        """bool[]. Whether a request waits or runs."""
        return jnp.any(self.status <= RUNNING)


class Slots(NamedTuple):
    """What the rows are used for.

    Attributes:
      seq_ids: i32[R]. The rows.
      request: i32[R]. The request in each row; negative for none.
      num_computed: i32[R]. Tokens of its text that the row holds.
      age: i32[R]. How many requests had been started before it.
    """

    seq_ids: jax.Array
    request: jax.Array
    num_computed: jax.Array
    age: jax.Array

    @property
    def are_live(self) -> jax.Array:
        """bool[R]. Whether a row has a request."""
        return self.request >= 0

    def pending(self, requests: Requests) -> jax.Array:
        """Returns i32[R]: tokens of each row's text that are to be computed."""
        return jnp.where(self.are_live, requests.lens[self.request] - self.num_computed, 0)

    def rows_where(self, condition: jax.Array) -> jax.Array:
        """Returns i32[R]: the rows where bool[R] is true, `NULL_SEQ` elsewhere."""
        return jnp.where(condition, self.seq_ids, NULL_SEQ)


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


def admitted(state: CacheState, requests: Requests, slots: Slots, step_tokens: int) -> jax.Array:
    """Returns bool[Q]: the waiting requests that start now.

    These are the first ones for which there are free rows, and free blocks for their texts and a
    token more, beside what the running ones need for theirs. The first one starts anyway if none
    runs.

    Args:
      state: The cache.
      requests: The queue.
      slots: The use of the rows.
      step_tokens: The most new tokens of a row in one step.
    """
    is_waiting = requests.status == WAITING
    rank = jnp.cumsum(is_waiting, dtype=jnp.int32) - 1
    has_room = jnp.ones_like(is_waiting)
    text_lens = requests.lens[slots.request] + 1
    for tables in state.page_tables:
        held = tables.num_blocks_held.reshape(tables.num_groups, -1).sum(0)[slots.seq_ids]
        lacking = jnp.maximum(_blocks_of(tables, text_lens, step_tokens) - held, 0)
        claimed = jnp.sum(jnp.where(slots.are_live, lacking, 0), dtype=jnp.int32)
        needed = jnp.where(is_waiting, _blocks_of(tables, requests.lens + 1, step_tokens), 0)
        has_room &= jnp.cumsum(needed, dtype=jnp.int32) <= tables.num_free - claimed
    has_room |= (rank == 0) & ~jnp.any(slots.are_live)
    return is_waiting & has_room & (rank < jnp.sum(~slots.are_live, dtype=jnp.int32))


def start(
    requests: Requests, slots: Slots, chosen: jax.Array, num_started: jax.Array
) -> tuple[Requests, Slots]:
    """Gives free rows to the chosen requests (bool[Q]), of which there are no more than rows."""
    num_rows = slots.request.size
    rank = jnp.cumsum(chosen, dtype=jnp.int32) - 1
    of_rank = jnp.full(num_rows, -1, jnp.int32)
    order = jnp.arange(chosen.size, dtype=jnp.int32)
    of_rank = of_rank.at[jnp.where(chosen, rank, num_rows)].set(order, mode="drop")
    slot_rank = jnp.cumsum(~slots.are_live, dtype=jnp.int32) - 1
    given = jnp.where(slots.are_live, -1, of_rank[slot_rank])
    is_new = given >= 0
    status = jnp.where(chosen, RUNNING, requests.status)
    return requests._replace(status=status), slots._replace(
        request=jnp.where(is_new, given, slots.request),
        num_computed=jnp.where(is_new, 0, slots.num_computed),
        age=jnp.where(is_new, num_started + slot_rank, slots.age),
    )


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

    While blocks are short, the request that started last is put back to wait; it fails if it is the
    only one that runs.

    Returns:
      The cache without pools, the queue, the use of the rows, and the plan of the step.
    """
    num_chunks, chunk_tokens = shape
    max_new_tokens = max(1, num_chunks * chunk_tokens)

    def attempt(carry: _Attempt) -> _Attempt:
        victim = jnp.argmax(jnp.where(carry.slots.are_live, carry.slots.age, -1))
        state, requests, slots = _preempt(carry, carry.has_failed, victim)
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


def _preempt(
    carry: _Attempt, condition: jax.Array, victim: jax.Array
) -> tuple[CacheState, Requests, Slots]:
    """Puts the request of row number `victim` (i32[]) of R back to wait, if bool[] is true.

    It fails if it is the only one that runs.
    """
    state, requests, slots = carry.state, carry.requests, carry.slots
    is_alone = jnp.sum(slots.are_live) == 1
    number = jnp.where(condition, slots.request[victim], requests.status.size)
    status = requests.status.at[number].set(jnp.where(is_alone, FAILED, WAITING), mode="drop")
    place = jnp.where(condition, victim, slots.request.size)
    state = free(state, jnp.where(condition, slots.seq_ids[victim], NULL_SEQ)[None])
    request = slots.request.at[place].set(-1, mode="drop")
    return state, requests._replace(status=status), slots._replace(request=request)


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


def _blocks_of(tables: PageTables, seq_lens: jax.Array, step_tokens: int) -> jax.Array:
    """Returns the most blocks that sequences up to these lengths hold in the groups of a pool."""
    total = jnp.zeros_like(seq_lens)
    for window in tables.windows:
        blocks = blocks_for(seq_lens, tables.block_size)
        if window is not None:
            blocks = jnp.minimum(blocks, ceil_div(window + step_tokens, tables.block_size) + 1)
        total += blocks
    return total
