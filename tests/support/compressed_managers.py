"""Managers for compression: requests whose tokens survive every format, and their contents."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.types import TokenFormat
from tests.support import compressed
from tests.support.compressed import tokens_in
from tests.support.internals import state_of
from tests.support.managers import Clock, make_manager, whole
from tests.support.prefix_managers import CONFIG

NATIVE, INT8, INT8_INT4, INT4 = TokenFormat
BLOCKS = 24
MODEL = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
POOL: Any = SimpleNamespace(**MODEL)  # What `tokens_in` asks of a pool.
BLOCK_BYTES = 2 * 2 * 2 * 4 * 16 * 4  # Keys and values, layers, heads, tokens, numbers, float32.
SIZES = {NATIVE: 4, INT8: 12, INT8_INT4: 16, INT4: 21}  # Tokens per block.
TO_INT8 = CompressionMethod(token_format=INT8, scorer=None)
TO_INT4 = CompressionMethod(token_format=INT4, scorer=None)
PRUNE = CompressionMethod(token_format=NATIVE, scorer="window", num_sinks=2, num_recent=3)
PRUNE_INT4 = dataclasses.replace(PRUNE, token_format=INT4)
WAYS = {"rounded": (0.5, TO_INT8), "pruned": (0.5, PRUNE), "both": (0.13, PRUNE_INT4)}
ways = pytest.mark.parametrize("way", WAYS)
TOKENS = [*range(1, 31)]


def make(**config):
    """24 blocks of 4 tokens for 6 requests of at most 32 tokens; all formats are enabled."""
    config = {"clock": Clock(), "token_formats": tuple(TokenFormat), **config}
    sizes = {"block_size": 4, "max_blocks": BLOCKS, "initial_blocks": BLOCKS}
    limits = {"max_seqs": 6, "max_sequence_length": 32}
    model = {**MODEL, **limits, **config.pop("geometry", {})}
    return make_manager(**{**sizes, **config}, geometry=model)


def make_caching(**config):
    return make(enable_prefix_caching=True, prefix_cache_config=CONFIG, **config)


def fill(manager, handle, tokens, begin=0):
    """Writes tokens from `begin`, a position among the tokens that the request holds."""

    def step(state, seq_ids):
        return compressed.put_row(state, int(seq_ids[0]), tokens, begin), None

    manager.run(step, [handle])


def begin(manager, name, tokens=TOKENS, **more):
    handle = manager.allocate(manager.new_request(name, len(tokens), **more))
    fill(manager, handle, tokens)
    return handle


def compute(manager, name, prompt):
    """Allocates a request with a prompt, and writes the tokens that are not cached."""
    handle = manager.allocate(manager.new_request(name, prompt_token_ids=prompt))
    skip = handle.num_cached_tokens
    fill(manager, handle, prompt[skip:], skip)
    return handle


def numbers_of(handle):
    """Keys and values of all layers, float32 [L, T, H, D]."""
    layers = [handle.kv_cache(layer) for layer in range(handle.num_layers())]
    return KeysAndValues(
        *(np.stack([np.asarray(x) for x in kv]) for kv in zip(*layers, strict=True))
    )


def bits_of(handle):
    return [x.tobytes() for x in numbers_of(handle)]


def tokens_of(handle):
    return tokens_in(POOL, numbers_of(handle))


def picture(manager):
    """All that a call can change, enabled formats included."""
    state = state_of(manager)
    reports = {name: handle.compression for name, handle in manager.list_handles()}
    return whole(manager), state.pool.formats, state.tables.block_sizes, reports


def blocks_in(num_tokens, token_format=NATIVE):
    return -(-num_tokens // SIZES[token_format])


def kept_tokens(way):
    """The tokens that a request of `TOKENS` holds after a compression."""
    return {
        "rounded": TOKENS,
        "pruned": [1, 2, *range(17, 31)],  # 4 blocks of 4.
        "both": [1, 2, *range(12, 31)],  # One block of 21.
    }[way]
