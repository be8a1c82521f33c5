"""Prompts for serving loops, and the answers that each must get: those of a full recomputation."""

import functools

import numpy as np

from ferrum_jax.integrations.nnx import nnx_model
from tests.support.tiny_model import VOCAB, dense_greedy, tiny_decoder, weights_of

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
