"""Steps of a caller's own that change a manager's state: what they must return."""

import weakref
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ferrum_jax.state import CacheState


class StepRunner:
    """Runs steps, and refuses those that lose the state. Not thread-safe."""

    def __init__(self) -> None:
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()

    def run(
        self, step: Callable[..., Any], state: CacheState, seq_ids: np.ndarray, *args: Any
    ) -> tuple[CacheState, Any]:
        """Returns what `step(state, seq_ids, *args)` returns: a state, and something besides.

        Raises:
          TypeError: If it returns something else; what is jitted has not run then.
        """
        eval_shape = getattr(step, "eval_shape", None)
        if eval_shape is not None and step not in self._checked:
            # It is jitted and may donate the state: too late to find out afterwards.
            _require_state_first(eval_shape(state, seq_ids, *args), state)
            self._checked.add(step)
        result = step(state, seq_ids, *args)
        _require_state_first(result, state)
        return result


def _require_state_first(result: Any, state: CacheState) -> None:
    """Raises TypeError unless a step's result is `(state, output)`, shapes included."""
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not is_pair or _form_of(result[0]) != _form_of(state):
        got = [type(part).__name__ for part in result] if is_pair else type(result).__name__
        raise TypeError(
            "A step must return (state, output), the state being the one that it was given, "
            f"changed, of the same shapes; it returned {got}. Return the CacheState first."
        )


def _form_of(tree: object) -> tuple[Any, list[Any]]:
    """Returns what a program compiles for: structure, shapes and dtypes."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves]
