"""A tiny decoder whose activations say that their heads lie over a mesh axis of type Explicit."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ferrum_jax import KeyValue, LayerGroup
from ferrum_jax.integrations import attend_new
from tests.support.caches import tiny_spec
from tests.support.tiny_model import rotary

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 41, 16, 4, 2, 8, 5
PROMPTS = [[3, 25, 17, 17, 8, 14, 9, 1, 2], [5, 6], [20, 33, 9, 14, 2], [7], [1, 2, 3, 4]]

_PAYLOAD = KeyValue(KV_HEADS, HEAD_DIM, "float32")
SPEC = tiny_spec(
    groups=[LayerGroup("full", [1], _PAYLOAD), LayerGroup("local", [0], _PAYLOAD, WINDOW)],
    **{"num_blocks": 48, "block_size": 4, "max_seqs": 6, "max_blocks_per_seq": 8},
)
"""Room for the decoder: 6 rows of up to 8 blocks of 4 tokens; the first layer has a window."""

SHARDED = {"q": P(None, "tp"), "k": P(None, "tp"), "v": P(None, "tp"), "out": P("tp")}
"""How the weights of a layer lie over the mesh."""


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model function of two layers.

    Attributes:
      axis: Mesh axis over which the activations say that their heads lie; None for no word on it.
    """

    axis: str | None = None

    def __call__(self, params, tokens, batch):
        embed = params["embed"]
        x = embed[tokens] if self.axis is None else embed.at[tokens].get(out_sharding=P())
        for layer, weights in enumerate(params["layers"]):
            heads = P(None, None, self.axis)
            q, k, v = (self.einsum("rtw,whd->rthd", x, weights[name], heads) for name in "qkv")
            y, batch = attend_new(batch, layer, (q, k, v), rotary=rotary)
            x = x + jnp.tanh(self.einsum("rthd,hdw->rtw", y, weights["out"], P()))
        return jnp.einsum("rw,vw->rv", batch.last(x), embed), batch.pools

    def einsum(self, text: str, x: jax.Array, weights: jax.Array, spec: P) -> jax.Array:
        if self.axis is None:
            return jnp.einsum(text, x, weights)
        return jnp.einsum(text, x, weights, out_sharding=spec)


def random_params() -> dict[str, Any]:
    """Random parameters, on the host."""
    rng = np.random.default_rng(0)

    def random(*shape):
        return rng.normal(0, 0.4, shape).astype(np.float32)

    shapes = {name: (WIDTH, KV_HEADS, HEAD_DIM) for name in "kv"}
    shapes |= {"q": (WIDTH, HEADS, HEAD_DIM), "out": (HEADS, HEAD_DIM, WIDTH)}
    layers = [{name: random(*shape) for name, shape in shapes.items()} for _ in range(2)]
    return {"embed": random(VOCAB, WIDTH), "layers": layers}


PARAMS = random_params()


def over(mesh: Mesh) -> dict[str, Any]:
    """The parameters with their heads over the mesh."""
    layers = [
        {name: jax.device_put(x, NamedSharding(mesh, SHARDED[name])) for name, x in layer.items()}
        for layer in PARAMS["layers"]
    ]
    return {"embed": jax.device_put(PARAMS["embed"], NamedSharding(mesh, P())), "layers": layers}
