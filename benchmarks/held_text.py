"""Held text that goes on through the cache of a real model, compressed or not."""

import argparse
import dataclasses
import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ferrum_jax as fj
from examples.models.shape import ModelConfig
from ferrum_jax.arithmetic import ceil_div
from ferrum_jax.codecs import CODECS
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.decoding.generate import GenerateOptions
from ferrum_jax.integrations import PagedBatch
from ferrum_jax.integrations.queries import record_queries
from ferrum_jax.manager.handle import PagedKvCacheHandle
from ferrum_jax.manager.options import ManagerOptions
from ferrum_jax.ops.transfer import BlockPayload, export_blocks, import_blocks
from ferrum_jax.records import CompressionReport
from ferrum_jax.types import TokenFormat

TOPICS = (
    "assignment",
    "calls",
    "compound",
    "debugger",
    "execmodel",
    "import",
    "specialnames",
    "types",
)
"""Texts: long ones of which none is a part of another one's beginning."""

COMPRESSED_FORMATS = tuple(x for x, entry in CODECS.items() if not entry.is_native)
"""What caches are compressed to."""

Model = tuple[Callable[..., tuple[jax.Array, Any]], Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What texts were like through a cache. R texts.

    Attributes:
      log_probs: f32[R, T]. Of each next token of the text.
      choices: i32[R, T]. The best token at each of these places.
      own_choices: i32[R, G]. The same along what the uncompressed cache generates.
      reports: What compression has done to each text's cache; none if it is uncompressed.
    """

    log_probs: np.ndarray
    choices: np.ndarray
    own_choices: np.ndarray
    reports: Sequence[CompressionReport]


def held_texts(
    encode: Callable[[str], Sequence[int]], num_texts: int, num_tokens: int
) -> list[list[int]]:
    """Returns the first tokens of different texts.

    Args:
      encode: The tokenizer.
      num_texts: How many texts, at most `len(TOPICS)`.
      num_tokens: Tokens of each.

    Raises:
      ValueError: If there are fewer texts, or one is shorter.
    """
    if not 1 <= num_texts <= len(TOPICS):
        raise ValueError(f"There are {len(TOPICS)} texts, got num_texts={num_texts}.")
    topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    texts = []
    for name in TOPICS[:num_texts]:
        tokens = list(encode(topics[name]))
        if len(tokens) < num_tokens:
            raise ValueError(
                f"The text {name!r} has {len(tokens)} tokens, and {num_tokens} are asked for. "
                "Ask for a shorter prompt, or for fewer new tokens."
            )
        texts.append(tokens[:num_tokens])
    return texts


class Subject:
    """A cache that holds the same prompts for one method after the other.

    Args:
      config: Shape of the model.
      model: The model as a function, and its parameters.
      texts: As many tokens of each.
      args: Options of the command line.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: Model,
        texts: Sequence[Sequence[int]],
        args: argparse.Namespace,
    ):
        self._model, self._num_prompt = model, args.num_prompt
        self._texts = np.asarray(texts, np.int32)
        self._step = _make_step(model[0])
        # Programs for all formats take a minute to compile, so prompts are read without them.
        self._manager = _manager(config, len(texts), args, ())
        handles = self._allocate()
        prompts = self._texts[:, : self._num_prompt].tolist()
        logits = self._manager.prefill(*self._model, handles, prompts)
        last = self._texts[:, self._num_prompt - args.num_queries : self._num_prompt]
        queries = self._manager.run(self._record, handles, last, config.num_q_heads)
        self._queries = np.asarray(queries)
        self._payload: BlockPayload = self._manager.run(self._export, handles)
        first = np.asarray(logits).argmax(axis=1).astype(np.int32)
        self._own = self._generate(handles, first, args.num_own + 1)
        self._manager = _manager(config, len(texts), args, COMPRESSED_FORMATS)

    def run(self, ratio: float = 1.0, method: CompressionMethod | None = None) -> Outcome:
        """Lets texts go on through the prompts' caches, compressed to less than 1 or not."""
        handles = self._allocate()
        self._manager.run(self._import, handles)
        if ratio < 1:
            self._compress(handles, ratio, method)
        log_probs, choices = self._go_on(handles, self._texts[:, self._num_prompt :])
        _, own_choices = self._go_on(handles, self._own)
        reports = [handle.compression for handle in handles]
        self._free(handles)
        done = [report for report in reports if report is not None]
        return Outcome(log_probs, choices, own_choices, done)

    def _compress(
        self, handles: Sequence[PagedKvCacheHandle], ratio: float, method: CompressionMethod | None
    ) -> None:
        """Compresses, and raises RuntimeError unless blocks are freed as reported."""
        num_free, stats = self._manager.free_block_count(), handles[0].stats()
        for handle, queries in zip(handles, self._queries, strict=True):
            self._manager.compress_cache(handle.request_id, ratio, method, queries)
        freed = self._manager.free_block_count() - num_free
        freed_bytes = freed * stats.memory_bytes // stats.blocks_allocated
        told = sum(handle.compression.freed_bytes for handle in handles if handle.compression)
        if freed_bytes != told:
            raise RuntimeError(f"{method} freed {freed_bytes} bytes, and reports {told}.")

    def _go_on(
        self, handles: Sequence[PagedKvCacheHandle], tokens: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lets i32[R, T + 1] go through the caches, and cuts them off again.

        Returns:
          Log probabilities f32[R, T] of what follows each token, and the best tokens i32[R, T].
        """
        num_steps = tokens.shape[1] - 1

        def follow(
            state: fj.CacheState, seq_ids: np.ndarray
        ) -> tuple[fj.CacheState, tuple[np.ndarray, ...]]:
            seq_lens, made = np.array(state.tables.seq_lens)[seq_ids], []
            for now, then in itertools.pairwise(tokens.T):
                state, out = self._step(state, seq_ids, self._model[1], now, then)
                made.append(out)
            state, _ = fj.truncate(state, seq_ids, seq_lens)
            return state, tuple(map(np.asarray, zip(*made, strict=True)))

        log_probs, choices, ok = self._manager.run(
            follow, handles, extends=True, reserve_tokens=num_steps
        )
        if not ok.all():
            raise RuntimeError(f"The cache has no room for {num_steps} more tokens of each text.")
        return log_probs.T, choices.T

    def _allocate(self) -> list[PagedKvCacheHandle]:
        requests = range(len(self._texts))
        return [
            self._manager.allocate(self._manager.new_request(i, self._num_prompt)) for i in requests
        ]

    def _free(self, handles: Sequence[PagedKvCacheHandle]) -> None:
        for handle in handles:
            self._manager.deallocate(handle.request_id)

    def _record(
        self, state: fj.CacheState, seq_ids: np.ndarray, tokens: np.ndarray, num_q_heads: int
    ) -> tuple[fj.CacheState, jax.Array]:
        args = *self._model, state, seq_ids, tokens
        return state, record_queries(*args, num_q_heads=num_q_heads)

    def _generate(
        self, handles: Sequence[PagedKvCacheHandle], first: np.ndarray, num_tokens: int
    ) -> np.ndarray:
        options = GenerateOptions(max_new_tokens=num_tokens)
        out = self._manager.generate(*self._model, handles, first, options=options)
        return np.asarray(out.tokens)

    def _export(
        self, state: fj.CacheState, seq_ids: np.ndarray
    ) -> tuple[fj.CacheState, BlockPayload]:
        return state, export_blocks(state.pool, _blocks_of(state, seq_ids))

    def _import(self, state: fj.CacheState, seq_ids: np.ndarray) -> tuple[fj.CacheState, None]:
        pool = import_blocks(state.pool, _blocks_of(state, seq_ids), self._payload)
        return state.with_pools([pool]), None


def _manager(
    config: ModelConfig,
    num_texts: int,
    args: argparse.Namespace,
    token_formats: Sequence[TokenFormat],
) -> fj.PagedKvCacheManager:
    longest = args.num_prompt + max(args.num_text, args.num_own) + 1
    num_blocks = num_texts * ceil_div(longest, args.block_size)
    return fj.PagedKvCacheManager(
        fj.CacheConfig(
            block_size=args.block_size,
            max_blocks=num_blocks,
            initial_blocks=num_blocks,
            target_devices=(fj.Device.of(jax.devices()[0]),),
            enable_prefix_caching=False,
        ),
        fj.CacheGeometry(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=fj.DataType.of(args.dtype),
            max_seqs=num_texts,
            max_sequence_length=longest,
        ),
        ManagerOptions(token_formats=token_formats, scrub_freed_blocks=False),
    )


def _blocks_of(state: fj.CacheState, seq_ids: np.ndarray) -> np.ndarray:
    """Returns the blocks of rows that have as many each, row by row."""
    tables = state.tables
    held, block_ids = np.array(tables.num_blocks_held), np.array(tables.block_ids)
    return block_ids[seq_ids, : held[seq_ids[0]]].ravel()


def _make_step(model_fn: Callable[..., tuple[jax.Array, Any]]) -> Callable[..., Any]:
    """Returns a step of one token a row: the state, and what follows."""

    def step(
        state: fj.CacheState, seq_ids: jax.Array, params: Any, tokens: jax.Array, then: jax.Array
    ) -> tuple[fj.CacheState, tuple[jax.Array, ...]]:
        """Takes i32[R] twice; returns log probabilities of `then`, the best tokens, and ok."""
        state, ok = fj.extend(state, seq_ids, 1, max_new_tokens=1)
        batch = PagedBatch.of(state, seq_ids, jnp.ones_like(seq_ids), num_tokens=1)
        logits, pools = model_fn(params, tokens[:, None], batch)
        log_probs = jax.nn.log_softmax(logits)[jnp.arange(then.size), then]
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return state.with_pools(pools), (log_probs, best, ok)

    return jax.jit(step, donate_argnums=0)
