"""What every codec does, and what a new one needs: a class, and an entry in the registry."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import ferrum_jax as fj
from ferrum_jax.attention import explain_backend, paged_attention
from ferrum_jax.attention.options import AttentionOptions
from ferrum_jax.codecs import CODECS, codec_for, format_of, unrotate
from ferrum_jax.encoding import storage_dtype
from ferrum_jax.ops.transfer import export_blocks, import_blocks
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import TokenFormat
from tests.support.compressed import empty_state, expected_attention, mixed_state, random_kv, read

NATIVE = TokenFormat.Native


def test_every_token_format_has_a_codec_at_its_number():
    assert list(CODECS) == list(TokenFormat) == list(range(len(TokenFormat)))
    assert [f for f, entry in CODECS.items() if entry.is_native] == [NATIVE]


def test_a_number_without_a_format_is_refused():
    assert format_of(2) is TokenFormat.Int8Int4
    for number in (-1, len(TokenFormat)):
        with pytest.raises(ValueError, match=r"is not a token format. There are Native \(0\)"):
            format_of(number)


@pytest.mark.parametrize("token_format", [*CODECS, None], ids=lambda x: x.name if x else "Crossed")
def test_tokens_that_are_replaced_one_by_one_equal_blocks_that_are_encoded(
    token_format, dtype, crossed_format
):
    payload = KeyValue(2, 16, dtype)
    codec = codec_for(crossed_format if token_format is None else token_format, payload, 4)
    stored = storage_dtype(payload.dtype, "cpu")
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, 3, codec.num_tokens, 16)).astype(np.float32)

    @jax.jit
    def replace_one_by_one(k, v, order):
        halves = codec.encode(jnp.zeros_like(k), jnp.zeros_like(v), stored)
        packed, tokens = codec.pack(k, v), jnp.arange(codec.num_tokens)

        def replace(halves, token):
            is_new = jnp.broadcast_to(tokens == token, k.shape[:-1])
            return codec.replace(*halves, packed, is_new), None

        return lax.scan(replace, halves, order)[0], codec.encode(k, v, stored)

    @jax.jit
    def decode(k_half, v_half):
        back, rotates = codec.decode(k_half, v_half), (codec.rotates_keys, codec.rotates_values)
        return [
            unrotate(x.astype(jnp.float32), payload.dtype) if is_rotated else x
            for x, is_rotated in zip(back, rotates, strict=True)
        ]

    halves, want = replace_one_by_one(k, v, rng.permutation(codec.num_tokens))
    for got, half in zip(halves, want, strict=True):
        assert got.dtype == stored and np.asarray(got).tobytes() == np.asarray(half).tobytes()
    for got, x, is_rotated in zip(
        decode(*halves), (k, v), (codec.rotates_keys, codec.rotates_values), strict=True
    ):
        np.testing.assert_allclose(np.asarray(got, np.float32), x, atol=0.4 if is_rotated else 0.02)


def mixed(crossed_format):
    """A native row and one of the made-up format, in a pool that is NaN elsewhere."""
    rows = {0: (crossed_format, 7), 1: (NATIVE, 5)}
    return mixed_state(rows, formats=[crossed_format])


def assert_holds(state, lengths):
    for row, (length, seed) in lengths.items():
        for got, want in zip(read(state, row), random_kv(state.pool, length, seed), strict=True):
            np.testing.assert_array_equal(got, want)


def test_a_new_codec_is_written_gathered_forked_and_copied(crossed_format):
    state = mixed(crossed_format)
    assert state.pool.tokens_per_block(crossed_format) == 3
    assert_holds(state, {0: (7, 0), 1: (5, 1)})
    state, ok = fj.fork(state, 0, [2])
    assert ok
    assert_holds(state, {0: (7, 0), 1: (5, 1), 2: (7, 0)})
    old, new = int(state.tables.block_ids[1, 0]), 20
    tables = dataclasses.replace(state.tables, block_ids=state.tables.block_ids.at[1, 0].set(new))
    pool = fj.copy_blocks(state.pool, [old], [new])
    moved = state.with_pools([pool]).with_tables([tables])
    assert_holds(moved, {0: (7, 0), 1: (5, 1), 2: (7, 0)})


def test_a_new_codec_is_swapped_out_and_in(crossed_format):
    state, other = mixed(crossed_format), empty_state([crossed_format])
    ids = state.tables.block_ids[0]
    pool = import_blocks(other.pool, ids, export_blocks(state.pool, ids, num_blocks=3))
    assert_holds(state.with_pools([pool]), {0: (7, 0)})


def test_xla_attends_to_a_new_codec_and_the_kernels_refuse_it(crossed_format):
    state, options = mixed(crossed_format), AttentionOptions()
    q = jax.random.normal(jax.random.key(0), (2, 1, 4, 16), jnp.float32)
    tables = state.tables
    rows = {
        "block_ids": tables.block_ids[:2],
        "held_lens": tables.held_lens[:2],
        "token_formats": tables.token_formats[:2],
    }
    out = paged_attention(q, state.pool, 1, **rows)
    want = expected_attention(state, 1, [0, 1], q, None, options)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-5)
    native, crossed = explain_backend(q, state.pool, 1, **rows).choices
    assert native.backend in ("cpu", "xla") and crossed.backend == "xla"
    refusals = dict(crossed.refusals)
    assert "does not know the token format Crossed" in refusals["cpu"]
    with pytest.raises(ValueError, match="does not know the token format Crossed"):
        paged_attention(q, state.pool, 1, backend="cpu", **rows)
