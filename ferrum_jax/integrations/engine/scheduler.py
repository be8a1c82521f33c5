"""The steps of an engine: what the next one computes, and what becomes of the tokens it takes."""

from __future__ import annotations

import collections
import concurrent.futures
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import ferrum_jax.integrations.engine.completion as completions
from ferrum_jax.decoding.logprobs import Chosen
from ferrum_jax.decoding.models import ModelFn
from ferrum_jax.errors import FerrumError, OutOfBlocksError
from ferrum_jax.integrations.engine.completion import taken_token
from ferrum_jax.integrations.engine.jobs import InFlight, Part, plan, step_inputs
from ferrum_jax.integrations.engine.options import EngineOptions, StepShape
from ferrum_jax.integrations.engine.program import StepInputs, make_step, score_prompt
from ferrum_jax.integrations.engine.queue import JobQueue
from ferrum_jax.integrations.prompt_logprobs import PromptLogprobsOptions
from ferrum_jax.manager import PagedKvCacheHandle, PagedKvCacheManager
from ferrum_jax.state import CacheState

_COMPILERS = 2  # Each of them uses several threads.


class Scheduler:
    """Runs the steps of jobs on the cache of one manager. Not thread-safe.

    Args:
      model_fn: The model.
      manager: The manager of the cache.
      options: Shape and sampling of the steps.

    Attributes:
      queue: The jobs.
      step_counts: Steps that were dispatched, by shape.
      num_reads: How often the host waited for tokens: once for each step.
      num_computed: Tokens that the steps have computed, padding excluded.
    """

    def __init__(self, model_fn: ModelFn, manager: PagedKvCacheManager, options: EngineOptions):
        self._step, self._model_fn = make_step(model_fn, options), model_fn
        self._manager, self._options = manager, options
        self.step_counts: collections.Counter[StepShape] = collections.Counter()
        self.num_reads = self.num_computed = 0
        self.queue = JobQueue(manager, options.max_rows, options.step.prompt_tokens)
        self._shapes: Sequence[StepShape] = options.step_shapes
        self._last = self._new_lanes()
        self._in_flight: InFlight | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no step is under way, and none can be dispatched before room is made."""
        return self._in_flight is None and not self.queue.running

    def warm_up(self, params: Any, shapes: Sequence[StepShape]) -> None:
        """Compiles steps of some shapes, and runs the first on no row; later ones have these."""
        chunk_tokens = self._options.step.chunk_shape[1]
        inputs = {shape: step_inputs([], shape, chunk_tokens) for shape in shapes}
        with concurrent.futures.ThreadPoolExecutor(_COMPILERS) as threads:
            # While one is compiled, the next one is traced. The largest, which is last, begins.
            lowered = (self._lower(params, inputs[shape]) for shape in reversed(shapes))
            for compiling in [threads.submit(step.compile) for step in lowered]:
                compiling.result()
        first = shapes[0]
        jax.block_until_ready(self._run([None] * first.num_rows, params, inputs[first]))
        self._shapes = shapes

    def _lower(self, params: Any, inputs: StepInputs) -> jax.stages.Lowered:
        """Returns the step of some inputs, for rows that are all padding, to be compiled."""

        def lower(state: CacheState, *args: Any) -> tuple[CacheState, jax.stages.Lowered]:
            return state, self._step.lower(state, *args)

        rows = [None] * inputs.lanes.size
        return self._manager.run(lower, rows, params, self._last, inputs)

    def advance(self, params: Any, now: float) -> None:
        """Dispatches a step, then reads the tokens of the step before.

        Args:
          params: Parameters of the model.
          now: Seconds on the engine's clock.
        """
        self.queue.start_jobs(may_wait=self._in_flight is not None)
        self.queue.expire(now)
        self._score_prompts(params)
        before, self._in_flight = self._in_flight, None
        try:
            self._in_flight = self._dispatch(params, before)
        finally:
            if before is not None:
                self._read(before)

    def _score_prompts(self, params: Any) -> None:
        """Computes the prompts that get log-probabilities; a step computes the last token again."""
        options = PromptLogprobsOptions(
            tokens_per_step=self._options.step.prompt_tokens,
            top_logprobs=self._options.top_logprobs,
        )
        for job in [job for job in self.queue.running if job.scores_prompt]:
            prompt = job.completion.prompt
            try:
                chosen = self._manager.run(
                    score_prompt, [job.live_handle], self._model_fn, params, prompt, options
                )
                row = jax.tree.map(lambda x: x[0], jax.device_get(chosen))
            except Exception as error:
                self.queue.end(job, completions.ERROR, error)
                continue
            job.completion.add_prompt([taken_token(row, place) for place in range(len(prompt))])
            job.num_computed = len(job.text) - 1
            self.num_computed += len(prompt)

    def _dispatch(self, params: Any, before: InFlight | None) -> InFlight | None:
        """Runs the next step; returns None if there is nothing to compute.

        Args:
          params: Parameters of the model.
          before: The step before, which may be read here if jobs have to be put back to wait.
        """
        parts = self._parts_with_room(before)
        if not parts:
            return None
        parts += self.queue.samples(parts)
        shape = self._shape_of(parts)
        inputs = step_inputs(parts, shape, self._options.step.chunk_shape[1])
        handles = [*(part.job.handle for part in parts), *[None] * (shape.num_rows - len(parts))]
        try:
            chosen = self._run(handles, params, inputs)
        except BaseException as error:
            for part in parts:
                if part.source is not None:
                    self.queue.release_lane(part.job)
            if not isinstance(error, Exception):
                raise
            if all(part.job.is_resident for part in parts if part.source is None):
                for part in parts:
                    self.queue.end(part.job, completions.ERROR, error)
            return None  # What another thread has swapped out or ended is noted by the next step.
        for part in parts:
            if part.source is None:
                part.job.num_computed += part.num_tokens
                part.job.num_unread += part.takes
        self.step_counts[shape] += 1
        self.num_computed += sum(part.num_tokens for part in parts)
        for leader in {part.source.job for part in parts if part.source is not None}:
            self.queue.fork(leader, [p.job for p in parts if p.source and p.source.job is leader])
        is_part = [part.source is None or part.job in self.queue.running for part in parts]
        return InFlight([p if ok else None for p, ok in zip(parts, is_part, strict=True)], chosen)

    def _run(
        self, handles: Sequence[PagedKvCacheHandle | None], params: Any, inputs: StepInputs
    ) -> Chosen:
        """Runs the program of a step on rows."""
        try:
            self._last, chosen = self._manager.run(self._step, handles, params, self._last, inputs)
        except Exception:
            if self._last.is_deleted():
                self._last = self._new_lanes()
            raise
        return chosen

    def _new_lanes(self) -> jax.Array:
        """Returns i32[L], on the cache's devices: else the first step is compiled twice."""

        def place(state: CacheState, _: np.ndarray) -> tuple[CacheState, jax.sharding.Sharding]:
            return state, state.page_tables[0].seq_lens.sharding

        lanes = np.zeros(self._options.max_rows, np.int32)
        return jax.device_put(lanes, self._manager.run(place, [None]))

    def _parts_with_room(self, before: InFlight | None) -> list[Part]:
        """Plans a step, and extends the jobs that lack room; those that find none wait again."""
        while True:  # Each turn reads the step before, or leaves one job less.
            self.queue.note_swapped()
            parts = plan(self.queue.running, self._options.step.chunk_shape)
            try:
                self.queue.extend(parts)
                if all(part.job.is_resident for part in parts):
                    return parts
            except OutOfBlocksError as shortage:
                if before is not None and not before.is_read:
                    self._read(before)
                    continue
                victim = max(self.queue.running, key=lambda job: job.urgency)
                if len(self.queue.running) > 1:
                    self.queue.preempt(victim)
                else:
                    self.queue.end(victim, completions.ERROR, shortage)
            except FerrumError:  # Another thread has swapped out or ended one since it was noted.
                if all(part.job.is_resident for part in parts):
                    raise

    def _shape_of(self, parts: Sequence[Part]) -> StepShape:
        """Returns the first shape that holds a step's parts."""
        _, chunk_tokens = self._options.step.chunk_shape
        num_chunks = sum(part.num_chunks(chunk_tokens) for part in parts)
        return next(
            shape
            for shape in self._shapes
            if len(parts) <= shape.num_rows and num_chunks <= shape.num_chunks
        )

    def _read(self, step: InFlight) -> None:
        """Waits for a step's tokens, and hands them to their jobs."""
        if step.is_read:
            return
        step.is_read = True
        self.num_reads += 1
        try:
            chosen = jax.device_get(step.chosen)
        except Exception as error:
            for part in step.parts:
                if part is not None and not part.job.completion.is_done:
                    self.queue.end(part.job, completions.ERROR, error)
            return
        for row, part in enumerate(step.parts):
            if part is not None and not part.job.completion.is_done:
                self._take(part, row, chosen)

    def _take(self, part: Part, row: int, chosen: Chosen) -> None:
        """Gives a job what a step has computed for it."""
        job = part.job
        if part.takes:
            taken = taken_token(chosen, row)
            token = taken.token
            job.num_unread -= 1
            job.text.append(token)
            job.completion.add(taken)
            if token in job.options.stop_token_ids:
                return self.queue.end(job, completions.STOP)
            if job.num_taken >= job.options.max_new_tokens:
                return self.queue.end(job, completions.LENGTH)
            if not job.has_offered:
                self.queue.commit(job)
                job.has_offered = True
