"""Log-probabilities of the tokens of prompts, computed while they are prefilled, or afterwards.

A model returns logits for the last new token of each row. So each token is a row of its own here:
rows of one step may be consecutive tokens of one sequence.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.checks import check_count, check_flag, check_live, check_type
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.logprobs import NULL_TOKEN, Chosen
from ferrum_jax.decoding.models import ModelFn, Pools, call_model, check_model, read_model
from ferrum_jax.decoding.prefill import (
    Chunks,
    PrefillOptions,
    checked_rows,
    grow_rows,
    keep_rows,
    pack_chunks,
    token_ids,
)
from ferrum_jax.layers import first_needed_block
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.buckets import first_rows
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ, IdsLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptLogprobsOptions:
    """What `prompt_logprobs` computes, and in which steps.

    Attributes:
      tokens_per_step: Maximum number of tokens per step; a smaller power of two if fewer are
        needed. A step's logits are `tokens_per_step * vocab` numbers.
      top_logprobs: Number of best tokens to return in each place.
      recompute_cached: Whether tokens that the rows hold already have log-probabilities too, for
        which they are computed again.

    Raises:
      ValueError: A field has a wrong type or value.
    """

    tokens_per_step: int = 256
    top_logprobs: int = 0
    recompute_cached: bool = True

    def __post_init__(self) -> None:
        """Checks each field."""
        check_count("tokens_per_step", self.tokens_per_step)
        check_count("top_logprobs", self.top_logprobs, minimum=0)
        check_flag("recompute_cached", self.recompute_cached)


class PromptLogprobs(NamedTuple):
    """Result of `prompt_logprobs`.

    Attributes:
      state: The cache, with the prompts cached.
      logits: f32[P, vocab]. Logits for the token after each prompt; NaN for `NULL_SEQ`.
      chosen: The tokens of each prompt (i32[P, T], T of the longest one, then `NULL_TOKEN`) with
        their log-probabilities, given those before. NaN for a first token, which has none before,
        for what was not asked for, and for `NULL_SEQ`.
    """

    state: CacheState
    logits: jax.Array
    chosen: Chosen


class _Flat(NamedTuple):
    """Tokens of one step, each a row of its own. R tokens.

    Attributes:
      tokens: i32[R, 1]. The tokens.
      num_tokens: i32[R]. 1; 0 for padding.
      next_tokens: i32[R]. Token after each in its prompt, or `NULL_TOKEN`.
      seq_ids: i32[R]. Row of each token, or `NULL_SEQ`.
      seq_lens: i32[R]. Position after each token.
    """

    tokens: np.ndarray
    num_tokens: np.ndarray
    next_tokens: np.ndarray
    seq_ids: np.ndarray
    seq_lens: np.ndarray


def prompt_logprobs(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: IdsLike,
    prompts: Sequence[Sequence[int]],
    *,
    starts: IdsLike = 0,
    options: PromptLogprobsOptions | None = None,
) -> PromptLogprobs:
    """Runs prompts through a model like `prefill`, with log-probabilities; donates the pools.

    Unlike those of `prefill`, prompts are whole: `starts` of their first tokens are cached already,
    as `handle.num_cached_tokens` says, perhaps all. To compute these again writes nothing.

    Each token is a row of its own, which reads all tokens before: long prompts take more time than
    in `prefill`. The model is compiled twice for each power of two of tokens per step.

    Args:
      model_fn: The model, as in `prefill`.
      params: Parameters of the model, a pytree.
      state: The cache. Its pools are consumed: use the returned state.
      seq_ids: i32[P]. Row of each prompt, as in `prefill`.
      prompts: Token ids of each prompt from position 0 on, at least one.
      starts: i32[P], or i32[] for all prompts. Leading tokens of each prompt that the row holds;
        its length must be that of the prompt, or `starts` if it has no room yet.
      options: What is computed; the defaults of `PromptLogprobsOptions` if None.

    Returns:
      The cache, the logits after each prompt, and the log-probabilities. Waits for the device.

    Raises:
      ValueError: As `prefill` says; `starts` is more than a prompt; or a row cannot compute its
        cached tokens again, because a sliding window or compression has dropped some of them.
      RefusedError, TypeError: As `prefill` says.
    """
    check_model(model_fn)
    check_live("state", state)
    options = PromptLogprobsOptions() if options is None else options
    check_type("options", options, PromptLogprobsOptions)
    arrays, num_top = [token_ids(*pair) for pair in enumerate(prompts)], options.top_logprobs
    given = _checked_starts(starts, arrays)
    new = [tokens[start:] for tokens, start in zip(arrays, given, strict=True)]
    rows, starts, growing = checked_rows(state, seq_ids, given, new)
    # The token before the first new one says how likely that one is.
    firsts = np.where(options.recompute_cached, 0, np.maximum(given - 1, 0))
    cached = [tokens[b:e] for tokens, b, e in zip(arrays, firsts, given, strict=True)]
    _require_held(state, rows[:-1], firsts, given)
    packing = PrefillOptions(chunk_tokens=1, rows_per_step=options.tokens_per_step)
    written = pack_chunks(new, packing)
    grown = grow_rows(state, written, growing)
    kept, pools = _Kept(arrays, num_top), state.pools
    for chunks in pack_chunks(cached, packing):
        flat = _flat(arrays, chunks, np.append(firsts, 0), rows)
        kept.add(chunks.prompts, flat, *_read_step(model_fn, params, state, flat, num_top))
    for chunks, with_room in zip(written, grown, strict=True):
        flat = _flat(arrays, chunks, starts, rows)
        *found, pools = _write_step(model_fn, params, pools, with_room, flat, num_top)
        kept.add(chunks.prompts, flat, *found)
    return PromptLogprobs([state, *grown][-1].with_pools(pools), kept.logits(), kept.chosen())


class _Kept:
    """Mutable collection of what the steps return.

    Args:
      prompts: Whole prompts, i32[T] each.
      num_top: Number of best tokens.
    """

    def __init__(self, prompts: Sequence[np.ndarray], num_top: int):
        self._prompts, self._num_top = prompts, num_top
        self._last: jax.Array | None = None
        self._parts: list[tuple[np.ndarray, np.ndarray, Chosen]] = []

    def add(self, which: np.ndarray, flat: _Flat, logits: jax.Array, chosen: Chosen) -> None:
        """Adds a step with tokens of prompts `which` (i32[R]): its logits, and the next tokens."""
        self._parts.append((which, flat.seq_lens, chosen))
        if self._last is None:
            shape = next_power_of_two(len(self._prompts)), logits.shape[-1]
            self._last = jnp.zeros(shape, logits.dtype)
        finished = np.where(flat.next_tokens == NULL_TOKEN, which, -1)
        self._last = keep_rows(self._last, logits, finished)

    def logits(self) -> jax.Array:
        """Returns the logits after each prompt: f32[P, vocab]."""
        assert self._last is not None
        return first_rows(self._last, len(self._prompts))

    def chosen(self) -> Chosen:
        """Returns the prompts with their log-probabilities: i32[P, T]; waits for the device."""
        shape = len(self._prompts), max(prompt.size for prompt in self._prompts)
        tokens, logprobs = np.full(shape, NULL_TOKEN, np.int32), np.full(shape, np.nan, np.float32)
        top_tokens = np.full((*shape, self._num_top), NULL_TOKEN, np.int32)
        top_logprobs = np.full((*shape, self._num_top), np.nan, np.float32)
        for row, prompt in zip(tokens, self._prompts, strict=True):
            row[: prompt.size] = prompt
        for which, after, chosen in jax.device_get(self._parts):
            is_token = chosen.tokens != NULL_TOKEN
            at = which[is_token], after[is_token]
            logprobs[at] = chosen.logprobs[is_token]
            top_tokens[at] = chosen.top_tokens[is_token]
            top_logprobs[at] = chosen.top_logprobs[is_token]
        return Chosen(*jax.device_put((tokens, logprobs, top_tokens, top_logprobs)))


def _checked_starts(starts: IdsLike, prompts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns i32[P], at most the length of each prompt, or raises ValueError."""
    given = np.asarray(as_ids(np.asarray(starts)))
    if given.shape not in ((), (len(prompts),)):
        raise ValueError(
            f"starts must be one number, or one per prompt, got shape {list(given.shape)} for "
            f"{len(prompts)} prompts."
        )
    given = np.broadcast_to(given, len(prompts))
    for i, (start, prompt) in enumerate(zip(given, prompts, strict=True)):
        if not 0 <= start <= prompt.size:
            raise ValueError(
                f"starts[{i}] must be from 0 to the {prompt.size} tokens of prompts[{i}], got "
                f"{start}. Pass whole prompts, cached tokens included."
            )
    return given


def _require_held(
    state: CacheState, rows: np.ndarray, firsts: np.ndarray, ends: np.ndarray
) -> None:
    """Raises ValueError unless rows hold what tokens `firsts` to `ends` (i32[P] each) can see."""
    for tables in state.page_tables:
        released, num_pruned = jax.device_get((tables.num_released, tables.num_pruned))
        for row, first, end in zip(rows, firsts, ends, strict=True):
            for group, window in enumerate(tables.windows):
                at = row + group * tables.max_seqs
                needed = first_needed_block(int(first), window, tables.block_size)
                if row == NULL_SEQ or first >= end or not (num_pruned[at] or released[at] > needed):
                    continue
                raise ValueError(
                    f"Row {row} cannot compute its tokens from position {first} on again: a "
                    "sliding window or compression has dropped tokens that they attend to. Ask for "
                    "them before, with the prefill, or pass recompute_cached=False."
                )


def _flat(
    prompts: Sequence[np.ndarray], chunks: Chunks, begins: np.ndarray, rows: np.ndarray
) -> _Flat:
    """Returns the tokens of one step.

    Args:
      prompts: Whole prompts, i32[T] each.
      chunks: Chunks of 1 token, from position `begins` of the prompts on.
      begins: i32[P + 1]. The last one is for padding, as in `rows`.
      rows: i32[P + 1]. Rows.
    """
    which = chunks.prompts
    after = (begins[which] + chunks.num_before + chunks.num_tokens).astype(np.int32)
    is_inside = [i >= 0 and at < prompts[i].size for i, at in zip(which, after, strict=True)]
    next_tokens = np.full(which.size, NULL_TOKEN, np.int32)
    for row in np.flatnonzero(is_inside):
        next_tokens[row] = prompts[which[row]][after[row]]
    return _Flat(chunks.tokens, chunks.num_tokens, next_tokens, rows[which], after)


@functools.partial(jax.jit, static_argnames=("model_fn", "num_top"), donate_argnames="pools")
def _write_step(
    model_fn: ModelFn,
    params: Any,
    pools: Pools,
    without_pools: CacheState,
    flat: _Flat,
    num_top: int,
) -> tuple[jax.Array, Chosen, Pools]:
    """Caches tokens; returns logits f32[R, vocab], the next tokens (i32[R]), and the pools."""
    batch = _batch(without_pools.with_pools(pools), flat)
    logits, pools = call_model(model_fn, params, jnp.asarray(flat.tokens), batch)
    return *_scored(logits, flat, num_top), pools


@functools.partial(jax.jit, static_argnames=("model_fn", "num_top"))
def _read_step(
    model_fn: ModelFn, params: Any, state: CacheState, flat: _Flat, num_top: int
) -> tuple[jax.Array, Chosen]:
    """Returns logits f32[R, vocab] after tokens that are cached, and the next tokens (i32[R])."""
    logits = read_model(model_fn, params, jnp.asarray(flat.tokens), _batch(state, flat))
    return _scored(logits, flat, num_top)


def _batch(state: CacheState, flat: _Flat) -> PagedBatch:
    return PagedBatch.of(state, flat.seq_ids, flat.num_tokens, num_tokens=1, seq_lens=flat.seq_lens)


def _scored(logits: jax.Array, flat: _Flat, num_top: int) -> tuple[jax.Array, Chosen]:
    """Returns logits f32[R, vocab] and the next tokens (i32[R]), unknown for `NULL_SEQ`."""
    next_tokens, is_row = jnp.asarray(flat.next_tokens), jnp.asarray(flat.seq_ids != NULL_SEQ)
    chosen = Chosen.of(logits, next_tokens, num_top)
    chosen = chosen.where(is_row, Chosen.unknown(next_tokens, num_top))
    return jnp.where(is_row[:, None], logits, jnp.nan), chosen
