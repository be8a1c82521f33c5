"""A batch: which tokens are where, and what padding never does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.integrations.batch import PagedBatch
from ferrum_jax.integrations.generate import GenerateOptions, generate
from ferrum_jax.integrations.prefill import prefill
from tests.support.caches import payload, slots_of, snapshot, tiny_spec

attend = jax.jit(PagedBatch.attend, static_argnames="layer")


@pytest.fixture
def state() -> fj.CacheState:
    state, ok = fj.allocate(fj.init(tiny_spec()), [0, 2, 3], [7, 3, 1])
    assert bool(ok)
    return state


def test_new_tokens_end_where_the_sequence_ends(state, transform):
    def made(state):
        batch = PagedBatch.of(state, [2, 0], [2, 3], num_tokens=3)
        return batch.positions, batch.slots

    positions, slots = transform(made)(state)
    assert positions.tolist() == [[1, 2, -1], [4, 5, 6]]
    assert slots[0, :2].tolist() == slots_of(state, [(2, 1), (2, 2)]).tolist()
    assert slots[1].tolist() == slots_of(state, [(0, 4), (0, 5), (0, 6)]).tolist()
    assert slots[0, 2] >= state.pool.num_blocks * state.pool.block_size


def test_chunks_of_one_sequence_can_share_a_batch(state):
    batch = PagedBatch.of(state, [0, 0], [3, 2], num_tokens=3, seq_lens=[3, 5])
    assert batch.positions.tolist() == [[0, 1, 2], [3, 4, -1]]


@pytest.mark.parametrize("seq_id", [-1, 1, 99], ids=["null", "free", "out of range"])
def test_a_row_without_tokens_writes_nothing_and_sees_nothing(state, seq_id):
    before = snapshot(state.pool)
    batch = PagedBatch.of(state, [seq_id], [2], num_tokens=2)
    k, v = payload(state.pool, 0, [1, 2])
    batch = batch.write(0, jnp.asarray(k)[None], jnp.asarray(v)[None])
    assert all((now == then).all() for now, then in zip(snapshot(batch.pool), before, strict=True))
    assert not attend(batch, 0, jnp.ones((1, 2, 1, 2))).any()


def test_what_is_written_is_gathered_and_attended_to(state):
    k, v = payload(state.pool, 1, range(1, 8))
    pieces, pool = ((0, 4), (4, 6), (6, 7)), state.pool
    for begin, end in pieces:
        now = fj.CacheState(pool=pool, tables=state.tables)
        batch = PagedBatch.of(now, [0], [end - begin], num_tokens=4, seq_lens=[end])
        padded = np.full((2, 1, 4, 1, 2), 999.0, np.float32)
        padded[0, 0, : end - begin], padded[1, 0, : end - begin] = k[begin:end], v[begin:end]
        pool = batch.write(1, jnp.asarray(padded[0]), jnp.asarray(padded[1])).pool
    state = fj.CacheState(pool=pool, tables=state.tables)
    for held, given in zip(fj.gather(state, 1, 0), (k, v), strict=True):
        np.testing.assert_array_equal(held[:7], given)
    q = jnp.zeros((1, 1, 2, 2))  # Equal logits: the mean of the values.
    out = attend(PagedBatch.of(state, [0], [1], num_tokens=1), 1, q)
    np.testing.assert_allclose(out[0, 0], np.broadcast_to(v.mean(0), (2, 2)), rtol=1e-6)


def test_one_token_a_row_attends_as_a_chunk_of_one_does(state):
    keys = jax.random.split(jax.random.key(0), 3)
    batch = PagedBatch.of(state, [0, 3, -1, 2], [1, 1, 1, 0], num_tokens=1)
    k, v = jax.random.normal(keys[0], (2, 4, 1, 1, 2))
    batch = batch.write(0, k, v)
    q = jax.random.normal(keys[1], (4, 2, 4, 2))
    one = attend(batch, 0, q[:, :1])
    wide = PagedBatch.of(
        fj.CacheState(pool=batch.pool, tables=state.tables),
        [0, 3, -1, 2],
        [1, 1, 1, 0],
        num_tokens=2,
    )
    np.testing.assert_allclose(one, attend(wide, 0, q)[:, :1], atol=1e-6)
    assert not one[2:].any()


def test_last_picks_the_last_new_token(state, transform):
    batch = PagedBatch.of(state, [0, 2, -1], [3, 1, 0], num_tokens=3)
    x = jnp.arange(18).reshape(3, 3, 2)
    picked = transform(lambda batch, x: batch.last(x))(batch, x)
    assert picked.tolist() == [[4, 5], [6, 7], [12, 13]]


# Mistakes that would otherwise decode wrong text.


@pytest.mark.parametrize("layer", [2, -1, np.int64(2)])
def test_a_layer_that_the_pool_has_not_is_refused(state, layer):
    batch = PagedBatch.of(state, [0], [1], num_tokens=1)
    ones = jnp.ones((1, 1, 1, 2))
    with pytest.raises(ValueError, match="the pool has 2, counted from 0"):
        batch.write(layer, ones, ones)
    with pytest.raises(ValueError, match="the pool has 2, counted from 0"):
        batch.attend(layer, ones)


@pytest.mark.parametrize(
    "seq_ids, q_lens, seq_lens", [(0, 1, 1), ([0], [1, 1], 1), ([0], 1, [1, 1])]
)
def test_rows_and_counts_that_do_not_pair_up_are_refused(state, seq_ids, q_lens, seq_lens):
    with pytest.raises(AssertionError, match="must be a vector|_lens has shape"):
        PagedBatch.of(state, seq_ids, q_lens, num_tokens=2, seq_lens=seq_lens)


def test_keys_of_another_model_are_refused_with_the_numbers_of_the_pool(state):
    batch = PagedBatch.of(state, [0, 2], 1, num_tokens=1)
    k = jnp.ones((2, 1, 4, 2))
    with pytest.raises(
        AssertionError, match=r"k must have shape \(2, 1, 1, 2\).*num_kv_heads \(1\)"
    ):
        batch.write(0, k, k)


def test_a_batch_of_a_consumed_state_is_refused(state):
    fj.truncate(state, [0], 3)
    with pytest.raises(ValueError, match="This state was consumed"):
        PagedBatch.of(state, [0], 1, num_tokens=1)


@pytest.mark.parametrize("rows", [np.array([2**32]), [0.7], np.array([False])], ids=str)
def test_prefill_refuses_rows_that_are_no_int32(state, rows):
    with pytest.raises(ValueError, match="must be integers within int32"):
        prefill(WRONG_MODELS["without what its layers wrote"], None, state, rows, [[1, 2]])


@pytest.mark.parametrize("q_len", [-1, -(2**31)])
def test_fewer_new_tokens_than_none_are_refused(state, q_len):
    with pytest.raises(ValueError, match=r"q_lens must be from 0 to num_tokens \(2\)"):
        PagedBatch.of(state, [0], [q_len], num_tokens=2)


def test_more_new_tokens_than_a_step_has_are_refused(state):
    with pytest.raises(ValueError, match=r"q_lens must be from 0 to num_tokens \(2\), got \[1 3\]"):
        PagedBatch.of(state, [0, 2], [1, 3], num_tokens=2)


@pytest.mark.parametrize("seq_ids, q_lens", [([0.5], [1]), (["0"], [1]), ([0], [1.5])])
def test_ids_and_counts_that_are_no_integers_are_refused(state, seq_ids, q_lens):
    with pytest.raises(ValueError, match="must be integers"):
        PagedBatch.of(state, seq_ids, q_lens, num_tokens=2)


def logits_of(batch: PagedBatch) -> jax.Array:
    return jnp.zeros((batch.q_lens.size, 5), jnp.float32)


def written(batch: PagedBatch) -> PagedBatch:
    pool = batch.pool
    shape = (*batch.positions.shape, pool.num_kv_heads, pool.head_dim)
    return batch.write(0, jnp.ones(shape), jnp.ones(shape))


WRONG_MODELS = {
    "without what its layers wrote": lambda _, tokens, batch: (logits_of(batch), batch.pool),
    "'PagedBatch']. Return the pool": lambda _, tokens, batch: (logits_of(batch), written(batch)),
    "must return (logits, pool)": lambda _, tokens, batch: logits_of(batch),
    "must be floats [1, vocab]": lambda _, tokens, batch: (
        jnp.zeros((*tokens.shape, 5)),
        written(batch).pool,
    ),
    "returned int32[1, 5]": lambda _, tokens, batch: (
        logits_of(batch).astype(jnp.int32),
        written(batch).pool,
    ),
    "wrote 1 layers; the pool has 2": lambda _, tokens, batch: (
        logits_of(batch),
        written(batch).pool,
    ),
}


@pytest.mark.parametrize("kind", WRONG_MODELS)
def test_a_model_that_decodes_wrong_is_refused_before_it_runs(state, kind):
    before, message = snapshot(state), re.escape(kind)
    error = ValueError if "layers;" in kind else TypeError
    with pytest.raises(error, match=message):
        prefill(WRONG_MODELS[kind], None, state, [0], [[1, 2, 3]], starts=4)
    options = GenerateOptions(max_new_tokens=2)
    with pytest.raises(error, match=message):
        generate(WRONG_MODELS[kind], None, state, [0], [1], options=options)
    assert all((now == then).all() for now, then in zip(snapshot(state), before, strict=True))


def test_a_model_may_scan_over_its_layers(state):
    def model_fn(params, tokens, batch):
        x = jnp.ones((*tokens.shape, 1, 2))

        def layer(batch, i):
            return batch.write(i, x, x), batch.attend(i, x)

        batch, _ = jax.lax.scan(layer, batch, jnp.arange(2))
        return logits_of(batch), batch.pool

    options = GenerateOptions(max_new_tokens=2)
    out = jax.eval_shape(lambda s: generate(model_fn, None, s, [0], [1], options=options), state)
    assert out.tokens.shape == (1, 2)


@pytest.mark.parametrize("prompt", [[1.7, 2.0], ["1"], [1 << 40]])
def test_a_prompt_of_something_else_than_token_ids_is_refused(state, prompt):
    with pytest.raises(ValueError, match="must be integers within int32"):
        prefill(WRONG_MODELS["without what its layers wrote"], None, state, [0], [prompt])
