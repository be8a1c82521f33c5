"""Decoding loop as one compiled program; rows grow block by block."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ferrum_jax.checks import check_count, check_flag, check_live, check_type
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.logprobs import NULL_TOKEN, Chosen, ChosenTokens
from ferrum_jax.decoding.models import ModelFn, call_model, check_model
from ferrum_jax.decoding.sampling import Sampling, check_token_ids, token_keys
from ferrum_jax.ops import extend
from ferrum_jax.ops.arguments import Ids, as_ids
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ, IdsLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Stop conditions and sampling of `generate`. Changing a static field recompiles.

    Attributes:
      max_new_tokens: Maximum number of tokens per row, including the given first one (static): the
        width of the output. If requests differ, keep one width and set `limits`.
      sampling: How tokens are chosen (static).
      stop_token_ids: Tokens that end a row. Static only if the options are an argument of your own
        jitted function; `generate` compiles for each power of two of their number.
      limits: i32[R]. Maximum number of tokens of each row, if smaller than `max_new_tokens`.
      top_logprobs: Number of best tokens to return in each place, with their log-probabilities
        (static).
      logprobs_after_temperature: Whether log-probabilities are those after the division of the
        logits by the temperature, or those of the model (static). Tokens that `top_k` and `top_p`
        drop count in both cases; forbidden ones do not. At temperature 0 there is no difference.

    Raises:
      ValueError: A static field has a wrong type or value.

    Example:
      >>> GenerateOptions(max_new_tokens=64, stop_token_ids=(2,)).sampling.is_greedy
      True
    """

    max_new_tokens: int = dataclasses.field(metadata={"static": True})
    sampling: Sampling = dataclasses.field(default=Sampling(), metadata={"static": True})
    stop_token_ids: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    limits: jax.Array | None = None
    top_logprobs: int = dataclasses.field(default=0, metadata={"static": True})
    logprobs_after_temperature: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self) -> None:
        """Checks the static fields."""
        check_count("max_new_tokens", self.max_new_tokens)
        check_type("sampling", self.sampling, Sampling)
        stop_token_ids = check_token_ids("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        check_count("top_logprobs", self.top_logprobs, minimum=0)
        check_flag("logprobs_after_temperature", self.logprobs_after_temperature)

    def choose(self, logits: jax.Array, key: jax.Array | None = None) -> Chosen:
        """Chooses a token for each row, as each step of `generate` does.

        Args:
          logits: f32[R, V]. Logits of each row.
          key: As for `Sampling.sample`.

        Returns:
          Tokens i32[R] with their log-probabilities; the first ones for `generate`, for example.

        Raises:
          ValueError: As `Sampling.sample` says, or `top_logprobs` is more than the vocabulary.
        """
        logits = self.sampling.without_forbidden(logits)
        tokens = self.sampling.sample(logits, key)
        if self.logprobs_after_temperature:
            logits = self.sampling.after_temperature(logits)
        return Chosen.of(logits, tokens, self.top_logprobs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GeneratedTokens(ChosenTokens):
    """What `generate` has generated, without the cache.

    Attributes:
      chosen: Tokens of each row (i32[R, max_new_tokens]), including its stop token, then
        `NULL_TOKEN`; with their log-probabilities.
      num_tokens: i32[R]. Number of tokens of each row.
      next: Token of each row after these (i32[R]), for the next call; `NULL_TOKEN` for a row that
        is done. If the model is to see the stop token in a further turn, `extend` the row for stop
        token and turn, and `prefill` both.
      ok: bool[]. False if a row to decode holds no token (its `allocate` was not ok, or it was
        freed), so that nothing was generated; or if a step found no room: no free blocks, a row
        with M blocks, or rows that may not be extended. Tokens generated before are valid.
    """

    chosen: Chosen
    num_tokens: jax.Array
    next: Chosen
    ok: jax.Array

    @property
    def next_tokens(self) -> jax.Array:
        """i32[R]. Token of each row after these; `NULL_TOKEN` for a row that is done."""
        return self.next.tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated(GeneratedTokens):
    """Result of `generate`.

    Attributes:
      state: The cache. It holds all generated tokens except for stop tokens.
    """

    state: CacheState

    def without_state(self) -> GeneratedTokens:
        """Returns what was generated, without the cache."""
        names = [field.name for field in dataclasses.fields(GeneratedTokens)]
        return GeneratedTokens(**{name: getattr(self, name) for name in names})


class _Inputs(NamedTuple):
    """Integer inputs of the loop.

    Attributes:
      seq_ids: i32[R]. Rows.
      tokens: i32[R], alone or with log-probabilities. First token of each row.
      stop_token_ids: i32[P]. Stop tokens, padded with `NULL_TOKEN`.
    """

    seq_ids: Ids
    tokens: Ids | Chosen
    stop_token_ids: Ids


def generate(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: IdsLike,
    tokens: IdsLike | Chosen,
    *,
    options: GenerateOptions,
    key: jax.Array | None = None,
) -> Generated:
    """Generates tokens until every row is done, in one program; donates the state.

    Each step makes room for one token per row, runs the model on the rows that are not done, and
    chooses their next tokens. A row is done after a stop token. A row that has reached its limit
    pauses, and takes no more blocks. The loop ends when no row is running, or when a step finds no
    room; then all rows of that step are unchanged.

    The first generated token is the given one: `tokens` is `Generated.tokens[:, 0]`, and counts as
    one of `max_new_tokens`. Choose it from the logits of `prefill` by `options.choose`, which knows
    its log-probability too. A call with `Generated.next` continues exactly where the last one
    ended, also after `ok` was false and blocks were freed: several short calls generate the tokens
    and log-probabilities of one long call.

    The token at position p of a sequence is drawn with `token_keys(keys, p)`, and depends on no
    other request. With one key for all rows, that of each row is `fold_in(key, seq_id)`.

    A manager has it as a method, which grows the pool.

    Args:
      model_fn: The model. Static: pass the same function, or an equal one, at each call.
      params: Parameters of the model, a pytree.
      state: The cache, which holds all tokens before `tokens` (see `prefill`). It is consumed: use
        the returned one.
      seq_ids: i32[R]. Rows, all different; `NULL_SEQ` for padding.
      tokens: i32[R]. First token of each row, not cached yet; `NULL_TOKEN` for a row that is
        done. NaN is the log-probability of tokens that are given alone. The loop is compiled for
        each R: pad rows with `NULL_SEQ`.
      options: Stop conditions and sampling.
      key: Typed keys [R] (`jax.random.key`), one per request, or one key for all rows; required if
        the temperature is above 0.

    Returns:
      The generated tokens, and the state.

    Raises:
      ValueError: A typed key is missing, or there are not R; `tokens` have another number of best
        tokens than the options; `model_fn` is not hashable, or the state was consumed.
      AssertionError: The arrays of rows differ in shape.
      TypeError: The model does not return `(logits, pools)` as `ModelFn` says.
    """
    check_model(model_fn)
    check_live("state", state)
    check_type("options", options, GenerateOptions)
    options.sampling.check_key(key)
    seq_ids = as_ids(seq_ids)
    first = _first_tokens(tokens, seq_ids, options.top_logprobs)
    stops = pad_to_power_of_two(np.asarray(as_ids(np.asarray(options.stop_token_ids))), NULL_TOKEN)
    key = None if options.sampling.is_greedy else _checked_keys(key, seq_ids)
    options = dataclasses.replace(options, stop_token_ids=(), limits=_limits(options, seq_ids))
    return _generate(model_fn, params, state, _Inputs(seq_ids, first, stops), options, key)


def _first_tokens(tokens: IdsLike | Chosen, seq_ids: Ids, num_top: int) -> Ids | Chosen:
    """Returns the given first tokens, checked: one per row, with `num_top` best tokens."""
    first = tokens if isinstance(tokens, Chosen) else as_ids(tokens)
    given = first.tokens if isinstance(first, Chosen) else first
    chex.assert_rank(seq_ids, 1, custom_message="seq_ids must be i32[R].")
    chex.assert_equal_shape([seq_ids, given], custom_message="tokens must have one per row.")
    if isinstance(first, Chosen) and first.top_tokens.shape[-1] != num_top:
        raise ValueError(
            f"tokens must have the {num_top} best tokens that top_logprobs asks for, got "
            f"{first.top_tokens.shape[-1]}. Choose the first tokens with the same options, or pass "
            "tokens alone."
        )
    return first


def _limits(options: GenerateOptions, seq_ids: Ids) -> Any:
    """Returns the limits of rows (i32[R]) as i32[R]; None if there are none."""
    if options.limits is None:
        return None
    limits = as_ids(options.limits)
    chex.assert_equal_shape([seq_ids, limits], custom_message="limits must have one per row.")
    return limits


def _checked_keys(key: jax.Array | None, seq_ids: Ids) -> jax.Array | None:
    """Returns one key, or keys [R] of rows (i32[R]); raises ValueError for another number."""
    if key is not None and key.shape not in ((), seq_ids.shape):
        raise ValueError(
            f"key must be one key, or one per row ({seq_ids.size}), got shape {list(key.shape)}. "
            "Make them with jax.vmap(jax.random.key)(seeds)."
        )
    return key


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="state")
def _generate(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    inputs: _Inputs,
    options: GenerateOptions,
    key: jax.Array | None,
) -> Generated:
    """Runs the loop of `generate`."""
    seq_ids, stops = jnp.asarray(inputs.seq_ids), jnp.asarray(inputs.stop_token_ids)
    width, num_top = options.max_new_tokens, options.top_logprobs
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
        logits, pools = call_model(model_fn, params, fed[:, None], batch)
        rows = batch.rows[0]
        keys = _row_keys(key, seq_ids, rows.held_lens + rows.num_pruned)
        out = _emit(out, running, options.choose(logits, keys))
        out = _emit_stops(out, is_running(out), stops)
        return dataclasses.replace(out, state=grown.with_pools(pools), ok=ok)

    first, nothing = inputs.tokens, jnp.full(seq_ids.shape, NULL_TOKEN, jnp.int32)
    if not isinstance(first, Chosen):
        first = Chosen.unknown(first, num_top)
    is_none = (seq_ids == NULL_SEQ) | (first.tokens < 0)
    out = Generated(
        state=state,
        chosen=Chosen.unknown(jnp.full((*seq_ids.shape, width), NULL_TOKEN, jnp.int32), num_top),
        num_tokens=jnp.zeros(seq_ids.shape, jnp.int32),
        next=Chosen.unknown(nothing, num_top).where(is_none, first),
        ok=jnp.asarray(True),
    )
    out = _emit_stops(out, is_running(out), stops)
    seq_lens = read(state.seq_lens, index_or_end(seq_ids, state.max_seqs), 0)
    out = dataclasses.replace(out, ok=jnp.all((seq_lens > 0) | ~is_running(out)))
    return lax.while_loop(lambda out: out.ok & jnp.any(is_running(out)), step, out)


def _emit(out: Generated, rows: jax.Array, after: Chosen) -> Generated:
    """Appends the next token of `rows` (bool[R]) to the output, and replaces it with another."""
    size, width = out.tokens.shape
    row, column = jnp.arange(size), jnp.where(rows, out.num_tokens, width)
    return dataclasses.replace(
        out,
        chosen=jax.tree.map(
            lambda all_of, one: all_of.at[row, column].set(one, mode="drop"), out.chosen, out.next
        ),
        num_tokens=out.num_tokens + rows.astype(jnp.int32),
        next=after.where(rows, out.next),
    )


def _emit_stops(out: Generated, rows: jax.Array, stop_token_ids: jax.Array) -> Generated:
    """Ends those of `rows` (bool[R]) of which the next token is one of i32[P] stop tokens."""
    if not stop_token_ids.size:
        return out
    is_stop = rows & jnp.isin(out.next_tokens, stop_token_ids)
    nothing = jnp.full_like(out.next_tokens, NULL_TOKEN)
    return _emit(out, is_stop, Chosen.unknown(nothing, out.next.top_tokens.shape[-1]))


def _row_keys(key: jax.Array | None, seq_ids: jax.Array, positions: jax.Array) -> jax.Array | None:
    """Returns keys [R] for the tokens at `positions`, of one key per row or of one for all."""
    if key is None:
        return None
    if key.ndim == 0:
        key = jax.vmap(jax.random.fold_in, (None, 0))(key, seq_ids)
    return token_keys(key, positions)
