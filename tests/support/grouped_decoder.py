"""A small decoder with sliding windows, and a cache of layer groups that have these windows."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from ferrum_jax import AttentionOptions, CacheSpec, KeyValue, LayerGroup
from ferrum_jax.decoding.batch import PagedBatch

VOCAB, HEADS, HEAD_DIM, LAYERS = 41, 2, 8, 4
WINDOWS = (5, None, 5, None)  # Of each layer.
SIZES: dict[str, Any] = {"num_blocks": 96, "block_size": 4, "max_seqs": 4, "max_blocks_per_seq": 16}
PAYLOAD = KeyValue(1, HEAD_DIM, "float32")
ONE_GROUP = CacheSpec(
    num_layers=LAYERS, num_kv_heads=1, head_dim=HEAD_DIM, dtype="float32", **SIZES
)
GROUPS = CacheSpec(
    groups=[LayerGroup("full", [1, 3], PAYLOAD), LayerGroup("local", [0, 2], PAYLOAD, 5)], **SIZES
)
PROMPTS = [list(range(1, 30)), [7, 7, 3], list(range(12, 1, -1))]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model function of random layers, with the windows of WINDOWS given to attention or not.

    Attributes:
      names_windows: Whether attention is told the windows.
    """

    names_windows: bool

    def __call__(self, params, tokens, batch: PagedBatch):
        x = params["embed"][tokens]
        for layer, weights in enumerate(params["layers"]):
            x, batch = attend(batch, layer, x, weights, self.options(layer))
        return batch.last(x) @ params["embed"].T, batch.pools

    def options(self, layer):
        return AttentionOptions(sliding_window=WINDOWS[layer] if self.names_windows else None)


def attend(batch, layer, x, weights, options=None, group=None):
    """One layer: projections, attention through the cache, residual."""
    q = (x @ weights["q"]).reshape(*x.shape[:2], HEADS, HEAD_DIM)
    k, v = ((x @ weights[name])[:, :, None] for name in "kv")
    places = jnp.cos(0.3 * batch.positions.astype(jnp.float32))[:, :, None, None]
    batch = batch.write(layer, k + places, v, group=group)
    seen = batch.attend(layer, q + places, options, group=group)
    return x + jnp.tanh(seen.reshape(*x.shape[:2], -1) @ weights["out"]), batch


def random_params():
    """Random parameters of the decoder."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return jnp.asarray(rng.normal(0, 0.5, shape), jnp.float32)

    layers = [
        {
            "q": random(16, HEADS * HEAD_DIM),
            "k": random(16, HEAD_DIM),
            "v": random(16, HEAD_DIM),
            "out": random(HEADS * HEAD_DIM, 16),
        }
        for _ in range(LAYERS)
    ]
    return {"embed": random(VOCAB, 16), "layers": layers}
