"""Several samples of each of several prompts, in one compiled program: a rollout of RL training."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.checks import check_count, check_live, check_type
from ferrum_jax.decoding.logprobs import Chosen, ChosenTokens
from ferrum_jax.decoding.models import ModelFn, check_model
from ferrum_jax.decoding.sampling import sample_keys
from ferrum_jax.errors import OutOfBlocksError, OutOfRowsError
from ferrum_jax.integrations.device_queue import blocks_of
from ferrum_jax.integrations.serve import checked_limits, checked_prompts, require_short
from ferrum_jax.integrations.serve_loop import Answers, Queue, ServeOptions, run_queue
from ferrum_jax.ops.buckets import pad_to_power_of_two
from ferrum_jax.state import CacheState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples(ChosenTokens):
    """G samples of each of P prompts, as `Engine.rollout` returns them.

    Attributes:
      chosen: New tokens of each sample (i32[P, G, max_new_tokens]), its stop token included, then
        `NULL_TOKEN`; with their log-probabilities.
      num_tokens: i32[P, G]. New tokens of each sample.
      num_steps: i32[]. How often the model ran.
      num_computed: i32[]. Tokens that the model computed, padding excluded: each prompt once, and
        all new tokens except for the last of each sample, unless blocks were short.
    """

    chosen: Chosen
    num_tokens: jax.Array
    num_steps: jax.Array
    num_computed: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Samples):
    """Samples by `rollout`, and the cache.

    Attributes:
      state: The cache, with its rows free again.
      max_blocks: i32[pools]. The most blocks of each pool that were in use at once, those of other
        rows included.
    """

    state: CacheState
    max_blocks: jax.Array


def rollout(
    model_fn: ModelFn,
    params: Any,
    state: CacheState,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    options: ServeOptions,
    key: jax.Array | None = None,
) -> Rollout:
    """Generates several samples of each prompt, in one program; donates the state, and waits.

    Each distinct prompt is computed once, in a row from which its samples are forked: they share
    its full blocks, and take their first tokens from its logits. All free rows of the cache are
    used, as far as there are samples for them. A row that is done is taken by the next sample or
    prompt, so what finds no room comes later. Where blocks run out, the sample that started last
    waits again.

    The tokens of a sample are those that it would get alone (see `serve`). Draws depend on the key,
    the numbers of prompt and sample, and the token's position: sample g of prompt p is that of an
    engine's request with `seed=draw_seeds(key, P)[p]`.

    Args:
      model_fn: The model (static).
      params: Parameters of the model, a pytree; those of equal shapes compile nothing.
      state: The cache. It is consumed: use the returned one. Rows that hold tokens are kept.
      prompts: Token ids of each of the P prompts. The program is compiled for each power of two of
        P * G, of P * G with the number of distinct prompts, and of the longest prompt.
      samples: Samples of each prompt, G.
      options: Stop conditions, sampling, and the shape of a step. `limits` are i32[P, G].
      key: A typed key (`jax.random.key`). Required if the temperature is above 0.

    Returns:
      The samples, and the state.

    Raises:
      OutOfRowsError: No row is free. Here and below, the state is as before.
      OutOfBlocksError: The free blocks might not hold the longest sample, even alone.
      ValueError: A prompt is empty, not of token ids, or longer than a row with the new tokens can
        be; a typed key is missing, `model_fn` is not hashable, the state was consumed; or it is
        called in `jit`.
      TypeError: The model does not return `(logits, pools)` as `ModelFn` says.
    """
    check_model(model_fn)
    check_live("state", state)
    check_type("options", options, ServeOptions)
    options.sampling.check_key(key)
    plan = _Plan.of(checked_prompts(prompts), check_count("samples", samples), options)
    rows = _free_rows(state, plan.limits.size)
    plan.require_room(state, options)
    keys = None if options.sampling.is_greedy or key is None else plan.keys(key)
    queue = plan.queue(options.stop_token_ids)
    options = dataclasses.replace(options, stop_token_ids=(), limits=None)
    return plan.rollout_of(run_queue(model_fn, params, state, rows, queue, options, keys))


def draw_seeds(key: jax.Array, num_prompts: int) -> np.ndarray:
    """Returns the seeds with which the samples of prompts are drawn.

    Args:
      key: A typed key.
      num_prompts: Prompts, P.

    Returns:
      i32[P], on the host: for `RequestOptions(seed=)` of an engine.

    Raises:
      ValueError: There is more than one key.
    """
    if key.shape:
        raise ValueError(
            f"key must be one typed key, got shape {list(key.shape)}. Each prompt and sample draws "
            "by its own number."
        )
    numbers = np.arange(next_power_of_two(num_prompts), dtype=np.int32)
    return np.asarray(_random_bits(key, numbers))[:num_prompts].view(np.int32)


@jax.jit
def _random_bits(key: jax.Array, numbers: jax.Array) -> jax.Array:
    """Returns u32[P], which depend on a key and on numbers i32[P]."""
    return jax.vmap(lambda i: jax.random.bits(jax.random.fold_in(key, i), dtype=jnp.uint32))(
        numbers
    )


_blocks_of = jax.jit(blocks_of, static_argnames="step_tokens")


class _Plan(NamedTuple):
    """The order in which prompts and samples start: each distinct prompt, then its samples.

    A prompt with a single sample needs no request of its own.

    Attributes:
      tokens: The P prompts, each i32[T].
      limits: i32[P, G]. The most new tokens of each sample.
      prompt: i32[Q]. The number of each request's prompt.
      sample: i32[Q]. The number of its sample; 0 for a prompt.
      parents: i32[Q]. As `Requests.parents`.
      outputs: i32[P * G]. The requests that are samples, in the order of prompts and samples.
    """

    tokens: Sequence[np.ndarray]
    limits: np.ndarray
    prompt: np.ndarray
    sample: np.ndarray
    parents: np.ndarray
    outputs: np.ndarray

    @classmethod
    def of(cls, tokens: Sequence[np.ndarray], samples: int, options: ServeOptions) -> "_Plan":
        """Plans G samples of each prompt; raises ValueError for limits of another shape."""
        limits = checked_limits(options, (len(tokens), samples))
        equal: dict[bytes, list[int]] = {}
        for i, prompt in enumerate(tokens):
            equal.setdefault(prompt.tobytes(), []).append(i)
        requests: list[tuple[int, int, int]] = []
        outputs = np.zeros((len(tokens), samples), np.int32)
        for numbers in equal.values():
            parent = -1
            if len(numbers) * samples > 1:
                parent = len(requests)
                requests.append((numbers[0], 0, parent))
            for i in numbers:
                outputs[i] = len(requests) + np.arange(samples)
                requests += [(i, sample, parent) for sample in range(samples)]
        prompt, sample, parents = np.asarray(requests, np.int32).T
        return cls(tokens, limits, prompt, sample, parents, outputs.reshape(-1))

    def require_room(self, state: CacheState, options: ServeOptions) -> None:
        """Raises an error if a sample may find no room, even alone."""
        limits = self.limits.max(axis=1)
        require_short(state, self.tokens, limits)
        longest = int((np.asarray([prompt.size for prompt in self.tokens]) + limits).max()) - 1
        for tables in state.page_tables:
            needed = int(_blocks_of(tables, np.int32(longest), options.step.prompt_tokens))
            if needed > int(tables.num_free):
                raise OutOfBlocksError(
                    f"A sample may hold {longest} tokens, which take {needed} blocks; "
                    f"{int(tables.num_free)} of {tables.num_blocks} are free. Free rows, lower "
                    "max_new_tokens, or make the cache with a larger num_blocks."
                )

    def queue(self, stop_token_ids: Sequence[int]) -> Queue:
        """Returns the requests for the loop."""
        return Queue.of(
            [self.tokens[i] for i in self.prompt],
            self.limits[self.prompt, self.sample],
            stop_token_ids,
            self.parents,
            self.outputs,
        )

    def keys(self, key: jax.Array) -> jax.Array:
        """Returns the keys of the requests, padded as these are."""
        seeds = draw_seeds(key, len(self.tokens))[self.prompt]
        return sample_keys(pad_to_power_of_two(seeds, 0), pad_to_power_of_two(self.sample, 0))

    def rollout_of(self, answers: Answers) -> Rollout:
        """Waits for the answers of the loop, and returns them prompt by prompt."""
        shape = self.limits.shape  # Reshaped on the host, where other numbers compile nothing.
        chosen, num_tokens = jax.tree.map(
            lambda x: jax.device_put(x[: self.limits.size].reshape(*shape, *x.shape[1:])),
            jax.device_get((answers.chosen, answers.num_tokens)),
        )
        return Rollout(
            state=answers.state,
            chosen=chosen,
            num_tokens=num_tokens,
            num_steps=answers.counts.num_steps,
            num_computed=answers.counts.num_computed,
            max_blocks=answers.counts.max_blocks,
        )


def _free_rows(state: CacheState, num_samples: int) -> np.ndarray:
    """Returns free rows i32[R], no more than a power of two for some samples."""
    if isinstance(state.page_tables[0].held_lens, Tracer):
        raise ValueError("rollout reads its prompts on the host. Call it outside jit.")
    rows = np.flatnonzero(np.asarray(state.seq_lens) == 0).astype(np.int32)
    if not rows.size:
        raise OutOfRowsError(
            f"A rollout was asked for; all {state.max_seqs} rows hold tokens. Free rows, or make "
            "the cache with a larger max_seqs."
        )
    return rows[: next_power_of_two(num_samples)]
