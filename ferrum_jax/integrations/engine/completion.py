"""A request's answer as its tokens come: iterated, awaited, or read at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence

from ferrum_jax.decoding.logprobs import Chosen

STOP, LENGTH, CANCELLED, ERROR = "stop", "length", "cancelled", "error"
"""Why an answer ended: a stop token, the most tokens, `cancel`, or an error."""


@dataclasses.dataclass(frozen=True)
class TakenToken:
    """A token of an answer, or of a prompt.

    Attributes:
      token: Token id.
      logprob: Its log-probability, given the tokens before it.
      top: The best tokens with their log-probabilities, the best first, as many as were asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def taken_token(chosen: Chosen, place: int) -> TakenToken:
    """Returns the token at a place of tokens on the host, i32[P]."""
    top = zip(chosen.top_tokens[place].tolist(), chosen.top_logprobs[place].tolist(), strict=True)
    return TakenToken(int(chosen.tokens[place]), float(chosen.logprobs[place]), tuple(top))


class Completion:
    """The answer to one prompt, as it grows; from `Engine.submit`.

    Iterating over it yields token ids as they come, and drives the engine meanwhile; `async for`
    does so in threads. It may be read by several threads at once, and again from the beginning.

    Args:
      prompt: Token ids.
      drive: Runs a step of the engine unless the function that it is given returns true.
      cancel: Ends a completion.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        drive: Callable[[Callable[[], bool]], None],
        cancel: Callable[[Completion], None],
    ):
        self._prompt, self._drive, self._cancel = list(prompt), drive, cancel
        self._taken: list[TakenToken] = []
        self._prompt_taken: list[TakenToken] | None = None
        self._num_cached_tokens: int | None = None
        self._finish_reason: str | None = None
        self._error: Exception | None = None

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return list(self._prompt)

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self._prompt)

    @property
    def prompt_taken(self) -> list[TakenToken] | None:
        """The prompt's tokens with their log-probabilities, NaN for the first; None if not asked.

        They are known when the request has started.
        """
        return None if self._prompt_taken is None else list(self._prompt_taken)

    @property
    def num_cached_tokens(self) -> int | None:
        """Prompt tokens that were not computed for it: found in the prefix cache, or forked.

        None until it starts.
        """
        return self._num_cached_tokens

    @property
    def taken(self) -> list[TakenToken]:
        """The tokens so far, with their log-probabilities."""
        return list(self._taken)

    @property
    def tokens(self) -> list[int]:
        """Token ids so far, a stop token included."""
        return [taken.token for taken in self._taken]

    @property
    def finish_reason(self) -> str | None:
        """Why it ended: "stop", "length", "cancelled" or "error"; None while the answer grows."""
        return self._finish_reason

    @property
    def is_done(self) -> bool:
        """Whether no more tokens come."""
        return self._finish_reason is not None

    def cancel(self) -> None:
        """Ends the answer where it is, and frees its blocks; does nothing if it has ended."""
        self._cancel(self)

    def result(self) -> list[int]:
        """Waits for the end, driving the engine meanwhile, and returns all token ids.

        Raises:
          Exception: What ended the request, if it failed: for example `WaitTimeoutError`.
        """
        for _ in self:
            pass
        return self.tokens

    def __iter__(self) -> Iterator[int]:
        """Yields the token ids from the first on; waits for those that are to come."""
        place = 0
        while self._has_news(place) or self._waits(place):
            yield self._taken[place].token
            place += 1
        self._raise_error()

    async def __aiter__(self) -> AsyncIterator[int]:
        """Yields the token ids from the first on; does not block the event loop."""
        place, has_left = 0, threading.Event()
        try:
            while self._has_news(place) or await asyncio.to_thread(self._waits, place, has_left):
                yield self._taken[place].token
                place += 1
        finally:
            has_left.set()  # A thread that still waits for it runs no more steps.
        self._raise_error()

    def __await__(self) -> Generator[object, None, list[int]]:
        """Waits for the end, and gives all token ids."""
        return self._all().__await__()

    def begin(self, num_cached_tokens: int) -> None:
        """Notes what is cached when it first starts; the engine calls this.

        Args:
          num_cached_tokens: Prompt tokens that are not computed for it.
        """
        if self._num_cached_tokens is None:
            self._num_cached_tokens = num_cached_tokens

    def add(self, taken: TakenToken) -> None:
        """Appends a token; the engine calls this.

        Args:
          taken: The token.
        """
        self._taken.append(taken)

    def add_prompt(self, taken: list[TakenToken]) -> None:
        """Adds the log-probabilities of the prompt; the engine calls this.

        Args:
          taken: The prompt's tokens.
        """
        self._prompt_taken = taken

    def end(self, reason: str, error: Exception | None = None) -> None:
        """Ends the answer; the engine calls this.

        Args:
          reason: Why.
          error: What is raised for those who read it, if it failed.
        """
        self._error, self._finish_reason = error, reason

    async def _all(self) -> list[int]:
        async for _ in self:
            pass
        return self.tokens

    def _has_news(self, place: int) -> bool:
        return len(self._taken) > place

    def _waits(self, place: int, has_left: threading.Event | None = None) -> bool:
        """Drives the engine until there is a token at a place, or there will be none.

        It stops as well when the reader `has_left`.
        """

        def is_over() -> bool:
            is_left = has_left is not None and has_left.is_set()
            return self._has_news(place) or self.is_done or is_left

        while not is_over():
            self._drive(is_over)
        return self._has_news(place)

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
