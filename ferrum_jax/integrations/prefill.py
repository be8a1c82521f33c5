"""Prompts of any lengths into the cache, packed so that little of the work is padding."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ferrum_jax.checks import check_count
from ferrum_jax.integrations.batch import ModelFn, PagedBatch, call_model
from ferrum_jax.ops.buckets import bucket_for, first_rows
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.ops.storage import as_ids
from ferrum_jax.state import BlockPool, CacheState, PageTables
from ferrum_jax.types import NULL_SEQ


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefillOptions:
    """The shape of a prefill step. A step is `rows_per_step` rows of `chunk_tokens` tokens.

    Attributes:
      chunk_tokens: Tokens of a row. A prompt is padded to a multiple of it: half a chunk is
        wasted on average.
      rows_per_step: Rows of a step at most; fewer, a power of two, if fewer are needed.
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
    """One step's pieces of prompts: R rows of up to T tokens.

    Attributes:
      prompts: i32[R]. Which prompt each chunk is of; -1 for padding.
      tokens: i32[R, T]. Its tokens, zero where there is none.
      num_tokens: i32[R]. How many these are.
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
        """i32[R]. The prompt of which a chunk is the last one, -1 for other chunks."""
        return np.where(self.num_after == 0, self.prompts, -1)


def plan_chunks(prompts: Sequence[Sequence[int]], options: PrefillOptions) -> list[Chunks]:
    """Cuts prompts into the steps of a prefill, on the host.

    Args:
      prompts: Token ids, at least one each.
      options: The shape of a step.

    Returns:
      Steps of one shape. A prompt's chunks come in order, in one step or in several.

    Raises:
      ValueError: A prompt has no token.

    Example:
      >>> steps = plan_chunks([[7, 8, 9], [5]], PrefillOptions(chunk_tokens=2, rows_per_step=4))
      >>> steps[0].prompts.tolist(), steps[0].tokens.tolist(), steps[0].num_after.tolist()
      ([0, 0, 1, -1], [[7, 8], [9, 0], [5, 0], [0, 0]], [1, 0, 0, 0])
    """
    lens = [len(prompt) for prompt in prompts]
    if 0 in lens:
        raise ValueError(
            f"prompts[{lens.index(0)}] has no token, so no logits follow it. "
            "Leave it out, or start it with one."
        )
    cuts = [
        (i, begin)
        for i, length in enumerate(lens)
        for begin in range(0, length, options.chunk_tokens)
    ]
    rows = min(options.rows_per_step, bucket_for(len(cuts)))
    steps = [cuts[first : first + rows] for first in range(0, len(cuts), rows)]
    return [_fill(prompts, step, (rows, options.chunk_tokens)) for step in steps]


def _fill(
    prompts: Sequence[Sequence[int]], cuts: list[tuple[int, int]], shape: tuple[int, int]
) -> Chunks:
    """Returns the chunks that begin at `cuts`, pairs of prompt and position, as one step."""
    rows, size = shape
    chunks = Chunks(
        prompts=np.full(rows, -1, np.int32),
        tokens=np.zeros(shape, np.int32),
        num_tokens=np.zeros(rows, np.int32),
        num_before=np.zeros(rows, np.int32),
        num_after=np.zeros(rows, np.int32),
    )
    for row, (i, begin) in enumerate(cuts):
        tokens = as_ids(np.asarray(prompts[i][begin : begin + size]))
        chunks.prompts[row] = i
        chunks.tokens[row, : len(tokens)] = tokens
        chunks.num_tokens[row] = len(tokens)
        chunks.num_before[row] = begin
        chunks.num_after[row] = len(prompts[i]) - begin - len(tokens)
    return chunks


def prefill(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    seq_ids: ArrayLike,
    prompts: Sequence[Sequence[int]],
    *,
    options: PrefillOptions | None = None,
) -> tuple[jax.Array, CacheState]:
    """Runs prompts through a model into the cache; donates the pool.

    A prompt is what the cache does not hold yet of a row: all of a row fresh from `allocate`,
    the tokens after a shared prefix, or a further turn for which `extend` made room. Prompts
    are cut into chunks and these packed into steps of one shape, so a ragged set costs about
    its number of tokens. This is a loop of the host: do not put it in `jit`.

    The model is compiled for each power of two of rows in a step, up to `rows_per_step`, and for
    no length. Where P is not a power of two, the call waits for the logits at its end, and
    takes them by way of the host, since XLA would compile a program for each P.

    Args:
      model_fn: The model. Static: pass the same function (or an equal one) at each call.
      params: Its parameters, a pytree.
      state: The cache. Its pool is consumed: use the state returned.
      seq_ids: i32[P]. A row for each prompt, no two alike, which ends with that prompt: its
        length counts the prompt's tokens already. Read on the host.
      prompts: Token ids of each, at least one.
      options: The shape of a step.

    Returns:
      `(logits, state)`. logits: f32[P, vocab], what follows each prompt's last token; NaN for a
      row that is shorter than its prompt (an `allocate` that was not `ok`, say), whose tokens
      are not written.

    Raises:
      ValueError: There are no prompts, one has no token, or their number is not that of rows.
    """
    rows = np.asarray(seq_ids, np.int32)
    if rows.shape != (len(prompts),) or not len(prompts):
        raise ValueError(
            f"seq_ids must name one row for each of at least 1 prompt, got shape {rows.shape} "
            f"for {len(prompts)} prompts."
        )
    rows = np.append(rows, np.int32(NULL_SEQ))  # A padding chunk, of prompt -1, has this row.
    pool, last = state.pool, None
    for chunks in plan_chunks(prompts, options or PrefillOptions()):
        logits, pool = _step(model_fn, params, pool, state.tables, rows[chunks.prompts], chunks)
        if last is None:
            last = jnp.zeros((bucket_for(len(prompts)), logits.shape[-1]), logits.dtype)
        last = _keep(last, logits, chunks.finished)
    assert last is not None
    return first_rows(last, len(prompts)), dataclasses.replace(state, pool=pool)


@functools.partial(jax.jit, static_argnames="model_fn", donate_argnames="pool")
def _step(
    model_fn: ModelFn,
    params: Any,
    pool: BlockPool,
    tables: PageTables,
    seq_ids: jax.Array,
    chunks: Chunks,
) -> tuple[jax.Array, BlockPool]:
    """Returns f32[R, vocab], what follows each chunk, and the pool with the chunks in it."""
    rows = index_or_end(seq_ids, tables.max_seqs)
    held = read(tables.seq_lens, rows, 0)
    fits = held >= chunks.num_before + chunks.num_tokens + chunks.num_after
    batch = PagedBatch.of(
        CacheState(pool=pool, tables=tables),
        seq_ids,
        jnp.where(fits, chunks.num_tokens, 0),
        num_tokens=chunks.tokens.shape[1],
        seq_lens=held + read(tables.num_pruned, rows, 0) - chunks.num_after,
    )
    logits, pool = call_model(model_fn, params, jnp.asarray(chunks.tokens), batch)
    return jnp.where(fits[:, None], logits, jnp.nan), pool


@functools.partial(jax.jit, donate_argnames="kept")
def _keep(kept: jax.Array, logits: jax.Array, prompts: jax.Array) -> jax.Array:
    """Writes rows of f32[R, vocab] down as those of `prompts` (i32[R], -1 for none)."""
    return kept.at[index_or_end(prompts, kept.shape[0])].set(logits, mode="drop")
