"""Steps of `run`, which change the cache in place, and calls that do not wait for the device."""

import functools
import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.ops.indexing import token_slots
from tests.support.caches import payload
from tests.support.internals import wait_for_device
from tests.support.managers import make_manager, refused, start, tokens_of, whole, write_tokens
from tests.support.pools import keys


@pytest.fixture
def manager():
    return make_manager()


def pool_pointers(manager) -> list[int]:
    """Addresses of the keys and values of the pool."""
    return manager.run(
        lambda s, _: (s, [x.unsafe_buffer_pointer() for x in s.pool.arrays.values()]), []
    )


def write_last(state, seq_ids, k, v):
    """Writes k and v, each [L, R, H, D], as the last token of each row."""
    pool, tables = state.pool, state.tables
    rows = jnp.where(seq_ids < 0, tables.max_seqs, seq_ids)
    block_ids = tables.block_ids.at[rows].get(mode="fill", fill_value=-1)
    last = tables.held_lens.at[rows].get(mode="fill", fill_value=0) - 1
    slots = token_slots(
        block_ids, last[:, None], pool.num_blocks, pool.block_size, pool.slots_per_block
    )[:, 0]
    for layer in range(pool.num_layers):
        pool = fj.write(pool, layer, slots, k[layer], v[layer])
    return state.with_pools([pool]).with_tables([tables]), seq_ids


write_last_in_place = jax.jit(write_last, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0)
def extend_inside(state, seq_ids, num_tokens):
    """Extends rows inside a step."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=4)


def last_tokens(manager, tokens):
    """Keys and values [L, R, H, D] of one token per row."""
    pool = manager.run(lambda state, _: (state, state.pool), [])
    return [np.stack(x) for x in zip(*(payload(pool, i, tokens) for i in range(2)), strict=True)]


@pytest.mark.parametrize("initial_blocks", [6, 12])
def test_run_writes_the_pool_in_place_with_a_donating_step(initial_blocks):
    manager = make_manager(initial_blocks=initial_blocks)
    handles = [start(manager, i) for i in range(3)]
    before, state = pool_pointers(manager), manager.run(lambda state, _: (state, state), [])
    for round_ in range(4):
        manager.extend_all(handles, 1)
        k, v = last_tokens(manager, [100 * i + round_ + 1 for i in range(3)])
        manager.run(write_last_in_place, handles, k, v)
    assert pool_pointers(manager) == before and keys(state.pool).is_deleted()
    assert [tokens_of(h) for h in handles] == [[100 * i + n for n in range(1, 5)] for i in range(3)]
    manager.check()


def test_allocate_extend_and_deallocate_change_the_tables_in_place(manager):
    def leaves():
        return manager.run(lambda state, _: (state, jax.tree.leaves(state.tables)), [])

    handle, place = start(manager, "a", 1), pool_pointers(manager)
    for call in (
        lambda: start(manager, "b", 4),
        lambda: manager.extend(handle, 4),
        lambda: manager.deallocate("a"),
    ):
        before = leaves()
        call()
        assert all(leaf.is_deleted() for leaf in before)
    manager.free_blocks(manager.allocate_blocks(2))
    manager.gc()
    assert pool_pointers(manager) == place


def test_run_passes_rows_in_the_order_of_the_handles_with_none_as_padding(manager):
    a, b, c = (start(manager, name, 2) for name in "abc")
    rows = manager.run(lambda state, seq_ids: (state, seq_ids), [c, None, a])
    assert (rows.dtype, rows.tolist()) == (np.int32, [2, -1, 0])
    k, v = last_tokens(manager, [31, 99, 11])
    out = manager.run(write_last_in_place, [c, None, a], k, v)
    assert out.tolist() == [2, -1, 0]
    assert [tokens_of(handle)[1] for handle in (a, b, c)] == [11, 0, 31]
    assert manager.run(lambda state, _, *args: (state, args), [], 1, "two") == (1, "two")
    manager.run(write_last_in_place, [None, None, None], k, v)
    assert [tokens_of(handle)[1] for handle in (a, b, c)] == [11, 0, 31]


def test_run_accepts_a_step_that_does_not_donate(manager):
    handle = start(manager, "a", 1)
    manager.run(jax.jit(write_last), [handle], *last_tokens(manager, [7]))
    manager.run(write_last, [handle, None], *last_tokens(manager, [8, 9]))
    assert tokens_of(handle) == [8]


WRONG_RESULTS = {
    "no state": lambda state, rows: rows,
    "the state alone": lambda state, rows: state,
    "the state in the middle": lambda state, rows: (rows, state, rows),
    "a state inside": lambda state, rows: ((rows, state), rows),
    "the pool alone": lambda state, rows: (state.pool, rows),
    "a larger pool": lambda state, rows: (
        jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, state),
        rows,
    ),
    "nothing": lambda state, rows: None,
}


@pytest.mark.parametrize("kind", WRONG_RESULTS)
@pytest.mark.parametrize("is_jitted", [False, True], ids=["plain", "donating"])
def test_run_refuses_a_step_that_does_not_return_the_state_first_or_last(manager, kind, is_jitted):
    handle = start(manager, "a", 4)
    write_tokens(manager, handle, [1, 2, 3, 4])
    before, step = whole(manager), WRONG_RESULTS[kind]
    step = jax.jit(step, donate_argnums=0) if is_jitted else step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Donated arrays that are not used.
        with pytest.raises(
            TypeError, match=r"must return \(state, output\) or .* CacheState first, or last"
        ):
            manager.run(step, [handle])
    assert whole(manager) == before
    assert tokens_of(handle) == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [RuntimeError, errors.CacheLostError])
def test_run_that_loses_the_state_makes_every_call_raise_cache_lost_error(manager, error):
    handle = start(manager, "a", 1)
    tokens = last_tokens(manager, [5])

    def lose(state, seq_ids):
        write_last_in_place(state, seq_ids, *tokens)
        if error is RuntimeError:
            raise error("a bug of the model")
        return state, None  # The donated state.

    with pytest.raises(error):
        manager.run(lose, [handle])
    for call in (
        lambda: manager.extend(handle, 1),
        lambda: manager.run(write_last, [handle], *tokens),
        lambda: manager.deallocate("a"),
        lambda: start(manager, "b", 1),
    ):
        with pytest.raises(errors.CacheLostError, match="took it, donated, .* make another"):
            call()


def test_allocate_finds_lengths_that_run_changed_without_extends(manager):
    a, b = start(manager, "a", 3), start(manager, "b", 3)
    write_tokens(manager, a, [1, 2, 3])
    ok = manager.run(extend_inside, [a, b], np.asarray([4, 4], np.int32))
    jax.block_until_ready(ok)
    wait_for_device(manager)
    with pytest.raises(errors.UncountedTokensError, match="Pass extends=True"):
        start(manager, "c", 15)  # Fits by the counts of the manager.
    assert [handle.num_tokens() for handle in (a, b)] == [7, 7]
    assert tokens_of(a) == [1, 2, 3, 0, 0, 0, 0]
    manager.check()
    c = start(manager, "c", 15)
    manager.extend(a, 2)
    assert [handle.num_tokens() for handle in (a, b, c)] == [9, 7, 15]
    manager.check()


def test_run_of_a_step_that_cannot_be_traced_leaves_the_cache_usable(manager):
    handle = start(manager, "a", 4)
    write_tokens(manager, handle, [1, 2, 3, 4])
    before = whole(manager)

    @functools.partial(jax.jit, donate_argnums=0)
    def broken(state, seq_ids):
        state, _ = write_last(state, seq_ids, jnp.ones((2, 1, 1, 2)), jnp.ones((2, 1, 1, 2)))
        raise RuntimeError("a bug of the model")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="a bug of the model"):
            manager.run(broken, [handle])
    with pytest.raises(AssertionError):  # Shapes are checked at trace time.
        manager.run(write_last_in_place, [handle], *np.ones((2, 2, 3, 1, 2), np.float32))
    assert whole(manager) == before
    assert tokens_of(handle) == [1, 2, 3, 4]
    manager.extend(handle, 1)
    manager.check()


@functools.partial(jax.jit, donate_argnums=0)
def slow(state, seq_ids, num_rounds):
    """Computes for as long as asked; every array of the state depends on it."""
    ones = jnp.ones((128, 128), jnp.float32)
    last = jax.lax.fori_loop(0, num_rounds, lambda _, x: x @ x * jnp.float32(1 / 128), ones)
    zero = (jnp.sum(last) < 0).astype(jnp.int32)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), state), zero


def hot_path(manager, num_rounds, is_done):
    """Makes each call during a step of `num_rounds` rounds; notes whether the step was done."""
    a, b = start(manager, "a", 4), start(manager, "b", 2)
    blocks = manager.allocate_blocks(1)
    output = manager.run(slow, [a, b], num_rounds)
    c = start(manager, "c", 3)
    calls = {
        "allocate": lambda: start(manager, "d", 2),
        "can_allocate": lambda: manager.can_allocate(manager.new_request("e", 3)),
        "extend": lambda: manager.extend(a, 3),
        "extend_all": lambda: manager.extend_all([a, c], 1),
        "refused extend": lambda: refused(manager.extend, a, 100),
        "get_handle": lambda: manager.get_handle("a").num_tokens(),
        "list_handles": manager.list_handles,
        "stats": lambda: (manager.stats(), a.stats(), manager.free_block_count()),
        "run": lambda: manager.run(slow, [a, None], 1),
        "free_blocks": lambda: manager.free_blocks(blocks),
        "deallocate": lambda: manager.deallocate("b"),
        "gc": manager.gc,
    }
    for name, call in calls.items():
        call()
        is_done[name] = output.is_ready()
    a.key_cache(0)
    is_done["key_cache"] = output.is_ready()
    for name in "ac":
        manager.deallocate(name)


def test_only_key_cache_waits_for_the_device(manager):
    gc.collect()
    hot_path(manager, 1, {})  # Compiles everything.
    waited = {}
    hot_path(manager, 30_000, waited)
    assert waited.pop("key_cache"), "the step was not running"
    assert not any(waited.values()), f"waited: {[name for name, done in waited.items() if done]}"
    manager.check()
