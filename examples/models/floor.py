"""The time that a model's matrix products take alone: what no cache and no scheduler saves."""

import statistics
import time
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from examples.models.layers import LanguageModel, project
from ferrum_jax.integrations.engine import StepShape

REPEATS = 5


def products_seconds(
    model: LanguageModel, step_counts: Mapping[StepShape, int], chunk_tokens: int
) -> float:
    """Measures the model's matrix products for the steps of an engine, padding included.

    Args:
      model: The model.
      step_counts: How many steps there were of each shape.
      chunk_tokens: Tokens of a chunk.

    Returns:
      Seconds of all these steps together.
    """
    weights = [x for x in jax.tree.leaves(nnx.state(model.layers)) if x.ndim == 2]
    head = (model.embedding if model.head is None else model.head)[...]
    total = 0.0
    for (num_rows, num_chunks), count in step_counts.items():
        x = jnp.zeros((head.shape[1], num_rows + num_chunks * chunk_tokens), head.dtype)
        last = x[:, :num_rows]
        total += count * _seconds_of_a_step(weights, head, x, last)
    return total


def _seconds_of_a_step(
    weights: Sequence[jax.Array], head: jax.Array, x: jax.Array, last: jax.Array
) -> float:
    """Returns the median time of the products, after one run that compiles them."""
    times = []
    for _ in range(1 + REPEATS):
        started = time.perf_counter()
        jax.block_until_ready(_products(weights, head, x, last))
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


@jax.jit
def _products(
    weights: Sequence[jax.Array], head: jax.Array, x: jax.Array, last: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Multiplies [width, N] by each weight [out, in] in turn, and [width, R] by the head."""
    for weight in weights:
        x = project(jnp.resize(x, (weight.shape[1], x.shape[1])), weight)
    return x, project(last, head, jnp.float32)
