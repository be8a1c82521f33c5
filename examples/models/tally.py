"""Runs an engine until all prompts are answered, and keeps count of tokens, seconds and blocks."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import tqdm

from ferrum_jax import PagedKvCacheManager
from ferrum_jax.integrations.engine import Completion, Engine, RequestOptions


@dataclasses.dataclass
class Tally:
    """Counts of a run.

    Attributes:
      seconds: From the first prompt submitted to the last token.
      first_token_seconds: When each answer's first token came, in the order of their coming.
      num_at_first: Tokens that came together with the very first one.
      num_new: New tokens of all answers.
      peak_blocks: Most blocks that requests used at once.
      group_blocks: Blocks of the requests that ended last, before they did, by layer group.
    """

    seconds: float = 0.0
    first_token_seconds: list[float] = dataclasses.field(default_factory=list)
    num_at_first: int = 0
    num_new: int = 0
    peak_blocks: int = 0
    group_blocks: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def decode_tokens_per_second(self) -> float:
        """New tokens per second since the first one; prompts may be read meanwhile."""
        elapsed = self.seconds - self.first_token_seconds[0]
        return (self.num_new - self.num_at_first) / elapsed if elapsed > 0 else 0.0


def answer_all(
    engine: Engine,
    manager: PagedKvCacheManager,
    prompts: Sequence[Sequence[int]],
    options: RequestOptions,
    progress: "tqdm.tqdm[Any]",
) -> tuple[list[Completion], Tally]:
    """Answers all prompts.

    Args:
      engine: The engine.
      manager: Its manager.
      prompts: Token ids of each prompt.
      options: Options of each request; a prompt's number is its seed.
      progress: Advances by each token.

    Returns:
      The answers in the order of the prompts, and the counts.
    """
    tally, started = Tally(), time.perf_counter()
    answers = [
        engine.submit(prompt, dataclasses.replace(options, seed=number))
        for number, prompt in enumerate(prompts)
    ]
    num_tokens = [0] * len(answers)
    live = list(range(len(answers)))
    is_unfinished = True
    while is_unfinished:
        is_unfinished = engine.step()
        _note_blocks(tally, manager)
        tally.seconds = time.perf_counter() - started
        for number in live:
            had_none, num_tokens[number] = not num_tokens[number], len(answers[number].tokens)
            if had_none and num_tokens[number]:
                tally.first_token_seconds.append(tally.seconds)
        live = [number for number in live if not answers[number].is_done]
        progress.update(sum(num_tokens) - tally.num_new)
        tally.num_at_first = tally.num_at_first or sum(num_tokens)
        tally.num_new = sum(num_tokens)
    for answer in answers:
        answer.result()
    return answers, tally


def _note_blocks(tally: Tally, manager: PagedKvCacheManager) -> None:
    stats = manager.stats()
    used = stats.total_blocks - stats.free_blocks - stats.evictable_blocks
    tally.peak_blocks = max(tally.peak_blocks, used)
    if any(stats.group_blocks.values()):
        tally.group_blocks = dict(stats.group_blocks)
