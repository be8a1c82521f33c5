"""The prompts of the main job, and reading others from the command line or a file."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from examples.tokenizer import Tokenizer

DEFAULT_PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    'def fibonacci(n):\n    """Return the n-th Fibonacci number."""\n',
    "Three things to check before a long bicycle trip:\n1.",
    "Water boils at a lower temperature on a mountain because",
    "Dear Sir or Madam,\n\nI am writing to ask whether the position of assistant librarian that "
    "was announced in last week's paper is still open. I have worked in a public library for "
    "three years, where I",
    "Q: Why does the moon always show us the same face?\nA:",
    "A key/value cache keeps, for every token that a language model has read, the keys and values "
    "that later tokens attend to. Kept as one padded array, it takes the room of the longest "
    "possible sequence for every row of the batch, used or not. Kept in blocks that are handed "
    "out as sequences grow, it takes the room of the tokens that are there, and sequences that "
    "begin alike can share what they have in common. In short,",
)


def read_prompts(
    texts: Sequence[str], file: pathlib.Path | None, tokenizer: Tokenizer, *, chat: bool
) -> list[list[int]]:
    """Gathers the prompts to run, as token ids.

    Args:
      texts: Prompts of the command line.
      file: One prompt a line; or, if it ends in `.jsonl`, an object with "text" or "token_ids".
      tokenizer: The model's.
      chat: Whether texts are wrapped in the model's chat template.

    Returns:
      Token ids of each; of the default prompts if neither argument names one.

    Raises:
      ValueError: A line is neither form, or a prompt is empty.
    """
    prompts: list[str | list[int]] = list(texts)
    if file is not None:
        lines = file.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if line.strip()]
        prompts += map(_from_json, lines) if file.suffix == ".jsonl" else lines
    token_ids = []
    for prompt in prompts or DEFAULT_PROMPTS:
        if isinstance(prompt, str):
            prompt = tokenizer.encode(tokenizer.apply_chat(prompt) if chat else prompt)
        if not prompt:
            raise ValueError("A prompt is empty. Give it at least one token.")
        token_ids.append(prompt)
    return token_ids


def _from_json(line: str) -> str | list[int]:
    fields: Any = json.loads(line)
    if isinstance(fields, dict):
        if isinstance(fields.get("text"), str):
            return fields["text"]
        ids = fields.get("token_ids")
        if isinstance(ids, list) and all(isinstance(token, int) for token in ids):
            return ids
    raise ValueError(f'A line must be {{"text": "…"}} or {{"token_ids": […]}}, got {line[:80]}')
