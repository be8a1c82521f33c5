"""The loop of `serve` and `rollout`, one program: it starts requests, and runs their steps."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import ferrum_jax.integrations.device_queue as device_queue
import ferrum_jax.integrations.device_steps as device_steps
from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.checks import check_type
from ferrum_jax.integrations.device_queue import DONE, WAITING, Requests, Slots
from ferrum_jax.integrations.generate import NULL_TOKEN, GenerateOptions
from ferrum_jax.integrations.logprobs import Chosen
from ferrum_jax.integrations.mixed import MixedBatch, StepOptions
from ferrum_jax.integrations.models import ModelFn, call_model
from ferrum_jax.integrations.sampling import token_keys
from ferrum_jax.ops import fork, free
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.ops.indexing import read
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(GenerateOptions):
    """Stop conditions and sampling of `serve` and `rollout`, and the shape of their steps.

    Attributes:
      step: Shape of a step that reads prompts (static).

    Raises:
      ValueError: A static field has a wrong type or value.
    """

    step: StepOptions = dataclasses.field(default=StepOptions(), metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the static fields."""
        super().__post_init__()
        check_type("step", self.step, StepOptions)


class Queue(NamedTuple):
    """The requests of a call; Q, L, P and N are powers of two.

    Attributes:
      prompts: i32[Q, L]. Token ids of each prompt, then zeros.
      prompt_lens: i32[Q]. Tokens of each prompt; 0 for padding.
      limits: i32[Q]. The most new tokens of each request.
      stop_token_ids: i32[P]. Stop tokens, padded with `NULL_TOKEN`.
      parents: i32[Q]. As `Requests.parents`; None if no request has one.
      outputs: i32[N]. The requests of which the answers are returned; None for all.
    """

    prompts: np.ndarray
    prompt_lens: np.ndarray
    limits: np.ndarray
    stop_token_ids: np.ndarray
    parents: np.ndarray | None = None
    outputs: np.ndarray | None = None

    @classmethod
    def of(
        cls,
        prompts: Sequence[np.ndarray],
        limits: np.ndarray,
        stop_token_ids: Sequence[int],
        parents: np.ndarray | None = None,
        outputs: np.ndarray | None = None,
    ) -> "Queue":
        """Pads requests to powers of two.

        Args:
          prompts: The prompt of each of Q requests, i32[T].
          limits: i32[Q]. The most new tokens of each.
          stop_token_ids: Tokens that end an answer.
          parents: i32[Q], or None.
          outputs: i32[N], or None.
        """
        size, length = next_power_of_two(len(prompts)), next_power_of_two(max(map(len, prompts)))
        padded, lens = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        lens[: len(prompts)] = [len(tokens) for tokens in prompts]
        for row, tokens in zip(padded, prompts, strict=False):
            row[: len(tokens)] = tokens
        return cls(
            prompts=padded,
            prompt_lens=lens,
            limits=pad_to_power_of_two(limits, 1),
            stop_token_ids=pad_to_power_of_two(np.asarray(stop_token_ids, np.int32), NULL_TOKEN),
            parents=None if parents is None else pad_to_power_of_two(parents, NULL_SEQ),
            outputs=None if outputs is None else pad_to_power_of_two(outputs, 0),
        )


class Counts(NamedTuple):
    """The work of a loop.

    Attributes:
      num_started: i32[]. Requests started, those started again included.
      num_steps: i32[]. How often the model ran.
      num_computed: i32[]. Tokens that it computed, padding excluded.
      max_blocks: i32[pools]. The most blocks of each pool that were in use at once.
    """

    num_started: jax.Array
    num_steps: jax.Array
    num_computed: jax.Array
    max_blocks: jax.Array

    def with_blocks_of(self, state: CacheState) -> "Counts":
        """Returns the counts after the blocks that are in use in a state."""
        return self._replace(max_blocks=jnp.maximum(self.max_blocks, _used_blocks(state)))


class Answers(NamedTuple):
    """What a loop returns; Q requests, or N of them.

    Attributes:
      state: The cache, with the rows free again.
      chosen: New tokens of each request (i32[Q, max_new_tokens]), with log-probabilities.
      num_tokens: i32[Q]. New tokens of each request.
      ok: bool[Q]. Whether a request ended as it should.
      num_preempted: i32[]. How often a request was put back to wait.
      counts: The work.
    """

    state: CacheState
    chosen: Chosen
    num_tokens: jax.Array
    ok: jax.Array
    num_preempted: jax.Array
    counts: Counts


class _Loop(NamedTuple):
    """What changes from step to step.

    Attributes:
      state: The cache.
      requests: The queue.
      chosen: New tokens [Q, max_new_tokens] of the requests.
      slots: The use of the rows.
      parent_logits: [R, V]. Logits after the prompts of parents, in their rows; None if there are
        no parents.
      counts: The work so far.
    """

    state: CacheState
    requests: Requests
    chosen: Chosen
    slots: Slots
    parent_logits: jax.Array | None
    counts: Counts


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="state")
def run_queue(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: jax.Array | np.ndarray,
    queue: Queue,
    options: ServeOptions,
    keys: jax.Array | None,
) -> Answers:
    """Runs the loop until all requests have ended; donates the state.

    Args:
      model_fn: The model (static).
      params: Its parameters.
      state: The cache.
      seq_ids: i32[R]. Free rows.
      queue: The requests.
      options: As given, without stop tokens and limits.
      keys: Keys [Q] of the requests; None if tokens are not drawn.

    Returns:
      The answers, and the state.
    """
    server = _Server(model_fn, params, queue, options, keys)
    begun = server.begin(state, jnp.asarray(seq_ids))
    loop = lax.while_loop(lambda loop: loop.requests.are_unfinished, server.advance, begun)
    lens, status = loop.requests.lens, loop.requests.status
    of_requests = loop.chosen, lens - server.queue.prompt_lens, status == DONE
    if server.queue.outputs is not None:
        of_requests = jax.tree.map(lambda x: x[server.queue.outputs], of_requests)
    chosen, num_tokens, ok = of_requests
    num_requests = jnp.sum(server.queue.prompt_lens > 0, dtype=jnp.int32)
    num_preempted = loop.counts.num_started - num_requests
    return Answers(loop.state, chosen, num_tokens, ok, num_preempted, loop.counts)


class _Server(NamedTuple):
    """What stays as it is while the queue is served, and the steps of the loop.

    Attributes:
      model_fn: The model.
      params: Its parameters.
      queue: The prompts.
      options: As given, without stop tokens and limits.
      keys: Keys [Q]; None if tokens are not drawn.
    """

    model_fn: ModelFn
    params: Any
    queue: Queue
    options: ServeOptions
    keys: jax.Array | None

    def begin(self, state: CacheState, seq_ids: jax.Array) -> _Loop:
        """Returns the loop before its first step: all requests wait."""
        lens, width = jnp.asarray(self.queue.prompt_lens), self.options.max_new_tokens
        parents = None if self.queue.parents is None else jnp.asarray(self.queue.parents)
        texts = jnp.pad(self.queue.prompts, ((0, 0), (0, width)))
        status = jnp.where(lens > 0, WAITING, DONE).astype(jnp.int32)
        none = jnp.full((lens.size, width), NULL_TOKEN, jnp.int32)
        zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(seq_ids.size, jnp.int32)
        loop = _Loop(
            state=state,
            requests=Requests(texts, lens, status, parents),
            chosen=Chosen.unknown(none, self.options.top_logprobs),
            slots=Slots(seq_ids, request=zeros - 1, num_computed=zeros, age=zeros),
            parent_logits=None,
            counts=Counts(zero, zero, zero, _used_blocks(state)),
        )
        if parents is None:
            return loop
        _, _, logits = jax.eval_shape(lambda loop: self._compute(loop, (0, 1)), loop)
        return loop._replace(parent_logits=jnp.zeros(logits.shape, logits.dtype))

    def advance(self, loop: _Loop) -> _Loop:
        """Starts requests; then runs steps, those with prompts first, until others can start."""
        num_chunks, chunk_tokens = self.options.step.chunk_shape
        loop = self._admit(loop)
        loop = lax.while_loop(
            self._reads_prompts, lambda x: self._step(x, (num_chunks, chunk_tokens)), loop
        )
        if self.options.step.exact:
            return loop
        return lax.while_loop(self._only_decodes, lambda x: self._step(x, (0, chunk_tokens)), loop)

    def _starting(self, loop: _Loop) -> jax.Array:
        """Returns i32[Q]: where requests can start; see `device_queue.starting_places`."""
        num_chunks, chunk_tokens = self.options.step.chunk_shape
        step_tokens = num_chunks * chunk_tokens
        return device_queue.starting_places(loop.state, loop.requests, loop.slots, step_tokens)

    def _starts_none(self, loop: _Loop) -> jax.Array:
        """Returns bool[]: whether no request can start."""
        return jnp.all(self._starting(loop) == loop.slots.request.size)

    def _reads_prompts(self, loop: _Loop) -> jax.Array:
        """Returns bool[]: whether the next step needs chunks, and no request is to start.

        With exact steps, all have chunks.
        """
        least = 0 if self.options.step.exact else 1
        return jnp.any(loop.slots.pending(loop.requests) > least) & self._starts_none(loop)

    def _only_decodes(self, loop: _Loop) -> jax.Array:
        """Returns bool[]: whether the next step only decodes, and no request is to start."""
        pending = loop.slots.pending(loop.requests)
        return jnp.any(pending > 0) & jnp.all(pending <= 1) & self._starts_none(loop)

    def _admit(self, loop: _Loop) -> _Loop:
        """Starts requests; children take their first token from the logits of their parents."""
        places, counts = self._starting(loop), loop.counts
        requests, slots, sources = device_queue.start(
            loop.requests, loop.slots, places, counts.num_started
        )
        num_started = counts.num_started + jnp.sum(places < slots.request.size, dtype=jnp.int32)
        loop = loop._replace(
            requests=requests, slots=slots, counts=counts._replace(num_started=num_started)
        )
        if (logits := loop.parent_logits) is None:
            return loop
        place = jnp.arange(slots.request.size, dtype=jnp.int32)
        is_fork = (sources < place.size) & (sources != place)
        state, _ = fork(loop.state, slots.seq_ids[sources], slots.rows_where(is_fork))
        loop = loop._replace(state=state, counts=loop.counts.with_blocks_of(state))
        is_first = (sources < place.size) & (slots.pending(requests) == 0)
        return self._take(loop, read(logits, sources, 0), is_first)

    def _step(self, loop: _Loop, shape: tuple[int, int]) -> _Loop:
        """Runs the model on P chunks of C tokens (`shape`) and a token of each row that decodes."""
        loop, has_next, logits = self._compute(loop, shape)
        if loop.parent_logits is None:
            return self._take(loop, logits, has_next)
        is_read = has_next & loop.slots.are_parents(loop.requests)
        kept = lax.cond(
            jnp.any(is_read),
            lambda kept: jnp.where(is_read[:, None], logits, kept),
            lambda kept: kept,
            loop.parent_logits,
        )
        return self._take(loop._replace(parent_logits=kept), logits, has_next & ~is_read)

    def _compute(self, loop: _Loop, shape: tuple[int, int]) -> tuple[_Loop, jax.Array, jax.Array]:
        """Returns the loop after a step, and for each row whether it has logits, and which."""
        roomy, requests, slots, plan = device_steps.make_room(
            loop.state, loop.requests, loop.slots, shape
        )
        tokens, spans = device_steps.spans_of(requests, slots, plan, shape[1])
        grown = roomy.with_pools(loop.state.pools)
        batch = MixedBatch.of_spans(grown, spans, chunk_tokens=shape[1])
        logits, pools = call_model(self.model_fn, self.params, tokens[:, None], batch)
        slots = slots._replace(num_computed=slots.num_computed + plan.num_new)
        has_next = (plan.num_new > 0) & (slots.pending(requests) == 0)
        counts = loop.counts._replace(
            num_steps=loop.counts.num_steps + 1,
            num_computed=loop.counts.num_computed + jnp.sum(plan.num_new, dtype=jnp.int32),
        )
        loop = loop._replace(
            state=grown.with_pools(pools),
            requests=requests,
            slots=slots,
            counts=counts.with_blocks_of(roomy),
        )
        return loop, has_next, logits

    def _take(self, loop: _Loop, logits: jax.Array, has_next: jax.Array) -> _Loop:
        """Takes the next token of some rows (bool[R]) from logits [R, V], and ends requests."""
        requests, slots, none = loop.requests, loop.slots, self.queue.prompt_lens.size
        lens = requests.lens[slots.request]
        keys = None if self.keys is None else token_keys(self.keys[slots.request], lens)
        after = self.options.choose(logits, keys)
        number = jnp.where(has_next, slots.request, none)
        num_new = lens - self.queue.prompt_lens[slots.request]
        chosen = jax.tree.map(
            lambda all_of, one: all_of.at[number, num_new].set(one, mode="drop"),
            loop.chosen,
            after,
        )
        is_last = num_new + 1 >= self.queue.limits[slots.request]
        is_last = has_next & (is_last | jnp.isin(after.tokens, self.queue.stop_token_ids))
        ended = jnp.where(is_last, number, none)
        requests = requests._replace(
            texts=requests.texts.at[number, lens].set(after.tokens, mode="drop"),
            lens=requests.lens.at[number].add(1, mode="drop"),
            status=requests.status.at[ended].set(DONE, mode="drop"),
        )
        return loop._replace(
            state=free(loop.state, slots.rows_where(is_last)),
            requests=requests,
            chosen=chosen,
            slots=slots._replace(request=jnp.where(is_last, -1, slots.request)),
        )


def _used_blocks(state: CacheState) -> jax.Array:
    """Returns i32[pools]: the blocks of each pool that are in use."""
    return jnp.stack([tables.num_blocks - tables.num_free for tables in state.page_tables])
