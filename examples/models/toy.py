"""A decoder of two layers with random weights: enough for the examples, and it needs no files."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from ferrum_jax.manager import PagedKvCacheHandle

Manager = fj.PagedKvCacheManager | fj.MultiDevicePagedKvCacheManager

VOCAB_SIZE, NUM_LAYERS, NUM_HEADS, HEAD_DIM = 64, 2, 2, 64
WIDTH = NUM_HEADS * HEAD_DIM
GEOMETRY = fj.CacheGeometry(
    num_layers=NUM_LAYERS,
    num_kv_heads=NUM_HEADS,
    head_dim=HEAD_DIM,
    dtype=fj.DataType.FP32,
    max_seqs=8,
    max_sequence_length=512,
)


def prefix_manager(options: fj.ManagerOptions | None = None) -> fj.PagedKvCacheManager:
    """Makes a manager of 32 blocks of 16 tokens that caches prefixes."""
    config = fj.CacheConfig(
        block_size=16,
        max_blocks=32,
        initial_blocks=32,
        enable_prefix_caching=True,
        prefix_cache_config=fj.PrefixCacheConfig(
            max_prefixes=100,
            min_prefix_length=16,
            prefix_ttl_seconds=3600,
            enable_cross_request_sharing=True,
        ),
    )
    return fj.PagedKvCacheManager(config, GEOMETRY, options)


@functools.cache  # Made at the first call, when the example has chosen its devices.
def init_params() -> dict[str, jax.Array]:
    """Returns random weights, the same at each call."""
    rng = np.random.default_rng(0)
    qkv = rng.normal(0, WIDTH**-0.5, (NUM_LAYERS, 3, WIDTH, WIDTH))
    embedding, head = rng.normal(0, 1, (2, VOCAB_SIZE, WIDTH))
    params = {"embedding": embedding, "qkv": qkv, "head": head}
    return {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}


def model(
    params: dict[str, jax.Array], tokens: jax.Array, batch: fj.PagedBatch
) -> tuple[jax.Array, Any]:
    """Runs the new tokens of some rows through the decoder.

    Args:
      params: The weights, as `init_params` returns them.
      tokens: i32[R, T]. Up to T new tokens for each of R rows.
      batch: The rows of the cache.

    Returns:
      `(logits, pools)`: f32[R, VOCAB_SIZE] after each row's last new token, and the pool with
      the new tokens' keys and values.
    """
    x = params["embedding"].at[tokens].get(mode="clip")
    for layer in range(NUM_LAYERS):
        heads = jnp.einsum("rtw,pwv->prtv", x, params["qkv"][layer])
        q, k, v = heads.reshape(3, *tokens.shape, NUM_HEADS, HEAD_DIM)
        batch = batch.write(layer, k, v)
        x = x + batch.attend(layer, q).reshape(x.shape)
    return batch.last(x) @ params["head"].T, batch.pools


def prefill(manager: Manager, handle: PagedKvCacheHandle) -> int:
    """Computes the keys and values of a request's prompt, and returns the token that follows.

    Args:
      manager: The manager of the request.
      handle: The request, which was allocated with its prompt.
    """
    return int(jnp.argmax(manager.prefill(model, init_params(), [handle])))


def decode(manager: Manager, handle: PagedKvCacheHandle, token: int, num_tokens: int) -> list[int]:
    """Generates tokens.

    Args:
      manager: The manager of the request.
      handle: The request.
      token: The last token of the text so far, which is not in the cache yet.
      num_tokens: Tokens to generate.

    Returns:
      The tokens that follow `token`. The last one is not in the cache yet.
    """
    options = fj.GenerateOptions(max_new_tokens=num_tokens)
    out = manager.generate(model, init_params(), [handle], [token], options=options)
    return [*out.tokens[0, 1:].tolist(), int(out.next_tokens[0])]
