"""Steps of a caller's own that change a manager's state: what they must return."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ferrum_jax.state import CacheState


class StepCaller:
    """Calls steps, but for those that are jitted and would lose the state. Not thread-safe."""

    def __init__(self) -> None:
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()

    def call(
        self, step: Callable[..., Any], state: CacheState, seq_ids: np.ndarray, *args: Any
    ) -> Any:
        """Returns what `step(state, seq_ids, *args)` returns.

        Raises:
          TypeError: If it is jitted and does not return the state first; it has not run then.
        """
        eval_shape = getattr(step, "eval_shape", None)
        if eval_shape is not None and step not in self._checked:
            # It may donate the state: too late to find out afterwards.
            output_of(eval_shape(state, seq_ids, *args), state)
            self._checked.add(step)
        return step(state, seq_ids, *args)


def state_in(result: Any, state: CacheState) -> CacheState:
    """Returns the state that a step's result holds, wherever it stands; else the one given."""
    found = jax.tree.leaves(result, is_leaf=lambda x: isinstance(x, CacheState))
    states = [x for x in found if isinstance(x, CacheState) and _form_of(x) == _form_of(state)]
    return next((x for x in states if not is_lost(x)), state)


def is_lost(state: CacheState) -> bool:
    """Says whether a step has consumed a state, so that nobody can use it any more."""
    return state.pool.k.is_deleted() or state.tables.held_lens.is_deleted()


def output_of(result: Any, state: CacheState) -> Any:
    """Returns what a step returned besides the state; raises TypeError unless that came first."""
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not is_pair or _form_of(result[0]) != _form_of(state):
        got = [type(part).__name__ for part in result] if is_pair else type(result).__name__
        raise TypeError(
            "A step must return (state, output), the state being the one that it was given, "
            f"changed, of the same shapes; it returned {got}. Return the CacheState first."
        )
    return result[1]


def _form_of(tree: object) -> tuple[Any, list[Any]]:
    """Returns what a program compiles for: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]
