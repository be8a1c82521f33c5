"""A queue of requests in device memory: which start, in which rows, and which have to wait again.

Everything here is data on the device, for a loop inside `jit`. Q requests, R rows of the cache that
they may use.

Requests of the same prompt may have a *parent*: a request that computes the prompt, takes no token,
and keeps its row, from which they are forked. The last one that waits takes the row over.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ferrum_jax.layers import most_window_blocks
from ferrum_jax.ops import free
from ferrum_jax.ops.indexing import blocks_for, read
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
      parents: i32[Q]. The parent of each request, which stands before it; a parent's own number for
        a parent, and a negative one for none. None if no request has one.
    """

    texts: jax.Array
    lens: jax.Array
    status: jax.Array
    parents: jax.Array | None

    @property
    def are_unfinished(self) -> jax.Array:
        """bool[]. Whether a request waits or runs."""
        return jnp.any(self.status <= RUNNING)

    @property
    def numbers(self) -> jax.Array:
        """i32[Q]. The number of each request."""
        return jnp.arange(self.status.size, dtype=jnp.int32)

    @property
    def are_children(self) -> jax.Array:
        """bool[Q]. Whether a request has a parent."""
        if self.parents is None:
            return jnp.zeros_like(self.status, jnp.bool_)
        return (self.parents >= 0) & (self.parents != self.numbers)

    def count_children(self, condition: jax.Array) -> jax.Array:
        """Returns i32[Q]: of each parent, the children for which bool[Q] is true."""
        assert self.parents is not None
        parents = jnp.where(condition & self.are_children, self.parents, self.status.size)
        return jnp.zeros_like(self.status).at[parents].add(1, mode="drop")

    def with_status(self, status: jax.Array) -> "Requests":
        """Returns the queue with other states (i32[Q]).

        A parent that has no row waits as long as a child does, and is done otherwise. The children
        that wait for one that has failed fail too.
        """
        if self.parents is not None:
            of_parent = read(status, jnp.where(self.are_children, self.parents, -1), DONE)
            status = jnp.where((status == WAITING) & (of_parent == FAILED), FAILED, status)
            has_waiting = self.count_children(status == WAITING) > 0
            has_no_row = (self.parents == self.numbers) & (status != RUNNING) & (status != FAILED)
            status = jnp.where(has_no_row, jnp.where(has_waiting, WAITING, DONE), status)
        return self._replace(status=status)


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
        """Returns i32[R]: tokens of each row's text that are to be computed.

        There are none for a parent that keeps its row for its children.
        """
        return jnp.where(self.are_live, requests.lens[self.request] - self.num_computed, 0)

    def are_parents(self, requests: Requests) -> jax.Array:
        """Returns bool[R]: whether a row has a parent."""
        if requests.parents is None:
            return jnp.zeros_like(self.are_live)
        return self.are_live & (requests.parents[self.request] == self.request)

    def rows_where(self, condition: jax.Array) -> jax.Array:
        """Returns i32[R]: the rows where bool[R] is true, `NULL_SEQ` elsewhere."""
        return jnp.where(condition, self.seq_ids, NULL_SEQ)

    def places_of(self, numbers: jax.Array, num_requests: int) -> jax.Array:
        """Returns i32[N]: where requests (i32[N]) of Q run, as an index of R; R for nowhere."""
        size = self.request.size
        place = jnp.arange(size, dtype=jnp.int32)
        of_request = jnp.where(self.are_live, self.request, num_requests)
        places = jnp.full(num_requests, size, jnp.int32).at[of_request].set(place, mode="drop")
        return read(places, jnp.where(numbers < 0, num_requests, numbers), size)


class Started(NamedTuple):
    """What starts of requests have changed.

    Attributes:
      requests: The queue.
      slots: The use of the rows.
      sources: i32[R]. For each row in which a child starts, the row of its parent, as an index of
        R, its own if it takes over that; R for other rows.
    """

    requests: Requests
    slots: Slots
    sources: jax.Array


def starting_places(
    state: CacheState, requests: Requests, slots: Slots, step_tokens: int
) -> jax.Array:
    """Returns i32[Q]: the place, as an index of R, at which each request starts now; R for none.

    These are the first requests that wait for which there are free rows, and free blocks for their
    texts and a token more, beside what the running ones need for theirs. Children start when their
    parent has computed the prompt; until then, rows and blocks are reserved for them. The first
    request starts anyway if no row computes anything.

    Args:
      state: The cache.
      requests: The queue.
      slots: The use of the rows.
      step_tokens: The most new tokens of a row in one step.
    """
    size = slots.request.size
    is_waiting, is_child = requests.status == WAITING, requests.are_children
    has_room = _have_room(state, requests, slots, step_tokens)
    pending = slots.pending(requests)
    is_forced = is_waiting & (jnp.cumsum(is_waiting, dtype=jnp.int32) == 1) & ~jnp.any(pending > 0)
    is_free = ~slots.are_live
    free_places = jnp.nonzero(is_free, size=size, fill_value=size)[0].astype(jnp.int32)
    if requests.parents is None:
        rank = jnp.cumsum(is_waiting, dtype=jnp.int32) - 1
        starts = is_waiting & (has_room | is_forced)
        return jnp.where(starts, read(free_places, rank, size), size)
    parent_places = slots.places_of(jnp.where(is_child, requests.parents, -1), is_waiting.size)
    is_ready = ~is_child | ((parent_places < size) & (read(pending, parent_places, 1) == 0))
    is_last = is_waiting & is_child & ~_has_later(requests, is_waiting)
    needs_row = is_waiting & ~is_last
    rank = jnp.cumsum(needs_row, dtype=jnp.int32) - 1
    has_row = needs_row & (rank < jnp.sum(is_free, dtype=jnp.int32))
    starts = has_row & is_ready & (has_room | (is_forced & ~is_child))
    num_left = requests.count_children(needs_row & ~starts)
    takes_over = is_last & is_ready & has_room & (num_left[requests.parents] == 0)
    takes_over |= is_forced & is_child & ~starts
    place = jnp.where(takes_over, parent_places, size)
    return jnp.where(starts, read(free_places, rank, size), place)


def start(requests: Requests, slots: Slots, places: jax.Array, num_started: jax.Array) -> Started:
    """Starts requests at places i32[Q], as `starting_places` returns them.

    Args:
      requests: The queue.
      slots: The use of the rows.
      places: Where each request starts, as an index of R; R for those that do not.
      num_started: i32[]. Requests started so far.
    """
    size, num_requests = slots.request.size, requests.status.size
    is_started = places < size
    rank = jnp.cumsum(is_started, dtype=jnp.int32) - 1
    given = jnp.full(size, -1, jnp.int32).at[places].set(requests.numbers, mode="drop")
    is_new = given >= 0
    status, sources = requests.status, jnp.full(size, size, jnp.int32)
    num_computed = jnp.zeros_like(given)
    if requests.parents is not None:
        parent = jnp.where(is_new & requests.are_children[given], requests.parents[given], -1)
        sources = slots.places_of(parent, num_requests)
        num_computed = jnp.where(parent >= 0, requests.lens[parent], 0)
        left = jnp.where(is_new & slots.are_live, slots.request, num_requests)
        status = status.at[left].set(DONE, mode="drop")
    slots = slots._replace(
        request=jnp.where(is_new, given, slots.request),
        num_computed=jnp.where(is_new, num_computed, slots.num_computed),
        age=jnp.where(is_new, num_started + rank[given], slots.age),
    )
    return Started(requests.with_status(jnp.where(is_started, RUNNING, status)), slots, sources)


def preempt(
    state: CacheState, requests: Requests, slots: Slots, condition: jax.Array
) -> tuple[CacheState, Requests, Slots]:
    """Puts a request back to wait, if bool[] is true: the one that started last.

    Parents that keep a row for their children are taken once a single request computes. That one
    fails if there is no parent to take.
    """
    is_active = slots.pending(requests) > 0
    is_alone = jnp.sum(is_active) <= 1
    is_kept = slots.are_live & ~is_active
    fails = is_alone & ~jnp.any(is_kept)
    candidates = jnp.where(is_alone & ~fails, is_kept, is_active)
    victim = jnp.argmax(jnp.where(candidates, slots.age, -1))
    number = jnp.where(condition, slots.request[victim], requests.status.size)
    status = requests.status.at[number].set(jnp.where(fails, FAILED, WAITING), mode="drop")
    place = jnp.where(condition, victim, slots.request.size)
    state = free(state, jnp.where(condition, slots.seq_ids[victim], NULL_SEQ)[None])
    request = slots.request.at[place].set(-1, mode="drop")
    return state, requests.with_status(status), slots._replace(request=request)


def blocks_of(tables: PageTables, seq_lens: jax.Array, step_tokens: int) -> jax.Array:
    """Returns the most blocks that sequences hold in the groups of a pool.

    Args:
      tables: Tables of the pool.
      seq_lens: Lengths up to which the sequences grow, i32 of any shape.
      step_tokens: The most tokens by which they grow at once.
    """
    total = jnp.zeros_like(seq_lens)
    for window in tables.windows:
        blocks = blocks_for(seq_lens, tables.block_size)
        if window is not None:
            most = most_window_blocks(window, step_tokens, tables.block_size)
            blocks = jnp.minimum(blocks, most)
        total += blocks
    return total


def _have_room(state: CacheState, requests: Requests, slots: Slots, step_tokens: int) -> jax.Array:
    """Returns bool[Q]: whether blocks are free for a request and all that wait before it."""
    is_waiting, has_room = requests.status == WAITING, jnp.ones_like(requests.status, jnp.bool_)
    text_lens = requests.lens[slots.request] + 1
    for tables in state.page_tables:
        held = tables.num_blocks_held.reshape(tables.num_groups, -1).sum(0)[slots.seq_ids]
        lacking = jnp.maximum(blocks_of(tables, text_lens, step_tokens) - held, 0)
        is_growing = slots.pending(requests) > 0
        claimed = jnp.sum(jnp.where(is_growing, lacking, 0), dtype=jnp.int32)
        needed = blocks_of(tables, requests.lens + 1, step_tokens)
        if requests.parents is not None:
            # A group with a window keeps none of the shared blocks for long.
            num_shared = requests.lens[requests.parents] // tables.block_size
            num_shared *= sum(window is None for window in tables.windows)
            needed -= jnp.where(requests.are_children, num_shared, 0)
        needed = jnp.cumsum(jnp.where(is_waiting, needed, 0), dtype=jnp.int32)
        has_room &= needed <= tables.num_free - claimed
    return has_room


def _has_later(requests: Requests, condition: jax.Array) -> jax.Array:
    """Returns bool[Q]: whether a later child of the same parent is one where bool[Q] is true."""
    assert requests.parents is not None
    size = requests.status.size
    parents = jnp.where(condition & requests.are_children, requests.parents, size)
    last = jnp.full(size, -1, jnp.int32).at[parents].max(requests.numbers, mode="drop")
    return last[requests.parents] > requests.numbers
