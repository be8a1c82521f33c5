"""`PagedBatch`: positions, slots, writing and attending, and what it refuses."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.decoding.batch import PagedBatch
from ferrum_jax.decoding.generate import GenerateOptions, generate
from ferrum_jax.decoding.prefill import prefill
from tests.support.caches import payload, snapshot, tiny_spec

attend = jax.jit(PagedBatch.attend, static_argnames="layer")


@pytest.fixture
def state() -> fj.CacheState:
    state, ok = fj.allocate(fj.init(tiny_spec()), [0, 2, 3], [7, 3, 1])
    assert bool(ok)
    return state


@pytest.mark.parametrize("seq_id", [-1, 1, 99], ids=["null", "free", "out of range"])
def test_batch_write_and_attend_ignore_a_row_without_tokens(state, seq_id):
    before = snapshot(state.pool)
    batch = PagedBatch.of(state, [seq_id], [2], num_tokens=2)
    k, v = payload(state.pool, 0, [1, 2])
    batch = batch.write(0, jnp.asarray(k)[None], jnp.asarray(v)[None])
    assert all((now == then).all() for now, then in zip(snapshot(batch.pools), before, strict=True))
    assert not attend(batch, 0, jnp.ones((1, 2, 1, 2))).any()


def test_batch_attends_to_what_it_has_written(state):
    k, v = payload(state.pool, 1, range(1, 8))
    for begin, end in ((0, 4), (4, 6), (6, 7)):
        batch = PagedBatch.of(state, [0], [end - begin], num_tokens=4, seq_lens=[end])
        padded = np.full((2, 1, 4, 1, 2), 999.0, np.float32)
        padded[0, 0, : end - begin], padded[1, 0, : end - begin] = k[begin:end], v[begin:end]
        batch = batch.write(1, jnp.asarray(padded[0]), jnp.asarray(padded[1]))
        state = state.with_pools(batch.pools)
    for held, given in zip(fj.gather(state, 1, 0), (k, v), strict=True):
        np.testing.assert_array_equal(held[:7], given)
    q = jnp.zeros((1, 1, 2, 2))  # Equal logits: the mean of the values.
    out = attend(PagedBatch.of(state, [0], [1], num_tokens=1), 1, q)
    np.testing.assert_allclose(out[0, 0], np.broadcast_to(v.mean(0), (2, 2)), rtol=1e-6)


def test_batch_attends_alike_with_one_token_and_in_a_wider_step(state):
    keys = jax.random.split(jax.random.key(0), 3)
    batch = PagedBatch.of(state, [0, 3, -1, 2], [1, 1, 1, 0], num_tokens=1)
    k, v = jax.random.normal(keys[0], (2, 4, 1, 1, 2))
    batch = batch.write(0, k, v)
    q = jax.random.normal(keys[1], (4, 2, 4, 2))
    one = attend(batch, 0, q[:, :1])
    wide = PagedBatch.of(
        state.with_pools(batch.pools),
        [0, 3, -1, 2],
        [1, 1, 1, 0],
        num_tokens=2,
    )
    np.testing.assert_allclose(one, attend(wide, 0, q)[:, :1], atol=1e-6)
    assert not one[2:].any()


# Mistakes that would otherwise decode wrong text.


@pytest.mark.parametrize("layer", [2, -1, np.int64(2)])
def test_batch_refuses_a_layer_outside_the_pool(state, layer):
    batch = PagedBatch.of(state, [0], [1], num_tokens=1)
    ones = jnp.ones((1, 1, 1, 2))
    with pytest.raises(ValueError, match="the cache has 2 layers, counted from 0"):
        batch.write(layer, ones, ones)
    with pytest.raises(ValueError, match="the cache has 2 layers, counted from 0"):
        batch.attend(layer, ones)


@pytest.mark.parametrize(
    "seq_ids, q_lens, seq_lens, message",
    [
        (0, 1, 1, "must be a vector"),
        ([0], [1, 1], 1, "_lens has shape"),
        ([0], 1, [1, 1], "_lens has shape"),
        ([0], [-1], 1, r"q_lens must be from 0 to num_tokens \(2\)"),
        ([0], [-(2**31)], 1, r"q_lens must be from 0 to num_tokens \(2\)"),
        ([0, 2], [1, 3], 1, r"q_lens must be from 0 to num_tokens \(2\), got \[1 3\]"),
        ([0.5], [1], 1, "must be integers"),
        (["0"], [1], 1, "must be integers"),
        ([0], [1.5], 1, "must be integers"),
    ],
)
def test_batch_of_refuses_wrong_rows_and_counts(state, seq_ids, q_lens, seq_lens, message):
    with pytest.raises((AssertionError, ValueError), match=message):
        PagedBatch.of(state, seq_ids, q_lens, num_tokens=2, seq_lens=seq_lens)


def test_batch_write_refuses_keys_of_another_model(state):
    batch = PagedBatch.of(state, [0, 2], 1, num_tokens=1)
    k = jnp.ones((2, 1, 4, 2))
    with pytest.raises(
        AssertionError, match=r"k must have shape \(2, 1, 1, 2\).*num_kv_heads \(1\)"
    ):
        batch.write(0, k, k)


def logits_of(batch: PagedBatch) -> jax.Array:
    return jnp.zeros((batch.q_lens.size, 5), jnp.float32)


def written(batch: PagedBatch) -> PagedBatch:
    (pool,) = batch.pools
    shape = (*batch.positions.shape, pool.num_kv_heads, pool.head_dim)
    return batch.write(0, jnp.ones(shape), jnp.ones(shape))


WRONG_MODELS = {
    "without what its layers wrote": lambda _, tokens, batch: (logits_of(batch), batch.pools),
    "'PagedBatch']. Return `batch.pools`": lambda _, tokens, batch: (
        logits_of(batch),
        written(batch),
    ),
    "must return (logits, pools)": lambda _, tokens, batch: logits_of(batch),
    "must be floats [1, vocab]": lambda _, tokens, batch: (
        jnp.zeros((*tokens.shape, 5)),
        written(batch).pools,
    ),
    "returned int32[1, 5]": lambda _, tokens, batch: (
        logits_of(batch).astype(jnp.int32),
        written(batch).pools,
    ),
    "wrote 1 layers; the cache has 2": lambda _, tokens, batch: (
        logits_of(batch),
        written(batch).pools,
    ),
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_prefill_and_generate_refuse_a_model_with_a_wrong_result(state, kind):
    before, message = snapshot(state), re.escape(kind)
    error = ValueError if "layers;" in kind else TypeError
    with pytest.raises(error, match=message):
        prefill(WRONG_MODELS[kind], None, state, [0], [[1, 2, 3]], starts=4)
    options = GenerateOptions(max_new_tokens=2)
    with pytest.raises(error, match=message):
        generate(WRONG_MODELS[kind], None, state, [0], [1], options=options)
    assert all((now == then).all() for now, then in zip(snapshot(state), before, strict=True))


def test_generate_accepts_a_model_that_scans_over_its_layers(state):
    def model_fn(params, tokens, batch):
        x = jnp.ones((*tokens.shape, 1, 2))

        def layer(batch, i):
            return batch.write(i, x, x), batch.attend(i, x)

        batch, _ = jax.lax.scan(layer, batch, jnp.arange(2))
        return logits_of(batch), batch.pools

    options = GenerateOptions(max_new_tokens=2)
    out = jax.eval_shape(lambda s: generate(model_fn, None, s, [0], [1], options=options), state)
    assert out.tokens.shape == (1, 2)
