"""The default prompts, and prompts from the command line or a file."""

import dataclasses
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from examples.models import inputs
from examples.models.tokenizer import Tokenizer

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


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt as the user gave it.

    Attributes:
      place: Where the prompt was given, for messages.
      content: Its text, or its token ids.
    """

    place: str
    content: str | list[int]


def read_prompts(texts: Sequence[str], file: pathlib.Path | None) -> list[Prompt]:
    """Returns the prompts to run.

    Args:
      texts: Prompts of the command line.
      file: A prompt per line, which ends at a line feed and nowhere else; or, if its name ends in
        `.jsonl`, an object per line with "text" or "token_ids". Blank lines are left out.

    Returns:
      The prompts; the default ones if neither argument names any.

    Raises:
      ValueError: If the file has no prompt, is not UTF-8, or has a line of another form; or a text
        has a lone surrogate. The message names the place.
      OSError: If the file cannot be read.
    """
    prompts = []
    for number, text in enumerate(texts, start=1):
        place = f"--prompt {number}"
        prompts.append(Prompt(place, inputs.check_text(place, text)))
    if file is None:
        return prompts or [Prompt("a default prompt", text) for text in DEFAULT_PROMPTS]

    lines = [line.removesuffix("\r") for line in inputs.read_text(file).split("\n")]
    if not any(line.strip() for line in lines):
        raise ValueError(f"{file} has no prompt. Write one per line, or leave --prompts-file out.")
    for number, line in enumerate(lines, start=1):
        place = f"{file}, line {number}"
        if line.strip():
            with inputs.naming(place):
                content = _from_json(line) if file.suffix == ".jsonl" else line
            prompts.append(Prompt(place, content))
    return prompts


def encode_prompts(
    prompts: Iterable[Prompt], tokenizer: Tokenizer, vocab_size: int, *, chat: bool
) -> list[list[int]]:
    """Turns prompts into token ids.

    Args:
      prompts: The prompts.
      tokenizer: The model's tokenizer.
      vocab_size: Tokens in the model's vocabulary.
      chat: Whether texts are wrapped in the model's chat template.

    Returns:
      Token ids of each prompt, at least one.

    Raises:
      ValueError: If a prompt is empty, a token id is beyond the vocabulary, or a text cannot be
        encoded. The message names the prompt's place.
    """
    token_ids = []
    for prompt in prompts:
        with inputs.naming(prompt.place):
            ids = prompt.content
            if isinstance(ids, str):
                ids = tokenizer.encode(tokenizer.apply_chat(ids) if chat else ids)
            if not ids:
                raise ValueError("the prompt is empty. Give it at least one token.")
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise ValueError(
                        f"token id {token_id} is not one of the model's vocabulary, 0 to "
                        f"{vocab_size - 1}. Use the tokenizer of this model."
                    )
        token_ids.append(ids)
    return token_ids


def _from_json(line: str) -> str | list[int]:
    fields: Any = inputs.parse_json(line)
    if isinstance(fields, dict):
        if isinstance(fields.get("text"), str):
            return inputs.check_text("text", fields["text"])
        ids = fields.get("token_ids")
        if isinstance(ids, list) and all(type(token_id) is int for token_id in ids):
            return ids
    raise ValueError(f'must be {{"text": "…"}} or {{"token_ids": […]}}, got {line[:80]}')
