"""Serving a queue of prompts in one compiled program: rows are refilled as others finish."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

import ferrum_jax.integrations.device_queue as device_queue
from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.checks import check_live, check_type
from ferrum_jax.integrations.device_queue import DONE, WAITING, Requests, Slots
from ferrum_jax.integrations.generate import NULL_TOKEN, GenerateOptions
from ferrum_jax.integrations.logprobs import Chosen
from ferrum_jax.integrations.mixed import MixedBatch, StepOptions
from ferrum_jax.integrations.models import ModelFn, call_model, check_model
from ferrum_jax.integrations.prefill import token_ids
from ferrum_jax.integrations.sampling import token_keys
from ferrum_jax.ops import free
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.buckets import first_rows, pad_to_power_of_two
from ferrum_jax.state import CacheState
from ferrum_jax.types import IdsLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeOptions(GenerateOptions):
    """Stop conditions and sampling of `serve`, and the shape of its steps.

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Served:
    """Result of `serve`; Q requests.

    Attributes:
      state: The cache, with the rows free again.
      chosen: New tokens of each request (i32[Q, max_new_tokens]), its stop token included, then
        `NULL_TOKEN`; with their log-probabilities.
      num_tokens: i32[Q]. New tokens of each request.
      ok: bool[Q]. False for a request that did not end: its row would be longer than a row can be,
        or the free blocks do not hold it even alone. Its tokens so far are valid.
      num_steps: i32[]. How often the model ran.
      num_preempted: i32[]. How often a request was put back to wait, since blocks are short.
    """

    state: CacheState
    chosen: Chosen
    num_tokens: jax.Array
    ok: jax.Array
    num_steps: jax.Array
    num_preempted: jax.Array

    @property
    def tokens(self) -> jax.Array:
        """i32[Q, max_new_tokens]. New tokens of each request, then `NULL_TOKEN`."""
        return self.chosen.tokens

    @property
    def logprobs(self) -> jax.Array:
        """f32[Q, max_new_tokens]. Log-probability of each new token; NaN behind the last."""
        return self.chosen.logprobs


def serve(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: IdsLike,
    prompts: Sequence[Sequence[int]],
    *,
    options: ServeOptions,
    key: jax.Array | None = None,
) -> Served:
    """Generates the answers to any number of prompts, in one program; donates the state.

    The prompts wait in device memory. Whenever a row and enough blocks are free, the next one
    starts: first come, first served. Each step takes a token of every row that decodes, and chunks
    of the prompts that are being read, so that a long prompt does not hold up the others. The
    row of a request that is done is freed and taken by the next. Where blocks run out, the request
    that started last is put back to wait, and its prompt and tokens so far are computed again
    later; so all finish, the oldest first. Nothing waits for the host.

    A request's tokens are those that it would get alone: greedy ones up to the rounding of sums,
    which depends on the shape of a step, or bit for bit with `StepOptions.exact`. A draw depends on
    the request's key and the token's position only.

    Args:
      model_fn: The model (static).
      params: Parameters of the model, a pytree.
      state: The cache. It is consumed: use the returned one.
      seq_ids: i32[R]. Free rows to use, all different: how many requests run at once.
      prompts: Token ids of each of the Q prompts. The program is compiled for each power of two of
        Q and of the longest prompt.
      options: Stop conditions, sampling, and the shape of a step. `limits` are i32[Q].
      key: One typed key (`jax.random.key`), into which the request's number is folded, or keys
        [Q]. Required if the temperature is above 0.

    Returns:
      The answers, and the state.

    Raises:
      ValueError: A prompt is empty, not of token ids, or longer than a row with the new tokens can
        be; the rows are not free, not different or outside the cache; a typed key is missing,
        `model_fn` is not hashable, the state was consumed; or it is called in `jit`.
      TypeError: The model does not return `(logits, pools)` as `ModelFn` says.
    """
    check_model(model_fn)
    check_live("state", state)
    check_type("options", options, ServeOptions)
    options.sampling.check_key(key)
    queue = Queue.of(prompts, options)
    rows = checked_free_rows(state, seq_ids)
    require_fitting(state, queue)
    keys = None
    if not options.sampling.is_greedy:
        assert key is not None
        keys = request_keys(key, len(prompts), queue.prompt_lens.size)
    stops = pad_to_power_of_two(np.asarray(options.stop_token_ids, np.int32), NULL_TOKEN)
    options = dataclasses.replace(options, stop_token_ids=(), limits=None)
    served = serve_queue(model_fn, params, state, rows, queue, options, (keys, stops))
    of_requests = served.chosen, served.num_tokens, served.ok
    chosen, num_tokens, ok = jax.tree.map(lambda x: first_rows(x, len(prompts)), of_requests)
    return dataclasses.replace(served, chosen=chosen, num_tokens=num_tokens, ok=ok)


class Queue(NamedTuple):
    """The prompts of a call; Q and L are powers of two.

    Attributes:
      prompts: i32[Q, L]. Token ids of each prompt, then zeros.
      prompt_lens: i32[Q]. Tokens of each prompt; 0 for padding.
      limits: i32[Q]. The most new tokens of each request.
    """

    prompts: np.ndarray
    prompt_lens: np.ndarray
    limits: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], options: ServeOptions) -> "Queue":
        """Checks prompts and limits, and pads them."""
        ids = [token_ids(i, prompt) for i, prompt in enumerate(prompts)]
        if not ids:
            raise ValueError("prompts is empty. Pass at least one prompt.")
        limits = np.full(len(ids), options.max_new_tokens, np.int32)
        if options.limits is not None:
            given = np.asarray(as_ids(np.asarray(options.limits)))
            if given.shape != limits.shape or (given < 1).any():
                raise ValueError(
                    f"limits must be at least 1, one per prompt ({len(ids)}); got shape "
                    f"{list(given.shape)}, {given.tolist()}."
                )
            limits = np.minimum(given, limits)
        shape = next_power_of_two(len(ids)), next_power_of_two(max(x.size for x in ids))
        padded = np.zeros(shape, np.int32)
        for row, tokens in zip(padded, ids, strict=False):
            row[: tokens.size] = tokens
        lens = np.zeros(shape[0], np.int32)
        lens[: len(ids)] = [x.size for x in ids]
        return cls(padded, lens, np.pad(limits, (0, shape[0] - len(ids)), constant_values=1))


class _Loop(NamedTuple):
    """What changes from step to step.

    Attributes:
      state: The cache.
      requests: The queue.
      chosen: New tokens [Q, max_new_tokens] of the requests.
      slots: The use of the rows.
      num_started: i32[]. Requests started so far, those started again included.
      num_steps: i32[].
    """

    state: CacheState
    requests: Requests
    chosen: Chosen
    slots: Slots
    num_started: jax.Array
    num_steps: jax.Array


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="state")
def serve_queue(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: jax.Array,
    queue: Queue,
    options: ServeOptions,
    drawing: tuple[jax.Array | None, jax.Array],
) -> Served:
    """Runs the loop of `serve`; `drawing` are keys [Q], and stop tokens padded by `NULL_TOKEN`."""
    server = _Server(model_fn, params, queue, options, *drawing)
    loop = lax.while_loop(
        lambda loop: loop.requests.are_unfinished, server.advance, server.begin(state, seq_ids)
    )
    return _result(loop, queue.prompt_lens)


class _Server(NamedTuple):
    """What stays as it is while the queue is served, and the steps of the loop.

    Attributes:
      model_fn: The model.
      params: Its parameters.
      queue: The prompts.
      options: As given, without stop tokens and limits.
      keys: Keys [Q]; None if tokens are not drawn.
      stop_token_ids: i32[P]. Stop tokens, padded with `NULL_TOKEN`.
    """

    model_fn: ModelFn
    params: Any
    queue: Queue
    options: ServeOptions
    keys: jax.Array | None
    stop_token_ids: jax.Array

    def begin(self, state: CacheState, seq_ids: jax.Array) -> _Loop:
        """Returns the loop before its first step: all requests wait."""
        lens, width = jnp.asarray(self.queue.prompt_lens), self.options.max_new_tokens
        texts = jnp.pad(jnp.asarray(self.queue.prompts), ((0, 0), (0, width)))
        none = jnp.full((lens.size, width), NULL_TOKEN, jnp.int32)
        zeros = jnp.zeros(seq_ids.size, jnp.int32)
        return _Loop(
            state=state,
            requests=Requests(texts, lens, jnp.where(lens > 0, WAITING, DONE).astype(jnp.int32)),
            chosen=Chosen.unknown(none, self.options.top_logprobs),
            slots=Slots(jnp.asarray(seq_ids), request=zeros - 1, num_computed=zeros, age=zeros),
            num_started=jnp.zeros((), jnp.int32),
            num_steps=jnp.zeros((), jnp.int32),
        )

    def advance(self, loop: _Loop) -> _Loop:
        """Starts requests, runs a mixed step, then steps that only decode as long as these do."""
        num_chunks, chunk_tokens = self.options.step.chunk_shape
        loop = self._step(self._admit(loop), (num_chunks, chunk_tokens))
        if self.options.step.exact:
            return loop
        return lax.while_loop(self._only_decodes, lambda x: self._step(x, (0, chunk_tokens)), loop)

    def _starting(self, loop: _Loop) -> jax.Array:
        """Returns bool[Q]: the requests that can start."""
        num_chunks, chunk_tokens = self.options.step.chunk_shape
        return device_queue.admitted(
            loop.state, loop.requests, loop.slots, num_chunks * chunk_tokens
        )

    def _admit(self, loop: _Loop) -> _Loop:
        chosen = self._starting(loop)
        requests, slots = device_queue.start(loop.requests, loop.slots, chosen, loop.num_started)
        num_started = loop.num_started + jnp.sum(chosen, dtype=jnp.int32)
        return loop._replace(requests=requests, slots=slots, num_started=num_started)

    def _only_decodes(self, loop: _Loop) -> jax.Array:
        """Returns bool[]: whether the next step needs no chunk of a prompt."""
        pending = loop.slots.pending(loop.requests)
        return jnp.any(pending > 0) & jnp.all(pending <= 1) & ~jnp.any(self._starting(loop))

    def _step(self, loop: _Loop, shape: tuple[int, int]) -> _Loop:
        """Runs the model on P chunks of C tokens (`shape`) and a token of each row that decodes."""
        roomy, requests, slots, plan = device_queue.make_room(
            loop.state, loop.requests, loop.slots, shape
        )
        tokens, spans = device_queue.spans_of(requests, slots, plan, shape[1])
        grown = roomy.with_pools(loop.state.pools)
        batch = MixedBatch.of_spans(grown, spans, chunk_tokens=shape[1])
        logits, pools = call_model(self.model_fn, self.params, tokens[:, None], batch)
        slots = slots._replace(num_computed=slots.num_computed + plan.num_new)
        has_next = (plan.num_new > 0) & (slots.pending(requests) == 0)
        loop = loop._replace(
            state=grown.with_pools(pools),
            requests=requests,
            slots=slots,
            num_steps=loop.num_steps + 1,
        )
        return self._take(loop, logits, has_next)

    def _take(self, loop: _Loop, logits: jax.Array, has_next: jax.Array) -> _Loop:
        """Takes the next token of some rows (bool[R]) from logits f32[R, V], and ends requests."""
        requests, slots, none = loop.requests, loop.slots, self.queue.prompt_lens.size
        lens = requests.lens[slots.request]
        keys = None if self.keys is None else token_keys(self.keys[slots.request], lens)
        after = self.options.choose(logits, keys)
        number = jnp.where(has_next, slots.request, none)
        num_new = lens - jnp.asarray(self.queue.prompt_lens)[slots.request]
        chosen = jax.tree.map(
            lambda all_of, one: all_of.at[number, num_new].set(one, mode="drop"),
            loop.chosen,
            after,
        )
        is_last = num_new + 1 >= jnp.asarray(self.queue.limits)[slots.request]
        is_last = has_next & (is_last | jnp.isin(after.tokens, self.stop_token_ids))
        ended = jnp.where(is_last, number, none)
        requests = Requests(
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


def _result(loop: _Loop, prompt_lens: jax.Array | np.ndarray) -> Served:
    """Returns the answers of a loop that has ended."""
    return Served(
        state=loop.state,
        chosen=loop.chosen,
        num_tokens=loop.requests.lens - prompt_lens,
        ok=loop.requests.status == DONE,
        num_steps=loop.num_steps,
        num_preempted=loop.num_started - jnp.sum(prompt_lens > 0, dtype=jnp.int32),
    )


def request_keys(key: jax.Array, num_requests: int, num_padded: int) -> jax.Array:
    """Returns the keys [Q] of requests: those given, or one with each request's number in it."""
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(num_padded))
    if key.shape != (num_requests,):
        raise ValueError(
            f"key must be one typed key, or one per prompt ({num_requests}); got shape "
            f"{list(key.shape)}. Make them with jax.random.split(key, num_prompts)."
        )
    return key[jnp.minimum(jnp.arange(num_padded), num_requests - 1)]


def checked_free_rows(state: CacheState, seq_ids: IdsLike) -> np.ndarray:
    """Returns rows i32[R] on the host; raises ValueError unless they are different and free."""
    if any(isinstance(x, Tracer) for x in (seq_ids, state.page_tables[0].held_lens)):
        raise ValueError("serve reads its prompts and rows on the host. Call it outside jit.")
    rows = np.asarray(as_ids(np.asarray(seq_ids)))
    max_seqs = state.max_seqs
    if rows.ndim != 1 or not rows.size or np.unique(rows).size != rows.size:
        raise ValueError(f"seq_ids must be different rows, at least one; got {rows.tolist()}.")
    if ((rows < 0) | (rows >= max_seqs)).any():
        raise ValueError(f"seq_ids must be from 0 to {max_seqs - 1}, got {rows.tolist()}.")
    taken = rows[np.asarray(state.seq_lens)[rows] > 0].tolist()
    if taken:
        raise ValueError(f"Rows {taken} hold tokens. Pass free rows, or free these first.")
    return rows


def require_fitting(state: CacheState, queue: Queue) -> None:
    """Raises ValueError if a prompt and its new tokens are longer than a row can be."""
    longest = min(t.max_blocks_per_seq * t.block_size for t in state.page_tables)
    needed = queue.prompt_lens + queue.limits - 1
    if (needed > longest).any():
        i = int(np.argmax(needed))
        raise ValueError(
            f"prompts[{i}] has {queue.prompt_lens[i]} tokens, and {queue.limits[i]} new ones make "
            f"{needed[i]} to hold; a row holds {longest}. Shorten it, set limits, or make the "
            "cache with a larger max_blocks_per_seq."
        )
