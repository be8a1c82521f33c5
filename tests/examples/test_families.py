"""Each family's decoder: through a cache, in chunks and steps, as recomputed without one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from benchmarks import dense
from ferrum_jax.decoding.prefill import PrefillOptions
from ferrum_jax.reader import cached_layers
from tests.support.tiny_families import CONFIGS, tiny_model
from tests.support.whole_batch import whole_logits

NUM_STEPS = 6
PROMPT_LENS = (11, 1, 6)
ROWS = np.array([2, 0, 1])
IDS = np.random.default_rng(0).integers(0, 61, (3, max(PROMPT_LENS) + NUM_STEPS)).tolist()
PROMPTS = [ids[:n] for ids, n in zip(IDS, PROMPT_LENS, strict=True)]


@functools.cache
def recomputed(family):
    """f32[NUM_STEPS + 1, 3, vocab]. Logits after each prompt, and after each token behind it."""
    steps = range(NUM_STEPS + 1)
    whole = [ids[: n + i] for i in steps for ids, n in zip(IDS, PROMPT_LENS, strict=True)]
    logits = whole_logits(tiny_model(CONFIGS[family]), CONFIGS[family], whole)
    return logits.reshape(NUM_STEPS + 1, len(IDS), -1)


def next_tokens(step):
    """i32[3]. The token of each row that is computed in a step after the prompts."""
    return jnp.asarray([ids[n + step] for ids, n in zip(IDS, PROMPT_LENS, strict=True)], jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def _advance(model_fn, params, state, rows, tokens):
    state, _ = fj.extend(state, rows, 1, max_new_tokens=1)
    batch = fj.PagedBatch.of(state, rows, q_lens=1, num_tokens=1)
    logits, pools = model_fn(params, tokens[:, None], batch)
    return logits, state.with_pools(pools)


class PagedRows:
    """Rows of a paged cache with layer groups, which a model of a family continues."""

    def __init__(self, family):
        self.model_fn, self.params = tiny_model(CONFIGS[family])
        sizes = {"num_blocks": 64, "block_size": 4, "max_seqs": 4, "max_sequence_length": 24}
        self.state = fj.init(fj.CacheSpec.of(CONFIGS[family], dtype="float32", **sizes))

    def read(self):
        """Reads the prompts in chunks; returns the logits after each."""
        options = PrefillOptions(chunk_tokens=4, rows_per_step=2)
        logits, self.state = fj.prefill(
            self.model_fn, self.params, self.state, ROWS, PROMPTS, options=options
        )
        return logits

    def advance(self, rows, tokens):
        """Extends rows by a token each; returns the logits after it."""
        logits, self.state = _advance(self.model_fn, self.params, self.state, rows, tokens)
        fj.check_state(self.state)
        return logits


def paged_logits(family):
    """The same through a paged cache: prompts in chunks, then a token of each row per step."""
    paged = PagedRows(family)
    steps = [paged.read()]
    steps += [paged.advance(ROWS, next_tokens(step)) for step in range(NUM_STEPS)]
    return np.asarray(steps)


def dense_logits(family):
    """The same through a dense cache."""
    config, model = CONFIGS[family], tiny_model(CONFIGS[family])
    lens = jnp.asarray(PROMPT_LENS, jnp.int32)
    padded = jnp.asarray([ids[: max(PROMPT_LENS)] for ids in IDS], jnp.int32)
    cache = dense.init_cache(config, len(IDS), max(PROMPT_LENS) + NUM_STEPS)
    logits, cache = dense.prefill(*model, padded, lens, cache)
    steps = [logits]
    for step in range(NUM_STEPS):
        logits, cache = dense.decode_step(*model, next_tokens(step), lens + step + 1, cache)
        steps.append(logits)
    return np.asarray(steps)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_paged_cache_gives_the_logits_of_whole_sequences(family):
    np.testing.assert_allclose(paged_logits(family), recomputed(family), rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_a_fork_and_a_row_that_was_cut_give_the_logits_of_whole_sequences(family):
    paged = PagedRows(family)
    paged.read()
    for step in range(NUM_STEPS):
        paged.advance(ROWS, next_tokens(step))
    paged.state, forked = fj.fork(paged.state, ROWS[0], [3])
    length = int(paged.state.seq_lens[ROWS[0]])
    paged.state, cut = fj.truncate(paged.state, ROWS[:1], [length - 1])
    assert forked and cut
    logits = paged.advance(np.array([ROWS[0], 3]), jnp.asarray([7, 8], jnp.int32))
    text = IDS[0][: PROMPT_LENS[0] + NUM_STEPS]
    want = whole_logits(tiny_model(CONFIGS[family]), CONFIGS[family], [[*text[:-1], 7], [*text, 8]])
    np.testing.assert_allclose(logits, want, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_a_dense_cache_gives_the_logits_of_whole_sequences(family):
    np.testing.assert_allclose(dense_logits(family), recomputed(family), rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss", "gemma4"])
def test_a_window_of_one_token_less_or_more_shows_in_the_logits(family):
    logits = []
    for change in (0, -1, 1):
        window = CONFIGS[family].sliding_window + change
        config = dataclasses.replace(CONFIGS[family], sliding_window=window)
        logits.append(whole_logits(tiny_model(config), config, IDS[:1]))
    right, *wrong = logits
    assert np.abs(np.stack(wrong) - right[None]).max(axis=(1, 2)).min() > 1e-2


def test_sinks_take_their_share_of_the_softmax():
    model_fn, params = tiny_model(CONFIGS["gpt-oss"])
    without = jax.tree_util.tree_map_with_path(
        lambda path, x: x - 50.0 if "sinks" in jax.tree_util.keystr(path) else x, params
    )
    logits, changed = (
        whole_logits((model_fn, p), CONFIGS["gpt-oss"], IDS[:1]) for p in (params, without)
    )
    assert np.abs(logits - changed).max() > 1e-2


@pytest.mark.parametrize("family", CONFIGS)
def test_each_layer_is_in_a_group_of_its_kind_or_reads_the_last_such_layer(family):
    config = CONFIGS[family]
    groups, shared_layers = cached_layers(config, "float32")
    kinds = {
        layer: (group.sliding_window, group.payload.num_kv_heads, group.payload.head_dim)
        for group in groups
        for layer in group.layers
    }
    assert sorted([*kinds, *shared_layers]) == [*range(config.num_layers)]
    for layer in range(config.num_layers):
        kind = config.kind(layer)
        assert shared_layers.get(layer) == kind.shared_layer
        found = kinds[shared_layers.get(layer, layer)]
        assert found == (kind.sliding_window, kind.num_kv_heads, kind.head_dim)
