"""A batch without a cache: all tokens of each row are new, so that a model recomputes them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.models.shape import ModelConfig
from ferrum_jax.attention import AttentionOptions
from ferrum_jax.reader import cached_layers


@dataclasses.dataclass(frozen=True)
class WholeBatch:
    """R whole sequences of up to T tokens; `pools` has keys and values of each written layer."""

    q_lens: jax.Array
    num_tokens: int
    shared_layers: Mapping[int, int]
    pools: Mapping[int, tuple[jax.Array, jax.Array]] = dataclasses.field(default_factory=dict)

    @property
    def positions(self) -> jax.Array:
        return jnp.tile(jnp.arange(self.num_tokens, dtype=jnp.int32), (self.q_lens.size, 1))

    def last(self, x: jax.Array) -> jax.Array:
        return x[jnp.arange(x.shape[0]), self.q_lens - 1]

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> "WholeBatch":
        assert layer not in self.shared_layers and layer not in self.pools
        return dataclasses.replace(self, pools={**self.pools, layer: (k, v)})

    def attend(self, layer: int, q: jax.Array, options: AttentionOptions) -> jax.Array:
        k, v = self.pools[self.shared_layers.get(layer, layer)]
        k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
        logits = jnp.einsum("rthd,rshd->rhts", q, k) * options.scale_for(q.shape[3])
        distance = np.arange(self.num_tokens)[:, None] - np.arange(self.num_tokens)[None, :]
        window = options.sliding_window or self.num_tokens
        seen = (distance >= 0) & (distance < window)
        logits = jnp.where(seen[None, None], logits, -jnp.inf)
        sinks = jnp.full(q.shape[2], -jnp.inf) if options.sinks is None else options.sinks
        sinks = jnp.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=3), axis=3)[..., :-1]
        return jnp.einsum("rhts,rshd->rthd", weights, v)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(
    model_fn: Callable[..., Any],
    shared_layers: tuple[tuple[int, int], ...],
    params: Any,
    tokens: jax.Array,
    lens: jax.Array,
) -> jax.Array:
    return model_fn(params, tokens, WholeBatch(lens, tokens.shape[1], dict(shared_layers)))[0]


def whole_logits(
    model: tuple[Callable[..., Any], Any], config: ModelConfig, rows: Sequence[Sequence[int]]
) -> np.ndarray:
    """f32[R, vocab_size]. The model's logits after each whole sequence."""
    model_fn, params = model
    lens = np.array(list(map(len, rows)), np.int32)
    tokens = np.zeros((len(rows), -(-lens.max() // 8) * 8), np.int32)  # A program for 8 lengths.
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    _, shared_layers = cached_layers(config, "float32")
    return np.asarray(_logits(model_fn, (*shared_layers.items(),), params, tokens, lens))
