"""Options of an engine, and of a request to it."""

import dataclasses
from typing import NamedTuple

from ferrum_jax.checks import (
    INT32_LIMIT,
    check_count,
    check_flag,
    check_integer,
    check_number,
    check_type,
)
from ferrum_jax.decoding.generate import GenerateOptions
from ferrum_jax.decoding.sampling import Sampling, check_token_ids
from ferrum_jax.integrations.mixed import StepOptions
from ferrum_jax.types import Priority


class StepShape(NamedTuple):
    """Shape of a step; each one compiles a program.

    Attributes:
      num_rows: Most requests that take part.
      num_chunks: Most chunks of prompts beside the single tokens of these.
    """

    num_rows: int
    num_chunks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Shape and sampling of an engine's steps.

    Attributes:
      max_rows: The most requests that run at once; not more than the manager's `max_seqs`.
      step: Shape of a step that reads prompts.
      sampling: How tokens are chosen.
      top_logprobs: How many best tokens are given with each token taken.
      logprobs_after_temperature: Whether log-probabilities are those after temperature.

    Raises:
      ValueError: A field has a wrong type or value.
    """

    max_rows: int = 32
    step: StepOptions = StepOptions()
    sampling: Sampling = Sampling()
    top_logprobs: int = 0
    logprobs_after_temperature: bool = False

    def __post_init__(self) -> None:
        """Checks each field."""
        check_count("max_rows", self.max_rows)
        check_type("step", self.step, StepOptions)
        check_type("sampling", self.sampling, Sampling)
        check_count("top_logprobs", self.top_logprobs, minimum=0)
        check_flag("logprobs_after_temperature", self.logprobs_after_temperature)

    @property
    def step_shapes(self) -> tuple[StepShape, ...]:
        """The shapes that steps may have: those with the fewest chunks first, then rows.

        A step takes the first that holds its requests. Sizes are the largest one over powers of 4.
        """
        num_chunks, _ = self.step.chunk_shape
        if self.step.exact:
            return (StepShape(self.max_rows, num_chunks),)
        sizes = [0, *_sizes(num_chunks)]
        return tuple(StepShape(rows, size) for size in sizes for rows in _sizes(self.max_rows))

    @property
    def choosing(self) -> GenerateOptions:
        """How a step chooses tokens, as options of `generate`."""
        return GenerateOptions(
            max_new_tokens=1,
            sampling=self.sampling,
            top_logprobs=self.top_logprobs,
            logprobs_after_temperature=self.logprobs_after_temperature,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestOptions:
    """What a request may take, and how urgent it is.

    Attributes:
      max_new_tokens: The most new tokens, a stop token included.
      stop_token_ids: Tokens that end the answer.
      seed: Where draws begin, within int32: a draw depends on the seed, the sample's number and the
        token's position, never on the batch.
      priority: More urgent requests start first, and are put back to wait last.
      timeout_seconds: How long to wait for room; None for no limit.
      cache_salt: Tenant key; prompts share cached prefixes only under an equal one.
      prompt_logprobs: Whether the prompt's tokens get log-probabilities too. The whole prompt is
        then computed by itself as the request starts, whatever is cached; other requests wait.

    Raises:
      ValueError: A field has a wrong type or value.
    """

    max_new_tokens: int = 64
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0
    priority: Priority = Priority.Normal
    timeout_seconds: float | None = None
    cache_salt: str | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        """Checks each field."""
        check_count("max_new_tokens", self.max_new_tokens)
        if not -INT32_LIMIT <= check_integer("seed", self.seed) < INT32_LIMIT:
            raise ValueError(
                f"seed must be from {-INT32_LIMIT} to {INT32_LIMIT - 1}, got {self.seed}."
            )
        check_type("priority", self.priority, Priority)
        check_flag("prompt_logprobs", self.prompt_logprobs)
        if self.cache_salt is not None:
            check_type("cache_salt", self.cache_salt, str)
        stop_token_ids = check_token_ids("stop_token_ids", self.stop_token_ids)
        object.__setattr__(self, "stop_token_ids", stop_token_ids)
        if self.timeout_seconds is not None:
            if not check_number("timeout_seconds", self.timeout_seconds) >= 0:
                raise ValueError(f"timeout_seconds must be at least 0, got {self.timeout_seconds}.")


def _sizes(largest: int) -> list[int]:
    """Returns a size over 1, 4, 16, ..., as long as it divides evenly; the smallest first."""
    sizes = [largest]
    while sizes[0] % 4 == 0:
        sizes.insert(0, sizes[0] // 4)
    return sizes
