"""The answers of an engine's requests as arrays, for a rollout."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.integrations.engine.completion import Completion
from ferrum_jax.integrations.logprobs import NULL_TOKEN, Chosen


def stack_answers(
    answers: Sequence[Completion], shape: tuple[int, int, int], num_top: int
) -> tuple[Chosen, jax.Array]:
    """Returns answers that have ended, and the number of their tokens.

    Args:
      answers: P * G answers, those of one prompt after the other.
      shape: P, G, and the most tokens of an answer, W.
      num_top: Best tokens that are known in each place.

    Returns:
      `(chosen, num_tokens)`: [P, G, W], `NULL_TOKEN` behind the last token of an answer, and
      i32[P, G].
    """
    size, width = len(answers), shape[-1]
    tokens = np.full((size, width), NULL_TOKEN, np.int32)
    logprobs = np.full((size, width), np.nan, np.float32)
    top_tokens = np.full((size, width, num_top), NULL_TOKEN, np.int32)
    top_logprobs = np.full((size, width, num_top), np.nan, np.float32)
    for i, answer in enumerate(answers):
        for place, taken in enumerate(answer.taken):
            tokens[i, place], logprobs[i, place] = taken.token, taken.logprob
            for n, (token, logprob) in enumerate(taken.top):
                top_tokens[i, place, n], top_logprobs[i, place, n] = token, logprob
    num_tokens = np.asarray([len(answer.taken) for answer in answers], np.int32)
    arrays = (tokens, logprobs, top_tokens, top_logprobs)
    chosen = [jnp.asarray(x.reshape(*shape[:2], *x.shape[1:])) for x in arrays]
    return Chosen(*chosen), jnp.asarray(num_tokens.reshape(shape[:2]))
