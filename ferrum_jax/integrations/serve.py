"""Serving a queue of prompts in one compiled program: rows are refilled as others finish."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ferrum_jax.checks import check_live, check_type
from ferrum_jax.decoding.logprobs import Chosen, ChosenTokens
from ferrum_jax.decoding.models import ModelFn, check_model
from ferrum_jax.decoding.prefill import token_ids
from ferrum_jax.integrations.serve_loop import Answers, Queue, ServeOptions, run_queue
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.buckets import first_rows
from ferrum_jax.state import CacheState
from ferrum_jax.types import IdsLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Served(ChosenTokens):
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
    tokens = checked_prompts(prompts)
    limits = checked_limits(options, (len(tokens),))
    rows = checked_free_rows(state, seq_ids)
    require_short(state, tokens, limits)
    queue = Queue.of(tokens, limits, options.stop_token_ids)
    keys = None
    if not options.sampling.is_greedy and key is not None:
        keys = request_keys(key, len(tokens), queue.prompt_lens.size)
    options = dataclasses.replace(options, stop_token_ids=(), limits=None)
    return _served(run_queue(model_fn, params, state, rows, queue, options, keys), len(tokens))


def _served(answers: Answers, num_requests: int) -> Served:
    """Returns the answers of the loop, without padding."""
    chosen, num_tokens, ok = jax.tree.map(
        lambda x: first_rows(x, num_requests), (answers.chosen, answers.num_tokens, answers.ok)
    )
    return Served(
        state=answers.state,
        chosen=chosen,
        num_tokens=num_tokens,
        ok=ok,
        num_steps=answers.counts.num_steps,
        num_preempted=answers.num_preempted,
    )


def checked_prompts(prompts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Returns the token ids of each prompt, i32[T]; raises ValueError if there is none."""
    tokens = [token_ids(i, prompt) for i, prompt in enumerate(prompts)]
    if not tokens:
        raise ValueError("prompts is empty. Pass at least one prompt.")
    return tokens


def checked_limits(options: ServeOptions, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the most new tokens of each request, i32 of a shape; raises ValueError for others."""
    limits = np.full(shape, options.max_new_tokens, np.int32)
    if options.limits is None:
        return limits
    given = np.asarray(as_ids(np.asarray(options.limits)))
    if given.shape != shape or (given < 1).any():
        per = "prompt" if len(shape) == 1 else "prompt and sample"
        raise ValueError(
            f"limits must be at least 1, one per {per}, of shape {list(shape)}; got shape "
            f"{list(given.shape)}, {given.tolist()}."
        )
    return np.minimum(given, limits)


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


def require_short(state: CacheState, prompts: Sequence[np.ndarray], limits: np.ndarray) -> None:
    """Raises ValueError if a prompt with its new tokens, at most i32[Q], is longer than a row."""
    longest = min(t.max_blocks_per_seq * t.block_size for t in state.page_tables)
    for i, (tokens, limit) in enumerate(zip(prompts, limits.tolist(), strict=True)):
        if (needed := tokens.size + limit - 1) > longest:
            raise ValueError(
                f"prompts[{i}] has {tokens.size} tokens, and {limit} new ones make {needed} to "
                f"hold; a row holds {longest}. Shorten it, set limits, or make the cache with a "
                "larger max_blocks_per_seq."
            )
