"""The compiled decoding loop: the tokens of a full recomputation, and exact ends."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.integrations.generate import GenerateOptions, generate
from ferrum_jax.integrations.nnx import nnx_model
from ferrum_jax.integrations.prefill import PrefillOptions, prefill
from ferrum_jax.integrations.sampling import Sampling
from tests.support.caches import snapshot
from tests.support.tiny_model import (
    dense_greedy,
    dense_logits,
    tiny_cache,
    tiny_decoder,
    weights_of,
)

MODEL = nnx_model(tiny_decoder())
WEIGHTS = weights_of(tiny_decoder())
PROMPTS = [[1], [5, 6, 7, 8], [9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]]
ROWS = np.arange(4, dtype=np.int32)
TWELVE = GenerateOptions(max_new_tokens=12)
FOUR = GenerateOptions(max_new_tokens=4)


def started(prompts=PROMPTS, **changes):
    """The cache after the prompts, one a row, and the best first tokens."""
    rows = np.arange(len(prompts), dtype=np.int32)
    state, ok = fj.allocate(fj.init(tiny_cache(**changes)), rows, [len(p) for p in prompts])
    assert bool(ok)
    options = PrefillOptions(chunk_tokens=12, rows_per_step=4)
    logits, state = prefill(*MODEL, state, rows, prompts, options=options)
    return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.cache
def expected(row: int, num_tokens: int = 24) -> list[int]:
    return dense_greedy(WEIGHTS, PROMPTS[row], num_tokens)


def stopping() -> tuple[int, GenerateOptions]:
    """A token that ends row 1 as its fourth, and the options that say so."""
    stop = expected(1)[3]
    assert stop not in expected(1)[:3]
    return stop, GenerateOptions(max_new_tokens=12, stop_token_ids=(stop, 40))


def outputs(out) -> list[list[int]]:
    """Each row's tokens; what lies behind them must be empty."""
    tokens, counts = np.asarray(out.tokens), np.asarray(out.num_tokens)
    assert (tokens[np.arange(tokens.shape[1]) >= counts[:, None]] == -1).all()
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


def test_greedy_tokens_are_those_of_a_full_recomputation():
    state, first = started()
    out = generate(*MODEL, state, ROWS, first, options=TWELVE)
    assert bool(out.ok)
    assert outputs(out) == [expected(row)[:12] for row in ROWS]
    assert out.next_tokens.tolist() == [expected(row)[12] for row in ROWS]
    assert out.state.tables.seq_lens[:4].tolist() == [len(prompt) + 12 for prompt in PROMPTS]
    fj.check_state(out.state)


def test_the_first_token_given_is_the_first_token_out():
    state, first = started()
    out = generate(*MODEL, state, ROWS, first, options=FOUR)
    assert out.tokens[:, 0].tolist() == first.tolist()


def test_three_calls_of_four_are_one_call_of_twelve():
    state, tokens = started()
    pieces = []
    for _ in range(3):
        out = generate(*MODEL, state, ROWS, tokens, options=FOUR)
        state, tokens = out.state, out.next_tokens
        pieces.append(np.asarray(out.tokens))
    assert np.concatenate(pieces, axis=1).tolist() == [expected(row)[:12] for row in ROWS]


def test_three_sampled_calls_are_one_too_whatever_the_order_of_rows():
    sampling, key = Sampling(temperature=1.3, top_k=20, top_p=0.95), jax.random.key(5)
    options = GenerateOptions(max_new_tokens=12, sampling=sampling)
    state, first = started()
    once = np.asarray(generate(*MODEL, state, ROWS, first, options=options, key=key).tokens)
    state, first = started()
    order = np.asarray([2, 0, 3, 1], np.int32)
    tokens, pieces = first[order], []
    options = GenerateOptions(max_new_tokens=4, sampling=sampling)
    for _ in range(3):
        out = generate(*MODEL, state, order, tokens, options=options, key=key)
        state, tokens = out.state, out.next_tokens
        pieces.append(np.asarray(out.tokens))
    assert np.concatenate(pieces, axis=1).tolist() == once[order].tolist()
    assert once.tolist() != [expected(row)[:12] for row in ROWS]
    state, first = started()
    options = GenerateOptions(max_new_tokens=12, sampling=sampling)
    other = generate(*MODEL, state, ROWS, first, options=options, key=jax.random.key(6))
    assert other.tokens.tolist() != once.tolist()


def test_a_stop_token_ends_its_row_and_is_given_out_but_not_cached():
    state, first = started()
    stop, options = stopping()
    out = generate(*MODEL, state, ROWS, first, options=options)
    texts = [expected(row)[:12] for row in ROWS]
    texts = [text[: text.index(stop) + 1] if stop in text else text for text in texts]
    assert outputs(out) == texts
    for row, text in enumerate(texts):
        num_cached = len(text) - (text[-1] == stop)
        assert out.state.tables.seq_lens[row] == len(PROMPTS[row]) + num_cached
        assert (out.next_tokens[row] == -1) == (text[-1] == stop)
    fj.check_state(out.state)


def test_a_row_that_starts_with_a_stop_token_is_done_at_once():
    state, _ = started()
    rows, tokens = np.asarray([0, -1, 1, -1], np.int32), np.asarray([40, 40, -1, 5], np.int32)
    held = np.asarray(state.tables.seq_lens)
    out = generate(*MODEL, state, rows, tokens, options=stopping()[1])
    assert outputs(out) == [[40], [], [], []] and out.next_tokens.tolist() == [-1] * 4
    np.testing.assert_array_equal(out.state.tables.seq_lens, held)
    again = generate(*MODEL, out.state, rows, out.next_tokens, options=stopping()[1])
    assert outputs(again) == [[]] * 4 and bool(again.ok)


def test_limits_rest_a_row_and_it_goes_on_later():
    state, first = started()
    limits = np.asarray([0, 3, 12, 99], np.int32)
    options = GenerateOptions(max_new_tokens=12, limits=limits)
    out = generate(*MODEL, state, ROWS, first, options=options)
    assert outputs(out) == [expected(row)[: min(limits[row], 12)] for row in ROWS]
    assert out.next_tokens.tolist() == [expected(row)[min(limits[row], 12)] for row in ROWS]
    held = out.state.tables.num_blocks_held[:4].tolist()
    assert held == [-(-(len(PROMPTS[row]) + min(limits[row], 12)) // 4) for row in ROWS]
    options = GenerateOptions(max_new_tokens=12, limits=[12, 9, 0, 0])
    more = generate(*MODEL, out.state, ROWS, out.next_tokens, options=options)
    assert outputs(more) == [expected(0)[:12], expected(1)[3:12], [], []]
    fj.check_state(more.state)


def test_padding_rows_generate_nothing():
    state, first = started()
    rows = np.asarray([-1, 2, -1, 0], np.int32)
    tokens = jnp.asarray([7, first[2], 8, first[0]])
    out = generate(*MODEL, state, rows, tokens, options=FOUR)
    assert outputs(out) == [[], expected(2)[:4], [], expected(0)[:4]]
    assert out.next_tokens[::2].tolist() == [-1, -1]
    untouched = [len(PROMPTS[0]) + 4, len(PROMPTS[1]), len(PROMPTS[2]) + 4, len(PROMPTS[3])]
    assert out.state.tables.seq_lens[:4].tolist() == untouched


def test_without_blocks_it_stops_with_all_that_was_generated_and_can_go_on():
    state, first = started()
    state, ok = fj.allocate(state, [4, 5], [32, 24])  # Of 24 blocks, 8 + 14 are taken now.
    assert bool(ok) and int(state.tables.num_free) == 2
    out = generate(*MODEL, state, ROWS, first, options=TWELVE)
    assert not bool(out.ok)
    # Rows 1 and 3 take one block each at once, and rows 0 and 2 need one three tokens later.
    assert outputs(out) == [expected(row)[:3] for row in ROWS]
    assert out.next_tokens.tolist() == [expected(row)[3] for row in ROWS]
    assert out.state.tables.seq_lens[:4].tolist() == [len(prompt) + 3 for prompt in PROMPTS]
    fj.check_state(out.state)

    state = fj.free(out.state, [4])
    more = generate(*MODEL, state, ROWS, out.next_tokens, options=FOUR)
    assert bool(more.ok) and outputs(more) == [expected(row)[3:7] for row in ROWS]
    fj.check_state(more.state)


def test_a_full_row_stops_the_loop():
    state, first = started()
    rows = np.asarray([-1, -1, -1, 3], np.int32)
    out = generate(*MODEL, state, rows, first, options=TWELVE)
    out = generate(*MODEL, out.state, rows, out.next_tokens, options=TWELVE)
    assert not bool(out.ok)  # Row 3 began at 12 tokens and ends at its 8 blocks of 4.
    assert outputs(out) == [[], [], [], expected(3)[12:20]]
    fj.check_state(out.state)


def test_a_row_that_holds_no_token_is_refused_and_nothing_is_generated():
    state, first = started()
    before = snapshot(state)
    out = generate(*MODEL, state, [0, 1, 2, 5], first, options=FOUR)
    assert not bool(out.ok) and outputs(out) == [[]] * 4
    assert out.next_tokens.tolist() == first.tolist()
    assert all((now == then).all() for now, then in zip(snapshot(out.state), before, strict=True))
    # One that is not to be decoded may be free.
    options = GenerateOptions(max_new_tokens=12, limits=[1, 0, 0, 0])
    out = generate(*MODEL, out.state, [0, 1, 2, 5], first, options=options)
    assert bool(out.ok) and outputs(out) == [expected(0)[:1], [], [], []]


def test_each_step_has_the_logits_of_a_recomputation_and_the_last_row_ends_the_loop():
    state, first = started()
    seen = []

    def watching(params, tokens, batch):
        logits, pool = MODEL[0](params, tokens, batch)
        jax.debug.callback(lambda x: seen.append(np.array(x)), logits, ordered=True)
        return logits, pool

    options = dataclasses.replace(stopping()[1], limits=[2, 12, 0, 5])
    out = generate(watching, MODEL[1], state, ROWS, first, options=options)
    assert out.num_tokens.tolist() == [2, 4, 0, 5]
    jax.effects_barrier()
    assert len(seen) == 5
    for row, num_steps in ((0, 2), (1, 3), (3, 5)):
        full = dense_logits(WEIGHTS, PROMPTS[row] + expected(row)[:num_steps])
        steps = np.stack(seen)[:num_steps, row]
        np.testing.assert_allclose(steps, full[len(PROMPTS[row]) :], atol=1e-4)


def test_other_rows_and_the_same_model_split_again_do_not_trace_again():
    traces = []

    class Counting(type(MODEL[0])):
        def __call__(self, *args):
            traces.append(1)
            return super().__call__(*args)

    for seed, rows in enumerate([[0, 1], [3, 2], [1, -1]]):
        state, first = started()
        graphdef = nnx_model(tiny_decoder(seed))[0].graphdef
        options = GenerateOptions(max_new_tokens=3, stop_token_ids=(2,), limits=[seed + 1, 3])
        generate(Counting(graphdef), MODEL[1], state, rows, [1 + seed, 2], options=options)
        if seed == 0:
            num_traces = len(traces)
    assert num_traces >= 1 and len(traces) == num_traces


def test_the_state_is_donated():
    state, first = started()
    pointer = state.pool.v.unsafe_buffer_pointer()
    out = generate(*MODEL, state, ROWS, first, options=FOUR)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert out.state.pool.v.unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize(
    "num_rows, dtype", [(1, "float32"), (4, "float32"), (4, "bfloat16")], ids=str
)
def test_no_pool_is_copied_in_the_loop(num_rows, dtype):
    state = fj.init(tiny_cache(dtype=dtype, num_blocks=4096))
    rows = ROWS[:num_rows]
    run = functools.partial(generate, MODEL[0], seq_ids=rows, tokens=rows, options=FOUR)
    program = jax.jit(run, donate_argnames="state").lower(params=MODEL[1], state=state).compile()
    pool_bytes = state.pool.k.nbytes + state.pool.v.nbytes
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < pool_bytes / 10
    assert memory.alias_size_in_bytes >= pool_bytes


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 1.5),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", ("x",)),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", None),
        ("stop_token_ids", (1 << 40,)),
        ("sampling", "greedy"),
    ],
)
def test_wrong_options_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        GenerateOptions(**{"max_new_tokens": 4, field: value})


def test_wrong_arguments_are_refused():
    state = fj.init(tiny_cache())
    drawn = GenerateOptions(max_new_tokens=4, sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="jax.random.key"):
        generate(*MODEL, state, ROWS, ROWS, options=drawn)
    with pytest.raises(AssertionError, match="One of tokens a row"):
        generate(*MODEL, state, ROWS, ROWS[:2], options=FOUR)
    with pytest.raises(AssertionError, match="One of limits"):
        limits = GenerateOptions(max_new_tokens=4, limits=[1])
        generate(*MODEL, state, ROWS, ROWS, options=limits)


def test_options_without_limits_are_hashable():
    options = GenerateOptions(max_new_tokens=4, stop_token_ids=np.asarray([1, 2]))
    assert options == GenerateOptions(max_new_tokens=4, stop_token_ids=(1, 2))
    assert hash(options) == hash(GenerateOptions(max_new_tokens=4, stop_token_ids=(1, 2)))
