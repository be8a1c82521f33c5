"""`prompt_logprobs`: those of a full recomputation, whatever is cached; no cached byte changes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.prefill import PrefillOptions, prefill
from ferrum_jax.errors import RefusedError
from ferrum_jax.integrations.nnx import nnx_model
from ferrum_jax.integrations.prompt_logprobs import PromptLogprobsOptions, prompt_logprobs
from tests.support.caches import same_bits, snapshot
from tests.support.grouped_decoder import GROUPS, Decoder, random_params
from tests.support.grouped_decoder import PROMPTS as LONG_PROMPTS
from tests.support.tiny_model import (
    dense_logits,
    dense_logprobs,
    tiny_cache,
    tiny_decoder,
    weights_of,
)

MODEL = nnx_model(tiny_decoder())
WEIGHTS = weights_of(tiny_decoder())
PROMPTS = [[7], [5, 6, 7], [9, 8, 7, 6], [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9]]
SMALL = PrefillOptions(chunk_tokens=4, rows_per_step=4)
STEPS = PromptLogprobsOptions(tokens_per_step=8, top_logprobs=2)
NEW_ONLY = PromptLogprobsOptions(tokens_per_step=8, top_logprobs=2, recompute_cached=False)


def allocated(lens):
    state, ok = fj.allocate(fj.init(tiny_cache()), np.arange(len(lens)), lens)
    assert bool(ok)
    return state


def require_true(out, prompts, firsts=1):
    """Checks all log-probabilities from position `firsts` of each prompt on; others are NaN."""
    chosen, firsts = out.chosen, np.broadcast_to(firsts, len(prompts))
    for i, (prompt, first) in enumerate(zip(prompts, firsts, strict=True)):
        n, first = len(prompt), max(first, 1)
        logits = dense_logits(WEIGHTS, prompt)
        want = dense_logprobs(logits)
        np.testing.assert_allclose(out.logits[i], logits[-1], atol=1e-4)
        assert chosen.tokens[i, :n].tolist() == prompt and (chosen.tokens[i, n:] == -1).all()
        expected = np.full(chosen.logprobs.shape[1], np.nan)
        expected[first:n] = want[np.arange(first - 1, n - 1), prompt[first:]]
        np.testing.assert_allclose(chosen.logprobs[i], expected, atol=2e-4)
        best = np.full(chosen.top_logprobs.shape[1:], np.nan)
        best[first:n] = np.sort(want[first - 1 : n - 1])[:, ::-1][:, :2]
        np.testing.assert_allclose(chosen.top_logprobs[i], best, atol=2e-4)
        named = np.asarray(chosen.top_tokens[i])
        assert (named[:first] == -1).all() and (named[n:] == -1).all()
        best = np.take_along_axis(want[first - 1 : n - 1], named[first:n], 1)
        np.testing.assert_allclose(best, chosen.top_logprobs[i, first:n], atol=2e-4)


def test_prompt_log_probabilities_are_those_of_a_recomputation_and_the_cache_that_of_prefill():
    lens = [len(prompt) for prompt in PROMPTS]
    out = prompt_logprobs(*MODEL, allocated(lens), np.arange(5), PROMPTS, options=STEPS)
    require_true(out, PROMPTS)
    _, state = prefill(*MODEL, allocated(lens), np.arange(5), PROMPTS, options=SMALL)
    for row in range(5):
        pairs = zip(fj.gather(out.state, 1, row), fj.gather(state, 1, row), strict=True)
        for now, then in pairs:
            np.testing.assert_allclose(now, then, atol=1e-5)
    fj.check_state(out.state)


def test_rows_without_room_are_extended():
    out = prompt_logprobs(*MODEL, fj.init(tiny_cache()), np.arange(5), PROMPTS, options=STEPS)
    require_true(out, PROMPTS)
    assert out.state.seq_lens[:5].tolist() == [len(prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("starts", [[1, 2, 4, 3, 8], [0, 3, 0, 5, 13]])
@pytest.mark.parametrize("options", [STEPS, NEW_ONLY], ids=["all", "new"])
@pytest.mark.parametrize("has_room", [True, False])
def test_cached_tokens_are_computed_again_without_a_write(starts, options, has_room):
    held = [(i, prompt[:n]) for i, (n, prompt) in enumerate(zip(starts, PROMPTS, strict=True)) if n]
    lens = [len(prompt) for _, prompt in held]
    state, ok = fj.allocate(fj.init(tiny_cache()), [i for i, _ in held], lens)
    assert bool(ok)
    _, state = prefill(*MODEL, state, [i for i, _ in held], [p for _, p in held], options=SMALL)
    if has_room:
        more = [len(prompt) - n for prompt, n in zip(PROMPTS, starts, strict=True)]
        state, ok = fj.extend(state, np.arange(5), more, max_new_tokens=16)
        assert bool(ok)
    before = [snapshot(fj.gather(state, 0, i)) for i in range(5)]
    out = prompt_logprobs(*MODEL, state, np.arange(5), PROMPTS, starts=starts, options=options)
    require_true(out, PROMPTS, 1 if options is STEPS else starts)
    for i, start in enumerate(starts):
        for now, then in zip(fj.gather(out.state, 0, i), before[i], strict=True):
            assert np.asarray(now)[:start].tobytes() == then[:start].tobytes()
    fj.check_state(out.state)


def test_blocks_that_rows_share_keep_every_bit():
    prompt = PROMPTS[-1]
    _, state = prefill(*MODEL, allocated([13]), [0], [prompt], options=SMALL)
    state, ok = fj.fork(state, [0], [1])
    assert bool(ok)
    before = snapshot(state.pool)
    out = prompt_logprobs(*MODEL, state, [1], [prompt], starts=13, options=STEPS)
    require_true(out, [prompt])
    assert same_bits(out.state.pool, before)


def test_a_prompt_without_a_row_is_computed_and_not_cached():
    state = fj.init(tiny_cache())
    before = snapshot(state.pool)
    out = prompt_logprobs(*MODEL, state, [-1], [PROMPTS[2]], options=STEPS)
    assert np.isnan(out.logits).all() and np.isnan(out.chosen.logprobs).all()
    assert (out.chosen.top_tokens == -1).all() and same_bits(out.state.pool, before)


def test_a_refused_call_changes_nothing():
    state = allocated([13])
    before = snapshot(state)
    prompt = PROMPTS[-1]
    for starts, message in ((14, "from 0 to the 13 tokens"), (-1, "from 0 to"), ([1, 2], "starts")):
        with pytest.raises(ValueError, match=message):
            prompt_logprobs(*MODEL, state, [0], [prompt], starts=starts, options=STEPS)
    with pytest.raises(ValueError, match="Row 0 has 13 tokens"):
        prompt_logprobs(*MODEL, state, [0], [prompt[:7]], starts=3, options=STEPS)
    taken, ok = fj.allocate(state, [1, 2, 3], [32, 32, 16])
    assert bool(ok)
    with pytest.raises(RefusedError):
        prompt_logprobs(*MODEL, taken, [4], [prompt[:5]], options=STEPS)
    assert same_bits(state, before)
    for field in ("tokens_per_step", "top_logprobs", "recompute_cached"):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(STEPS, **{field: -1})


def test_windows_are_seen_while_a_row_grows_and_what_they_passed_is_refused():
    params = random_params()
    model = Decoder(False)
    rows, options = np.arange(3), PromptLogprobsOptions(tokens_per_step=8)
    whole, ok = fj.allocate(fj.init(GROUPS), rows, [len(prompt) for prompt in LONG_PROMPTS])
    assert bool(ok)
    want = prompt_logprobs(model, params, whole, rows, LONG_PROMPTS, options=options)
    out = prompt_logprobs(model, params, fj.init(GROUPS), rows, LONG_PROMPTS, options=options)
    np.testing.assert_allclose(out.chosen.logprobs, want.chosen.logprobs, atol=1e-4)
    lens = [len(prompt) for prompt in LONG_PROMPTS]
    again = prompt_logprobs(
        model, params, want.state, rows, LONG_PROMPTS, starts=lens, options=options
    )
    np.testing.assert_allclose(again.chosen.logprobs, want.chosen.logprobs, atol=1e-4)
    before = snapshot(out.state)
    with pytest.raises(ValueError, match="Row 0 cannot compute its tokens from position 0"):
        prompt_logprobs(model, params, out.state, rows, LONG_PROMPTS, starts=lens, options=options)
    assert same_bits(out.state, before)
    state, ok = fj.extend(out.state, rows, 2, max_new_tokens=2)
    assert bool(ok)
    longer = [[*prompt, 4, 5] for prompt in LONG_PROMPTS]
    new_only = PromptLogprobsOptions(tokens_per_step=8, recompute_cached=False)
    more = prompt_logprobs(model, params, state, rows, longer, starts=lens, options=new_only)
    whole, ok = fj.allocate(fj.init(GROUPS), rows, [len(prompt) for prompt in longer])
    want = prompt_logprobs(model, params, whole, rows, longer, options=options)
    for i, n in enumerate(lens):
        np.testing.assert_allclose(
            more.chosen.logprobs[i, n : n + 2], want.chosen.logprobs[i, n : n + 2], atol=1e-4
        )
    assert np.isfinite(jnp.asarray(more.logits)).all()


def test_prompt_log_probabilities_copy_no_pool():
    state = fj.init(tiny_cache(num_blocks=4096))
    state, ok = fj.allocate(state, [0], [13])
    assert bool(ok)
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(state.pool)]
    out = prompt_logprobs(*MODEL, state, [0], [PROMPTS[-1]], starts=5, options=STEPS)
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(out.state.pool)] == pointers
