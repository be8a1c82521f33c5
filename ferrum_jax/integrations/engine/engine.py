"""An engine: requests come at any time, share steps, and get their tokens as they come."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Self, overload

import jax
import jax.numpy as jnp

import ferrum_jax.integrations.engine.completion as completions
from ferrum_jax.checks import check_count, check_type
from ferrum_jax.integrations.engine.answers import stack_answers
from ferrum_jax.integrations.engine.completion import Completion
from ferrum_jax.integrations.engine.jobs import Job
from ferrum_jax.integrations.engine.options import EngineOptions, RequestOptions, StepShape
from ferrum_jax.integrations.engine.scheduler import Scheduler
from ferrum_jax.integrations.models import ModelFn, check_model
from ferrum_jax.integrations.prefill import token_ids
from ferrum_jax.integrations.rollout import Samples, draw_seeds
from ferrum_jax.integrations.serve import checked_prompts
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager import PagedKvCacheManager

_IDLE_SECONDS = 0.02  # Between looks for room that others make.


class Engine:
    """Runs a model for requests that come at any time, on the cache of a manager.

    Requests share steps: each step takes a token of every request that decodes, and chunks of the
    prompts that are being read, so that a long prompt does not hold up the others. A step is
    dispatched before the tokens of the one before are read, so that the device has no pause.
    Prompts share what the manager's prefix cache holds; one that begins like a prompt that is being
    read waits for it. The most urgent request starts first, of equal ones the oldest. Where blocks
    run out, the least urgent and youngest one has to wait again: its bytes are swapped out if the
    manager preempts (`ManagerOptions.preemption_policy`), else its tokens are kept and computed
    again.

    Whoever reads a `Completion` drives the engine, in any thread; `step` does so by hand. There is
    no thread in the background. The manager may serve other requests meanwhile.

    Args:
      model_fn: The model. It is compiled for a few shapes of steps; engines with equal models and
        options share the programs.
      params: Parameters of the model, a pytree.
      manager: The manager of the cache.
      options: Shape and sampling of the steps; the defaults of `EngineOptions` if absent.
      clock: Returns seconds that only grow, for timeouts; for tests.

    Raises:
      ValueError: An argument has a wrong type or value, or `model_fn` is not hashable.

    Example:
      >>> from examples.models import toy
      >>> import ferrum_jax as fj
      >>> config = fj.CacheConfig(block_size=16, max_blocks=32, initial_blocks=32)
      >>> manager = fj.PagedKvCacheManager(config, toy.GEOMETRY)
      >>> with Engine(toy.model, toy.init_params(), manager, EngineOptions(max_rows=4)) as engine:
      ...     answers = [engine.submit(prompt) for prompt in ([1, 2, 3], [4, 5])]
      ...     print([len(answer.result()) for answer in answers])
      [64, 64]
    """

    def __init__(
        self,
        model_fn: ModelFn,
        params: Any,
        manager: PagedKvCacheManager,
        options: EngineOptions | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        check_model(model_fn)
        check_type("manager", manager, PagedKvCacheManager)
        options = EngineOptions() if options is None else options
        check_type("options", options, EngineOptions)
        self._params, self._manager, self._clock = params, manager, clock
        self._options = options
        self._scheduler = Scheduler(model_fn, manager, options)
        self._arrivals, self._lock = itertools.count(), threading.RLock()
        self._is_closed = False

    def close(self) -> None:
        """Cancels all requests. The manager stays open."""
        with self._lock, interrupts.delayed():
            self._is_closed = True
            for job in self._scheduler.queue.jobs:
                self._scheduler.queue.end(job, completions.CANCELLED)

    def __enter__(self) -> Self:
        """Returns the engine."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the engine."""
        self.close()

    @property
    def num_steps(self) -> int:
        """Steps that were dispatched so far."""
        return self._scheduler.step_counts.total()

    @property
    def step_counts(self) -> Mapping[StepShape, int]:
        """Steps that were dispatched so far, by shape."""
        return dict(self._scheduler.step_counts)

    @property
    def num_reads(self) -> int:
        """How often the host has waited for tokens so far."""
        return self._scheduler.num_reads

    @property
    def num_preempted(self) -> int:
        """How often a request was put back to wait so far, because there were not enough blocks."""
        return self._scheduler.queue.num_preempted

    def warm_up(self, shapes: Iterable[StepShape | tuple[int, int]] | None = None) -> None:
        """Compiles the steps, so that no request waits for a compiler; changes nothing else.

        Later steps have one of these shapes: fewer of them compile sooner, and pad more.

        Args:
          shapes: Rows and chunks of the steps, each of `EngineOptions.step_shapes`, the last one of
            these included; all of them if absent.

        Raises:
          ValueError: A shape is not one of these, or the last one is missing.
        """
        known = self._options.step_shapes
        chosen = set(known if shapes is None else shapes)
        if not chosen <= set(known) or known[-1] not in chosen:
            raise ValueError(
                f"shapes must be of {[tuple(shape) for shape in known]}, the last one included; "
                f"got {sorted(chosen)}. Select from `EngineOptions.step_shapes`, or pass none."
            )
        with self._lock, interrupts.delayed():
            self._scheduler.warm_up(self._params, [shape for shape in known if shape in chosen])

    @overload
    def submit(
        self, prompt: Sequence[int], options: RequestOptions | None = None, *, n: None = None
    ) -> Completion: ...

    @overload
    def submit(
        self, prompt: Sequence[int], options: RequestOptions | None = None, *, n: int
    ) -> list[Completion]: ...

    def submit(
        self, prompt: Sequence[int], options: RequestOptions | None = None, *, n: int | None = None
    ) -> Completion | list[Completion]:
        """Adds a request; it starts at one of the next steps.

        Args:
          prompt: Token ids.
          options: What it may take; the defaults of `RequestOptions` if absent.
          n: How many samples of the answer; one, not in a list, if absent. The prompt is computed
            once for all that run together.

        Returns:
          The answer, or a list of n, to be read as it grows.

        Raises:
          ValueError: The prompt is empty or not of token ids, or an argument has a wrong type.
          SequenceTooLongError: Prompt and answer are longer than a row can be.
          RuntimeError: The engine is closed.
        """
        tokens = token_ids(0, prompt).tolist()
        options = RequestOptions() if options is None else options
        check_type("options", options, RequestOptions)
        num_samples = 1 if n is None else check_count("n", n)
        with self._lock:
            if self._is_closed:
                raise RuntimeError("The engine is closed. Make another one over the same manager.")
            jobs: list[Job] = []
            for sample in range(num_samples):
                jobs.append(self._new_job(tokens, options, sample, jobs[0] if jobs else None))
            self._scheduler.queue.add(jobs)
        answers = [job.completion for job in jobs]
        return answers[0] if n is None else answers

    def rollout(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        options: RequestOptions | None = None,
        key: jax.Array | None = None,
    ) -> Samples:
        """Generates several samples of each prompt, and waits for them; other requests go on.

        The samples are those of the function `rollout` with the same key, sampling and limits. What
        the manager's prefix cache holds of the prompts is not computed again, also at later calls,
        as long as the version of the weights is the same (`set_params`).

        Args:
          prompts: Token ids of each of the P prompts.
          samples: Samples of each prompt, G.
          options: What each sample may take; the defaults of `RequestOptions` if absent.
          key: A typed key (`jax.random.key`), in place of the options' seed. Required if the
            temperature of the engine is above 0.

        Returns:
          The samples. The counts are those of all requests meanwhile.

        Raises:
          ValueError: A prompt is empty or not of token ids, an argument has a wrong type, or the
            key is missing.
          SequenceTooLongError: A prompt and its answer are longer than a row can be.
          RuntimeError: The engine is closed.
          Exception: What ended a sample, for example `OutOfBlocksError`. Others are cancelled.
        """
        options = RequestOptions() if options is None else options
        check_type("options", options, RequestOptions)
        self._options.sampling.check_key(key)
        tokens = checked_prompts(prompts)
        seeds = [options.seed] * len(tokens) if key is None else draw_seeds(key, len(tokens))
        before = self.num_steps, self._scheduler.num_computed
        answers: list[Completion] = []
        try:
            for prompt, seed in zip(tokens, seeds, strict=True):
                of_prompt = dataclasses.replace(options, seed=int(seed))
                answers += self.submit(prompt.tolist(), of_prompt, n=samples)
            for answer in answers:
                answer.result()
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise
        shape = len(tokens), samples, options.max_new_tokens
        chosen, num_tokens = stack_answers(answers, shape, self._options.top_logprobs)
        return Samples(
            chosen=chosen,
            num_tokens=num_tokens,
            num_steps=jnp.asarray(self.num_steps - before[0]),
            num_computed=jnp.asarray(self._scheduler.num_computed - before[1]),
        )

    def set_params(self, params: Any, version: Hashable | None = None) -> None:
        """Replaces the parameters from the next step on; those of equal shapes compile nothing.

        Requests that run keep what they have computed with the old ones, and go on with the new.

        Args:
          params: Parameters of the model.
          version: Names the new weights: cached prefixes of other versions are not found any more
            (`set_weights_version` of the manager). If absent, prefixes stay: for weights that
            compute the same.
        """
        with self._lock, interrupts.delayed():
            if version is not None:
                self._manager.set_weights_version(version)
            self._params = params

    def step(self) -> bool:
        """Dispatches a step, and reads the tokens of the step before.

        If that fails otherwise than for single requests, as where the manager was closed or has
        lost its cache, all requests end with the error.

        Returns:
          Whether requests are left.
        """
        with self._lock, interrupts.delayed():
            try:
                self._scheduler.advance(self._params, self._clock())
            except Exception as error:
                for job in self._scheduler.queue.jobs:
                    self._scheduler.queue.end(job, completions.ERROR, error)
                raise
            return bool(self._scheduler.queue.jobs)

    def run(self) -> None:
        """Runs steps until no request is left."""
        while self.step():
            self._pause_if_idle()

    def _new_job(
        self, prompt: list[int], options: RequestOptions, sample: int, leader: Job | None
    ) -> Job:
        timeout_seconds = options.timeout_seconds
        return Job(
            completion=Completion(prompt, self._drive, self._end),
            options=options,
            arrival=next(self._arrivals),
            expires_at=None if timeout_seconds is None else self._clock() + timeout_seconds,
            sample=sample,
            leader=leader,
            text=list(prompt),
        )

    def _drive(self, is_over: Callable[[], bool]) -> None:
        """Runs a step unless another thread has made `is_over` true meanwhile."""
        with self._lock:
            if is_over():
                return
            self.step()
        self._pause_if_idle()

    def _pause_if_idle(self) -> None:
        """Waits a moment where all requests wait for room that others hold."""
        if self._scheduler.is_idle and self._scheduler.queue.jobs:
            time.sleep(_IDLE_SECONDS)

    def _end(self, completion: Completion) -> None:
        """Cancels a completion that has not ended."""
        with self._lock, interrupts.delayed():
            for job in self._scheduler.queue.jobs:
                if job.completion is completion:
                    self._scheduler.queue.end(job, completions.CANCELLED)
