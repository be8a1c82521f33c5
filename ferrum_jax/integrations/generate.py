"""A whole decoding loop as one compiled program, its rows growing block by block."""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count, check_live, check_type
from ferrum_jax.integrations.batch import PagedBatch
from ferrum_jax.integrations.models import ModelFn, call_model, check_model
from ferrum_jax.integrations.sampling import Sampling
from ferrum_jax.ops import extend
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ

NULL_TOKEN = -1
"""Stands where there is no token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """When a loop stops, and how it chooses. Changing a static field recompiles.

    Attributes:
      max_new_tokens: Tokens of a row at most, the given first one counted (static): the width of
        the output. Where requests differ, keep one width and set `limits`.
      sampling: How a token is chosen (static).
      stop_token_ids: Tokens after which a row is done. Static only where options themselves go
        into a function of your own that is jitted; `generate` compiles for each power of two of
        their number.
      limits: i32[R]. Tokens of each row at most, where that is less than `max_new_tokens`.

    Example:
      >>> GenerateOptions(max_new_tokens=64, stop_token_ids=(2,)).sampling.is_greedy
      True
    """

    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    sampling: Sampling = dataclasses.field(default=Sampling(), metadata={"static": True})
    stop_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    limits: jax.Array | None = None

    def __post_init__(self) -> None:
        """Checks the static fields."""
        check_count("max_new_tokens", self.max_new_tokens)
        check_type("sampling", self.sampling, Sampling)
        if not isinstance(self.stop_token_ids, Iterable) or isinstance(self.stop_token_ids, str):
            raise ValueError(
                f"stop_token_ids must be a sequence of token ids, got {self.stop_token_ids!r}. "
                "Pass one token as (token_id,), and none as ()."
            )
        stop_token_ids = tuple(self.stop_token_ids)
        for token_id in stop_token_ids:
            check_count("stop_token_ids", token_id, minimum=0)
            if int(token_id) > np.iinfo(np.int32).max:
                raise ValueError(f"stop_token_ids must be within int32, got {token_id}.")
        object.__setattr__(self, "stop_token_ids", tuple(map(int, stop_token_ids)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What a loop has generated.

    Attributes:
      state: The cache. It holds every generated token but stop tokens.
      tokens: i32[R, max_new_tokens]. Each row's tokens, its stop token included; then
        `NULL_TOKEN`.
      num_tokens: i32[R]. How many these are.
      next_tokens: i32[R]. What follows them, to be given to the next call; `NULL_TOKEN` for a
        row that is done. A further turn of that row begins with its stop token, if the model is
        to see it: `extend` the row for stop token and turn, and `prefill` both.
      ok: bool[]. False if a row to be decoded holds no token (its `allocate` was not ok, or it was
        freed), so that nothing was generated; or if a step found no room: rows out of blocks, at
        their M blocks, or not to be extended at all. What was generated until then is there, and
        valid.
    """

    state: CacheState
    tokens: jax.Array
    num_tokens: jax.Array
    next_tokens: jax.Array
    ok: jax.Array


def generate(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: ArrayLike,
    tokens: ArrayLike,
    *,
    options: GenerateOptions,
    key: jax.Array | None = None,
) -> Generated:
    """Generates until every row is done, without the host; donates the state.

    Each step makes room for one token per row, runs the model on the rows that are not done, and
    chooses their next tokens. A row is done after a stop token, and rests, taking no more blocks,
    when it has as many tokens as it may. The loop ends when no row is left, or as soon as a step
    finds no room, with all rows of that step as they were.

    The first generated token is the one given: `tokens` come out as `Generated.tokens[:, 0]`, and
    count as one of `max_new_tokens`. Choose them from the logits of `prefill`, by
    `options.sampling.sample(logits, other_key)` with a key that is not used here. A call with
    `next_tokens` goes on exactly where the last one ended, also after `ok` was false and blocks
    were freed, and several short calls generate what one long call does. With sampling this holds
    for the same key and rows: a draw depends on key, row and position. (A manager chooses rows.)

    In a step of a manager, call `run` with `extends=True` and `reserve_tokens=max_new_tokens`:
    without the second, a pool that may grow does not grow for this loop.

    Args:
      model_fn: The model. Static: pass the same function (or an equal one) at each call.
      params: Its parameters, a pytree.
      state: The cache, holding what precedes `tokens` (see `prefill`). This consumes it: use
        the one returned.
      seq_ids: i32[R]. Rows, no two alike; `NULL_SEQ` for none.
      tokens: i32[R]. The first token of each row, not cached yet; `NULL_TOKEN` for a row that is
        done already. The loop is compiled for each R: pad rows with `NULL_SEQ`.
      options: When to stop and how to choose.
      key: A typed key, if tokens are to be drawn.

    Returns:
      What was generated, and the state.

    Raises:
      ValueError: There is no typed key, `model_fn` is not hashable, or the state was consumed.
      AssertionError: The rows' arrays differ in shape.
    """
    check_model(model_fn)
    check_live("state", state)
    check_type("options", options, GenerateOptions)
    options.sampling.check_key(key)
    seq_ids, tokens = as_ids(seq_ids), as_ids(tokens)
    chex.assert_rank(seq_ids, 1, custom_message="seq_ids must be i32[R].")
    chex.assert_equal_shape([seq_ids, tokens], custom_message="One of tokens a row.")
    if options.limits is not None:
        limits = as_ids(options.limits)
        chex.assert_equal_shape([seq_ids, limits], custom_message="One of limits a row.")
        options = dataclasses.replace(options, limits=limits)
    key = None if options.sampling.is_greedy else key
    stops = pad_to_power_of_two(np.asarray(as_ids(np.asarray(options.stop_token_ids))), NULL_TOKEN)
    options = dataclasses.replace(options, stop_token_ids=())
    return _generate(model_fn, params, state, (seq_ids, tokens, stops), options, key)


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="state")
def _generate(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    ids: tuple[jax.Array, jax.Array, jax.Array],
    options: GenerateOptions,
    key: jax.Array | None,
) -> Generated:
    """Generates; ids are rows and their first tokens, i32[R] each, and stop tokens, i32[P]."""
    seq_ids, tokens, stops = ids
    width = options.max_new_tokens
    limits = jnp.full(seq_ids.shape, width, jnp.int32)
    if options.limits is not None:
        limits = jnp.clip(options.limits, 0, width)

    def is_running(out: Generated) -> jax.Array:
        return (out.next_tokens >= 0) & (out.num_tokens < limits)

    def step(out: Generated) -> Generated:
        running = is_running(out)
        grown, ok = extend(out.state, jnp.where(running, seq_ids, NULL_SEQ), 1, max_new_tokens=1)
        running &= ok
        batch = PagedBatch.of(grown, seq_ids, running.astype(jnp.int32), num_tokens=1)
        fed = jnp.where(running, out.next_tokens, 0)
        logits, pool = call_model(model_fn, params, fed[:, None], batch)
        keys = _row_keys(key, seq_ids, batch.held_lens)
        chosen = options.sampling.sample(logits, keys)
        out = _emit(out, running, chosen)
        out = _emit_stops(out, is_running(out), stops)
        return dataclasses.replace(out, state=CacheState(pool, grown.tables), ok=ok)

    out = Generated(
        state=state,
        tokens=jnp.full((*seq_ids.shape, width), NULL_TOKEN, jnp.int32),
        num_tokens=jnp.zeros(seq_ids.shape, jnp.int32),
        next_tokens=jnp.where((seq_ids == NULL_SEQ) | (tokens < 0), NULL_TOKEN, tokens),
        ok=jnp.asarray(True),
    )
    out = _emit_stops(out, is_running(out), stops)
    held = read(state.tables.held_lens, index_or_end(seq_ids, state.tables.max_seqs), 0)
    out = dataclasses.replace(out, ok=jnp.all((held > 0) | ~is_running(out)))
    return lax.while_loop(lambda out: out.ok & jnp.any(is_running(out)), step, out)


def _emit(out: Generated, rows: jax.Array, next_tokens: jax.Array | int) -> Generated:
    """Appends the next token of `rows` (bool[R]) to the output and puts others in its place."""
    size, width = out.tokens.shape
    column = jnp.where(rows, out.num_tokens, width)
    return dataclasses.replace(
        out,
        tokens=out.tokens.at[jnp.arange(size), column].set(out.next_tokens, mode="drop"),
        num_tokens=out.num_tokens + rows.astype(jnp.int32),
        next_tokens=jnp.where(rows, next_tokens, out.next_tokens),
    )


def _emit_stops(out: Generated, rows: jax.Array, stop_token_ids: jax.Array) -> Generated:
    """Ends those of `rows` (bool[R]) whose next token is a stop token; i32[P], some of them -1."""
    if not stop_token_ids.size:
        return out
    return _emit(out, rows & jnp.isin(out.next_tokens, stop_token_ids), NULL_TOKEN)


def _row_keys(key: jax.Array | None, seq_ids: jax.Array, positions: jax.Array) -> jax.Array | None:
    """Returns keys [R], each of its row and position only."""
    if key is None:
        return None
    fold = jax.vmap(jax.random.fold_in)
    return fold(jax.vmap(jax.random.fold_in, (None, 0))(key, seq_ids), positions)
