"""The real Gemma 3 270M: tokens against goldens, logits against a dense cache.

Its weights are under Gemma's own terms: no test fetches them.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from benchmarks import dense
from examples import generate
from examples.models import downloads, families, prompts, weights
from ferrum_jax.decoding.prefill import prefill

GOLDENS_FILE = pathlib.Path(__file__).parent.parent / "goldens/gemma3_270m.json"
GOLDENS = json.loads(GOLDENS_FILE.read_text())
CASES = GOLDENS["cases"]
NUM_NEW = 64
NUM_LONG = 600  # Tokens of a prompt that is longer than the sliding window of 512.

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def gemma3():
    """`(config, params, tokenizer)` of the real model."""
    path = downloads.cached_path(downloads.DOWNLOADS["gemma3-270m"])
    if not path.exists():
        pytest.skip(f"{path} is not there: run `python examples/generate.py --model gemma3-270m`")
    return weights.load(path)


@pytest.fixture(scope="module")
def long_prompt(gemma3):
    """Token ids of a text that is longer than the window."""
    *_, tokenizer = gemma3
    return tokenizer.encode("\n\n".join(prompts.DEFAULT_PROMPTS) * 3)[:NUM_LONG]


@pytest.fixture(scope="module")
def dense_logits(gemma3, long_prompt):
    """f32[2, vocab]. What a dense cache says after the long prompt, and after a token more."""
    config, params, _ = gemma3
    model = families.functional(families.from_params(config, params))
    cache = dense.init_cache(config, 1, NUM_LONG)
    tokens, lens = jnp.asarray([long_prompt], jnp.int32), jnp.asarray([NUM_LONG - 1], jnp.int32)
    first, cache = dense.prefill(*model, tokens, lens, cache)
    second, _ = dense.decode_step(*model, tokens[:, -1], lens + 1, cache)
    return np.concatenate([first, second])


def paged_logits(gemma3, long_prompt, window):
    """The same through the paged cache, with a sliding window of any length."""
    config, params, _ = gemma3
    config = dataclasses.replace(config, sliding_window=window)
    model_fn, params = families.functional(families.from_params(config, params))
    sizes = {"num_blocks": 400, "block_size": 16, "max_seqs": 1, "max_sequence_length": 640}
    state = fj.init(fj.CacheSpec.of(config, dtype="float32", **sizes))
    first, state = prefill(model_fn, params, state, [0], [long_prompt[:-1]])

    @jax.jit
    def advance(params, state, tokens):
        state, _ = fj.extend(state, [0], 1, max_new_tokens=1)
        batch = fj.PagedBatch.of(state, [0], q_lens=1, num_tokens=1)
        return model_fn(params, tokens[:, None], batch)[0]

    second = advance(params, state, jnp.asarray(long_prompt[-1:], jnp.int32))
    return np.concatenate([first, second])


def test_the_tokenizer_reproduces_the_golden_ids(gemma3):
    *_, tokenizer = gemma3
    for case in CASES:
        assert tokenizer.encode(case["prompt"]) == case["token_ids"]
        assert tokenizer.decode(case["token_ids"]) == case["prompt"]
    text = "a\t\tb   c  é 東京 🤖\n\n\nx"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_paged_cache_decodes_to_the_golden_tokens_and_to_those_of_a_dense_cache(
    gemma3, tmp_path
):
    config, params, _ = gemma3
    ids = [case["token_ids"] for case in CASES]
    lines = [json.dumps({"token_ids": prompt}) for prompt in ids]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    generate.main(
        ["--model", "gemma3-270m", "--prompts-file", str(tmp_path / "prompts.jsonl")]
        + ["--max-new-tokens", str(NUM_NEW), "--ignore-eos", "--json", str(tmp_path / "out.json")]
    )
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    tokens = [result["new_token_ids"] for result in results]
    assert all(min(case["gap"]) > GOLDENS["min_gap"] for case in CASES), "each step is sure"
    assert tokens == [case["new_token_ids"] for case in CASES]
    model = families.functional(families.from_params(config, params))
    assert tokens == dense.generate(*model, config, ids, max_new_tokens=NUM_NEW)


def test_logits_behind_the_window_are_within_a_thousandth_of_a_dense_cache(
    gemma3, long_prompt, dense_logits
):
    logits = paged_logits(gemma3, long_prompt, 512)
    np.testing.assert_allclose(logits, dense_logits, rtol=0, atol=1e-3)


@pytest.mark.parametrize("window", [511, 513])
def test_a_window_of_one_token_less_or_more_shows_in_the_logits(
    gemma3, long_prompt, dense_logits, window
):
    difference = np.abs(paged_logits(gemma3, long_prompt, window) - dense_logits)
    assert difference.max(axis=1).min() > 1e-2
