"""What a sampler of the package `gemma` returns: texts, tokens, conversations."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Conversations so far, from which a next turn continues.

    A state holds no blocks: it may be used twice, or be dropped.

    Attributes:
      token_ids: Tokens of each conversation: prompts and answers, stop tokens included.
      predicted_tokens: i32[B, max_out_length]. Tokens of the last answers, then 0.
    """

    token_ids: tuple[tuple[int, ...], ...]
    predicted_tokens: np.ndarray = dataclasses.field(repr=False, compare=False)


@dataclasses.dataclass(frozen=True)
class SamplerOutput:
    """Answers with their state.

    Attributes:
      text: Text of the answer, or of each one.
      state: What a next turn continues from (`last_state`).
    """

    text: str | list[str]
    state: SamplerState

    @property
    def tokens(self) -> np.ndarray:
        """i32[max_out_length], or i32[B, max_out_length]. Tokens of the answers, then 0."""
        tokens = self.state.predicted_tokens
        return tokens[0] if isinstance(self.text, str) else tokens


def show(pieces: Iterator[SamplerOutput], shown: Any) -> SamplerOutput:
    """Shows an answer as it grows.

    Args:
      pieces: What each token adds to it.
      shown: True to print them, or a `dialog.Stream` to add them to.

    Returns:
      The whole answer.
    """
    texts, last = [], None
    for last in pieces:
        texts.append(last.text)
        if shown is True:
            print(last.text, end="", flush=True)
        else:
            shown.add(last.text)
    assert last is not None  # An answer has a token.
    return SamplerOutput("".join(texts), last.state)
