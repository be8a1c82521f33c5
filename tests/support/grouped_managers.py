"""Small managers of two layer groups: layer 0 keeps all tokens, layer 1 a window."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import ferrum_jax as fj
from ferrum_jax import KeyValue, KvCacheHandle, LayerGroup, PagedKvCacheManager
from ferrum_jax.types import TokenFormat
from tests.support.caches import payload
from tests.support.managers import BLOCK_SIZE, make_manager, start, write_tokens

WINDOW = 4
PAYLOAD = KeyValue(1, 2, "float32")
GROUPS = LayerGroup("full", [0], PAYLOAD), LayerGroup("local", [1], PAYLOAD, WINDOW)
TWO_GROUPS = {"groups": GROUPS}
WIDE = KeyValue(1, 4, "float32")
TWO_POOLS = {"groups": (GROUPS[0], LayerGroup("local", [1], WIDE, WINDOW))}
GROUP_BLOCK_BYTES = 2 * BLOCK_SIZE * 2 * 4  # K and V, tokens, head_dim, float32; one layer.


def make(geometry=TWO_GROUPS, **config) -> PagedKvCacheManager:
    """A manager of 16 blocks of 3 tokens, of one layer each."""
    return make_manager(geometry=geometry, **{"max_blocks": 16, **config})


def first_needed(seq_len: int, window: int | None = WINDOW) -> int:
    """The first block that the token at position `seq_len` can see, or that the last is in."""
    if window is None or not seq_len:
        return 0
    return min(max(0, seq_len - window + 1), seq_len - 1) // BLOCK_SIZE


def grow(manager, handle, tokens: Sequence[int], step: int = 1) -> None:
    """Extends a request by tokens, `step` at a time, and writes them."""
    for begin in range(0, len(tokens), step):
        more = tokens[begin : begin + step]
        manager.extend(handle, len(more))
        write_tokens(manager, handle, more, handle.num_tokens() - len(more))


def begin(manager, name, num_tokens: int, step: int = 1, **limits) -> KvCacheHandle:
    """Starts a request of tokens that are its own, `step` at a time."""
    handle = start(manager, name, 0, **limits)
    grow(manager, handle, tokens_for(name, num_tokens), step)
    return handle


def tokens_for(name: str, num_tokens: int) -> list[int]:
    """The tokens that `begin` writes."""
    first = 100 * (1 + ord(name[0]) - ord("a"))
    return list(range(first, first + num_tokens))


def tokens_in(handle: KvCacheHandle, layer: int, number: int | None = None) -> list[int]:
    """The token ids that a layer holds; 0 for released ones. `put` has encoded it by `number`."""
    number = layer if number is None else number
    k, v = (np.asarray(x, np.float32) for x in handle.kv_cache(layer))
    sizes: Any = SimpleNamespace(num_kv_heads=1, head_dim=k.shape[-1])
    tokens = (k[:, 0, :2] / 2.0**number @ [1, 256]).astype(int).tolist()
    for have, want in zip((k, v), payload(sizes, number, tokens), strict=True):
        np.testing.assert_array_equal(have, want)
    return tokens


def require_tokens(handle: KvCacheHandle, tokens: Sequence[int], num_released: int) -> None:
    """Asserts that both layers hold tokens, layer 1 without its first blocks."""
    assert handle.num_tokens() == len(tokens)
    num_gone = num_released * BLOCK_SIZE
    assert tokens_in(handle, 0) == list(tokens)
    assert tokens_in(handle, 1) == [0] * num_gone + list(tokens[num_gone:])
    num_blocks = -(-len(tokens) // BLOCK_SIZE)
    assert handle.stats().blocks_allocated == 2 * num_blocks - num_released


def make_large(**config):
    """A manager with blocks of 4 tokens in 2 groups that keep all tokens, and one window."""
    large = KeyValue(2, 16, "float32")
    groups = [
        LayerGroup("late", [3], large),
        LayerGroup("local", [2], large, 6),
        LayerGroup("early", [1], large),
    ]
    model = {"groups": groups, "num_layers": 3, "num_kv_heads": 2, "head_dim": 16}
    limits = {"max_seqs": 3, "max_sequence_length": 40}
    sizes = {"block_size": 4, "max_blocks": 40, "token_formats": tuple(TokenFormat)}
    return make({**model, **limits}, **{**sizes, **config})


def fill(manager, handle, begin, end):
    """Writes random numbers into all groups of a request, from position `begin` on."""

    def step(state, seq_ids):
        q_lens = np.asarray([end - begin], np.int32)
        batch = fj.PagedBatch.of(state, seq_ids, q_lens, num_tokens=end - begin)
        for layer in (1, 2, 3):
            key = jax.random.key(layer + 10 * begin)
            k, v = jax.random.normal(key, (2, 1, end - begin, 2, 16))
            batch = batch.write(layer, k, v)
        return state.with_pools(batch.pools), None

    manager.run(step, [handle])
