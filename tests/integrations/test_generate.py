"""`generate`: the tokens of a full recomputation, and exact ends.

Most tests run one program, with limits and stop tokens; the plain loop and sampling have their own.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.generate import GenerateOptions, generate
from ferrum_jax.decoding.prefill import PrefillOptions, prefill
from ferrum_jax.decoding.sampling import Sampling
from ferrum_jax.integrations.nnx import nnx_model
from tests.support.caches import snapshot
from tests.support.pools import pool_bytes, values
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
RARE = 40  # A token that no row generates.


def limited(limits=12, stop=RARE, **more) -> GenerateOptions:
    """At most so many tokens per row, of a width of 12; rows also end with a stop token."""
    limits = np.broadcast_to(np.asarray(limits, np.int32), 4)
    return GenerateOptions(max_new_tokens=12, limits=limits, stop_token_ids=(stop, RARE), **more)


def started():
    """The cache after the prompts, one per row, and the best first tokens."""
    state, ok = fj.allocate(fj.init(tiny_cache()), ROWS, [len(prompt) for prompt in PROMPTS])
    assert bool(ok)
    options = PrefillOptions(chunk_tokens=4, rows_per_step=4)
    logits, state = prefill(*MODEL, state, ROWS, PROMPTS, options=options)
    return state, jnp.argmax(logits, axis=-1).astype(jnp.int32)


@functools.cache
def expected(row: int, num_tokens: int = 24) -> list[int]:
    tokens = dense_greedy(WEIGHTS, PROMPTS[row], num_tokens)
    assert RARE not in tokens
    return tokens


def stop_of_row_1() -> int:
    """A token that ends row 1 as its fourth."""
    stop = expected(1)[3]
    assert stop not in expected(1)[:3]
    return stop


def in_pieces(state, rows, tokens, **options) -> list[list[int]]:
    """The tokens of three calls of four."""
    pieces = [[] for _ in rows]
    key = options.pop("key", None)
    for _ in range(3):
        out = generate(*MODEL, state, rows, tokens, options=limited(4, **options), key=key)
        state, tokens = out.state, out.next_tokens
        pieces = [piece + more for piece, more in zip(pieces, outputs(out), strict=True)]
    return pieces


def outputs(out) -> list[list[int]]:
    """Each row's tokens; the rest of the output must be empty."""
    tokens, counts = np.asarray(out.tokens), np.asarray(out.num_tokens)
    assert (tokens[np.arange(tokens.shape[1]) >= counts[:, None]] == -1).all()
    return [row[:count].tolist() for row, count in zip(tokens, counts, strict=True)]


def test_generate_chooses_the_tokens_of_a_full_recomputation():
    state, first = started()
    out = generate(*MODEL, state, ROWS, first, options=TWELVE)
    assert bool(out.ok) and out.tokens[:, 0].tolist() == first.tolist()
    assert outputs(out) == [expected(row)[:12] for row in ROWS]
    assert out.next_tokens.tolist() == [expected(row)[12] for row in ROWS]
    assert out.state.tables.seq_lens[:4].tolist() == [len(prompt) + 12 for prompt in PROMPTS]
    fj.check_state(out.state)


def test_generate_three_times_four_tokens_is_generate_twelve():
    state, first = started()
    assert in_pieces(state, ROWS, first) == [expected(row)[:12] for row in ROWS]


def test_generate_samples_the_same_in_pieces_and_whatever_the_order_of_rows():
    sampling, key = Sampling(temperature=1.3, top_k=20, top_p=0.95), jax.random.key(5)

    def at_once(key):
        state, first = started()
        options = limited(sampling=sampling)
        return outputs(generate(*MODEL, state, ROWS, first, options=options, key=key))

    once = at_once(key)
    state, first = started()
    order = np.asarray([2, 0, 3, 1], np.int32)
    pieces = in_pieces(state, order, first[order], sampling=sampling, key=key)
    assert pieces == [once[row] for row in order]
    assert once != [expected(row)[:12] for row in ROWS]
    assert at_once(jax.random.key(6)) != once


def test_generate_returns_a_stop_token_but_does_not_cache_it():
    state, first = started()
    stop = stop_of_row_1()
    out = generate(*MODEL, state, ROWS, first, options=limited(stop=stop))
    texts = [expected(row)[:12] for row in ROWS]
    texts = [text[: text.index(stop) + 1] if stop in text else text for text in texts]
    assert outputs(out) == texts
    for row, text in enumerate(texts):
        num_cached = len(text) - (text[-1] == stop)
        assert out.state.tables.seq_lens[row] == len(PROMPTS[row]) + num_cached
        assert (out.next_tokens[row] == -1) == (text[-1] == stop)
    fj.check_state(out.state)


def test_generate_ends_a_row_that_starts_with_a_stop_token_at_once():
    state, _ = started()
    rows, tokens = np.asarray([0, -1, 1, -1], np.int32), np.asarray([RARE, RARE, -1, 5], np.int32)
    held = np.asarray(state.tables.seq_lens)
    out = generate(*MODEL, state, rows, tokens, options=limited())
    assert outputs(out) == [[RARE], [], [], []] and out.next_tokens.tolist() == [-1] * 4
    np.testing.assert_array_equal(out.state.tables.seq_lens, held)
    again = generate(*MODEL, out.state, rows, out.next_tokens, options=limited())
    assert outputs(again) == [[]] * 4 and bool(again.ok)


def test_generate_pauses_a_row_at_its_limit_and_continues_it_later():
    state, first = started()
    limits = np.asarray([0, 3, 12, 99], np.int32)
    out = generate(*MODEL, state, ROWS, first, options=limited(limits))
    assert outputs(out) == [expected(row)[: min(limits[row], 12)] for row in ROWS]
    assert out.next_tokens.tolist() == [expected(row)[min(limits[row], 12)] for row in ROWS]
    held = out.state.tables.num_blocks_held[:4].tolist()
    assert held == [-(-(len(PROMPTS[row]) + min(limits[row], 12)) // 4) for row in ROWS]
    options = limited([12, 9, 0, 0])
    more = generate(*MODEL, out.state, ROWS, out.next_tokens, options=options)
    assert outputs(more) == [expected(0)[:12], expected(1)[3:12], [], []]
    fj.check_state(more.state)


def test_generate_ignores_padding_rows():
    state, first = started()
    rows = np.asarray([-1, 2, -1, 0], np.int32)
    tokens = jnp.asarray([7, first[2], 8, first[0]])
    out = generate(*MODEL, state, rows, tokens, options=limited(4))
    assert outputs(out) == [[], expected(2)[:4], [], expected(0)[:4]]
    assert out.next_tokens[::2].tolist() == [-1, -1]
    untouched = [len(PROMPTS[0]) + 4, len(PROMPTS[1]), len(PROMPTS[2]) + 4, len(PROMPTS[3])]
    assert out.state.tables.seq_lens[:4].tolist() == untouched


def test_generate_without_free_blocks_returns_what_it_has_and_can_continue():
    state, first = started()
    state, ok = fj.allocate(state, [4, 5], [32, 24])  # Of 24 blocks, 8 + 14 are taken now.
    assert bool(ok) and int(state.tables.num_free) == 2
    out = generate(*MODEL, state, ROWS, first, options=limited())
    assert not bool(out.ok)
    # Rows 1 and 3 take one block each at once, and rows 0 and 2 need one three tokens later.
    assert outputs(out) == [expected(row)[:3] for row in ROWS]
    assert out.next_tokens.tolist() == [expected(row)[3] for row in ROWS]
    assert out.state.tables.seq_lens[:4].tolist() == [len(prompt) + 3 for prompt in PROMPTS]
    fj.check_state(out.state)

    state = fj.free(out.state, [4])
    more = generate(*MODEL, state, ROWS, out.next_tokens, options=limited(4))
    assert bool(more.ok) and outputs(more) == [expected(row)[3:7] for row in ROWS]
    fj.check_state(more.state)


def test_generate_stops_at_a_row_without_room():
    state, first = started()
    rows = np.asarray([-1, -1, -1, 3], np.int32)
    out = generate(*MODEL, state, rows, first, options=limited())
    out = generate(*MODEL, out.state, rows, out.next_tokens, options=limited())
    assert not bool(out.ok)  # Row 3 began at 12 tokens and ends at its 8 blocks of 4.
    assert outputs(out) == [[], [], [], expected(3)[12:20]]
    fj.check_state(out.state)


def test_generate_refuses_a_row_that_holds_no_token():
    state, first = started()
    before = snapshot(state)
    out = generate(*MODEL, state, [0, 1, 2, 5], first, options=limited(4))
    assert not bool(out.ok) and outputs(out) == [[]] * 4
    assert out.next_tokens.tolist() == first.tolist()
    assert all((now == then).all() for now, then in zip(snapshot(out.state), before, strict=True))
    # A row that is not decoded may be free.
    out = generate(*MODEL, out.state, [0, 1, 2, 5], first, options=limited([1, 0, 0, 0]))
    assert bool(out.ok) and outputs(out) == [expected(0)[:1], [], [], []]


def test_generate_has_the_logits_of_a_recomputation_at_each_step_and_ends_with_the_last_row():
    state, first = started()
    seen = []

    def watching(params, tokens, batch):
        logits, pools = MODEL[0](params, tokens, batch)
        jax.debug.callback(lambda x: seen.append(np.array(x)), logits, ordered=True)
        return logits, pools

    options = limited([2, 12, 0, 5], stop=stop_of_row_1())
    out = generate(watching, MODEL[1], state, ROWS, first, options=options)
    assert out.num_tokens.tolist() == [2, 4, 0, 5]
    jax.effects_barrier()
    assert len(seen) == 5
    for row, num_steps in ((0, 2), (1, 3), (3, 5)):
        full = dense_logits(WEIGHTS, PROMPTS[row] + expected(row)[:num_steps])
        steps = np.stack(seen)[:num_steps, row]
        np.testing.assert_allclose(steps, full[len(PROMPTS[row]) :], atol=1e-4)


def test_generate_does_not_trace_again_for_other_rows_or_the_same_model_split_again():
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


def test_generate_donates_the_state():
    state, first = started()
    pointer = values(state.pool).unsafe_buffer_pointer()
    out = generate(*MODEL, state, ROWS, first, options=limited())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert values(out.state.pool).unsafe_buffer_pointer() == pointer


@pytest.mark.parametrize("num_rows, dtype", [(1, "float32"), (4, "bfloat16")], ids=str)
def test_generate_copies_no_pool(num_rows, dtype):
    state = fj.init(tiny_cache(dtype=dtype, num_blocks=4096))
    rows = ROWS[:num_rows]
    run = functools.partial(generate, MODEL[0], seq_ids=rows, tokens=rows, options=TWELVE)
    program = jax.jit(run, donate_argnames="state").lower(params=MODEL[1], state=state).compile()
    num_bytes = pool_bytes(state.pool)
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < num_bytes / 10
    assert memory.alias_size_in_bytes >= num_bytes


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
def test_generate_options_refuse_a_wrong_value_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        GenerateOptions(**{"max_new_tokens": 4, field: value})


def test_generate_refuses_wrong_arguments():
    state = fj.init(tiny_cache())
    drawn = GenerateOptions(max_new_tokens=4, sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="jax.random.key"):
        generate(*MODEL, state, ROWS, ROWS, options=drawn)
    with pytest.raises(AssertionError, match="tokens must have one per row"):
        generate(*MODEL, state, ROWS, ROWS[:2], options=TWELVE)
    with pytest.raises(AssertionError, match="limits must have one per row"):
        limits = GenerateOptions(max_new_tokens=4, limits=[1])
        generate(*MODEL, state, ROWS, ROWS, options=limits)


def test_generate_options_without_limits_are_hashable():
    options = GenerateOptions(max_new_tokens=4, stop_token_ids=np.asarray([1, 2]))
    assert options == GenerateOptions(max_new_tokens=4, stop_token_ids=(1, 2))
    assert hash(options) == hash(GenerateOptions(max_new_tokens=4, stop_token_ids=(1, 2)))
