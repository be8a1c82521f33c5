"""Arguments of the samplers of the package `gemma`, and the package itself."""

import importlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from ferrum_jax.checks import INT32_LIMIT, check_type
from ferrum_jax.integrations.gemma.results import SamplerState

_MEDIA = (
    "a prompt is text, since attention to the cache is causal, and tokens of an image see each "
    "other. Use gm.text.ChatSampler for prompts with images or audio."
)
_REFUSED = {
    "images": _MEDIA,
    "audio": _MEDIA,
    "audio_lengths": _MEDIA,
    "sharding": "the prompts of a step are on the device of the cache. Leave it out; for a mesh, "
    "pass GemmaModel(model) to an Engine on a manager over the mesh.",
}


def conversations(state: SamplerState | None, num_prompts: int) -> Sequence[Sequence[int]]:
    """Returns the tokens before each prompt.

    Args:
      state: Conversations so far, if any.
      num_prompts: Prompts that continue them.

    Raises:
      ValueError: There is another number of conversations, or it is not a state of this sampler.
    """
    if state is None:
        return [()] * num_prompts
    check_type("last_state", state, SamplerState)
    if len(state.token_ids) != num_prompts:
        raise ValueError(
            f"last_state has {len(state.token_ids)} conversations, and {num_prompts} prompts were "
            "given. Pass a prompt for each."
        )
    return state.token_ids


def seeds(rng: Any, num_prompts: int) -> list[int]:
    """Returns the seeds of prompts.

    Args:
      rng: A seed, a key, or None for random seeds.
      num_prompts: How many.
    """
    rng = random.randrange(INT32_LIMIT) if rng is None else rng
    key = rng if isinstance(rng, jax.Array) else jax.random.key(rng)
    return jax.random.randint(key, (num_prompts,), 0, INT32_LIMIT - 1).tolist()


def refuse(arguments: Mapping[str, Any]) -> None:
    """Refuses what the package's samplers take, and this one does not.

    Args:
      arguments: By name; None is as if it was not given.

    Raises:
      ValueError: One was given.
      TypeError: One is not of the package's samplers either.
    """
    for name, value in arguments.items():
        if name not in _REFUSED:
            raise TypeError(f"PagedSampler takes no argument {name!r}.")
        if value is not None:
            raise ValueError(f"{name} cannot be given: {_REFUSED[name]}")


def import_package(name: str) -> Any:
    """Imports a module of the package gemma, or of its dependencies.

    Args:
      name: Name of the module.

    Raises:
      ImportError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            "PagedSampler needs the package gemma: pip install 'ferrum-jax[gemma]', with Python "
            "3.12 or later."
        ) from error
