"""Steps of a caller that change a pool's state: how they run, and what they must return."""

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import ferrum_jax.manager.pool.reads as reads
from ferrum_jax.interrupts import interrupts
from ferrum_jax.manager.pool.counts import PoolCounts
from ferrum_jax.manager.pool.device_state import DeviceState, is_consumed
from ferrum_jax.state import CacheState


class WholeStep:
    """A step in Python that signal handlers must not interrupt, as they do not a jitted one.

    Args:
      step: The step; see `StepRunner.run`.
    """

    def __init__(self, step: Callable[..., Any]):
        self._step = step

    def __call__(self, *args: Any) -> Any:
        """Runs the step."""
        return self._step(*args)


class StepRunner:
    """Runs steps on a pool's state. Not thread-safe.

    Args:
      device_state: The state that steps change.
      counts: What the host counts of it.
    """

    def __init__(self, device_state: DeviceState, counts: PoolCounts):
        self._device_state, self._counts = device_state, counts
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()

    def run(
        self, step: Callable[..., Any], seq_ids: np.ndarray, *args: Any, extends: bool = False
    ) -> Any:
        """Runs a step that changes the state, and returns its output.

        Args:
          step: Returns the state and an output: the state first, or last.
          seq_ids: i32[R]. Rows of the step.
          *args: Further arguments of the step.
          extends: Whether the step changes lengths; the state is unsettled afterwards.

        Raises:
          TypeError: If the step does not return the state first or last; a jitted one has not run
            then.
          CacheLostError: If the step consumed the state and did not return it.
        """
        held = self._device_state
        given = held.current
        held_before = held.held_blocks() if extends else None
        self._check_output(step, given, seq_ids, *args)
        # A handler cannot stop a program, but would lose the state that the program returns.
        is_whole = hasattr(step, "eval_shape") or isinstance(step, WholeStep)
        with contextlib.nullcontext() if is_whole else interrupts.allowed():
            result = step(given, seq_ids, *args)
        try:
            state, output = _parts_of(result, given)
        except TypeError:
            held.replace(_state_in(result, given), held_before=held_before)
            raise
        held.replace(state, held_before=held_before)
        held.require()
        if not extends and not _has_same_tables(given, state):
            try:
                held.replace(state, ok=self._matches_counts())
            except Exception:  # The step has run all the same.
                held.distrust_counts()
        return output

    def _check_output(
        self, step: Callable[..., Any], state: CacheState, seq_ids: np.ndarray, *args: Any
    ) -> None:
        """Raises TypeError if a step is jitted and does not return the state first or last."""
        eval_shape = getattr(step, "eval_shape", None)
        if eval_shape is not None and step not in self._checked:
            # The step may donate the state: too late to find out afterwards.
            _parts_of(eval_shape(state, seq_ids, *args), state)
            self._checked.add(step)

    def _matches_counts(self) -> jax.Array:
        counts = {
            "held_lens": self._counts.held_lens,
            "num_blocks_held": self._counts.num_blocks_held,
        }
        if self._counts.has_windows:
            counts["num_released"] = self._counts.num_released
        of_rows = {name: np.asarray(x, np.int32) for name, x in counts.items()}
        num_free = np.asarray(self._counts.num_free, np.int32)
        return reads.matches(self._device_state.current.page_tables, num_free, of_rows)


def _state_in(result: Any, state: CacheState) -> CacheState:
    """Returns the state that a step's result holds, at whatever place; else the one given."""
    found = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, CacheState))
    states = [x for x in found if isinstance(x, CacheState) and _form_of(x) == _form_of(state)]
    return next((x for x in states if not is_consumed(x)), state)


def _has_same_tables(one: CacheState, other: CacheState) -> bool:
    """Returns whether two states hold the very same arrays as tables."""
    trees = jax.tree.leaves(one.page_tables), jax.tree.leaves(other.page_tables)
    return all(first is second for first, second in zip(*trees, strict=True))


def _parts_of(result: Any, state: CacheState) -> tuple[CacheState, Any]:
    """Returns the state and the output of a step; raises TypeError without a state at either end.

    Of several outputs, it is a tuple.
    """
    parts = list(result) if isinstance(result, (tuple, list)) else []
    if len(parts) > 1 and _form_of(parts[0]) == _form_of(state):
        return parts[0], _alone(parts[1:])
    if len(parts) > 1 and _form_of(parts[-1]) == _form_of(state):
        return parts[-1], _alone(parts[:-1])
    got = [type(part).__name__ for part in parts] or type(result).__name__
    raise TypeError(
        "A step must return (state, output) or (output, state), the state being the one that it "
        f"was given, changed, of the same shapes; it returned {got}. Return the CacheState first, "
        "or last."
    )


def _alone(outputs: list[Any]) -> Any:
    """Returns the outputs of a step: the one that there is, or a tuple of several."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _form_of(tree: object) -> tuple[Any, list[Any]]:
    """Returns what a program compiles for: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]
