"""A small random decoder (grouped queries, rotary, two layers), written three times.

In Flax NNX and in Linen with the paged attention, and in plain NumPy without any cache.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import ferrum_jax as fj
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.integrations import linen as paged_linen
from ferrum_jax.integrations import nnx as paged_nnx
from tests.support.compressed import small_spec

VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 41, 16, 4, 2, 8, 2


def rotary(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotates the halves of x [R, T, H, D] by positions i32[R, T]."""
    half = x.shape[-1] // 2
    rates = jnp.asarray(100.0 ** (-np.arange(half) / half), jnp.float32)
    angles = positions.astype(jnp.float32)[:, :, None, None] * rates[None, None, None]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


class NnxBlock(nnx.Module):
    def __init__(self, layer: int, rngs: nnx.Rngs) -> None:
        attention = nnx.MultiHeadAttention(
            num_heads=HEADS,
            in_features=WIDTH,
            qkv_features=HEADS * HEAD_DIM,
            num_kv_heads=KV_HEADS,
            rngs=rngs,
        )
        self.attention = paged_nnx.PagedAttention(attention, layer, rotary=rotary)
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array, batch: PagedBatch) -> tuple[jax.Array, PagedBatch]:
        y, batch = self.attention(self.attention_norm(x), batch)
        x = x + y
        return x + self.down(jax.nn.silu(self.up(self.norm(x)))), batch


class NnxDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.block_0 = NnxBlock(0, rngs)
        self.block_1 = NnxBlock(1, rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

    def __call__(self, tokens: jax.Array, batch: PagedBatch):
        x = self.embed(tokens)
        x, batch = self.block_0(x, batch)
        x, batch = self.block_1(x, batch)
        return self.head(batch.last(x)), batch.pools


class LinenBlock(nn.Module):
    layer: int

    @nn.compact
    def __call__(self, x: jax.Array, batch: PagedBatch) -> tuple[jax.Array, PagedBatch]:
        attention = paged_linen.PagedAttention(
            num_heads=HEADS,
            layer=self.layer,
            num_kv_heads=KV_HEADS,
            qkv_features=HEADS * HEAD_DIM,
            rotary=rotary,
            name="attention",
        )
        y, batch = attention(nn.RMSNorm(name="attention_norm")(x), batch)
        x = x + y
        y = nn.Dense(2 * WIDTH, name="up")(nn.RMSNorm(name="norm")(x))
        return x + nn.Dense(WIDTH, name="down")(jax.nn.silu(y)), batch


class LinenDecoder(nn.Module):
    @nn.compact
    def __call__(self, tokens: jax.Array, batch: PagedBatch):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        for layer in range(LAYERS):
            x, batch = LinenBlock(layer, name=f"block_{layer}")(x, batch)
        return nn.Dense(VOCAB, name="head")(batch.last(x)), batch.pools


_Module = TypeVar("_Module", bound=nnx.Module)


def random_module(make: Callable[[], _Module], seed: int = 0) -> _Module:
    """A module with random parameters, biases and scales included; compiles no initializer."""
    graphdef, params = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        mean, spread = float("scale" in name), 0.1 if "scale" in name or "bias" in name else 0.3
        return jnp.asarray(rng.normal(mean, spread, leaf.shape), leaf.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(fill, params))


def tiny_decoder(seed: int = 0) -> NnxDecoder:
    return random_module(lambda: NnxDecoder(nnx.Rngs(0)), seed)


def weights_of(model: nnx.Module) -> dict[str, Any]:
    """The parameters by name: nested dictionaries, as Linen has them."""
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def tiny_cache(**changes: Any) -> fj.CacheSpec:
    """Room for the decoder: 6 rows of up to 8 blocks of 4 tokens, 24 blocks in all."""
    return small_spec(
        **{"num_layers": LAYERS, "num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, **changes}
    )


def dense_logits(weights: Mapping[str, Any], tokens: Sequence[int]) -> np.ndarray:
    """Logits [T, VOCAB] of a whole sequence in float64, every token recomputed."""
    w = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(weights))
    x = w["embed"]["embedding"][np.asarray(tokens)]
    for layer in range(LAYERS):
        block = w[f"block_{layer}"]
        x = x + _dense_attention(block["attention"], _rms(x, block["attention_norm"]))
        y = _linear(_rms(x, block["norm"]), block["up"])
        x = x + _linear(y / (1 + np.exp(-y)), block["down"])
    return _linear(x, w["head"])


def dense_logprobs(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities f64[..., V] of logits, with the rules of `Sampling` for odd numbers."""
    logits = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    best = logits.max(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        below = np.where(logits == best, 0, logits - best)
    return below - np.log(np.exp(below).sum(-1, keepdims=True))


def dense_greedy(weights: Mapping[str, Any], prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The tokens that follow a prompt, the best one each time."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(dense_logits(weights, tokens)[-1].argmax()))
    return tokens[len(prompt) :]


def _linear(x: np.ndarray, w: Mapping[str, np.ndarray]) -> np.ndarray:
    return x @ w["kernel"] + w["bias"]


def _rms(x: np.ndarray, w: Mapping[str, np.ndarray]) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * w["scale"]


def _rotated(x: np.ndarray) -> np.ndarray:
    pairs = x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]
    rates = 100.0 ** (-np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    pairs = pairs * np.exp(1j * np.arange(len(x))[:, None, None] * rates)
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _dense_attention(w: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    q, k, v = (
        np.einsum("tw,whd->thd", x, w[name]["kernel"]) + w[name]["bias"]
        for name in ("query", "key", "value")
    )
    q, k = _rotated(q), _rotated(k)
    k, v = (np.repeat(y, HEADS // KV_HEADS, axis=1) for y in (k, v))
    logits = np.einsum("thd,shd->hts", q, k) / np.sqrt(HEAD_DIM)
    logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    seen = np.einsum("hts,shd->thd", shares, v)
    return np.einsum("thd,hdw->tw", seen, w["out"]["kernel"]) + w["out"]["bias"]
