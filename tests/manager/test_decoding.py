"""`prefill` and `generate` of a manager: the tokens of a model without a cache."""

import asyncio
import signal

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import (
    InvalidHandleError,
    RefusedError,
    SequenceTooLongError,
    UnknownRequestError,
)
from ferrum_jax.integrations import NULL_TOKEN, PrefillOptions
from ferrum_jax.integrations.nnx import nnx_model
from ferrum_jax.manager import AsyncKvCacheManager
from tests.support.managers import PREFIXES, make_manager, whole
from tests.support.multi_device import CPU, make_multi
from tests.support.tiny_model import (
    HEAD_DIM,
    KV_HEADS,
    dense_greedy,
    dense_logits,
    tiny_decoder,
    weights_of,
)

MODEL = tiny_decoder()
MODEL_FN, PARAMS = nnx_model(MODEL)
WEIGHTS = weights_of(MODEL)
SIZES = {"num_kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "max_seqs": 4, "max_sequence_length": 32}
POOL = {"geometry": SIZES, "block_size": 4, "max_blocks": 24}
STEP = PrefillOptions(chunk_tokens=4, rows_per_step=4)
GREEDY = fj.GenerateOptions(max_new_tokens=6)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [27, 18, 28]]


def make(**changes):
    return make_manager(**{**POOL, **changes})


def start(manager, request_id, prompt, **limits):
    """Allocates a request with its prompt."""
    return manager.allocate(manager.new_request(request_id, prompt_token_ids=prompt, **limits))


def prefill(manager, handles, prompts=None):
    return manager.prefill(MODEL_FN, PARAMS, handles, prompts, options=STEP)


def generate(manager, handles, tokens, options=GREEDY, **key):
    return manager.generate(MODEL_FN, PARAMS, handles, tokens, options=options, **key)


def assert_logits(logits, *texts):
    """Asserts that logits [R, V] are those of the model without a cache, after each text."""
    expected = [dense_logits(WEIGHTS, text)[-1] for text in texts]
    np.testing.assert_allclose(logits, np.stack(expected), atol=1e-4)


MAKERS = {"one device": make, "several devices": lambda: make_multi(2, **POOL)}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_manager_generates_the_tokens_of_a_model_without_a_cache(kind):
    manager = MAKERS[kind]()
    a, b = (start(manager, name, prompt) for name, prompt in zip("ab", PROMPTS, strict=True))
    logits = prefill(manager, ["b", a])
    assert_logits(logits, PROMPTS[1], PROMPTS[0])
    out = generate(manager, [b, "a"], GREEDY.choose(logits))
    expected = [dense_greedy(WEIGHTS, prompt, 7) for prompt in (PROMPTS[1], PROMPTS[0])]
    assert out.tokens.tolist() == [row[:6] for row in expected]
    assert out.next_tokens.tolist() == [row[6] for row in expected]
    assert bool(out.ok) and not hasattr(out, "state")
    assert (a.num_tokens(), b.num_tokens()) == (15, 9)
    manager.check()


def test_the_manager_of_an_event_loop_and_one_that_moves_requests_generate_the_same():
    inner = make_multi(2, **POOL)
    a = start(inner, "a", PROMPTS[0])

    async def answer():
        manager = AsyncKvCacheManager(inner)
        first = GREEDY.choose(await prefill(manager, ["a"]))
        out = await generate(manager, [a], first, fj.GenerateOptions(max_new_tokens=3))
        await manager.move_cache(a, CPU[1])
        return out.tokens.tolist()[0], await generate(manager, ["a"], out.next)

    begun, rest = asyncio.run(answer())
    assert begun + rest.tokens.tolist()[0] == dense_greedy(WEIGHTS, PROMPTS[0], 9)


def test_prefill_computes_no_token_that_is_cached():
    manager = make(enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    prefill(manager, [start(manager, "a", PROMPTS[0])])
    assert manager.commit("a") == 8
    again = start(manager, "b", [*PROMPTS[0], 7])
    assert again.num_cached_tokens == 8
    # What is given in place of the cached tokens makes no difference.
    logits = prefill(manager, [again], [[0] * 8 + [PROMPTS[0][8], 7]])
    assert_logits(logits, [*PROMPTS[0], 7])
    manager.check()


def test_a_further_turn_is_prefilled_after_what_was_generated():
    manager = make()
    start(manager, "a", PROMPTS[0])
    out = generate(manager, ["a"], GREEDY.choose(prefill(manager, ["a"])))
    (turn,) = [[*out.next_tokens.tolist(), 11, 12]]
    manager.extend("a", len(turn))
    logits = prefill(manager, ["a"], [turn])
    assert_logits(logits, [*PROMPTS[0], *out.tokens.tolist()[0], *turn])


def test_a_request_without_tokens_is_extended_by_its_prompt_and_the_pool_grows():
    manager = make(initial_blocks=1)
    requests = [manager.new_request(name, initial_tokens=0) for name in "ab"]
    a, b = map(manager.allocate, requests)
    assert_logits(prefill(manager, [a, b], PROMPTS), *PROMPTS)
    assert [handle.num_tokens() for handle in (a, b)] == [9, 3]
    manager.check()


def test_padding_is_computed_and_stored_nowhere():
    manager = make()
    a = start(manager, "a", PROMPTS[0])
    logits = prefill(manager, [None, a], [PROMPTS[1], PROMPTS[0]])
    assert np.isnan(logits[0]).all()
    assert_logits(logits[1:], PROMPTS[0])
    out = generate(manager, [None, a], np.argmax(np.nan_to_num(logits), axis=-1))
    assert out.tokens.tolist() == [6 * [NULL_TOKEN], dense_greedy(WEIGHTS, PROMPTS[0], 6)]


def test_draws_depend_on_the_key_and_the_place_in_the_call_and_not_on_the_row():
    options = fj.GenerateOptions(max_new_tokens=6, sampling=fj.Sampling(temperature=1.0))
    drawn = []
    for names in ("ab", "ba"):  # So that each has another row.
        manager = make()
        for name in names:
            start(manager, name, PROMPTS["ab".index(name)])
        prefill(manager, ["a", "b"])
        out = generate(manager, ["a", "b"], [5, 5], options, key=jax.random.key(1))
        drawn.append(out.tokens.tolist())
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), np.arange(2))
    assert drawn[0] == drawn[1] and drawn[0][0] != drawn[0][1]
    for name in "ab":
        manager.deallocate(name)
    start(manager, "b", PROMPTS[1])
    prefill(manager, ["b"])
    assert generate(manager, ["b"], [5], options, key=keys[1:]).tokens.tolist() == drawn[0][1:]


def test_generate_goes_on_after_blocks_have_run_out():
    manager = make(max_blocks=4)
    for name, prompt in zip("ab", PROMPTS, strict=True):
        start(manager, name, prompt)
    options = fj.GenerateOptions(max_new_tokens=8)
    out = generate(manager, ["a", "b"], GREEDY.choose(prefill(manager, ["a", "b"])), options)
    assert not out.ok and out.num_tokens.tolist() == [1, 1]
    manager.deallocate("b")
    rest = generate(manager, ["a"], out.next_tokens[:1], fj.GenerateOptions(max_new_tokens=5))
    texts = out.tokens[:1, :1].tolist()[0] + rest.tokens.tolist()[0]
    assert not rest.ok or len(texts) == 6
    assert texts[:4] == dense_greedy(WEIGHTS, PROMPTS[0], 8)[:4]


def test_a_row_that_is_done_or_limited_needs_no_length():
    manager = make()
    for name, prompt in zip("ab", PROMPTS, strict=True):
        start(manager, name, prompt, max_sequence_length=len(prompt) + 2)
    first = np.argmax(prefill(manager, ["a", "b"]), axis=-1)
    with pytest.raises(SequenceTooLongError, match="'a' holds 9 tokens and asks for 6 more"):
        generate(manager, ["a", "b"], first)
    limited = fj.GenerateOptions(max_new_tokens=6, limits=np.asarray([2, 6]))
    out = generate(manager, ["a", "b"], [first[0], NULL_TOKEN], limited)
    assert out.num_tokens.tolist() == [2, 0] and bool(out.ok)


def test_what_cannot_be_prefilled_or_generated_is_refused_and_changes_nothing():
    manager = make()
    a, stranger = start(manager, "a", PROMPTS[0]), start(make(), "a", PROMPTS[0])
    prefill(manager, [a])
    manager.fork(a, ["b"])
    manager.allocate(manager.new_request("c", initial_tokens=0, max_sequence_length=8))
    start(manager, "longer", PROMPTS[1])
    manager.extend("longer", 1)
    before = whole(manager)
    for call, error, told in (
        (lambda: prefill(manager, ["b"], [PROMPTS[0]]), ValueError, "a step has had its first 9"),
        (lambda: prefill(manager, ["a"]), ValueError, "a step has had its first 9"),
        (lambda: prefill(manager, ["a"], [[1, 2]]), ValueError, "Extend it by what is new"),
        (lambda: prefill(manager, ["longer"], [[1] * 5]), ValueError, "last of the 4 of"),
        (lambda: prefill(manager, ["longer"]), ValueError, "holds 4 tokens, and its prompt has 3"),
        (lambda: prefill(manager, ["a"], PROMPTS), ValueError, "one per request, 1, got 2"),
        (lambda: prefill(manager, ["c"]), ValueError, "'c' is not known. Pass prompts"),
        (lambda: prefill(manager, [None]), ValueError, "None is not known. Pass prompts"),
        (lambda: prefill(manager, ["c"], [[1] * 9]), SequenceTooLongError, "'c'.*asks for 9"),
        (lambda: prefill(manager, ["z"], PROMPTS[:1]), UnknownRequestError, "'z' is not live"),
        (lambda: prefill(manager, [stranger]), InvalidHandleError, "another manager"),
        (lambda: generate(manager, ["a"], [1, 2]), ValueError, "one number per request, 1"),
        (
            lambda: generate(manager, ["longer"], [1]),
            RefusedError,
            "4 tokens.*first 0. Prefill",
        ),
        (lambda: generate(manager, ["c"], [1]), RefusedError, "holds 0 tokens"),
        (lambda: generate(manager, [stranger], [1]), InvalidHandleError, "another manager"),
    ):
        with pytest.raises(error, match=told):
            call()
        assert whole(manager) == before
    with pytest.raises(ValueError, match="key must be a typed key"):
        drawing = fj.GenerateOptions(max_new_tokens=2, sampling=fj.Sampling(temperature=1.0))
        generate(manager, ["a"], [1], drawing)


def test_a_signal_waits_until_a_prefill_is_done():
    manager = make()
    a = start(manager, "a", PROMPTS[0])

    def interrupted(params, tokens, batch):
        signal.raise_signal(signal.SIGINT)
        return MODEL_FN(params, tokens, batch)

    # A worker of pytest-xdist ignores the signal.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            manager.prefill(interrupted, PARAMS, [a], options=STEP)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not manager.is_lost
    manager.check()
    first = dense_greedy(WEIGHTS, PROMPTS[0], 1)
    assert generate(manager, [a], first).tokens.tolist() == [dense_greedy(WEIGHTS, PROMPTS[0], 6)]


def test_run_takes_the_state_first_or_last_and_several_outputs():
    manager = make()
    start(manager, "a", PROMPTS[0])
    steps = [
        lambda state, rows: (state, rows),
        lambda state, rows: (rows, state),
        jax.jit(lambda state, rows: (rows, state), donate_argnums=0),
    ]
    assert [manager.run(step, ["a", None]).tolist() for step in steps] == 3 * [[0, -1]]
    several = manager.run(lambda state, rows: (1, [2, 3], state), ["a"])
    assert several == (1, [2, 3])
    assert manager.run(lambda state, rows: [state, 1, 2], ["a"]) == (1, 2)

    def prompt_step(state, rows):
        return fj.prefill(MODEL_FN, PARAMS, state, rows, PROMPTS[:1], options=STEP)

    assert_logits(manager.run(prompt_step, ["a"]), PROMPTS[0])
