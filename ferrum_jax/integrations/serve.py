"""Serving a queue of prompts in one compiled program: rows are refilled as others finish."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.checks import check_live, check_type
from ferrum_jax.integrations.generate import NULL_TOKEN, GenerateOptions
from ferrum_jax.integrations.logprobs import token_logprobs
from ferrum_jax.integrations.mixed import MixedBatch, Spans, StepOptions
from ferrum_jax.integrations.models import ModelFn, call_model, check_model
from ferrum_jax.ops import extend, free
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.ops.indexing import blocks_for, columns
from ferrum_jax.state import CacheState, PageTables
from ferrum_jax.types import NULL_SEQ, IdsLike

# States of a request.
_WAITING, _RUNNING, _DONE, _FAILED = range(4)
_NO_SLOT = -1


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
      tokens: i32[Q, max_new_tokens]. New tokens of each request, its stop token included; then
        `NULL_TOKEN`.
      num_tokens: i32[Q]. New tokens of each request.
      logprobs: f32[Q, max_new_tokens]. Log-probability of each new token; NaN behind the last.
      ok: bool[Q]. False for a request that did not end: its row would be longer than a row can be,
        or the free blocks do not hold it even alone. Its tokens so far are valid.
      num_steps: i32[]. How often the model ran.
      num_preempted: i32[]. How often a request was put back to wait, for want of blocks.
    """

    state: CacheState
    tokens: jax.Array
    num_tokens: jax.Array
    logprobs: jax.Array
    ok: jax.Array
    num_steps: jax.Array
    num_preempted: jax.Array


class _Inputs(NamedTuple):
    """What does not change: R rows, Q requests.

    Attributes:
      seq_ids: i32[R]. Rows.
      prompt_lens: i32[Q]. Tokens of each prompt.
      limits: i32[Q]. The most new tokens of each request.
      keys: Keys [Q]; None if tokens are not drawn.
      stop_token_ids: i32[P]. Stop tokens, padded with `NULL_TOKEN`.
    """

    seq_ids: jax.Array
    prompt_lens: jax.Array
    limits: jax.Array
    keys: jax.Array | None
    stop_token_ids: jax.Array


class _Requests(NamedTuple):
    """The queue; first come, first served.

    Attributes:
      texts: i32[Q, L]. Tokens of each prompt, then its new ones.
      lens: i32[Q]. Tokens of each text.
      status: i32[Q]. Waiting, running, done or failed.
      logprobs: f32[Q, max_new_tokens].
    """

    texts: jax.Array
    lens: jax.Array
    status: jax.Array
    logprobs: jax.Array


class _Slots(NamedTuple):
    """What the R rows are used for.

    Attributes:
      request: i32[R]. The request in each row; `_NO_SLOT` for none.
      num_computed: i32[R]. Tokens of its text that the cache holds.
      age: i32[R]. How many requests had been started before it.
    """

    request: jax.Array
    num_computed: jax.Array
    age: jax.Array

    @property
    def is_live(self) -> jax.Array:
        """bool[R]. Whether a row has a request."""
        return self.request >= 0

    def pending(self, requests: _Requests) -> jax.Array:
        """Returns i32[R]: tokens of each row's text that are to be computed."""
        return jnp.where(self.is_live, requests.lens[self.request] - self.num_computed, 0)


class _Loop(NamedTuple):
    """What changes from step to step.

    Attributes:
      state: The cache.
      requests: The queue.
      slots: The use of the rows.
      num_started: i32[]. Requests started so far, those started again included.
      num_steps: i32[].
      num_preempted: i32[].
    """

    state: CacheState
    requests: _Requests
    slots: _Slots
    num_started: jax.Array
    num_steps: jax.Array
    num_preempted: jax.Array


class _Plan(NamedTuple):
    """The tokens of one step: P chunks of C tokens, and a token of each row that decodes.

    Attributes:
      num_new: i32[R]. Tokens of each row.
      first_chunk: i32[R]. The first chunk of each row.
      slots: i32[P]. The row of each chunk, as an index of R; R for none.
    """

    num_new: jax.Array
    first_chunk: jax.Array
    slots: jax.Array


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
    of the prompts that are being read, so that a long prompt does not hold up the others. A row
    whose request is done is freed and taken by the next. Where blocks run out, the request that
    started last is put back to wait, and its prompt and tokens so far are computed again later; so
    all finish, the oldest first. Nothing waits for the host.

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
        `model_fn` is not hashable, or the state was consumed.
      TypeError: The model does not return `(logits, pools)` as `ModelFn` says.
    """
    check_model(model_fn)
    check_live("state", state)
    check_type("options", options, ServeOptions)
    options.sampling.check_key(key)
    raise NotImplementedError
