"""Which jobs run, what their next step computes, and what becomes of the tokens it takes."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

import ferrum_jax.integrations.engine.completion as completions
from ferrum_jax.errors import (
    CacheLostError,
    FerrumError,
    OutOfBlocksError,
    OutOfHostMemoryError,
    OutOfRowsError,
    SequenceTooLongError,
    WaitTimeoutError,
)
from ferrum_jax.integrations.engine.completion import TakenToken
from ferrum_jax.integrations.engine.jobs import InFlight, Job, Part, plan, step_inputs
from ferrum_jax.integrations.engine.options import EngineOptions, StepShape
from ferrum_jax.integrations.engine.program import StepInputs, make_step
from ferrum_jax.integrations.logprobs import Chosen
from ferrum_jax.integrations.models import ModelFn
from ferrum_jax.manager import PagedKvCacheHandle, PagedKvCacheManager
from ferrum_jax.records import AllocationRequest
from ferrum_jax.state import CacheState

_SHORTAGES = OutOfBlocksError, OutOfRowsError
_names = itertools.count()


class Scheduler:
    """Jobs on the cache of one manager. Not thread-safe.

    Args:
      model_fn: The model.
      manager: The manager of the cache.
      options: Shape and sampling of the steps.

    Attributes:
      waiting: Jobs without a cache.
      running: Jobs that take part in steps.
      swapped: Jobs with a cache that is swapped out.
      step_counts: Steps that were dispatched, by shape.
      num_reads: How often the host waited for tokens: once for each step.
      num_preempted: How often a job was put back to wait.
    """

    def __init__(self, model_fn: ModelFn, manager: PagedKvCacheManager, options: EngineOptions):
        self._step, self._manager, self._options = make_step(model_fn, options), manager, options
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.swapped: list[Job] = []
        self.step_counts: collections.Counter[StepShape] = collections.Counter()
        self.num_reads = self.num_preempted = 0
        self._shapes: Sequence[StepShape] = options.step_shapes
        self._name, self._numbers = f"engine-{next(_names)}", itertools.count()
        self._free_lanes = list(range(options.max_rows))
        self._last = self._new_lanes()
        self._in_flight: InFlight | None = None
        self._room_changes_at_refusal = -1

    @property
    def jobs(self) -> list[Job]:
        """All jobs that have not ended."""
        return [*self.waiting, *self.running, *self.swapped]

    @property
    def is_idle(self) -> bool:
        """Whether no step is under way, and none can be dispatched before room is made."""
        return self._in_flight is None and not self.running

    def add(self, jobs: Sequence[Job]) -> None:
        """Adds samples of one prompt to those that wait.

        Raises:
          SequenceTooLongError: If prompt and answer are longer than a row can be.
        """
        needed, longest = jobs[0].max_tokens, self._manager.pools.first.geometry.max_sequence_length
        if needed > longest:
            raise SequenceTooLongError(
                f"{len(jobs[0].text)} prompt tokens and {jobs[0].options.max_new_tokens} new ones "
                f"make {needed} to hold; a request holds {longest}. Shorten it, or lower "
                "max_new_tokens."
            )
        self.waiting.extend(jobs)

    def warm_up(self, params: Any, shapes: Sequence[StepShape]) -> None:
        """Runs a step of each of some shapes on no row; later steps have one of these shapes."""
        for shape in shapes:
            inputs = step_inputs([], shape, self._options.step.chunk_shape[1])
            jax.block_until_ready(self._run([None] * shape.num_rows, params, inputs))
        self._shapes = shapes

    def advance(self, params: Any, now: float) -> None:
        """Dispatches a step, then reads the tokens of the step before.

        Args:
          params: Parameters of the model.
          now: Seconds on the engine's clock.
        """
        self._expire(now)
        self._start_jobs()
        before, self._in_flight = self._in_flight, None
        try:
            self._in_flight = self._dispatch(params, before)
        finally:
            if before is not None:
                self._read(before)

    def end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """Ends a job, and frees its blocks; those that are full stay in the prefix cache."""
        for jobs in (self.waiting, self.running, self.swapped):
            if job in jobs:
                jobs.remove(job)
        handle = job.handle
        try:
            if handle is not None and handle.is_valid():
                self._commit(job)
                self._manager.deallocate(handle.request_id)
        except CacheLostError as lost:  # There is nothing left to free.
            error = error or lost
        finally:
            self._release_lane(job)
            job.handle = None
            job.completion.end(completions.ERROR if error else reason, error)

    # Who runs.

    def _expire(self, now: float) -> None:
        for job in [j for j in self.waiting if j.expires_at is not None and now >= j.expires_at]:
            self.end(
                job,
                completions.ERROR,
                WaitTimeoutError(
                    f"There was no room for {len(job.text)} tokens within "
                    f"{job.options.timeout_seconds} seconds. Use a longer timeout, or more blocks."
                ),
            )

    def _start_jobs(self) -> None:
        """Swaps in and starts jobs in the order of their urgency, until one finds no room."""
        self._note_swapped()
        if self._manager.num_room_changes == self._room_changes_at_refusal and self.running:
            return
        for job in sorted([*self.swapped, *self.waiting], key=lambda job: job.urgency):
            if not self._free_lanes or not self._has_margin(job):
                return
            if self._can_soon_share(job):
                continue
            try:
                self._start(job)
            except _SHORTAGES as shortage:
                self._room_changes_at_refusal = self._manager.num_room_changes
                if self.is_idle and job.expires_at is None:
                    self.end(job, completions.ERROR, shortage)  # Nothing here makes room.
                return
            except FerrumError as error:
                self.end(job, completions.ERROR, error)

    def _new_request(self, job: Job) -> AllocationRequest:
        """Returns what the manager is asked for: room for the job's text."""
        return self._manager.new_request(
            (self._name, next(self._numbers)),
            len(job.text),
            job.max_tokens,
            job.options.priority,
            prompt_token_ids=job.text,
            cache_salt=job.options.cache_salt,
        )

    def _start(self, job: Job) -> None:
        if job.handle is not None:
            self._manager.swap_in(job.handle.request_id)
            self.swapped.remove(job)
        else:
            job.handle = self._manager.allocate(self._new_request(job))
            job.num_computed = job.num_committed = job.handle.num_cached_tokens
            job.num_known, job.has_offered = len(job.text), False
            job.completion.begin(job.num_computed)
            self.waiting.remove(job)
        job.lane = self._free_lanes.pop()
        self.running.append(job)

    def _can_soon_share(self, job: Job) -> bool:
        """Returns whether a running job is about to give this one what it begins with."""
        if job.leader in self.running and not job.leader.has_offered:
            return True
        size = self._manager.block_size()
        return self._caches and any(job.waits_for(other, size) for other in self.running)

    def _has_margin(self, job: Job) -> bool:
        """Returns whether a job leaves a block for each one that runs, if it is to start now."""
        if job.handle is not None or not self.running:
            return True
        size = len(job.text) + len(self.running) * self._manager.block_size()
        request = self._new_request(job)
        return self._manager.can_allocate(
            dataclasses.replace(request, initial_tokens=min(size, job.max_tokens))
        )

    def _note_swapped(self) -> None:
        """Notes which jobs the manager has swapped out to make room for more urgent requests."""
        for job in [job for job in self.running if not job.is_resident]:
            self.running.remove(job)
            self._release_lane(job)
            self.swapped.append(job)
            self.num_preempted += 1

    def _preempt(self, job: Job) -> None:
        """Puts a running job back to wait; all of its tokens are read."""
        request_id = job.live_handle.request_id
        if self._manager.preempts:
            try:
                self._manager.swap_out(request_id)
                return self._note_swapped()
            except OutOfHostMemoryError:
                pass  # Its tokens are computed again.
        self._commit(job)
        self._manager.deallocate(request_id)
        job.handle, job.num_computed = None, 0
        self.running.remove(job)
        self._release_lane(job)
        self.waiting.append(job)
        self.num_preempted += 1

    def _release_lane(self, job: Job) -> None:
        if job.lane >= 0:
            self._free_lanes.append(job.lane)
            job.lane = -1

    # Steps.

    def _dispatch(self, params: Any, before: InFlight | None) -> InFlight | None:
        """Runs the next step; returns None if there is nothing to compute.

        Args:
          params: Parameters of the model.
          before: The step before, which may be read here if jobs have to be put back to wait.
        """
        parts = self._parts_with_room(before)
        if not parts:
            return None
        parts += self._samples(parts)
        shape = self._shape_of(parts)
        inputs = step_inputs(parts, shape, self._options.step.chunk_shape[1])
        handles = [*(part.job.handle for part in parts), *[None] * (shape.num_rows - len(parts))]
        try:
            chosen = self._run(handles, params, inputs)
        except Exception as error:
            for part in parts:
                self.end(part.job, completions.ERROR, error)
            return None
        for part in parts:
            if part.source is None:
                part.job.num_computed += part.num_tokens
                part.job.num_unread += part.takes
        self.step_counts[shape] += 1
        for leader in {part.source.job for part in parts if part.source is not None}:
            self._fork(leader, [p.job for p in parts if p.source and p.source.job is leader])
        is_part = [part.source is None or part.job in self.running for part in parts]
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

    def _samples(self, parts: Sequence[Part]) -> list[Part]:
        """Returns a part for each sample that can begin with what its leader computes now."""
        samples = []
        for part in parts:
            if part.takes and not part.job.num_new:
                for job in [job for job in self.waiting if job.leader is part.job]:
                    if self._free_lanes and not job.text[len(job.completion.prompt) :]:
                        job.lane = self._free_lanes.pop()
                        samples.append(Part(job, 0, takes=True, source=part))
        return samples

    def _fork(self, leader: Job, samples: list[Job]) -> None:
        """Starts samples on their leader's blocks; those for which there is no room wait on."""
        while samples:
            names = [(self._name, next(self._numbers)) for _ in samples]
            try:
                handles = self._manager.fork(leader.live_handle.request_id, names)
                break
            except _SHORTAGES:
                self._release_lane(samples.pop())
        else:
            return
        for job, job.handle in zip(samples, handles, strict=True):
            job.num_computed = job.num_known = job.num_committed = len(job.text)
            job.num_unread, job.has_offered = 1, True
            job.completion.begin(job.num_computed)
            self.waiting.remove(job)
            self.running.append(job)

    def _parts_with_room(self, before: InFlight | None) -> list[Part]:
        """Plans a step, and extends the jobs that lack room; those that find none wait again."""
        while True:  # Each turn reads the step before, or leaves one job less.
            self._note_swapped()
            parts = plan(self.running, self._options.step.chunk_shape)
            lacking = [part.job.live_handle for part in parts if part.lacks_room]
            try:
                if lacking:
                    self._manager.extend_all(lacking, 1)
                if all(part.job.is_resident for part in parts):
                    return parts
            except OutOfBlocksError as shortage:
                if before is not None and not before.is_read:
                    self._read(before)
                    continue
                victim = max(self.running, key=lambda job: job.urgency)
                if len(self.running) > 1:
                    self._preempt(victim)
                else:
                    self.end(victim, completions.ERROR, shortage)

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
                    self.end(part.job, completions.ERROR, error)
            return
        for row, part in enumerate(step.parts):
            if part is not None and not part.job.completion.is_done:
                self._take(part, row, chosen)

    def _take(self, part: Part, row: int, chosen: Chosen) -> None:
        """Gives a job what a step has computed for it."""
        job = part.job
        if part.takes:
            top = zip(
                chosen.top_tokens[row].tolist(), chosen.top_logprobs[row].tolist(), strict=True
            )
            token = int(chosen.tokens[row])
            job.num_unread -= 1
            job.text.append(token)
            job.completion.add(TakenToken(token, float(chosen.logprobs[row]), tuple(top)))
            if token in job.options.stop_token_ids:
                return self.end(job, completions.STOP)
            if len(job.completion.tokens) >= job.options.max_new_tokens:
                return self.end(job, completions.LENGTH)
            if not job.has_offered:
                self._commit(job)
                job.has_offered = True

    def _commit(self, job: Job) -> None:
        """Offers what a job has computed of its text to the prefix cache."""
        num_tokens = min(job.num_computed, len(job.text))
        if not self._caches or not job.is_resident or num_tokens <= job.num_committed:
            return
        new = job.text[job.num_known : max(num_tokens, job.num_known)]
        self._manager.commit(job.live_handle, new, num_tokens=num_tokens)
        job.num_known += len(new)
        job.num_committed = num_tokens

    @property
    def _caches(self) -> bool:
        return self._manager.caches_prefixes
