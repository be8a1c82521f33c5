"""One step for rows that decode and rows that read their prompts, in a batch of one shape."""

import dataclasses

import jax
import jax.numpy as jnp

from ferrum_jax.attention import AttentionOptions
from ferrum_jax.checks import check_count
from ferrum_jax.decoding.batch import GroupRows, PagedBatch
from ferrum_jax.ops.indexing import columns
from ferrum_jax.state import CacheState


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Shape of a mixed step: a token of each row that decodes, and chunks of prompts beside them.

    A step takes `chunk_tokens * chunks_per_step` prompt tokens at most, so that a long prompt does
    not hold up the rows that decode. Changing a field recompiles.

    Attributes:
      chunk_tokens: Consecutive prompt tokens that attention reads together. A prompt's last chunk
        is padded.
      chunks_per_step: Chunks in a step, of one prompt or of several.
      exact: Whether the logits after a token have the same bits whatever else is in the batch, and
        whichever of the tokens before it were cached: every token is then a row of length 1, and
        every step has the same shape, also one without prompts. `chunk_tokens * chunks_per_step`
        tokens are then computed in each step beside one per row, padding included.

    Raises:
      ValueError: A field is not a positive integer.
    """

    chunk_tokens: int = 16
    chunks_per_step: int = 16
    exact: bool = False

    def __post_init__(self) -> None:
        """Checks the counts."""
        check_count("chunk_tokens", self.chunk_tokens)
        check_count("chunks_per_step", self.chunks_per_step)

    @property
    def chunk_shape(self) -> tuple[int, int]:
        """Chunks of a step (P), and tokens of each (C)."""
        if self.exact:
            return self.prompt_tokens, 1
        return self.chunks_per_step, self.chunk_tokens

    @property
    def prompt_tokens(self) -> int:
        """The most prompt tokens of a step."""
        return self.chunk_tokens * self.chunks_per_step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Spans:
    """Consecutive tokens of rows, one span after the other: R of one token, then P of C tokens.

    Attributes:
      seq_ids: i32[R + P]. Row of each span; `NULL_SEQ` for none.
      ends: i32[R + P]. Position after the last token of each span.
      lens: i32[R + P]. Tokens of each span.
      outputs: i32[R]. For each of R rows, which of the R + P * C tokens its next token is predicted
        from; any index if it has none.
    """

    seq_ids: jax.Array
    ends: jax.Array
    lens: jax.Array
    outputs: jax.Array

    def with_chunks(self, seq_ids: jax.Array, ends: jax.Array, lens: jax.Array) -> "Spans":
        """Returns these spans of one token, with those of chunks (i32[P] each) behind them."""
        return dataclasses.replace(
            self,
            seq_ids=jnp.concatenate([self.seq_ids, seq_ids]),
            ends=jnp.concatenate([self.ends, ends]),
            lens=jnp.concatenate([self.lens, lens]),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedBatch(PagedBatch):
    """A batch of N tokens, each a row of length 1: R that stand alone, then P chunks of C tokens.

    A model works on it as on any batch, with T = 1, and returns logits f32[R, vocab] of the tokens
    that `last` selects. Attention takes each chunk as one row, so that its tokens share what they
    read.

    Attributes:
      chunks: The rows of the chunks in each layer group; None if P is 0.
      chunk_lens: i32[P]. Tokens of each chunk; None if P is 0.
      outputs: i32[R]. The tokens that `last` selects.
      chunk_tokens: C (static).
    """

    chunks: tuple[GroupRows, ...] | None = dataclasses.field(kw_only=True)
    chunk_lens: jax.Array | None = dataclasses.field(kw_only=True)
    outputs: jax.Array = dataclasses.field(kw_only=True)
    chunk_tokens: int = dataclasses.field(kw_only=True, metadata={"static": True})

    @classmethod
    def of_spans(cls, state: CacheState, spans: Spans, *, chunk_tokens: int) -> "MixedBatch":
        """Makes a batch of spans of rows.

        Args:
          state: The cache, which already has room for the tokens.
          spans: The tokens; spans of one row in order, each of them behind the one before.
          chunk_tokens: C, the most tokens of a chunk (static).

        Returns:
          The batch.
        """
        num_single = spans.outputs.size
        seq_ids, ends, lens = (x[:num_single] for x in (spans.seq_ids, spans.ends, spans.lens))
        chunks, chunk_lens = None, None
        if spans.seq_ids.size > num_single:
            chunk_ids, chunk_ends, chunk_lens = (
                x[num_single:] for x in (spans.seq_ids, spans.ends, spans.lens)
            )
            chunks = tuple(
                GroupRows.of(state.page_tables[place.pool], place.index, chunk_ids, chunk_ends)
                for place in state.layers.places
            )
            token = columns(chunk_tokens)
            seq_ids = _joined(seq_ids, jnp.repeat(chunk_ids, chunk_tokens))
            ends = _joined(ends, (chunk_ends - chunk_lens)[:, None] + token + 1)
            lens = _joined(lens, (token < chunk_lens[:, None]).astype(jnp.int32))
        tokens = PagedBatch.of(state, seq_ids, lens, num_tokens=1, seq_lens=ends)
        parts = {field.name: getattr(tokens, field.name) for field in dataclasses.fields(tokens)}
        return cls(
            **parts,
            chunks=chunks,
            chunk_lens=chunk_lens,
            outputs=spans.outputs,
            chunk_tokens=chunk_tokens,
        )

    @property
    def num_outputs(self) -> int:
        """Tokens of which `last` selects the activations: R."""
        return self.outputs.size

    def last(self, x: jax.Array) -> jax.Array:
        """Selects the tokens that the rows' next tokens are predicted from.

        Args:
          x: [N, 1, ...]. Activations of the new tokens.

        Returns:
          [R, ...]. Activations of `outputs`.
        """
        return x[jnp.clip(self.outputs, 0, x.shape[0] - 1), 0]

    def _attend(
        self, group: int, q: jax.Array, layer: jax.Array | int, options: AttentionOptions
    ) -> jax.Array:
        """Attends single tokens and chunks each by a call of their own."""
        if self.chunks is None or self.chunk_lens is None or self.chunk_tokens == 1:
            return super()._attend(group, q, layer, options)
        num_single = self.num_outputs
        pool = self.pools[self.layers.places[group].pool]
        singles = jax.tree.map(lambda x: x[:num_single], self.rows[group])
        q_lens = self.q_lens[:num_single]
        single = singles.attend(q[:num_single], pool, layer, options=options, q_lens=q_lens)
        # Reshapes of one axis each: others are not defined where the heads lie over a mesh with
        # axes of type Explicit.
        chunked = q[num_single:, 0].reshape(-1, self.chunk_tokens, *q.shape[2:])
        chunked = self.chunks[group].attend(
            chunked, pool, layer, options=options, q_lens=self.chunk_lens
        )
        return jnp.concatenate([single, chunked.reshape(-1, *q.shape[2:])[:, None]])


def _joined(singles: jax.Array, of_chunks: jax.Array) -> jax.Array:
    """Returns i32[N] of the single tokens (i32[R]) and of the chunks' tokens (i32[P, C])."""
    return jnp.concatenate([singles, of_chunks.reshape(-1)])
