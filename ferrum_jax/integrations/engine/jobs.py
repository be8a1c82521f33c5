"""What an engine knows of its requests, and the inputs of a step for those that run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.decoding.logprobs import Chosen
from ferrum_jax.integrations.engine.completion import Completion
from ferrum_jax.integrations.engine.options import RequestOptions, StepShape
from ferrum_jax.integrations.engine.program import StepInputs
from ferrum_jax.manager import PagedKvCacheHandle

ON_DEVICE = -1
"""A token that the device knows and the host does not yet."""


@dataclasses.dataclass(eq=False, kw_only=True)
class Job:
    """A request of an engine.

    Attributes:
      completion: The answer, as the caller sees it.
      options: As submitted.
      arrival: How many requests were submitted before.
      expires_at: When the engine's clock says so, it fails unless it has started; None for never.
      sample: Its number among the samples of a prompt.
      leader: The first sample of its prompt, from which it may be forked; None for that one.
      text: Tokens of the prompt and of the answer, as far as the host knows them.
      num_unread: Tokens behind these that a step has taken, and the host has not read: 0 or 1.
      num_computed: Tokens of the text that the cache holds, or that a step is writing.
      num_known: Tokens of the text that the manager was told.
      num_committed: Tokens that were offered to the prefix cache.
      has_offered: Whether its prompt was offered to the prefix cache since it started.
      lane: Where the device keeps its last token, while it runs.
      handle: Its cache; None while it waits.
    """

    completion: Completion
    options: RequestOptions
    arrival: int
    expires_at: float | None
    sample: int
    leader: Job | None
    text: list[int]
    num_unread: int = 0
    num_computed: int = 0
    num_known: int = 0
    num_committed: int = 0
    has_offered: bool = False
    lane: int = -1
    handle: PagedKvCacheHandle | None = None

    @property
    def urgency(self) -> tuple[int, int]:
        """Sort key: the most urgent request first, of equal ones the oldest."""
        return -self.options.priority, self.arrival

    @property
    def live_handle(self) -> PagedKvCacheHandle:
        """Its cache, if it has one."""
        assert self.handle is not None
        return self.handle

    @property
    def is_resident(self) -> bool:
        """Whether the cache is on the device."""
        return self.handle is not None and self.handle.is_resident

    @property
    def num_taken(self) -> int:
        """New tokens that the host has read."""
        return len(self.text) - self.completion.num_prompt_tokens

    @property
    def num_new(self) -> int:
        """New tokens so far, those that are not read yet included."""
        return self.num_taken + self.num_unread

    @property
    def num_pending(self) -> int:
        """Tokens that are to be computed before the next one is taken; 0 if none is to come."""
        if self.num_new >= self.options.max_new_tokens:
            return 0
        return len(self.text) + self.num_unread - self.num_computed

    @property
    def num_unused(self) -> int:
        """Tokens that its row has room for, and that no step has computed."""
        return self.live_handle.num_tokens() - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether its prompt is to get log-probabilities that it does not have yet."""
        return self.options.prompt_logprobs and self.completion.prompt_taken is None

    def is_expired(self, now: float) -> bool:
        """Returns whether it has not started in time, `now` being in seconds of the clock."""
        has_started = self.completion.num_cached_tokens is not None
        return self.expires_at is not None and now >= self.expires_at and not has_started

    @property
    def max_tokens(self) -> int:
        """Tokens that its row holds at the end; the last one taken is not computed."""
        return self.completion.num_prompt_tokens + self.options.max_new_tokens - 1

    def waits_for(self, other: Job, block_size: int) -> bool:
        """Returns whether a running job is about to cache full blocks that this one needs."""
        if other.has_offered or other.options.cache_salt != self.options.cache_salt:
            return False
        size = (
            min(len(self.text) - 1, other.completion.num_prompt_tokens) // block_size * block_size
        )
        num_common = next(
            (i for i in range(size) if self.text[i] != other.text[i]), size
        )  # Of equal lists, `size`.
        return num_common // block_size * block_size > other.num_committed


@dataclasses.dataclass(frozen=True)
class Part:
    """What a job computes in a step.

    Attributes:
      job: The job.
      num_tokens: How many tokens.
      takes: Whether it takes its next token.
      source: The part that computes the logits for it, if it computes none itself.
    """

    job: Job
    num_tokens: int
    takes: bool
    source: Part | None = None

    @property
    def num_lacking(self) -> int:
        """Tokens by which the job's row has to be extended first."""
        return max(0, self.num_tokens - self.job.num_unused)

    def num_chunks(self, chunk_tokens: int) -> int:
        """Returns the chunks that the tokens take; none if it is one token."""
        return ceil_div(self.num_tokens, chunk_tokens) if self.num_tokens > 1 else 0


@dataclasses.dataclass(eq=False)
class InFlight:
    """A step that was dispatched, and of which the tokens were not read yet.

    Attributes:
      parts: What it computes, row by row; None for a sample that did not start.
      chosen: The tokens that it takes, on the device.
      is_read: Whether they were read after all.
    """

    parts: Sequence[Part | None]
    chosen: Chosen
    is_read: bool = False


def plan(jobs: Sequence[Job], chunk_shape: tuple[int, int]) -> list[Part]:
    """Divides a step's P chunks of C tokens among jobs, the most urgent first.

    Jobs that lack one token take it beside. A row is used up before it is extended, since its
    windows then release what tokens behind its length do not see.
    """
    num_chunks, chunk_tokens = chunk_shape
    parts = []
    for job in sorted(jobs, key=lambda job: job.urgency):
        pending = job.num_pending
        num_tokens = pending
        if pending > 1:
            num_tokens = min(pending, job.num_unused or pending, num_chunks * chunk_tokens)
            num_chunks -= ceil_div(num_tokens, chunk_tokens)
        if num_tokens:
            parts.append(Part(job, num_tokens, takes=num_tokens == pending))
    return parts


def step_inputs(parts: Sequence[Part], shape: StepShape, chunk_tokens: int) -> StepInputs:
    """Returns the inputs of a step; part r is row r of its shape, and the rest is padding."""
    num_rows, num_chunks = shape
    tokens = np.zeros(num_rows + num_chunks * chunk_tokens, np.int32)
    rows = np.zeros((6, num_rows), np.int32)
    lanes = np.full(num_rows, np.iinfo(np.int32).max, np.int32)
    chunks = np.zeros((3, num_chunks), np.int32)
    chunks[0] = num_rows
    next_chunk = itertools.count()
    outputs: dict[Job, int] = {}
    for row, part in enumerate(parts):
        job, of = part.job, part.source or part
        start, output = of.job.num_computed, outputs.get(of.job, row)
        end = start + of.num_tokens
        lanes[row] = job.lane
        if part.num_tokens == 1:
            tokens[row] = job.text[start] if start < len(job.text) else ON_DEVICE
        elif part.num_tokens:
            for begin in range(start, end, chunk_tokens):
                chunk, until = next(next_chunk), min(begin + chunk_tokens, end)
                place = num_rows + chunk * chunk_tokens
                tokens[place : place + until - begin] = job.text[begin:until]
                chunks[:, chunk] = row, until, until - begin
                output = place + until - begin - 1
        outputs[job] = output
        is_single = part.num_tokens == 1
        rows[:, row] = is_single, end, output, part.takes, job.options.seed, job.sample
    return StepInputs(tokens, lanes, rows, chunks if num_chunks else None, chunk_tokens)
