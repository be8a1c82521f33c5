"""The jobs of an engine: which run, which wait for room, and what the manager is told of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import ferrum_jax.integrations.engine.completion as completions
from ferrum_jax.arithmetic import PerPool, ceil_div
from ferrum_jax.errors import (
    FerrumError,
    OutOfBlocksError,
    OutOfHostMemoryError,
    OutOfRowsError,
    SequenceTooLongError,
    WaitTimeoutError,
)
from ferrum_jax.integrations.engine.jobs import Job, Part
from ferrum_jax.manager import PagedKvCacheManager
from ferrum_jax.records import AllocationRequest

_SHORTAGES = OutOfBlocksError, OutOfRowsError
_names = itertools.count()


class JobQueue:
    """Jobs on the cache of one manager. Not thread-safe.

    Args:
      manager: The manager of the cache.
      num_lanes: The most jobs that run at once.
      step_tokens: The most tokens of prompts in a step.

    Attributes:
      waiting: Jobs without a cache.
      running: Jobs that take part in steps.
      swapped: Jobs with a cache that is swapped out.
      num_preempted: How often a job was put back to wait.
    """

    def __init__(self, manager: PagedKvCacheManager, num_lanes: int, step_tokens: int):
        self._manager, self._step_tokens = manager, step_tokens
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.swapped: list[Job] = []
        self.num_preempted = 0
        self._name, self._numbers = f"engine-{next(_names)}", itertools.count()
        self._free_lanes = list(range(num_lanes))
        self._room_changes_at_refusal = -1
        self._counts = manager.pools.first.pool.counts

    @property
    def jobs(self) -> list[Job]:
        """All jobs that have not ended."""
        return [*self.waiting, *self.running, *self.swapped]

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

    def expire(self, now: float) -> None:
        """Ends the jobs that have waited too long at `now`, in seconds of the engine's clock.

        Those that wait for a running job to share its blocks have room, and stay; so do those that
        have started once.
        """
        for job in [job for job in self.waiting if job.is_expired(now)]:
            if self._can_soon_share(job):
                continue
            self.end(
                job,
                completions.ERROR,
                WaitTimeoutError(
                    f"There was no room for {len(job.text)} tokens within "
                    f"{job.options.timeout_seconds} seconds. Use a longer timeout, or more blocks."
                ),
            )

    def start_jobs(self, *, may_wait: bool) -> None:
        """Swaps in and starts jobs in the order of their urgency, until one finds no room.

        Args:
          may_wait: Whether a step is under way, which may make room.
        """
        self.note_swapped()
        if self._manager.num_room_changes == self._room_changes_at_refusal and self.running:
            return
        for job in sorted([*self.swapped, *self.waiting], key=lambda job: job.urgency):
            if not self._free_lanes or not self._has_margin(job):
                return
            # What the device knows of a swapped job is lost with its lane: it is read first.
            if job.num_unread or self._can_soon_share(job):
                continue
            try:
                self._start(job)
            except _SHORTAGES as shortage:
                self._room_changes_at_refusal = self._manager.num_room_changes
                if not (may_wait or self.running or job.expires_at is not None):
                    self.end(job, completions.ERROR, shortage)  # Nothing here makes room.
                return
            except FerrumError as error:
                self.end(job, completions.ERROR, error)

    def note_swapped(self) -> None:
        """Notes which jobs the manager has swapped out to make room for more urgent requests."""
        for job in [job for job in self.running if not job.is_resident]:
            self.running.remove(job)
            self.release_lane(job)
            self.swapped.append(job)
            self.num_preempted += 1

    def preempt(self, job: Job) -> None:
        """Puts a running job back to wait; all of its tokens are read."""
        request_id = job.live_handle.request_id
        if self._manager.preempts:
            try:
                self._manager.swap_out(request_id)
                return self.note_swapped()
            except OutOfHostMemoryError:
                pass  # Its tokens are computed again.
        self.commit(job)
        self._manager.deallocate(request_id)
        job.handle, job.num_computed = None, 0
        self.running.remove(job)
        self.release_lane(job)
        self.waiting.append(job)
        self.num_preempted += 1

    def samples(self, parts: Sequence[Part]) -> list[Part]:
        """Returns a part for each sample that can begin with what its leader computes now."""
        samples = []
        for part in parts:
            if part.takes and not part.job.num_new:
                for job in [job for job in self.waiting if job.leader is part.job]:
                    if self._free_lanes and not job.num_taken:
                        job.lane = self._free_lanes.pop()
                        samples.append(Part(job, 0, takes=True, source=part))
        return samples

    def fork(self, leader: Job, samples: list[Job]) -> None:
        """Starts samples on their leader's blocks; those that are refused wait on."""
        while samples:
            names = [(self._name, next(self._numbers)) for _ in samples]
            try:
                handles = self._manager.fork(leader.live_handle.request_id, names)
                break
            except FerrumError:
                self.release_lane(samples.pop())
        else:
            return
        for job, job.handle in zip(samples, handles, strict=True):
            job.num_computed, job.num_committed = len(job.text), leader.num_committed
            job.num_known = leader.num_known
            job.num_unread, job.has_offered = 1, True
            if leader.completion.prompt_taken is not None:
                job.completion.add_prompt(leader.completion.prompt_taken)
            job.completion.begin(job.num_computed)
            self.waiting.remove(job)
            self.running.append(job)

    def commit(self, job: Job) -> None:
        """Offers what a job has computed of its text to the prefix cache."""
        num_tokens = min(job.num_computed, len(job.text))
        if not self._caches or not job.is_resident or num_tokens <= job.num_committed:
            return
        new = job.text[job.num_known : max(num_tokens, job.num_known)]
        self._manager.commit(job.live_handle, new, num_tokens=num_tokens)
        job.num_known += len(new)
        job.num_committed = num_tokens

    def extend(self, parts: Sequence[Part]) -> None:
        """Makes room for what jobs are to compute next; some may have got it where this raises.

        A block that a sliding window has passed is cached only if it was offered before; so of a
        prompt is offered what steps have computed, or are computing.
        """
        lacking: dict[int, list[Job]] = {}
        for part in parts:
            if num_tokens := part.num_lacking:
                lacking.setdefault(num_tokens, []).append(part.job)
                if self._counts.has_windows and not part.job.has_offered:
                    self.commit(part.job)
        for num_tokens, jobs in lacking.items():
            self._manager.extend_all([job.live_handle for job in jobs], num_tokens)

    def end(self, job: Job, reason: str, error: Exception | None = None) -> None:
        """Ends a job, and frees its blocks; those that are full stay in the prefix cache."""
        for jobs in (self.waiting, self.running, self.swapped):
            if job in jobs:
                jobs.remove(job)
        handle = job.handle
        try:
            if handle is not None and handle.is_valid():
                self.commit(job)
                self._manager.deallocate(handle.request_id)
        except Exception as failure:  # The manager is closed, or has lost its cache.
            error = error or failure
        finally:
            self.release_lane(job)
            job.handle = None
            job.completion.end(completions.ERROR if error else reason, error)

    def release_lane(self, job: Job) -> None:
        """Gives back the lane of a job that takes part in no step any more, if it has one."""
        if job.lane >= 0:
            self._free_lanes.append(job.lane)
            job.lane = -1

    def _start(self, job: Job) -> None:
        if job.handle is not None:
            self._manager.swap_in(job.handle.request_id)
            self.swapped.remove(job)
        else:
            job.handle = self._manager.allocate(self._new_request(job))
            job.num_computed = job.num_committed = job.handle.num_cached_tokens
            if job.scores_prompt:  # The manager was not told, so as to find nothing cached.
                self._manager.commit(job.handle, job.text, num_tokens=0)
            job.num_known = min(len(job.text), job.handle.num_tokens())
            job.has_offered = False
            job.completion.begin(job.num_computed)
            self.waiting.remove(job)
        job.lane = self._free_lanes.pop()
        self.running.append(job)

    def _new_request(self, job: Job) -> AllocationRequest:
        """Returns what the manager is asked for: room for the job's text, or for a step of it.

        With sliding windows a row is extended step by step, so that they release what they pass.
        """
        is_whole = job.scores_prompt or not self._counts.has_windows
        return self._manager.new_request(
            (self._name, next(self._numbers)),
            len(job.text) if is_whole else min(len(job.text), self._step_tokens),
            job.max_tokens,
            job.options.priority,
            prompt_token_ids=None if job.scores_prompt else job.text,
            cache_salt=job.options.cache_salt,
        )

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
        size, request = min(size, job.max_tokens), self._new_request(job)
        if self._counts.has_windows:
            longest = self._manager.pools.first.geometry.max_sequence_length
            size = min(self._size_at_once(size), longest)
            request = dataclasses.replace(  # A prompt that is cached takes less.
                request, max_sequence_length=longest, prompt_token_ids=None
            )
        return self._manager.can_allocate(dataclasses.replace(request, initial_tokens=size))

    def _size_at_once(self, num_tokens: int) -> int:
        """Returns tokens that take, allocated at once, what running jobs and a new one lack.

        Args:
          num_tokens: Tokens that the new one is to hold.
        """
        needed = self._most_blocks(num_tokens)
        for job in self.running:
            held = min(len(job.text), job.live_handle.num_tokens())
            needed += self._most_blocks(len(job.text)) - self._most_blocks(held)
        pairs = zip(needed, self._counts.num_groups, strict=True)
        return self._counts.block_size * max(ceil_div(blocks, groups) for blocks, groups in pairs)

    def _most_blocks(self, num_tokens: int) -> PerPool:
        """Returns the most blocks that a job holds while it grows to `num_tokens`."""
        return self._counts.blocks_for(num_tokens, step=self._step_tokens)

    @property
    def _caches(self) -> bool:
        return self._manager.caches_prefixes
