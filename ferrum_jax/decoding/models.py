"""Model functions, and the checks that turn their mistakes into errors at trace time."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ferrum_jax.decoding.batch import PagedBatch, WrittenLayers
from ferrum_jax.state import BlockPool

Pools: TypeAlias = tuple[BlockPool, ...]
"""The pools of a cache."""

ModelFn: TypeAlias = Callable[[Any, jax.Array, PagedBatch], tuple[jax.Array, Pools]]
"""Type of a model function: `(params, tokens i32[R, T], batch) -> (logits, pools)`.

logits are f32[R, vocab], those of the tokens that `batch.last` selects, each row's last new one.
The pools are those of the last batch, with every layer's keys and values written. Calls with equal
functions share a compiled program.
"""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ReadOnlyBatch(PagedBatch):
    """A batch of tokens that are cached already: it writes none."""

    def write(
        self, layer: jax.Array | int, k: ArrayLike, v: ArrayLike, *, group: str | None = None
    ) -> PagedBatch:
        """Writes nothing."""
        del layer, k, v, group  # Unused.
        return self


def check_model(model_fn: ModelFn) -> None:
    """Checks that a model function can be called, and compiled once for all calls.

    Args:
      model_fn: The model.

    Raises:
      ValueError: `model_fn` is not callable, or not hashable.
    """
    if not callable(model_fn):
        raise ValueError(
            "model_fn must be a function (params, tokens, batch) -> (logits, pools), got "
            f"{type(model_fn).__name__}. For an NNX model, pass *nnx_model(model)."
        )
    try:
        hash(model_fn)
    except TypeError as error:
        raise ValueError(
            f"model_fn must be hashable, since calls with equal ones share a program: {error}. "
            "Make its configuration hashable (a frozen dataclass, tuples for lists), or pass a "
            "function defined once that calls the model; `nnx_model` takes any NNX model."
        ) from error


def call_model(
    model_fn: ModelFn, params: Any, tokens: jax.Array, batch: PagedBatch
) -> tuple[jax.Array, Pools]:
    """Calls a model, and checks its result: a wrong one would decode wrong tokens silently.

    Args:
      model_fn: The model.
      params: Parameters of the model.
      tokens: i32[R, T]. New tokens.
      batch: Rows of the new tokens.

    Returns:
      `(logits, pools)`, as the model returns them.

    Raises:
      TypeError: The model does not return a pair, logits that are floats [R, vocab], or other
        pools than it was given.
      ValueError: The model does not write all layers of the cache.
    """
    written = WrittenLayers()
    result = model_fn(params, tokens, dataclasses.replace(batch, written=written))
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    if not is_pair or not _are_pools(result[1], batch.pools):
        got = [_name_of(part) for part in result] if is_pair else _name_of(result)
        raise TypeError(
            f"A model must return (logits, pools); it returned {got}. Return `batch.pools` of the "
            "batch that its last layer returned."
        )
    logits, pools = result
    _require_logits(logits, batch.num_outputs, tokens.shape[1])
    if any(_same_arrays(*both) for both in zip(pools, batch.pools, strict=True)):
        raise TypeError(
            "A model returned the pools that it was given, without what its layers wrote. Pass the "
            "batch that each layer returns on to the next, and return the last one's pools."
        )
    written.require_all(batch.layers)
    return logits, pools


def read_model(model_fn: ModelFn, params: Any, tokens: jax.Array, batch: PagedBatch) -> jax.Array:
    """Calls a model for tokens that are cached already: it changes nothing.

    Args:
      model_fn: The model.
      params: Parameters of the model.
      tokens: i32[R, T]. The last tokens of the rows.
      batch: The rows, with the tokens as new ones.

    Returns:
      f32[R, vocab]. Logits after each row's last token.

    Raises:
      TypeError: The model does not return logits that are floats [R, vocab].
    """
    parts = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    logits, _ = model_fn(params, tokens, ReadOnlyBatch(**parts))
    _require_logits(logits, batch.num_outputs, tokens.shape[1])
    return logits


def _are_pools(result: Any, given: Pools) -> bool:
    """Returns whether a model's result has a pool for each that it was given."""
    is_tuple = isinstance(result, tuple) and len(result) == len(given)
    return is_tuple and all(isinstance(pool, BlockPool) for pool in result)


def _same_arrays(pool: BlockPool, other: BlockPool) -> bool:
    """Returns whether two pools hold the very same arrays."""
    pairs = zip(jax.tree.leaves(pool), jax.tree.leaves(other), strict=True)
    return all(one is another for one, another in pairs)


def _name_of(value: object) -> str:
    return PagedBatch.__name__ if isinstance(value, PagedBatch) else type(value).__name__


def _require_logits(logits: Any, num_rows: int, num_tokens: int) -> None:
    shape, dtype = jnp.shape(logits), jnp.result_type(logits)
    if len(shape) != 2 or shape[0] != num_rows or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"A model's logits must be floats [{num_rows}, vocab], one vector for each token that "
            f"`batch.last(x)` selects; it returned {dtype}{list(shape)} for rows of {num_tokens} "
            "tokens. Select the tokens with `batch.last(x)`, best before the output layer: logits "
            "of all tokens take many times the memory."
        )
