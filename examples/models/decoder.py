"""Decodes batches of prompts with a language model, a manager and its prefix cache."""

import dataclasses
import math
import os.path
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import tqdm

from examples.models import families
from examples.models.layers import LanguageModel
from examples.models.model_config import cache_layers
from examples.models.shape import ModelConfig
from ferrum_jax import (
    CacheConfig,
    CacheGeometry,
    CacheState,
    Device,
    LayerGroup,
    PagedKvCacheManager,
    PrefixCacheConfig,
)
from ferrum_jax.arithmetic import ceil_div, next_power_of_two
from ferrum_jax.integrations.generate import Generated, GenerateOptions, generate
from ferrum_jax.integrations.logprobs import NULL_TOKEN
from ferrum_jax.integrations.prefill import PrefillOptions, prefill

Batch = dict[int, list[int]]  # Token ids of each prompt, by its number.


@dataclasses.dataclass
class Tally:
    """Tokens, seconds and blocks of a run.

    Attributes:
      prompt_tokens: Tokens of the prompts.
      reused_tokens: Prompt tokens that were found in the prefix cache.
      new_tokens: Tokens generated.
      compile_seconds: Time to compile the programs.
      prefill_seconds: Time to compute the prompts.
      decode_seconds: Time to generate the new tokens.
      peak_blocks: Most blocks in use at once.
      group_blocks: Blocks of the requests of the last batch at its end, by layer group.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    new_tokens: int = 0
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_blocks: int = 0
    group_blocks: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def computed_tokens(self) -> int:
        """Prompt tokens that the model computed."""
        return self.prompt_tokens - self.reused_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Size of a cache, and whether it caches prefixes.

    Attributes:
      dtype: Dtype of keys and values.
      block_size: Tokens per block.
      num_blocks: Blocks of the pool; enough for the largest batch if absent.
      batch_size: Most prompts decoded at once.
      caches_prefixes: Whether prompts share the blocks of equal first tokens.
    """

    dtype: str = "float32"
    block_size: int = 16
    num_blocks: int | None = None
    batch_size: int = 32
    caches_prefixes: bool = True


def plan(
    config: ModelConfig,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    options: CacheOptions,
) -> tuple[list[Batch], PagedKvCacheManager]:
    """Splits prompts into batches, and makes a cache that holds the largest.

    Raises:
      ValueError: A prompt is longer than the model, or than the pool, can hold; or the pool does
        not fit in memory.
    """
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > config.max_sequence_length:
        raise ValueError(
            f"The longest prompt and {max_new_tokens} new tokens are {longest} tokens; the "
            f"model holds {config.max_sequence_length}. Shorten it, or lower --max-new-tokens."
        )
    if options.block_size > config.max_sequence_length:
        raise ValueError(
            f"A block of {options.block_size} tokens is larger than the "
            f"{config.max_sequence_length} tokens that the model holds. Lower --block-size."
        )
    num_rows = min(len(prompts), options.batch_size)
    layers = cache_layers(config, options.dtype)
    needed = [
        sum(_num_blocks(group, len(ids), max_new_tokens, options) for group in layers["groups"])
        for ids in prompts
    ]
    num_blocks = options.num_blocks or sum(sorted(needed)[-num_rows:])
    if max(needed) > num_blocks:
        raise ValueError(
            f"One prompt with its new tokens needs {max(needed)} blocks, there are {num_blocks}. "
            "Raise --num-blocks."
        )
    geometry = CacheGeometry(**layers, max_seqs=num_rows, max_sequence_length=longest)
    return _batches(prompts, needed, num_rows, num_blocks), _manager(geometry, num_blocks, options)


def _num_blocks(
    group: LayerGroup, prompt_tokens: int, max_new_tokens: int, options: CacheOptions
) -> int:
    """Returns the most blocks that a layer group takes for a prompt and its new tokens."""
    total = ceil_div(prompt_tokens + max_new_tokens, options.block_size)
    if group.sliding_window is None:
        return total
    # All of the prompt at first; later the window, which begins and ends inside a block.
    window = ceil_div(group.sliding_window + 1, options.block_size) + 1
    return max(ceil_div(prompt_tokens, options.block_size), min(total, window))


def _manager(
    geometry: CacheGeometry, num_blocks: int, options: CacheOptions
) -> PagedKvCacheManager:
    kept = PrefixCacheConfig(
        max_prefixes=num_blocks,
        min_prefix_length=options.block_size,
        prefix_ttl_seconds=math.inf,
        enable_cross_request_sharing=True,
    )
    config = CacheConfig(
        block_size=options.block_size,
        max_blocks=num_blocks,
        initial_blocks=num_blocks,
        target_devices=(Device.of(jax.devices()[0]),),
        enable_prefix_caching=options.caches_prefixes,
        prefix_cache_config=kept,
    )
    try:
        return PagedKvCacheManager(config, geometry)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"A pool of {num_blocks} blocks of {options.block_size} tokens cannot be made "
            f"({error}). Lower --num-blocks, --batch-size or --block-size."
        ) from error


def _batches(
    prompts: Sequence[list[int]], needed: Sequence[int], num_rows: int, num_blocks: int
) -> list[Batch]:
    """Splits prompts, in order, so that each batch's blocks fit even at its longest."""
    batches: list[Batch] = [{}]
    room = num_blocks
    for number, (ids, blocks) in enumerate(zip(prompts, needed, strict=True)):
        if len(batches[-1]) == num_rows or blocks > room:
            batches.append({})
            room = num_blocks
        batches[-1][number] = ids
        room -= blocks
    return batches


class Decoder:
    """Decodes batches of prompts with one model and one manager.

    Args:
      model: The model.
      manager: The manager of the cache.
      num_rows: Sequences decoded at once.
      max_new_tokens: Most tokens to generate for each prompt.
      options: When to stop and how to choose tokens; its `max_new_tokens` are those between two
        updates of the progress bar.
      caches_prefixes: Whether a prompt that begins like another is computed after it, to share.
    """

    def __init__(
        self,
        model: LanguageModel,
        manager: PagedKvCacheManager,
        num_rows: int,
        max_new_tokens: int,
        options: GenerateOptions,
        *,
        caches_prefixes: bool = True,
    ):
        self._model_fn, self._params = families.functional(model)
        self._manager, self._num_rows = manager, num_rows
        self._max_new_tokens, self._options = max_new_tokens, options
        self._caches_prefixes = caches_prefixes
        self._key = jax.random.key(0)
        self.tally = Tally()

    def warm_up(self, batches: Sequence[Batch]) -> None:
        """Compiles the programs for these batches, on empty rows."""
        started = time.perf_counter()
        shape = PrefillOptions()
        waves = (wave for batch in batches for wave in self._waves(batch))
        for num_rows in {_rows_of_a_step(list(wave.values()), shape) for wave in waves}:
            self._manager.run(
                self._prefill, [None], [[0] * num_rows * shape.chunk_tokens], np.zeros(1, int)
            )
        nothing = np.full(self._num_rows, NULL_TOKEN, np.int32)
        self._manager.run(self._generate, [None] * self._num_rows, nothing, nothing)
        self.tally.compile_seconds += time.perf_counter() - started

    def run(self, batch: Batch, progress: "tqdm.tqdm[Any]") -> Batch:
        """Decodes a batch of prompts, by number, and returns their new tokens."""
        started = time.perf_counter()
        first: dict[int, int] = {}
        for wave in self._waves(batch):
            first |= self._read(batch, list(wave))
        self.tally.prefill_seconds += time.perf_counter() - started

        started = time.perf_counter()
        new_tokens = self._decode(first, progress)
        self.tally.decode_seconds += time.perf_counter() - started
        self.tally.new_tokens += sum(map(len, new_tokens.values()))
        stats = self._manager.stats()
        used = stats.total_blocks - stats.free_blocks - stats.evictable_blocks
        self.tally.peak_blocks = max(self.tally.peak_blocks, used)
        self.tally.group_blocks = dict(stats.group_blocks)
        for number, tokens in new_tokens.items():
            handle = self._handle(number)
            # A stop token is generated, but not written to the cache.
            self._manager.commit(handle, tokens[: handle.num_tokens() - len(batch[number])])
            self._manager.deallocate(number)
        return new_tokens

    def _waves(self, batch: Batch) -> list[Batch]:
        """Splits prompts into waves: a prompt that begins like another is computed after it.

        Of each prompt only the tokens remain that its wave computes, if the cache was empty.
        """
        if not self._caches_prefixes:
            return [batch]
        leaders: Batch = {}
        followers: Batch = {}
        longest_first = sorted(batch.items(), key=lambda item: -len(item[1]))
        for number, ids in longest_first:
            shared = max((_num_common(ids, other) for other in leaders.values()), default=0)
            if shared < self._manager.block_size():
                leaders[number] = ids
            else:
                followers[number] = ids[min(shared, len(ids) - 1) :]
        return [leaders, followers] if followers else [leaders]

    def _read(self, batch: Batch, numbers: Sequence[int]) -> dict[int, int]:
        """Prefills some prompts, and returns the token that follows each."""
        prompts = [batch[number] for number in numbers]
        handles = [
            self._manager.allocate(self._manager.new_request(number, prompt_token_ids=ids))
            for number, ids in zip(numbers, prompts, strict=True)
        ]
        cached = [handle.num_cached_tokens for handle in handles]
        rest = [ids[count:] for ids, count in zip(prompts, cached, strict=True)]
        logits = self._manager.run(self._prefill, handles, rest, np.asarray(cached))
        for handle in handles:
            self._manager.commit(handle)
        self._key, key = jax.random.split(self._key)
        tokens = np.asarray(self._options.sampling.sample(logits, key)).tolist()
        self.tally.prompt_tokens += sum(map(len, prompts))
        self.tally.reused_tokens += sum(cached)
        return dict(zip(numbers, tokens, strict=True))

    def _decode(self, first: dict[int, int], progress: "tqdm.tqdm[Any]") -> Batch:
        padding = self._num_rows - len(first)
        rows = [*map(self._handle, first), *[None] * padding]
        tokens = np.asarray([*first.values(), *[NULL_TOKEN] * padding], np.int32)
        new_tokens: Batch = {number: [] for number in first}
        slice_tokens = self._options.max_new_tokens
        for done in range(0, self._max_new_tokens, slice_tokens):
            limits = np.full(self._num_rows, self._max_new_tokens - done, np.int32)
            out = self._manager.run(
                self._generate, rows, tokens, limits, extends=True, reserve_tokens=slice_tokens
            )
            made, counts, tokens, ok = (np.asarray(x) for x in out)
            if not ok:
                raise SystemExit("The cache ran out of blocks. Raise --num-blocks.")
            for row, so_far in enumerate(new_tokens.values()):
                so_far.extend(made[row, : counts[row]].tolist())
            progress.update(int(counts.sum()))
            if (tokens == NULL_TOKEN).all():
                break
        return new_tokens

    def _handle(self, number: int) -> Any:
        return self._manager.get_handle(number)

    def _prefill(
        self,
        state: CacheState,
        seq_ids: np.ndarray,
        token_ids: Sequence[Sequence[int]],
        starts: np.ndarray,
    ) -> tuple[CacheState, jax.Array]:
        logits, state = prefill(
            self._model_fn, self._params, state, seq_ids, token_ids, starts=starts
        )
        return state, jax.block_until_ready(logits)

    def _generate(
        self, state: CacheState, seq_ids: np.ndarray, tokens: np.ndarray, limits: np.ndarray
    ) -> tuple[CacheState, tuple[jax.Array, ...]]:
        options = dataclasses.replace(self._options, limits=limits)
        out: Generated = generate(
            self._model_fn, self._params, state, seq_ids, tokens, options=options, key=self._key
        )
        return out.state, (out.tokens, out.num_tokens, out.next_tokens, out.ok)


def _rows_of_a_step(prompts: Sequence[Sequence[int]], shape: PrefillOptions) -> int:
    """Returns the rows of the prefill step that prompts are packed into."""
    num_chunks = sum(ceil_div(len(ids), shape.chunk_tokens) for ids in prompts)
    return min(shape.rows_per_step, next_power_of_two(num_chunks))


def _num_common(first: list[int], second: list[int]) -> int:
    return len(os.path.commonprefix([first, second]))
