"""Models of the package `gemma` on the cache, against their own forward without one."""

import numpy as np
import pytest
from flax import linen as nn

import ferrum_jax as fj
from ferrum_jax.integrations import PrefillOptions
from ferrum_jax.integrations.gemma import GemmaModel
from tests.support import tiny_gemma as tiny

PROMPTS = [[9, 30, 31, 8, 61], [8 + 7 * i % 56 for i in range(41)]]
STEP = PrefillOptions(chunk_tokens=8, rows_per_step=2)


@pytest.fixture(autouse=True)
def as_the_package_promotes():
    with tiny.promotion():
        yield


def init(model_fn, params):
    geometry = model_fn.geometry(params, max_seqs=2, max_sequence_length=96)
    return fj.init(geometry.spec(num_blocks=48, block_size=8))


@pytest.mark.parametrize("cls", [tiny.Gemma2, tiny.Gemma3, tiny.Gemma3n, tiny.Gemma4])
def test_each_family_computes_what_it_computes_without_a_cache(cls):
    model, params = tiny.make(cls)
    model_fn = GemmaModel(model)
    logits, state = fj.prefill(
        model_fn, params, init(model_fn, params), [0, 1], PROMPTS, options=STEP
    )
    out = fj.generate(
        model_fn,
        params,
        state,
        [0, 1],
        logits.argmax(axis=-1),
        options=fj.GenerateOptions(max_new_tokens=10),
    )
    assert bool(out.ok)
    for prompt, last, answer in zip(PROMPTS, logits, out.tokens.tolist(), strict=True):
        own = tiny.forward(model, params, prompt + answer)[len(prompt) - 1 :]
        np.testing.assert_allclose(last, own[0], atol=5e-5)
        assert answer == own[:-1].argmax(axis=-1).tolist()
    fj.check_state(out.state)


def test_the_geometry_has_the_windows_and_the_heads_of_the_layers():
    groups = {}
    for cls in (tiny.Gemma3, tiny.Gemma4):
        model, params = tiny.make(cls)
        geometry = GemmaModel(model).geometry(params, max_seqs=2, max_sequence_length=96)
        groups[cls] = [
            (group.layers, group.sliding_window, *group.payload.features["k"])
            for group in geometry.groups
        ]
    assert groups[tiny.Gemma3] == [((0,), 12, 2, 16), ((1,), 12, 2, 16), ((2,), None, 2, 16)]
    assert groups[tiny.Gemma4] == [((0, 1), 12, 2, 16), ((2,), None, 1, 32)]
    assert geometry.shared_layers == ((3, 1), (4, 2))


def test_local_layers_hold_the_window_only():
    model, params = tiny.make(tiny.Gemma3)
    model_fn = GemmaModel(model)
    _, state = fj.prefill(model_fn, params, init(model_fn, params), [0, 1], PROMPTS, options=STEP)
    first, second, full = state.tables.num_blocks_held.reshape(3, 2)[:, 1].tolist()
    most = -(-(tiny.WINDOW + STEP.chunk_tokens * STEP.rows_per_step) // 8) + 1
    assert full == 6 and first == second <= most < full


def test_a_queue_of_prompts_is_served_in_one_program():
    model, params = tiny.make(tiny.Gemma3)
    model_fn = GemmaModel(model)
    prompts = [*PROMPTS, [20, 21]]
    options = fj.ServeOptions(
        max_new_tokens=6, step=fj.integrations.StepOptions(chunk_tokens=8, chunks_per_step=2)
    )
    out = fj.serve(model_fn, params, init(model_fn, params), [0, 1], prompts, options=options)
    assert out.ok.all()
    for prompt, answer in zip(prompts, out.tokens.tolist(), strict=True):
        own = tiny.forward(model, params, prompt + answer)
        assert answer == own[len(prompt) - 1 : -1].argmax(axis=-1).tolist()


def test_functions_of_equal_models_are_equal():
    model, _ = tiny.make(tiny.Gemma3)
    other, _ = tiny.make(tiny.Gemma3, seed=1)
    assert GemmaModel(model) == GemmaModel(other) != GemmaModel(tiny.Gemma2())
    assert hash(GemmaModel(model)) == hash(GemmaModel(other))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="Dense is not a Transformer of the package gemma"):
        GemmaModel(nn.Dense(4))
    with pytest.raises(TypeError, match="LoRA.*Pass the model inside of a wrapper"):
        GemmaModel(tiny.gm.nn.LoRA(rank=2, model=tiny.Gemma3()))
    with pytest.raises(ValueError, match="return_last_only=True"):
        GemmaModel(tiny.Gemma3(return_last_only=True))
