"""Prefill: prompts of any lengths, cut into chunks that are packed with little padding."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.checks import check_count, check_live, check_type
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.models import ModelFn, Pools, call_model, check_model
from ferrum_jax.ops import extend
from ferrum_jax.ops.arguments import as_ids
from ferrum_jax.ops.buckets import first_rows
from ferrum_jax.ops.indexing import index_or_end
from ferrum_jax.outcomes import require
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ, IdsLike


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """Shape of a prefill step: `rows_per_step` rows of `chunk_tokens` tokens.

    A step's activations take memory for all of its tokens. A model should select each row's last
    token (`batch.last`) before its output layer: logits of all tokens are `rows_per_step *
    chunk_tokens * vocab` numbers, 311 MB in float32 for the defaults and a vocabulary of 151,936.

    Attributes:
      chunk_tokens: Tokens per row. A prompt is padded to a multiple of it, by half a chunk on
        average.
      rows_per_step: Maximum number of rows per step; a smaller power of two if fewer are needed.

    Raises:
      ValueError: A field is not a positive integer.
    """

    chunk_tokens: int = 32
    rows_per_step: int = 16

    def __post_init__(self) -> None:
        """Checks each field."""
        check_count("chunk_tokens", self.chunk_tokens)
        check_count("rows_per_step", self.rows_per_step)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Chunks:
    """Chunks of prompts for one step: R rows of up to T tokens.

    Attributes:
      prompts: i32[R]. Index of each chunk's prompt; -1 for padding.
      tokens: i32[R, T]. Tokens of each chunk; zero for padding.
      num_tokens: i32[R]. Number of tokens of each chunk.
      num_before: i32[R]. Tokens of the same prompt in earlier chunks.
      num_after: i32[R]. Tokens of the same prompt in later chunks.
    """

    prompts: np.ndarray
    tokens: np.ndarray
    num_tokens: np.ndarray
    num_before: np.ndarray
    num_after: np.ndarray

    @property
    def finished(self) -> np.ndarray:
        """i32[R]. Index of the prompt of which a chunk is the last one; -1 for other chunks."""
        return np.where(self.num_after == 0, self.prompts, -1)


def plan_chunks(
    prompts: Sequence[Sequence[int] | np.ndarray], options: PrefillOptions
) -> list[Chunks]:
    """Splits prompts into the steps of a prefill, on the host.

    Args:
      prompts: Token ids of each prompt, at least one.
      options: Shape of a step.

    Returns:
      Steps of one shape. A prompt's chunks are in order, in one step or in several.

    Raises:
      ValueError: A prompt is empty, or contains anything but token ids.

    Example:
      >>> steps = plan_chunks([[7, 8, 9], [5]], PrefillOptions(chunk_tokens=2, rows_per_step=4))
      >>> steps[0].prompts.tolist(), steps[0].tokens.tolist(), steps[0].num_after.tolist()
      ([0, 0, 1, -1], [[7, 8], [9, 0], [5, 0], [0, 0]], [1, 0, 0, 0])
    """
    return pack_chunks([token_ids(i, prompt) for i, prompt in enumerate(prompts)], options)


def pack_chunks(arrays: Sequence[np.ndarray], options: PrefillOptions) -> list[Chunks]:
    """Returns the steps of `plan_chunks` for prompts i32[T], of which some may be empty."""
    cuts = [
        (i, begin)
        for i, tokens in enumerate(arrays)
        for begin in range(0, tokens.size, options.chunk_tokens)
    ]
    rows = min(options.rows_per_step, next_power_of_two(len(cuts)))
    steps = [cuts[first : first + rows] for first in range(0, len(cuts), rows)]
    return [_pack(arrays, step, (rows, options.chunk_tokens)) for step in steps]


def token_ids(i: int, prompt: Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns prompt number `i` as i32[T]; raises ValueError if it is empty or not token ids."""
    tokens = np.asarray(prompt)
    if tokens.ndim != 1:
        raise ValueError(
            f"prompts[{i}] must be a list of token ids, got {type(prompt).__name__} of shape "
            f"{list(tokens.shape)}. Pass a list of prompts, each a list of its own length."
        )
    if not tokens.size:
        raise ValueError(
            f"prompts[{i}] is empty, so no logits follow it. "
            "Leave it out, or begin it with a token."
        )
    tokens = np.asarray(as_ids(tokens))
    if (tokens < 0).any():
        at = int(np.argmax(tokens < 0))
        raise ValueError(
            f"prompts[{i}][{at}] is {tokens[at]}; token ids are at least 0. Pass prompts without "
            "padding: they may be of any lengths."
        )
    return tokens


def _pack(
    prompts: Sequence[np.ndarray], cuts: list[tuple[int, int]], shape: tuple[int, int]
) -> Chunks:
    """Returns the chunks that begin at `cuts`, pairs of prompt and position, as one [R, T] step."""
    rows, size = shape
    numbers = np.zeros((4, rows), np.int32)
    numbers[0] = -1
    tokens = np.zeros(shape, np.int32)
    for row, (i, begin) in enumerate(cuts):
        chunk = prompts[i][begin : begin + size]
        tokens[row, : chunk.size] = chunk
        numbers[:, row] = i, chunk.size, begin, prompts[i].size - begin - chunk.size
    which, num_tokens, num_before, num_after = numbers
    return Chunks(which, tokens, num_tokens, num_before, num_after)


def prefill(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: IdsLike,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    starts: IdsLike = 0,
    options: PrefillOptions | None = None,
) -> tuple[jax.Array, CacheState]:
    """Runs prompts through a model and caches their keys and values; donates the pools.

    A prompt is the part of a row that is not computed yet: all tokens of a row after `allocate`,
    the tokens after a shared prefix, or a further turn for which `extend` made room. A row without
    room for it is extended chunk by chunk: a layer group with a sliding window then holds the
    window and a step's tokens, however long the prompt. Pass prompts without padding, which would
    be cached as tokens. They are cut into chunks, which are packed into steps of one shape, so the
    cost is about proportional to the tokens. This is a loop on the host, which first waits for the
    lengths of the rows: do not call it in `jit`.

    The model is compiled for each power of two of rows per step, up to `rows_per_step`. If P is not
    a power of two, the call waits for the logits. `Sampling.sample(logits, key)` chooses from them.

    Args:
      model_fn: The model. Static: pass the same function, or an equal one, at each call.
      params: Parameters of the model, a pytree.
      state: The cache. Its pools are consumed: use the returned state.
      seq_ids: i32[P]. Row of each prompt, all different; `NULL_SEQ` for a prompt that is computed
        but not cached (to compile ahead). Read on the host.
      prompts: Token ids of each prompt, at least one.
      starts: i32[P], or i32[] for all prompts. Position of each prompt's first token in its
        sequence, with dropped tokens counted. The length of each sequence must be `starts +
        len(prompt)`, or `starts` if it has no room for the prompt yet.
      options: Shape of a step; the defaults of `PrefillOptions` if None.

    Returns:
      `(logits, state)`. logits: f32[P, vocab], for the token after each prompt; NaN for `NULL_SEQ`.

    Raises:
      ValueError: A prompt is empty, or not of token ids; the rows are not one per prompt, repeated,
        outside the cache, or end elsewhere; `model_fn` is not hashable; the state was consumed.
      RefusedError: There is no room for a prompt; the state is as before.
      TypeError: The model does not return `(logits, pools)` as `ModelFn` says.
    """
    check_model(model_fn)
    check_live("state", state)
    options = PrefillOptions() if options is None else options
    check_type("options", options, PrefillOptions)
    steps = plan_chunks(prompts, options)
    rows, starts, growing = checked_rows(state, seq_ids, starts, prompts)
    grown, pools, last = grow_rows(state, steps, growing), state.pools, None
    for chunks, with_room in zip(steps, grown, strict=True):
        which = chunks.prompts
        seq_lens = starts[which] + chunks.num_before + chunks.num_tokens
        logits, pools = run_step(model_fn, params, pools, with_room, rows[which], seq_lens, chunks)
        if last is None:
            last = jnp.zeros((next_power_of_two(len(prompts)), logits.shape[-1]), logits.dtype)
        last = keep_rows(last, logits, chunks.finished)
    assert last is not None
    return first_rows(last, len(prompts)), grown[-1].with_pools(pools)


def grow_rows(state: CacheState, steps: Sequence[Chunks], rows: np.ndarray) -> list[CacheState]:
    """Extends rows (i32[P], `NULL_SEQ` for one that has room) step by step, before any step runs.

    Returns:
      The cache without pools for each step, with room for the step's chunks.

    Raises:
      RefusedError: There is no room for a step.
    """
    without_pools = state.with_pools(())
    if not steps or (rows == NULL_SEQ).all():
        return [without_pools] * len(steps)
    grown, oks = [], []
    for chunks in steps:
        num_tokens = np.bincount(chunks.prompts + 1, chunks.num_tokens, rows.size + 1)[1:]
        seq_ids = np.where(num_tokens > 0, rows, NULL_SEQ)
        without_pools, ok = extend(
            without_pools, seq_ids, num_tokens.astype(np.int32), max_new_tokens=chunks.tokens.size
        )
        grown.append(without_pools)
        oks.append(ok)
    what = f"prefill {np.count_nonzero(rows != NULL_SEQ)} rows that had no room for their prompts"
    require(np.asarray(jax.device_get(oks)), what, state)
    return grown


def checked_rows(
    state: CacheState,
    seq_ids: IdsLike,
    starts: IdsLike,
    prompts: Sequence[Sequence[int] | np.ndarray],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rows and starts, each i32[P + 1], and the rows without room for their prompts.

    The last row and start are for padding chunks, which are of prompt -1. The rows without room are
    i32[P], `NULL_SEQ` for one that has it. Raises ValueError unless each prompt ends its row, or
    begins at its end.
    """
    max_seqs = state.max_seqs
    if any(isinstance(x, Tracer) for x in (seq_ids, starts, state.page_tables[0].held_lens)):
        raise ValueError("prefill reads the lengths of rows on the host. Call it outside jit.")
    rows, starts = np.asarray(as_ids(np.asarray(seq_ids))), np.asarray(as_ids(np.asarray(starts)))
    if rows.shape != (len(prompts),) or not len(prompts) or starts.shape not in ((), rows.shape):
        raise ValueError(
            "seq_ids must have one row per prompt, for at least 1 prompt, and starts one number, "
            f"or one per prompt; got shapes {list(rows.shape)} and {list(starts.shape)} for "
            f"{len(prompts)} prompts."
        )
    starts = np.broadcast_to(starts, rows.shape)
    named = rows[rows != NULL_SEQ]
    if not ((named >= 0) & (named < max_seqs)).all() or np.unique(named).size != named.size:
        raise ValueError(
            f"seq_ids must be different rows from 0 to {max_seqs - 1}, or NULL_SEQ "
            f"({NULL_SEQ}); got {rows.tolist()}. Give each prompt the row allocated for it."
        )
    if (starts < 0).any():
        raise ValueError(f"starts must be at least 0, got {starts.tolist()}.")
    seq_lens = jax.device_get(state.seq_lens)[rows]
    for i, (row, start, seq_len) in enumerate(zip(rows, starts, seq_lens, strict=True)):
        if row != NULL_SEQ and seq_len not in (start, start + len(prompts[i])):
            raise ValueError(
                f"Row {row} has {seq_len} tokens; prompts[{i}] ({len(prompts[i])} tokens from "
                f"position {start}) needs it to have {start + len(prompts[i])}, or {start} if it "
                "has no room yet. Make sure that its `allocate` or `extend` was ok "
                "(`ferrum_jax.require`), free a row before it is allocated again, and pass "
                "`starts` where a prompt follows tokens of its row."
            )
    growing = np.where(seq_lens > starts, np.int32(NULL_SEQ), rows)
    return np.append(rows, np.int32(NULL_SEQ)), np.append(starts, np.int32(0)), growing


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="pools")
def run_step(
    model_fn: ModelFn,
    params: Any,
    pools: Pools,
    without_pools: CacheState,
    seq_ids: jax.Array,
    seq_lens: jax.Array,
    chunks: Chunks,
) -> tuple[jax.Array, Pools]:
    """Returns logits f32[R, vocab] after each chunk, and the pools with the chunks cached.

    `seq_ids` and `seq_lens` are i32[R]: the row of each chunk, and the position after it.
    """
    batch = PagedBatch.of(
        without_pools.with_pools(pools),
        seq_ids,
        chunks.num_tokens,
        num_tokens=chunks.tokens.shape[1],
        seq_lens=seq_lens,
    )
    logits, pools = call_model(model_fn, params, jnp.asarray(chunks.tokens), batch)
    return jnp.where((seq_ids == NULL_SEQ)[:, None], jnp.nan, logits), pools


@functools.partial(jax.jit, donate_argnames="kept")
def keep_rows(kept: jax.Array, logits: jax.Array, prompts: jax.Array) -> jax.Array:
    """Returns `kept` f32[P, vocab] with rows of f32[R, vocab] at indices i32[R]; -1 is dropped."""
    return kept.at[index_or_end(prompts, kept.shape[0])].set(logits, mode="drop")
