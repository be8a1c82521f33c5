"""Rewriting a row: effects on other rows, refusals, programs, and the losses reported."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.compression.rewrite import Rewrite, compress_rows, sample_queries
from ferrum_jax.ops.compressed import enable_formats
from ferrum_jax.payload import KeysAndValues
from tests.support.caches import num_compilations, num_free, same_bits, snapshot
from tests.support.compiled import IN_PLACE, pool_sized_results
from tests.support.compressed import format_of, put_row, read, row_tokens, small_spec
from tests.support.pools import keys, values
from tests.support.rewritten_rows import (
    FITTED,
    INT8,
    NATIVE,
    PRUNE,
    PRUNE_TO_INT4,
    TO_INT4,
    TO_INT8,
    block_ids_of,
    bytes_of,
    compress,
    how,
    new_state,
    queries_of,
)

# Other rows.


@pytest.mark.parametrize("rewrite", [TO_INT8, PRUNE], ids=["rounded", "pruned"])
def test_compress_row_changes_no_byte_of_another_row(rewrite):
    state = new_state({0: 30, 1: 17, 3: 9})
    blocks = {row: block_ids_of(state, row) for row in (1, 3)}
    before = {row: bytes_of(state, blocks[row]) for row in blocks}
    num_kept = 30 if rewrite is TO_INT8 else 7
    state, ok, _ = compress(state, 0, num_kept, rewrite)
    assert ok
    for row in blocks:
        assert block_ids_of(state, row).tolist() == blocks[row].tolist()
        assert bytes_of(state, blocks[row]) == before[row]
        assert format_of(state, row) == NATIVE
    fj.check_state(state)


@pytest.mark.parametrize("compressed", [0, 1])
def test_compress_row_does_not_change_blocks_that_another_row_holds(compressed):
    other = 1 - compressed
    state = new_state({0: 30}, is_random=False)
    state, _ = fj.fork(state, [0], [1])
    held = block_ids_of(state, other)
    before, was_free = bytes_of(state, held), num_free(state)
    state, ok, _ = compress(state, compressed, 30, TO_INT8)
    num_blocks = -(-30 // state.pool.tokens_per_block(INT8))
    assert ok and num_free(state) == was_free - (num_blocks - 1), "its own last block is reused"
    assert block_ids_of(state, other).tolist() == held.tolist()
    assert bytes_of(state, held) == before
    assert not set(block_ids_of(state, compressed)) & set(held.tolist())
    assert row_tokens(state, other) == row_tokens(state, compressed) == [*range(1, 31)]
    fj.check_state(state)
    state = fj.free(state, [compressed])
    assert num_free(state) == 24 - 8 and bytes_of(state, held) == before
    fj.check_state(state)


def test_compress_row_of_both_holders_of_shared_blocks():
    state = new_state({0: 30}, is_random=False)
    state, _ = fj.fork(state, [0], [1])
    state, ok, _ = compress(state, 0, 30, TO_INT8)
    state, ok_too, _ = compress(state, 1, 7, PRUNE)
    assert ok and ok_too
    assert row_tokens(state, 0) == [*range(1, 31)]
    assert row_tokens(state, 1) == [1, 2, 26, 27, 28, 29, 30]
    num_blocks = -(-30 // state.pool.tokens_per_block(INT8))
    assert num_free(state) == 24 - num_blocks - 2
    fj.check_state(state)


REFUSED = {
    "more than it holds": (0, 31, PRUNE),
    "nothing": (0, 0, PRUNE),
    "less than nothing": (0, -1, PRUNE),
    "a free row": (4, 1, PRUNE),
    "no row": (-1, 1, PRUNE),
    "a row out of range": (6, 1, PRUNE),
    "too few free blocks": (0, 29, PRUNE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_changes_no_bit(name):
    """Row 0 shares all of its 7 full blocks, and 6 are free."""
    state = new_state({0: 30, 2: 32, 3: 2})
    state, ok = fj.fork(state, [0], [1])
    assert bool(ok) and num_free(state) == 6
    row, num_kept, rewrite = REFUSED[name]
    before = snapshot(state)
    state, ok, _ = compress(state, row, num_kept, rewrite)
    assert not ok and same_bits(state, before)
    fj.check_state(state)


def test_compress_row_refuses_more_blocks_than_a_row_can_hold():
    """Back to a format of more bits, which the facade never asks for."""
    state = new_state({0: 32}, is_random=False)
    state, _, _ = compress(state, 0, 32, TO_INT8)
    state, ok = fj.extend(state, [0], [8], max_new_tokens=8)
    assert bool(ok)
    state = put_row(state, 0, range(33, 41), 32)
    before = snapshot(state)
    wide = Rewrite(source=INT8, target=NATIVE, max_source_blocks=8, max_target_blocks=16)
    state, ok, _ = compress(state, 0, 40, wide)
    assert not ok and same_bits(state, before)


def test_compress_row_with_other_numbers_of_a_method_does_not_recompile():
    state = new_state({0: 30, 1: 30, 2: 30}, is_random=False)
    state, _, _ = compress(state, 0, 7, PRUNE)
    before = num_compilations()
    kept = {1: (1, 1, [1, 30]), 2: (3, 5, [1, 2, 3, 26, 27, 28, 29, 30])}
    for row, (num_sinks, num_recent, tokens) in kept.items():
        method = CompressionMethod(scorer="window", num_sinks=num_sinks, num_recent=num_recent)
        rewrite = dataclasses.replace(how(NATIVE, NATIVE, method), scale=0.1 * row)
        state, ok, _ = compress(state, row, len(tokens), rewrite)
        assert ok
    assert num_compilations() == before
    for row, (_, _, tokens) in kept.items():
        assert row_tokens(state, row) == tokens


def test_compress_row_with_other_steps_and_rates_does_not_recompile():
    def fit(**changes):
        method = dataclasses.replace(FITTED, **changes)
        return compress(new_state({0: 30}), 0, 12, how(NATIVE, NATIVE, method))[2].fitting_error

    errors = [fit(), fit(fit_steps=1)]
    before = num_compilations()
    errors += [fit(fit_steps=2), fit(learning_rate=0.001)]
    assert num_compilations() == before
    assert len({float(error.sum()) for error in errors}) == len(errors)


def test_compress_row_works_in_place():
    """Scratch is some times the row, whatever the pool."""
    spec = small_spec(dtype="bfloat16", num_blocks=4093, num_layers=3)
    state = enable_formats(fj.init(spec), [INT8])
    rewrite = Rewrite(source=NATIVE, target=INT8, max_source_blocks=8, max_target_blocks=4)
    queries = jnp.zeros((3, 2, 4, 16), jnp.float32)

    def program(state, queries):
        return compress_rows(state, [(0, 0)], np.int32(9), [queries], rewrite)

    compiled = jax.jit(program, donate_argnums=0).lower(state, queries).compile()
    made = pool_sized_results(compiled, state.pool)
    assert made and {opcode for _, opcode in made} <= IN_PLACE
    row_bytes = 3 * 2 * 2 * 32 * 16 * 4  # Layers, keys and values, heads, tokens, float32.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * row_bytes
    pool = state.pool
    places = {x.unsafe_buffer_pointer() for x in pool.arrays.values()}
    after, _, _ = compiled(state, queries)
    assert keys(pool).is_deleted() and values(pool).is_deleted()
    assert {x.unsafe_buffer_pointer() for x in after.pool.arrays.values()} == places


# What was lost.


def outputs(kv, queries):
    """Attention of every query to all tokens, layer by layer: float64 [L, Hq, Q, D]."""
    group = queries.shape[1] // kv.k.shape[2]
    k, v = (np.repeat(x.astype(np.float64), group, axis=2) for x in kv)
    logits = np.einsum("lhqd,lthd->lhqt", queries, k) / np.sqrt(queries.shape[-1])
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("lhqt,lthd->lhqd", shares / shares.sum(-1, keepdims=True), v)


def errors(got, want, queries):
    """Relative L2 error of each layer's outputs."""
    difference = outputs(got, queries) - outputs(want, queries)
    axes = 1, 2, 3
    return np.sqrt((difference**2).sum(axes) / (outputs(want, queries) ** 2).sum(axes))


def test_losses_are_what_numpy_finds():
    state = new_state({0: 30})
    before, queries = read(state, 0), queries_of(state)
    state, _, loss = compress(state, 0, 9, PRUNE_TO_INT4)
    kept = [0, 1, *range(23, 30)]
    pruned = KeysAndValues(*(x[:, kept] for x in before))
    np.testing.assert_allclose(loss.pruning_error, errors(pruned, before, queries), rtol=1e-3)
    np.testing.assert_allclose(loss.fitting_error, loss.pruning_error, rtol=1e-6)
    np.testing.assert_allclose(loss.error, errors(read(state, 0), before, queries), rtol=1e-3)
    assert (np.abs(loss.error - loss.pruning_error) > 1e-4).all(), "rounding is part of it"


def test_losses_of_a_second_rounding_are_its_own():
    state = new_state({0: 30})
    state, _, first = compress(state, 0, 30, TO_INT8)
    middle, queries = read(state, 0), queries_of(state)
    state, _, second = compress(state, 0, 30, TO_INT4)
    np.testing.assert_allclose(second.error, errors(read(state, 0), middle, queries), rtol=1e-3)
    for loss in (first, second):
        assert not loss.pruning_error.any() and not loss.fitting_error.any()
        assert (loss.error > 0).all()
    assert (second.error > 5 * first.error).all()


def test_fitting_makes_up_for_some_of_the_pruning_on_the_queries_given():
    state = new_state({0: 30})
    before, queries = read(state, 0), queries_of(state)
    state, ok, loss = compress(state, 0, 12, how(NATIVE, NATIVE, FITTED))
    assert ok and (loss.fitting_error <= loss.pruning_error * (1 + 1e-5)).all()
    assert (loss.fitting_error < 0.9 * loss.pruning_error).any()
    np.testing.assert_allclose(loss.error, loss.fitting_error, rtol=1e-4)
    np.testing.assert_allclose(loss.error, errors(read(state, 0), before, queries), rtol=1e-3)
    fj.check_state(state)


def test_sampled_queries_are_as_wide_as_the_keys_and_of_these_alone():
    """Whatever lies in other blocks, NaN even, is not looked at."""
    state = new_state({0: 30, 1: 9})
    kv = read(state, 1)
    queries = np.asarray(sample_queries(state, jnp.int32(1), PRUNE))
    assert queries.shape == (2, 2, 16, 16) and np.isfinite(queries).all()
    width = np.sqrt((kv.k**2).mean(1))  # [L, H, D]
    np.testing.assert_allclose(queries.std(axis=(2, 3)), width.mean(-1), rtol=0.25)
    assert not np.array_equal(queries[0] / width[0][:, None], queries[1] / width[1][:, None])
