"""`prefill`: prompts in chunks give the cache and the logits of a full recomputation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.prefill import PrefillOptions, plan_chunks, prefill
from ferrum_jax.decoding.prefill import _step as prefill_step
from ferrum_jax.integrations.nnx import nnx_model
from tests.support.caches import snapshot
from tests.support.pools import keys, pool_bytes, values
from tests.support.tiny_model import dense_logits, tiny_cache, tiny_decoder, weights_of

SMALL = PrefillOptions(chunk_tokens=4, rows_per_step=4)
MODEL = nnx_model(tiny_decoder())
WEIGHTS = weights_of(tiny_decoder())
# One token; one block less one, just one, one more; several blocks.
PROMPTS = [[7], [5, 6, 7], [9, 8, 7, 6], [3, 1, 4, 1, 5], [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9]]


def allocated(lens, **changes):
    """A cache whose rows 0, 1, ... have these lengths, and the rows."""
    state, ok = fj.allocate(fj.init(tiny_cache(**changes)), np.arange(len(lens)), lens)
    assert bool(ok)
    return state, np.arange(len(lens))


def last_logits(prompts):
    return np.stack([dense_logits(WEIGHTS, prompt)[-1] for prompt in prompts])


@pytest.mark.parametrize("chunk_tokens, rows_per_step", [(1, 3), (4, 4), (5, 16), (32, 2)])
def test_a_plan_holds_each_token_once_and_in_order(chunk_tokens, rows_per_step):
    options = PrefillOptions(chunk_tokens=chunk_tokens, rows_per_step=rows_per_step)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1, 99, rng.integers(1, 40)).tolist() for _ in range(9)]
    seen = [[] for _ in prompts]
    finished = []
    for step in plan_chunks(prompts, options):
        assert step.tokens.shape[0] <= rows_per_step and step.tokens.shape[1] == chunk_tokens
        for row, prompt in enumerate(step.prompts):
            tokens = step.tokens[row, : step.num_tokens[row]].tolist()
            assert not step.tokens[row, step.num_tokens[row] :].any()
            if prompt == -1:
                assert not tokens
                continue
            assert tokens and step.num_before[row] == len(seen[prompt])
            seen[prompt] += tokens
            assert step.num_after[row] == len(prompts[prompt]) - len(seen[prompt])
        finished += [i for i in step.finished if i >= 0]
    assert seen == prompts
    assert finished == list(range(len(prompts)))


@pytest.mark.parametrize(
    "num_chunks, rows, num_steps", [(1, 1, 1), (2, 2, 1), (3, 4, 1), (8, 8, 1), (9, 8, 2)]
)
def test_a_small_set_takes_a_small_step(num_chunks, rows, num_steps):
    steps = plan_chunks([[1, 2]] * num_chunks, PrefillOptions(chunk_tokens=2, rows_per_step=8))
    assert [step.prompts.size for step in steps] == [rows] * num_steps


def test_prefill_in_chunks_gives_the_logits_and_the_cache_of_whole_prompts():
    lens = [len(prompt) for prompt in PROMPTS]
    whole, rows = allocated(lens)
    at_once = PrefillOptions(chunk_tokens=16, rows_per_step=8)
    expected, whole = prefill(*MODEL, whole, rows, PROMPTS, options=at_once)
    state, _ = allocated(lens)
    logits, state = prefill(*MODEL, state, rows, PROMPTS, options=SMALL)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, last_logits(PROMPTS), atol=1e-4)
    np.testing.assert_allclose(logits, expected, atol=1e-5)
    fj.check_state(state)
    for layer in range(2):
        for row in rows:
            for now, then in zip(
                fj.gather(state, layer, row), fj.gather(whole, layer, row), strict=True
            ):
                np.testing.assert_allclose(now, then, atol=1e-5)


def test_prefill_continues_a_row_after_its_cached_tokens():
    state, rows = allocated([3, 8])
    prompts = [PROMPTS[-1], PROMPTS[-1][::-1]]
    _, state = prefill(*MODEL, state, rows, [prompts[0][:3], prompts[1][:8]], options=SMALL)
    rest = [prompts[0][3:], prompts[1][8:]]
    state, ok = fj.extend(state, rows, [len(tokens) for tokens in rest], max_new_tokens=16)
    assert bool(ok)
    logits, _ = prefill(*MODEL, state, rows, rest, starts=[3, 8], options=SMALL)
    np.testing.assert_allclose(logits, last_logits(prompts), atol=1e-4)


def test_prefill_continues_a_fork_of_a_shared_prefix():
    prefix, tails = PROMPTS[-1][:12], [[11, 12, 13, 14, 15], [16]]
    state, rows = allocated([12])
    _, state = prefill(*MODEL, state, rows, [prefix], options=SMALL)
    state, ok = fj.fork(state, [0], [1])
    state, grown = fj.extend(state, [0, 1], [5, 1], max_new_tokens=16)
    assert bool(ok) and bool(grown)
    logits, state = prefill(*MODEL, state, [0, 1], tails, starts=12, options=SMALL)
    np.testing.assert_allclose(logits, last_logits([prefix + tail for tail in tails]), atol=1e-4)
    fj.check_state(state)


@pytest.mark.parametrize(
    "row, prompt, starts, message",
    [
        (0, [1, 2, 3], 0, "Row 0 has 4 tokens; .* needs it to have 3"),  # An old row, not freed.
        (0, [1, 2, 3, 4, 5], 0, "Row 0 has 4 tokens; .* needs it to have 5"),
        (0, [1, 2, 3], 2, "from position 2"),
        (0, [1, 2, 3], -1, "starts must be at least 0"),
        (0, [1], [3, 3], r"got shapes \[1\] and \[2\]"),
    ],
)
def test_prefill_refuses_a_prompt_that_does_not_fit_its_row(row, prompt, starts, message):
    state, _ = allocated([4, 3])
    before = snapshot(state)
    with pytest.raises(ValueError, match=message):
        prefill(*MODEL, state, [row], [prompt], starts=starts, options=SMALL)
    assert all((now == then).all() for now, then in zip(snapshot(state), before, strict=True))


def test_prefill_counts_dropped_tokens_in_starts():
    state, rows = allocated([7])
    tables = dataclasses.replace(state.tables, num_pruned=state.tables.num_pruned.at[0].set(2))
    state = state.with_tables([tables])
    logits, state = prefill(*MODEL, state, rows, [[1, 2, 3]], starts=6, options=SMALL)
    assert np.isfinite(logits).all()


def test_prefill_of_null_seq_writes_nothing():
    state, _ = allocated([4])
    before = snapshot(state.pool)
    prompts = [[1, 2, 3, 4, 5], [6]]
    logits, state = prefill(*MODEL, state, [-1, -1], prompts, options=SMALL)
    assert np.isnan(logits).all()
    for now, then in zip(snapshot(state.pool), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_prefill_donates_the_pool():
    state, rows = allocated([5, 6])
    pointer = keys(state.pool).unsafe_buffer_pointer()
    _, after = prefill(*MODEL, state, rows, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]], options=SMALL)
    assert keys(state.pool).is_deleted() and values(state.pool).is_deleted()
    assert keys(after.pool).unsafe_buffer_pointer() == pointer


def test_prefill_copies_no_pool(dtype):
    state, rows = allocated([3, 5], dtype=dtype, num_blocks=4096)
    (chunks,) = plan_chunks([[1, 2, 3], [1, 2, 3, 4, 5]], SMALL)
    rows = np.append(rows, -1).astype(np.int32)[chunks.prompts]
    seq_lens = chunks.num_before + chunks.num_tokens
    args = *MODEL, state.pools, state.with_pools(()), rows, seq_lens, chunks
    memory = prefill_step.lower(*args).compile().memory_analysis()
    num_bytes = pool_bytes(state.pool)
    assert memory.temp_size_in_bytes < num_bytes / 10


@pytest.mark.parametrize(
    "seq_ids, prompts, message",
    [
        ([0, 1], [[1], []], r"prompts\[1\] is empty"),
        ([0], [[1], [2]], "one row per prompt"),
        ([], [], "at least 1 prompt"),
        ([0, 0], [[1], [2]], "different rows .* got .0, 0."),
        ([0, 6], [[1], [2]], "rows from 0 to 5"),
        ([0, -2], [[1], [2]], "rows from 0 to 5"),
        ([0.5, 1], [[1], [2]], "must be integers"),
        ([2**32, 1], [[1], [2]], "must be integers within int32"),
        ([False, True], [[1], [2]], "must be integers"),
        ([0, 1], [[1], [1 << 40]], "must be integers within int32"),
        ([0, 1], [[1], ["1"]], "must be integers"),
        ([0, 1], [[1], [-1]], r"prompts\[1\]\[0\] is -1; token ids are at least 0"),
        ([0, 1], [[1], [1.5]], "must be integers"),
        ([0, 1], [1, 2], r"prompts\[0\] must be a list of token ids, got int"),
        ([0], [[[1]]], r"prompts\[0\] must be a list of token ids"),
        ([0], ["a"], r"prompts\[0\] must be a list of token ids, got str"),
    ],
)
def test_prefill_refuses_wrong_prompts_and_rows(seq_ids, prompts, message):
    state, _ = allocated([1, 1])
    with pytest.raises(ValueError, match=message):
        prefill(*MODEL, state, seq_ids, prompts)
    assert not keys(state.pool).is_deleted()


def test_prefill_cannot_be_traced():
    state, _ = allocated([1])
    with pytest.raises(ValueError, match="outside jit"):
        jax.jit(lambda state: prefill(*MODEL, state, [0], [[1]]))(state)


@pytest.mark.parametrize("field", ["chunk_tokens", "rows_per_step"])
def test_prefill_options_refuse_a_step_without_rows_or_tokens(field):
    with pytest.raises(ValueError, match=field):
        PrefillOptions(**{field: 0})
