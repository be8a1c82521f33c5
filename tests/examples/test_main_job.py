"""The main job with the real model: the paged cache changes nothing but where bytes lie."""

import itertools
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
from ferrum_jax.integrations import PagedBatch
from ferrum_jax.integrations.mixed import StepOptions
from tests.support.managers import PREFIXES

GOLDENS_FILE = pathlib.Path(__file__).parent.parent / "goldens/smollm2_135m.json"
GOLDENS = json.loads(GOLDENS_FILE.read_text())
NUM_NEW = 64

pytestmark = [pytest.mark.model, pytest.mark.slow]  # The real model decodes for a minute.


@pytest.fixture(scope="module")
def smollm2():
    """`(config, model_fn, params, tokenizer)` of the real model."""
    config, params, tokenizer = weights.load(downloads.resolve())
    return config, *families.functional(families.from_params(config, params)), tokenizer


@pytest.fixture(scope="module")
def ragged(smollm2):
    """16 prompts as token ids: the golden ones, and beginnings of a long text."""
    *_, tokenizer = smollm2
    text = tokenizer.encode(" ".join(prompts.DEFAULT_PROMPTS))
    lengths = (1, 2, 15, 16, 17, 31, 33, 64, 100, 127, 150, 200)
    return [case["token_ids"] for case in GOLDENS["cases"]] + [text[:n] for n in lengths]


@pytest.fixture(scope="module")
def dense_logits(smollm2, ragged):
    """f32[NUM_NEW, 16, vocab]. What a dense cache says as it continues them greedily."""
    config, model_fn, params, _ = smollm2
    lens = np.array(list(map(len, ragged)), np.int32)
    padded = np.zeros((len(ragged), lens.max()), np.int32)
    for row, ids in zip(padded, ragged, strict=True):
        row[: len(ids)] = ids
    cache = dense.init_cache(config, len(ragged), padded.shape[1] + NUM_NEW)
    logits, cache = dense.prefill(model_fn, params, jnp.asarray(padded), jnp.asarray(lens), cache)
    steps = [logits]
    for step in range(1, NUM_NEW):
        tokens = jnp.argmax(logits, axis=1).astype(jnp.int32)
        logits, cache = dense.decode_step(model_fn, params, tokens, jnp.asarray(lens + step), cache)
        steps.append(logits)
    return np.asarray(steps)


def sure_steps(case):
    """Steps up to the first that is too close to call."""
    unsure = [i for i, gap in enumerate(case["gap"]) if gap < GOLDENS["min_gap"]]
    return unsure[0] if unsure else len(case["gap"])


def test_sixteen_ragged_prompts_decode_to_the_tokens_of_a_dense_cache_and_of_the_goldens(
    ragged, dense_logits, tmp_path
):
    lines = [json.dumps({"token_ids": ids}) for ids in ragged]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    generate.main(
        ["--prompts-file", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", str(NUM_NEW)]
        + ["--ignore-eos", "--json", str(tmp_path / "out.json")]
    )
    report = json.loads((tmp_path / "out.json").read_text())
    paged_tokens = [result["new_token_ids"] for result in report["results"]]
    assert [result["prompt_token_ids"] for result in report["results"]] == ragged
    assert paged_tokens == dense_logits.argmax(axis=-1).T.tolist()
    for case, tokens in zip(GOLDENS["cases"], paged_tokens, strict=False):
        sure = sure_steps(case)
        assert tokens[:sure] == case["new_token_ids"][:sure]
    cache = report["cache"]
    assert cache["peak_bytes"] < cache["dense_bytes"]
    assert cache["free_blocks"] + cache["evictable_blocks"] == cache["total_blocks"]
    assert cache["reused_prompt_tokens"] > 500, "twelve of them are beginnings of one text"


def test_logits_stay_within_a_thousandth_of_a_dense_cache_at_every_step(
    smollm2, ragged, dense_logits
):
    config, model_fn, params, _ = smollm2
    rows = np.arange(len(ragged))
    model = {name: getattr(config, name) for name in ("num_layers", "num_kv_heads", "head_dim")}
    sizes = {"num_blocks": 16 * 17, "block_size": 16, "max_seqs": 16, "max_blocks_per_seq": 17}
    spec = fj.CacheSpec(**model, **sizes, dtype="float32")
    state, ok = fj.allocate(fj.init(spec), rows, list(map(len, ragged)))
    assert ok
    logits, state = prefill(model_fn, params, state, rows, ragged)

    def next_logits(params, state, tokens):
        state, ok = fj.extend(state, rows, 1, max_new_tokens=1)
        batch = PagedBatch.of(state, rows, np.ones_like(rows), num_tokens=1)
        logits, pools = model_fn(params, tokens[:, None], batch)
        return logits, state.with_pools(pools)

    next_logits = jax.jit(next_logits, donate_argnums=1)
    np.testing.assert_allclose(logits, dense_logits[0], rtol=0, atol=1e-3)
    for before, now in itertools.pairwise(dense_logits):
        logits, state = next_logits(params, state, before.argmax(axis=-1).astype(np.int32))
        np.testing.assert_allclose(logits, now, rtol=0, atol=1e-3)
    fj.check_state(state)


def test_exact_steps_give_the_real_model_the_same_bits_after_any_hit_in_any_batch(smollm2, ragged):
    config, model_fn, params, _ = smollm2
    step = StepOptions(chunk_tokens=8, chunks_per_step=2, exact=True)
    options = fj.EngineOptions(max_rows=4, step=step, top_logprobs=8)
    request = fj.RequestOptions(max_new_tokens=6)
    prompt, others = ragged[-3], [ragged[-5], ragged[0], ragged[2], ragged[-4]]

    def bits(completion):
        assert completion.is_done
        return [[np.float32(p).tobytes() for _, p in taken.top] for taken in completion.taken]

    def make_manager():
        return fj.PagedKvCacheManager(
            fj.CacheConfig(
                block_size=16,
                max_blocks=80,
                initial_blocks=80,
                enable_prefix_caching=True,
                prefix_cache_config=PREFIXES,
            ),
            fj.CacheGeometry.of(config, max_seqs=4, max_sequence_length=256, dtype="float32"),
        )

    with fj.Engine(model_fn, params, make_manager(), options) as engine:
        alone = engine.submit(prompt, request)
        engine.run()
    with fj.Engine(model_fn, params, make_manager(), options) as engine:
        requests = [engine.submit(other, request) for other in others]  # Two begin as the prompt.
        among = engine.submit(prompt, request)
        engine.run()
        assert among.num_cached_tokens > 0 and all(r.is_done for r in requests)
        again = engine.submit(prompt, request)
        engine.run()
        assert again.num_cached_tokens == len(prompt) - 1
    assert bits(alone) == bits(among) == bits(again)
