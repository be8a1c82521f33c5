"""Prefill and serving on replicas: each program runs on all of them, without an exchange."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.arithmetic import ceil_div, next_power_of_two
from ferrum_jax.checks import check_live, check_type
from ferrum_jax.decoding.logprobs import Chosen, ChosenTokens
from ferrum_jax.decoding.models import ModelFn, Pools, check_model
from ferrum_jax.decoding.prefill import (
    Chunks,
    PrefillOptions,
    checked_rows,
    keep_rows,
    pack_chunks,
    run_step,
    token_ids,
)
from ferrum_jax.integrations.serve import (
    checked_free_rows,
    checked_limits,
    checked_prompts,
    request_keys,
    require_short,
)
from ferrum_jax.integrations.serve_loop import Queue, ServeOptions, run_queue
from ferrum_jax.ops import extend
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.replicas import ReplicaRows, Replicas, naming
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ, IdsLike


def prefill_replicas(
    model_fn: ModelFn,
    params: Any,
    replicas: Replicas,
    seq_ids: IdsLike,
    prompts: Sequence[Sequence[int]],
    *,
    starts: IdsLike = 0,
    options: PrefillOptions | None = None,
) -> tuple[jax.Array, Replicas]:
    """Runs prompts through a model and caches their keys and values; donates the pools.

    Each step is one program, in which every replica computes chunks of its own prompts. There are
    as many steps as the replica with the most chunks needs: give replicas about as many tokens.

    Args:
      model_fn: As for `prefill`, like all arguments that are not explained here.
      params: Parameters of the model; every replica uses them.
      replicas: The caches. Their pools are consumed: use the returned ones.
      seq_ids: i32[n]. Row of each prompt, numbered over all replicas; all different.
      prompts: Token ids of each prompt, at least one.
      starts: i32[n], or i32[] for all prompts.
      options: Shape of a step of one replica; the defaults of `PrefillOptions` if None.

    Returns:
      `(logits, replicas)`. logits: f32[n, vocab], for the token after each prompt, on all devices.

    Raises:
      ValueError: As `prefill`; the text names the replica, and its rows from 0 on.
      RefusedError: A replica has no room for a prompt; all replicas are as before.
    """
    check_model(model_fn)
    check_live("replicas", replicas)
    options = PrefillOptions() if options is None else options
    check_type("options", options, PrefillOptions)
    arrays = [token_ids(i, prompt) for i, prompt in enumerate(prompts)]
    rows = replicas.split(seq_ids)
    if not arrays or rows.replicas.size != len(arrays):
        raise ValueError(
            f"seq_ids must have one row per prompt, for at least 1 prompt; got "
            f"{rows.replicas.size} rows for {len(arrays)} prompts."
        )
    starts = np.broadcast_to(np.asarray(as_ids(np.asarray(starts))), len(arrays))
    steps, growing = _plan(replicas, rows, arrays, starts, options)
    pools, last = replicas.caches.pools, None
    grown = _grow(replicas, steps, growing)
    for with_room, step in zip(grown, steps, strict=True):
        pools, logits = _prefill_each(model_fn, params, pools, with_room, step)
        if last is None:
            shape = *rows.seq_ids.shape, logits.shape[-1]
            last = jnp.zeros(shape, logits.dtype, device=logits.sharding)
        last = _keep_each(with_room, last, logits, step.chunks.finished)
    assert last is not None
    caches = grown[-1].caches.with_pools(pools)
    return rows.collect(last), dataclasses.replace(replicas, caches=caches)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicasServed(ChosenTokens):
    """Result of `serve_replicas`; Q requests, in the order of the prompts.

    Attributes:
      replicas: The caches, with the rows free again.
      chosen: As of `Served`, on all devices.
      num_tokens: i32[Q]. New tokens of each request.
      ok: bool[Q]. As of `Served`.
      replica: i32[Q]. The replica that answered each request.
      num_steps: i32[P]. How often the model ran in each replica.
      num_preempted: i32[P]. How often a replica put a request back to wait.
    """

    replicas: Replicas
    chosen: Chosen
    num_tokens: jax.Array
    ok: jax.Array
    replica: np.ndarray
    num_steps: jax.Array
    num_preempted: jax.Array


def serve_replicas(
    model_fn: ModelFn,
    params: Any,
    replicas: Replicas,
    seq_ids: IdsLike,
    prompts: Sequence[Sequence[int]],
    *,
    options: ServeOptions,
    key: jax.Array | None = None,
) -> ReplicasServed:
    """Generates the answers to any number of prompts, as `serve` does; donates the replicas.

    The prompts are divided among the replicas before the program starts, such that each has about
    as many tokens to read and to generate at most. An answer does not depend on its replica.

    Args:
      model_fn: As for `serve`, like all arguments that are not explained here.
      params: Parameters of the model; every replica uses them.
      replicas: The caches. They are consumed: use the returned ones.
      seq_ids: i32[n]. Free rows to use, numbered over all replicas: as many of each replica.
      prompts: Token ids of each of the Q prompts.
      options: As for `serve`.
      key: As for `serve`.

    Returns:
      The answers, and the replicas.

    Raises:
      ValueError: As `serve`, where the text names the replica, and its rows from 0 on; or the rows
        are not as many of each replica.
    """
    check_model(model_fn)
    check_live("replicas", replicas)
    check_type("options", options, ServeOptions)
    options.sampling.check_key(key)
    tokens = checked_prompts(prompts)
    limits = checked_limits(options, (len(tokens),))
    require_short(replicas.caches, tokens, limits)
    rows = _served_rows(replicas, seq_ids)
    queue = Queue.of(tokens, limits, options.stop_token_ids)
    parts = _share_out([len(x) + limit for x, limit in zip(tokens, limits, strict=True)], replicas)
    keys = _keys_of_each(options, key, parts)
    spread = [
        parts.spread(x[: len(tokens)]) for x in (queue.prompts, queue.prompt_lens, queue.limits)
    ]
    options = dataclasses.replace(options, stop_token_ids=(), limits=None)
    shared = params, queue.stop_token_ids
    served, of_requests, of_replicas = _serve_each(
        model_fn, shared, replicas, rows, spread, options, keys
    )
    chosen, num_tokens, ok = jax.tree.map(parts.collect, of_requests)
    return ReplicasServed(
        replicas=served,
        chosen=chosen,
        num_tokens=num_tokens,
        ok=ok,
        replica=parts.replicas,
        num_steps=of_replicas[0],
        num_preempted=of_replicas[1],
    )


class _Step(NamedTuple):
    """A prefill step of all replicas: R chunks in each.

    Attributes:
      seq_ids: i32[P, R]. Row of each chunk in its replica.
      seq_lens: i32[P, R]. Position after each chunk.
      chunks: The chunks; each array is [P, R, ...].
    """

    seq_ids: np.ndarray
    seq_lens: np.ndarray
    chunks: Chunks


def _plan(
    replicas: Replicas,
    rows: ReplicaRows,
    prompts: Sequence[np.ndarray],
    starts: np.ndarray,
    options: PrefillOptions,
) -> tuple[list[_Step], np.ndarray]:
    """Returns the steps, and the rows without room for their prompts (i32[P, n])."""
    members = [rows.members(i) for i in range(replicas.num_replicas)]
    num_chunks = np.asarray([ceil_div(prompt.size, options.chunk_tokens) for prompt in prompts])
    most = max(int(num_chunks[of_replica].sum()) for of_replica in members)
    size = min(options.rows_per_step, next_power_of_two(most))
    num_steps = ceil_div(most, size)
    growing, planned = np.full_like(rows.seq_ids, NULL_SEQ), []
    for i, (state, of_replica) in enumerate(zip(replicas.on_host(), members, strict=True)):
        its_prompts = [prompts[j] for j in of_replica]
        ids, its_starts = np.full(1, NULL_SEQ, np.int32), np.zeros(1, np.int32)
        if its_prompts:
            with naming(i):
                ids, its_starts, without_room = checked_rows(
                    state, rows.seq_ids[i, : of_replica.size], starts[of_replica], its_prompts
                )
            growing[i, : of_replica.size] = without_room
        packed = pack_chunks(its_prompts, dataclasses.replace(options, rows_per_step=size))
        packed += [_no_chunks(options)] * (num_steps - len(packed))
        planned.append([_step_of(_padded(chunks, size), ids, its_starts) for chunks in packed])
    steps = [jax.tree.map(lambda *x: np.stack(x), *of_all) for of_all in zip(*planned, strict=True)]
    return steps, growing


def _no_chunks(options: PrefillOptions) -> Chunks:
    none = np.zeros(0, np.int32)
    return Chunks(none, np.zeros((0, options.chunk_tokens), np.int32), none, none, none)


def _padded(chunks: Chunks, size: int) -> Chunks:
    """Returns chunks with padding up to `size` of them."""
    missing = size - chunks.prompts.size

    def padded(x: np.ndarray, value: int = 0) -> np.ndarray:
        return np.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)], constant_values=value)

    of_all = jax.tree.map(padded, chunks)
    return dataclasses.replace(of_all, prompts=padded(chunks.prompts, -1))


def _step_of(chunks: Chunks, rows: np.ndarray, starts: np.ndarray) -> _Step:
    """Returns a step of one replica; rows and starts as `checked_rows` returns them."""
    which = chunks.prompts
    seq_lens = starts[which] + chunks.num_before + chunks.num_tokens
    return _Step(rows[which], seq_lens.astype(np.int32), chunks)


def _grow(replicas: Replicas, steps: Sequence[_Step], growing: np.ndarray) -> list[Replicas]:
    """Extends rows (i32[P, n], `NULL_SEQ` for none) step by step, as `prefill.grow_rows` does."""
    caches = replicas.caches.with_pools(())
    without_pools, grown, oks = dataclasses.replace(replicas, caches=caches), [], []
    if (growing == NULL_SEQ).all():
        return [without_pools] * len(steps)
    for step in steps:
        num_tokens = np.zeros_like(growing)
        which = np.where(step.chunks.prompts < 0, 0, step.chunks.prompts)
        np.add.at(num_tokens, (np.arange(len(growing))[:, None], which), step.chunks.num_tokens)
        seq_ids = np.where(num_tokens > 0, growing, NULL_SEQ)
        most = step.chunks.tokens[0].size
        without_pools, ok = _extend_each(without_pools, seq_ids, num_tokens, most)
        grown.append(without_pools)
        oks.append(ok)
    what = (
        f"prefill {np.count_nonzero(growing != NULL_SEQ)} rows that had no room for their prompts"
    )
    replicas.require(np.stack(jax.device_get(oks), 1), what)
    return grown


@functools.partial(jax.jit, static_argnames="most")
def _extend_each(
    replicas: Replicas, seq_ids: jax.Array, num_tokens: jax.Array, most: int
) -> tuple[Replicas, jax.Array]:
    def step(state: CacheState, _: Any, *of_rows: jax.Array) -> tuple[CacheState, jax.Array]:
        return extend(state, *of_rows, max_new_tokens=most)

    return replicas.run(step, (), seq_ids, num_tokens)


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="pools")
def _prefill_each(
    model_fn: ModelFn, params: Any, pools: Pools, without_pools: Replicas, step: _Step
) -> tuple[Pools, jax.Array]:
    """Runs `run_step` on each replica; returns the pools, and logits f32[P, R, vocab]."""

    def run(pools: Pools, params: Any, state: CacheState, step: _Step) -> tuple[Pools, jax.Array]:
        logits, pools = run_step(model_fn, params, pools, state, *step)
        return pools, logits

    return without_pools.run_on(pools, run, params, without_pools.caches, step)


@functools.partial(jax.jit, donate_argnames="kept")
def _keep_each(
    replicas: Replicas, kept: jax.Array, logits: jax.Array, prompts: jax.Array
) -> jax.Array:
    """Runs `keep_rows` on each replica."""

    def keep(kept: jax.Array, _: Any, *of_step: jax.Array) -> tuple[jax.Array, None]:
        return keep_rows(kept, *of_step), None

    kept, _ = replicas.run_on(kept, keep, (), logits, prompts)
    return kept


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="replicas")
def _serve_each(
    model_fn: ModelFn,
    shared: tuple[Any, jax.Array],
    replicas: Replicas,
    rows: jax.Array,
    requests: Sequence[jax.Array],
    options: ServeOptions,
    keys: jax.Array | None,
) -> tuple[Replicas, tuple[Chosen, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """Runs `run_queue` on each replica.

    Args:
      model_fn: The model (static).
      shared: Parameters, and padded stop tokens.
      replicas: The caches.
      rows: i32[P, R]. Free rows of each replica.
      requests: Prompts [P, Q, L], their lengths and limits [P, Q] of each replica.
      options: As given, without stop tokens and limits.
      keys: Keys [P, Q]; None if tokens are not drawn.
    """

    def step(state: CacheState, shared: Any, *parts: Any) -> tuple[CacheState, Any]:
        (params, stops), (rows, requests, keys) = shared, parts
        queue = Queue(*requests, stop_token_ids=stops)
        answers = run_queue(model_fn, params, state, rows, queue, options, keys)
        of_requests = answers.chosen, answers.num_tokens, answers.ok
        return answers.state, (of_requests, (answers.counts.num_steps, answers.num_preempted))

    replicas, (of_requests, of_replicas) = replicas.run(step, shared, rows, requests, keys)
    return replicas, of_requests, of_replicas


def _keys_of_each(
    options: ServeOptions, key: jax.Array | None, parts: ReplicaRows
) -> jax.Array | None:
    """Returns the keys [P, Q] of the requests of each replica; None if tokens are not drawn."""
    if options.sampling.is_greedy or key is None:
        return None
    number = np.arange(parts.replicas.size)
    return request_keys(key, number.size, number.size)[parts.spread(number)]


def _served_rows(replicas: Replicas, seq_ids: IdsLike) -> np.ndarray:
    """Returns free rows i32[P, R]; raises ValueError unless there are as many of each replica."""
    rows = replicas.split(seq_ids)
    counts = np.bincount(rows.replicas, minlength=replicas.num_replicas)
    if (counts != counts[0]).any():
        raise ValueError(
            f"seq_ids must name as many rows of each replica, got {counts.tolist()} of the "
            f"{replicas.num_replicas} replicas. Row s of replica p is p * "
            f"{replicas.rows_per_replica} + s."
        )
    chosen = rows.seq_ids[:, : counts[0]]
    for i, (state, its_rows) in enumerate(zip(replicas.on_host(), chosen, strict=True)):
        with naming(i):
            checked_free_rows(state, its_rows)
    return chosen


def _share_out(sizes: Sequence[int], replicas: Replicas) -> ReplicaRows:
    """Divides requests among replicas: the longest first, each to the least loaded one."""
    loads = np.zeros(replicas.num_replicas, np.int64)
    replica = np.zeros(len(sizes), np.int32)
    for i in np.argsort(-np.asarray(sizes), kind="stable"):
        replica[i] = np.argmin(loads)
        loads[replica[i]] += sizes[i]
    places = np.arange(len(sizes), dtype=np.int32)
    return ReplicaRows.of(replica, places, replicas.num_replicas)
