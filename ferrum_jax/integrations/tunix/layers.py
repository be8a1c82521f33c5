"""The cache that a Tunix model needs, read from its configuration."""

from typing import Any

import jax.numpy as jnp

from ferrum_jax.integrations.tunix.model import check_family
from ferrum_jax.reader import cached_layers


def cache_layers(model: Any) -> dict[str, Any]:
    """Returns the layers of a Tunix model's cache, for a `CacheSpec` or a `CacheGeometry`.

    Layers with a sliding window are in groups of their own, which release what the window has
    passed; layers with other heads have another pool; layers that share the cache of another one
    have none. Of layers that are all alike, there is one group.

    Args:
      model: A Llama 3, Qwen 2, Qwen 3, Gemma, Gemma 3 or Gemma 4 model of Tunix.

    Returns:
      The arguments `groups` and `shared_layers`: `CacheSpec(**cache_layers(model), ...)`.

    Raises:
      TypeError: The model is of another family.
    """
    check_family(model)
    return cached_layers(model.config, cache_dtype(model))._asdict()


def cache_dtype(model: Any) -> jnp.dtype:
    """Returns the dtype of a Tunix model's keys and values.

    Args:
      model: The model.
    """
    weights = model.embedder.input_embedding
    return jnp.dtype(getattr(model.config, "dtype", weights.dtype))
