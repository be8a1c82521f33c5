"""The cache that a Tunix model needs, read from its attention modules."""

from typing import Any

import jax.numpy as jnp

from ferrum_jax.integrations.tunix.model import check_family, sliding_window
from ferrum_jax.layers import LayerGroup, equal_sized
from ferrum_jax.payload import KeyValue


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
    sources = getattr(model, "kv_cache_sharing_patterns", range(len(model.layers)))
    shared = {layer: source for layer, source in enumerate(sources) if layer != source}
    alike: dict[tuple[KeyValue, int | None], list[int]] = {}
    for i, layer in enumerate(model.layers):
        if i not in shared:
            attention = layer.attn
            payload = KeyValue(attention.num_kv_heads, attention.head_dim, cache_dtype(model))
            alike.setdefault((payload, sliding_window(attention)), []).append(i)
    groups = [
        LayerGroup("full" if window is None else f"window_{window}", layers, payload, window)
        for (payload, window), layers in alike.items()
    ]
    return {"groups": equal_sized(groups), "shared_layers": shared}


def cache_dtype(model: Any) -> jnp.dtype:
    """Returns the dtype of a Tunix model's keys and values.

    Args:
      model: The model.
    """
    weights = model.embedder.input_embedding
    return jnp.dtype(getattr(model.config, "dtype", weights.dtype))
