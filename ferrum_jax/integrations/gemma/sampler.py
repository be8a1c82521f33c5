"""A sampler with the interface of those of the package `gemma`, on an engine."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.checks import check_type
from ferrum_jax.config import CacheConfig, PrefixCacheConfig
from ferrum_jax.integrations.engine import Completion, Engine, EngineOptions, RequestOptions
from ferrum_jax.integrations.gemma.arguments import conversations, import_package, refuse, seeds
from ferrum_jax.integrations.gemma.model import GemmaModel
from ferrum_jax.integrations.gemma.results import SamplerOutput, SamplerState, show
from ferrum_jax.integrations.gemma.sampling import MethodSampling
from ferrum_jax.manager import PagedKvCacheManager
from ferrum_jax.types import Device

Prompt: TypeAlias = Any
"""A text or a `dialog.Conversation`, or a list (or array) of these."""

_ROWS_BY_DEFAULT = 4  # Conversations of `cache_length` tokens that the blocks hold.


@dataclasses.dataclass(kw_only=True, eq=False)
class PagedSampler:
    """Answers prompts as `gm.text.Sampler` and `gm.text.ChatSampler` do, for text.

    `sample` takes one prompt or any number of them, and `chat` keeps a conversation. Prompts share
    the steps of an `Engine`, and the blocks of what they begin with. A next turn sees all turns
    before, and computes what no full block holds: its own tokens, and less than a block before.

    Attributes:
      model: A Gemma model (see `GemmaModel`).
      params: Its parameters.
      tokenizer: A `gm.text.Tokenizer`; the one that the model names if None.
      multi_turn: Whether `chat` continues the turns before.
      print_stream: Whether `chat` prints the answer as it grows; or a `dialog.Stream` to add it to.
      sampling: A `gm.text.SamplingMethod`; the best token if None.
      forbidden_tokens: Tokens that are never generated, as ids or texts of one token.
      stop_tokens: Tokens that end an answer, beside those of the tokenizer.
      cache_length: Maximum number of tokens per conversation.
      max_out_length: Maximum number of new tokens per answer.
      num_blocks: Blocks of each pool; enough for 4 conversations of `cache_length` tokens if None.
      block_size: Tokens per block.
      options: How many prompts run at once, and the shape of steps; `sampling` is not read.
      last_state: The conversation of `chat`; None before the first turn.
      turns: Texts of the conversation, by turns those of the user and of the model.

    Raises:
      ImportError: The package gemma is not installed.
      TypeError: The model is not one of the package's, or `sampling` not one of its methods.
      ValueError: A field has a wrong value, or the parameters are on several devices.
    """

    model: Any
    params: Any = dataclasses.field(repr=False)
    tokenizer: Any = None
    multi_turn: bool = False
    print_stream: Any = False
    sampling: Any = None
    forbidden_tokens: Sequence[str | int] | None = None
    stop_tokens: Sequence[str | int] | None = None
    cache_length: int = 4096
    max_out_length: int = 2048
    num_blocks: int | None = None
    block_size: int = 16
    options: EngineOptions = EngineOptions()
    last_state: SamplerState | None = dataclasses.field(default=None, init=False, repr=False)
    turns: list[str] = dataclasses.field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        """Makes the cache, with the layer groups of the model."""
        text = import_package("gemma.gm.text")
        check_type("options", self.options, EngineOptions)
        self._model_fn = GemmaModel(self.model)
        if self.tokenizer is None:
            version = self.model.INFO.tokenizer_version
            if not version:
                raise ValueError("The model names no tokenizer. Pass one as tokenizer=.")
            self.tokenizer = text.Tokenizer.from_version(version)
        if self.sampling is None:
            self.sampling = text.Greedy()
        special, forbidden = self.tokenizer.special_tokens, self._ids(self.forbidden_tokens)
        stops = special.EOS, special.END_OF_TURN, special.BEGIN_OF_TOOL_RESPONSE
        self._stop_ids = (*map(int, stops), *self._ids(self.stop_tokens))
        self._forbidden_ids = (*forbidden, *map(int, self.tokenizer.FORBIDDEN_TOKENS))
        self._engines: dict[MethodSampling, Engine] = {}
        self._manager = self._new_manager()
        self._engine(self.sampling)

    @property
    def manager(self) -> PagedKvCacheManager:
        """The manager of the cache: its statistics, its prefix cache, `close`."""
        return self._manager

    def sample(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stream: bool = False,
        sampling: Any = None,
        rng: Any = None,
        return_state: bool = False,
        last_state: SamplerState | None = None,
        **others: Any,
    ) -> Any:
        """Answers one prompt, or a list of any number of them.

        The beginning of a first turn (BOS) is added; tags of turns are not.

        Args:
          prompt: The prompt, or a list.
          max_new_tokens: The most tokens of an answer; `max_out_length`, or as many as a
            conversation still holds, if None.
          stream: Whether to return an iterator of what each token adds to the answer to one prompt.
          sampling: A `gm.text.SamplingMethod` for this call.
          rng: Seed or key of the draws; a random one if None. A draw depends on it, on the prompt's
            number and on the token's position.
          return_state: Whether to return a `SamplerOutput`, not the text alone.
          last_state: State of the turns before, of as many conversations as there are prompts.
          **others: Images, audio and shardings, which are refused.

        Returns:
          A text, or a list of them; or their `SamplerOutput`; or an iterator of these.

        Raises:
          ValueError: Images, audio or a sharding were given, `stream` is for several prompts, or
            `last_state` is not a state of as many conversations.
          TypeError: `sampling` is not a sampling method.
          SequenceTooLongError: A conversation would be longer than `cache_length`.
          OutOfBlocksError: A conversation does not fit, even alone.
        """
        refuse(others)
        texts, is_one = self._texts(prompt)
        if stream and not is_one:
            raise ValueError(f"stream is for one prompt, got {len(texts)}. Pass a single text.")
        turns = [self.tokenizer.encode(text, add_bos=last_state is None) for text in texts]
        begun = conversations(last_state, len(turns))
        requests = self._requests(
            [[*before, *turn] for before, turn in zip(begun, turns, strict=True)],
            max_new_tokens,
            seeds(rng, len(turns)),
        )
        engine = self._engine(self.sampling if sampling is None else sampling)
        if stream:
            return self._pieces(engine, *requests[0], return_state=return_state)
        with _submitted(engine, requests) as answers:
            decoded = [self.tokenizer.decode(answer.result()) for answer in answers]
        output = SamplerOutput(decoded[0] if is_one else decoded, self._state(answers))
        return output if return_state else output.text

    def chat(
        self,
        prompt: Prompt,
        *,
        multi_turn: bool | None = None,
        print_stream: Any = None,
        **arguments: Any,
    ) -> str:
        """Answers the next turn of a conversation, with the tags of turns around it.

        Args:
          prompt: A text, or a `dialog.Conversation`.
          multi_turn: Whether to continue the turns before; as the sampler says if None.
          print_stream: Whether to print the answer as it grows; as the sampler says if None.
          **arguments: Of `sample`: `max_new_tokens`, `sampling` and `rng`.

        Returns:
          The answer.

        Raises:
          Exception: As `sample` does; the conversation is then as before.
        """
        dialog = import_package("dialog")
        continues = self.multi_turn if multi_turn is None else multi_turn
        before, turns = (self.last_state, self.turns) if continues else (None, [])
        if isinstance(prompt, str):
            prompt = dialog.Conversation(dialog.User(prompt))
        text = str(prompt.as_text(format=self.tokenizer.FORMAT))
        shown = self.print_stream if print_stream is None else print_stream
        arguments |= {"return_state": True, "last_state": before}
        if shown is False:
            output = self.sample(text, **arguments)
        else:
            output = show(self.sample(text, stream=True, **arguments), shown)
        answer = str(output.text)
        self.last_state, self.turns = output.state, [*turns, text, answer]
        return answer

    @property
    def conversation(self) -> Any:
        """The turns of `chat` as a `dialog.Conversation`."""
        return import_package("dialog").Conversation("".join(self.turns))

    def _new_manager(self) -> PagedKvCacheManager:
        """Makes the cache, on the device of the parameters."""
        arrays = [leaf for leaf in jax.tree.leaves(self.params) if isinstance(leaf, jax.Array)]
        devices = {device for array in arrays for device in array.devices()} or {jax.devices()[0]}
        if len(devices) > 1:
            raise ValueError(
                f"The parameters are on {len(devices)} devices, and a PagedSampler's cache is on "
                "one. Pass GemmaModel(model) to an Engine on a manager over the mesh "
                "(ManagerOptions.mesh)."
            )
        geometry = self._model_fn.geometry(
            self.params, max_seqs=self.options.max_rows, max_sequence_length=self.cache_length
        )
        num_blocks = self.num_blocks
        if num_blocks is None:
            num_groups = max(len(pool.windows) for pool in geometry.spec(1, self.block_size).pools)
            num_blocks = (
                _ROWS_BY_DEFAULT * num_groups * ceil_div(self.cache_length, self.block_size)
            )
        config = CacheConfig(
            block_size=self.block_size,
            max_blocks=num_blocks,
            initial_blocks=num_blocks,
            target_devices=(Device.of(devices.pop()),),
            enable_prefix_caching=True,
            prefix_cache_config=PrefixCacheConfig(
                max_prefixes=num_blocks,
                min_prefix_length=1,
                prefix_ttl_seconds=math.inf,
                enable_cross_request_sharing=True,
            ),
        )
        return PagedKvCacheManager(config, geometry)

    def _engine(self, method: Any) -> Engine:
        """Returns the engine that samples by a method; engines share the cache."""
        sampling = MethodSampling.of(method, self._forbidden_ids)
        if sampling not in self._engines:
            options = dataclasses.replace(self.options, sampling=sampling)
            engine = Engine(self._model_fn, self.params, self._manager, options)
            self._engines[sampling] = engine
        return self._engines[sampling]

    def _texts(self, prompt: Prompt) -> tuple[list[str], bool]:
        """Returns the texts of prompts, and whether it is one that is not in a list."""
        kind = import_package("dialog").Conversation
        if isinstance(prompt, np.ndarray):
            prompt = prompt.tolist()
        is_one = isinstance(prompt, (str, kind))
        return [
            text.as_text(format=self.tokenizer.FORMAT) if isinstance(text, kind) else text
            for text in ([prompt] if is_one else prompt)
        ], is_one

    def _ids(self, tokens: Sequence[str | int] | None) -> list[int]:
        """Returns the ids of tokens, given as such or as texts of one token each."""
        ids = []
        for token in tokens or ():
            encoded = self.tokenizer.encode(token) if isinstance(token, str) else [token]
            if len(encoded) != 1:
                raise ValueError(
                    f"{token!r} is {len(encoded)} tokens. Each of stop_tokens and forbidden_tokens "
                    "must be one: pass its text, or its id."
                )
            ids += map(int, encoded)
        return ids

    def _requests(
        self, prompts: Sequence[list[int]], max_new_tokens: int | None, seeds: Sequence[int]
    ) -> list[tuple[list[int], RequestOptions]]:
        """Returns prompts with what each of them may take."""
        if max_new_tokens is not None and max_new_tokens > self.max_out_length:
            raise ValueError(
                f"max_new_tokens must be at most max_out_length ({self.max_out_length}), got "
                f"{max_new_tokens}. Lower it, or make the sampler with a larger max_out_length."
            )
        requests = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            most = max_new_tokens
            if most is None:  # The last token is not cached.
                most = min(self.max_out_length, max(1, self.cache_length - len(prompt) + 1))
            options = RequestOptions(
                max_new_tokens=most,
                stop_token_ids=self._stop_ids,
                seed=seed,
            )
            requests.append((prompt, options))
        return requests

    def _pieces(
        self, engine: Engine, prompt: list[int], options: RequestOptions, *, return_state: bool
    ) -> Iterator[str | SamplerOutput]:
        """Yields what each token adds to an answer."""
        with _submitted(engine, [(prompt, options)]) as answers:
            for token in answers[0]:
                piece = self.tokenizer.decode([token])
                yield SamplerOutput(piece, self._state(answers)) if return_state else piece

    def _state(self, answers: Sequence[Completion]) -> SamplerState:
        """Returns conversations up to the tokens of some answers so far."""
        predicted = np.zeros((len(answers), self.max_out_length), np.int32)
        for row, answer in zip(predicted, answers, strict=True):
            row[: len(answer.tokens)] = answer.tokens
        token_ids = tuple((*answer.prompt, *answer.tokens) for answer in answers)
        return SamplerState(token_ids, predicted)


@contextlib.contextmanager
def _submitted(
    engine: Engine, requests: Sequence[tuple[list[int], RequestOptions]]
) -> Iterator[list[Completion]]:
    """Submits requests, and cancels at the end those that have not ended."""
    answers: list[Completion] = []
    try:
        for prompt, options in requests:
            answers.append(engine.submit(prompt, options))
        yield answers
    finally:
        for answer in answers:
            answer.cancel()
