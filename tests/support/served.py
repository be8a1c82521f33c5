"""Prompts for serving loops, and the answers that each must get: those of a full recomputation."""

import functools

import numpy as np

import ferrum_jax as fj
from ferrum_jax.integrations.nnx import nnx_model
from tests.support.managers import PREFIXES
from tests.support.tiny_model import (
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    VOCAB,
    dense_greedy,
    tiny_decoder,
    weights_of,
)

MODEL_FN, PARAMS = nnx_model(tiny_decoder())
WEIGHTS = weights_of(tiny_decoder())
STOP = 7


@functools.cache
def _greedy(prompt: tuple[int, ...], num_tokens: int) -> list[int]:
    return dense_greedy(WEIGHTS, prompt, num_tokens)


def answer(prompt, max_new_tokens: int, stop: int | None = STOP) -> list[int]:
    """The greedy answer to a prompt, its stop token included."""
    tokens = _greedy(tuple(prompt), max_new_tokens)
    return tokens[: tokens.index(stop) + 1] if stop in tokens else tokens


def random_prompts(rng: np.random.Generator, count: int, longest: int = 14) -> list[list[int]]:
    """Prompts of which some begin alike."""
    head = rng.integers(0, VOCAB, longest // 2).tolist()
    prompts = []
    for _ in range(count):
        tokens = rng.integers(0, VOCAB, rng.integers(1, longest // 2)).tolist()
        prompts.append(head + tokens if rng.random() < 0.4 else tokens)
    return prompts


def make_manager(max_blocks: int = 24, caches: bool = True, **options) -> fj.PagedKvCacheManager:
    """Blocks of 4 tokens, for 4 requests of up to 32."""
    return fj.PagedKvCacheManager(
        fj.CacheConfig(
            block_size=4,
            max_blocks=max_blocks,
            initial_blocks=max_blocks,
            enable_prefix_caching=caches,
            prefix_cache_config=PREFIXES,
        ),
        fj.CacheGeometry(
            num_layers=LAYERS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            dtype="float32",
            max_seqs=4,
            max_sequence_length=32,
        ),
        fj.ManagerOptions(**options),
    )
