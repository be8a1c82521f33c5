"""The compiled step of an engine, and the step that scores a prompt."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.decoding.logprobs import Chosen
from ferrum_jax.decoding.models import ModelFn, call_model
from ferrum_jax.decoding.sampling import sample_keys, token_keys
from ferrum_jax.integrations.engine.options import EngineOptions
from ferrum_jax.integrations.mixed import MixedBatch, Spans
from ferrum_jax.integrations.prompt_logprobs import PromptLogprobsOptions, prompt_logprobs
from ferrum_jax.ops.indexing import index_or_end, read
from ferrum_jax.state import CacheState
from ferrum_jax.types import NULL_SEQ


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepInputs:
    """What the host says of one step: D rows, P chunks of C tokens.

    Attributes:
      tokens: i32[D + P * C]. Token ids; negative for a row's last token, which the device knows.
      lanes: i32[D]. Where each row's last token is kept; out of range for padding.
      rows: i32[6, D]. For each row: its single tokens (0 or 1), the position after its last token
        of the step, which token its next one is predicted from, whether it takes one, its seed,
        and the number of its sample.
      chunks: i32[3, P]. For each chunk: its row (D for none), the position after it, its tokens.
        None if P is 0.
      chunk_tokens: C (static).
    """

    tokens: np.ndarray
    lanes: np.ndarray
    rows: np.ndarray
    chunks: np.ndarray | None
    chunk_tokens: int = dataclasses.field(metadata={"static": True})


@functools.lru_cache(maxsize=64)
def make_step(model_fn: ModelFn, options: EngineOptions) -> jax.stages.Wrapped:
    """Returns the jitted step of engines with this model and these options.

    It takes `(state, seq_ids i32[D], params, last i32[L], inputs)` and donates the state and the
    last tokens of the L lanes. It returns `(state, (last, chosen))`; what is chosen for a row that
    takes no token means nothing.
    """
    step = functools.partial(_step, model_fn, options)
    return jax.jit(step, donate_argnums=(0, 3))


def _step(
    model_fn: ModelFn,
    options: EngineOptions,
    state: CacheState,
    seq_ids: jax.Array,
    params: Any,
    last: jax.Array,
    inputs: StepInputs,
) -> tuple[CacheState, tuple[jax.Array, Chosen]]:
    """Runs the model on the tokens of a step, and takes the next tokens."""
    lens, ends, outputs, takes, seeds, samples = jnp.asarray(inputs.rows)
    num_rows = seq_ids.size
    spans = Spans(jnp.where(lens > 0, seq_ids, NULL_SEQ), ends, lens, outputs)
    if inputs.chunks is not None:
        of_chunk, chunk_ends, chunk_lens = jnp.asarray(inputs.chunks)
        chunk_ids = read(jnp.asarray(seq_ids), of_chunk, NULL_SEQ)
        spans = spans.with_chunks(chunk_ids, chunk_ends, chunk_lens)
    given = jnp.asarray(inputs.tokens)
    lanes = index_or_end(jnp.asarray(inputs.lanes), last.size)
    known = read(last, lanes, 0)
    singles = jnp.where(given[:num_rows] < 0, known, given[:num_rows])
    tokens = jnp.concatenate([singles, given[num_rows:]])
    batch = MixedBatch.of_spans(state, spans, chunk_tokens=inputs.chunk_tokens)
    logits, pools = call_model(model_fn, params, tokens[:, None], batch)
    keys = None
    if not options.sampling.is_greedy:
        keys = token_keys(sample_keys(seeds, samples), ends)
    chosen = options.choosing.choose(logits, keys)
    last = last.at[lanes].set(jnp.where(takes > 0, chosen.tokens, known), mode="drop")
    return state.with_pools(pools), (last, chosen)


def score_prompt(
    state: CacheState,
    seq_ids: np.ndarray,
    model_fn: ModelFn,
    params: Any,
    prompt: Sequence[int],
    options: PromptLogprobsOptions,
) -> tuple[CacheState, Chosen]:
    """Computes a prompt and the log-probabilities of its tokens, as a step of a manager."""
    scored = prompt_logprobs(model_fn, params, state, seq_ids, [prompt], options=options)
    return scored.state, scored.chosen
