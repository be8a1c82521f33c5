"""Steps that compute on the cache in place, and calls that do not wait for the device."""

import functools
import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import CacheLostError, InvalidHandleError, UncountedTokensError
from ferrum_jax.manager import programs
from ferrum_jax.ops.indexing import token_slots
from tests.support.helpers import payload
from tests.support.managers import (
    Clock,
    make_manager,
    refused,
    start,
    tokens_of,
    whole,
    write_tokens,
)


@pytest.fixture
def manager():
    return make_manager()


def pool_pointers(manager) -> list[int]:
    """Where the pool's keys and values lie in memory."""
    return manager.run(
        lambda s, _: (s, [s.pool.k.unsafe_buffer_pointer(), s.pool.v.unsafe_buffer_pointer()]), []
    )


def write_last(state, seq_ids, k, v):
    """Writes k and v, each [L, R, H, D], as the last token of each row."""
    pool, tables = state.pool, state.tables
    rows = jnp.where(seq_ids < 0, tables.max_seqs, seq_ids)
    block_ids = tables.block_ids.at[rows].get(mode="fill", fill_value=-1)
    last = tables.seq_lens.at[rows].get(mode="fill", fill_value=0) - 1
    slots = token_slots(block_ids, last[:, None], pool.num_blocks, pool.block_size)[:, 0]
    for layer in range(pool.num_layers):
        pool = fj.write(pool, layer, slots, k[layer], v[layer])
    return fj.CacheState(pool, tables), seq_ids


write_last_in_place = jax.jit(write_last, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0)
def extend_inside(state, seq_ids, num_tokens):
    """Lengthens rows without asking the host."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=4)


def last_tokens(manager, tokens):
    """Keys and values [L, R, H, D] of one token a row."""
    pool = manager.run(lambda state, _: (state, state.pool), [])
    return [np.stack(x) for x in zip(*(payload(pool, i, tokens) for i in range(2)), strict=True)]


# Steps.


@pytest.mark.parametrize("initial_blocks", [6, 12])
def test_a_donated_step_writes_where_the_pool_lies(initial_blocks):
    manager = make_manager(initial_blocks=initial_blocks)
    handles = [start(manager, i) for i in range(3)]
    before = pool_pointers(manager)
    for round_ in range(4):
        manager.extend_all(handles, 1)
        k, v = last_tokens(manager, [100 * i + round_ + 1 for i in range(3)])
        manager.run(write_last_in_place, handles, k, v)
    assert pool_pointers(manager) == before
    assert [tokens_of(h) for h in handles] == [[100 * i + n for n in range(1, 5)] for i in range(3)]
    manager.check()


def test_table_operations_leave_the_pool_where_it_lies(manager):
    before = pool_pointers(manager)
    handle = start(manager, "a", 4)
    manager.extend(handle, 4)
    manager.free_blocks(manager.allocate_blocks(2))
    manager.deallocate("a")
    manager.gc()
    assert pool_pointers(manager) == before


def test_table_operations_change_the_tables_in_place(manager):
    def leaves():
        return manager.run(lambda state, _: (state, jax.tree.leaves(state.tables)), [])

    handle = start(manager, "a", 1)
    for call in (
        lambda: start(manager, "b", 4),
        lambda: manager.extend(handle, 4),
        lambda: manager.deallocate("a"),
    ):
        before = leaves()
        call()
        assert all(leaf.is_deleted() for leaf in before)


def test_the_step_takes_the_state_over(manager):
    state = manager.run(lambda state, _: (state, state), [])
    handle = start(manager, "a", 1)
    manager.run(write_last_in_place, [handle], *last_tokens(manager, [5]))
    assert state.pool.k.is_deleted() and state.pool.v.is_deleted()
    assert tokens_of(handle) == [5]


def test_rows_come_in_the_order_of_the_handles_and_none_is_padding(manager):
    a, b, c = (start(manager, name, 2) for name in "abc")
    rows = manager.run(lambda state, seq_ids: (state, seq_ids), [c, None, a])
    assert (rows.dtype, rows.tolist()) == (np.int32, [2, -1, 0])
    k, v = last_tokens(manager, [31, 99, 11])
    out = manager.run(write_last_in_place, [c, None, a], k, v)
    assert out.tolist() == [2, -1, 0]
    assert [tokens_of(handle)[1] for handle in (a, b, c)] == [11, 0, 31]
    manager.run(write_last_in_place, [None, None, None], k, v)
    assert [tokens_of(handle)[1] for handle in (a, b, c)] == [11, 0, 31]


def test_arguments_and_output_are_handed_through(manager):
    got = manager.run(lambda state, seq_ids, *args: (state, args), [], 1, "two", {"three": 3})
    assert got == (1, "two", {"three": 3})


def test_a_step_need_not_donate(manager):
    handle = start(manager, "a", 1)
    manager.run(jax.jit(write_last), [handle], *last_tokens(manager, [7]))
    manager.run(write_last, [handle, None], *last_tokens(manager, [8, 9]))
    assert tokens_of(handle) == [8]


def test_lengths_that_a_step_changed_are_picked_up(manager):
    a, b, c = start(manager, "a", 2), start(manager, "b", 3), start(manager, "c")
    grow = np.asarray([4, 0, 1, 2], np.int32)
    ok = manager.run(extend_inside, [a, None, b, c], grow, extends=True)
    assert bool(ok)
    assert [handle.num_tokens() for handle in (a, b, c)] == [6, 4, 2]
    assert manager.free_block_count() == 12 - 2 - 2 - 1
    manager.check()
    manager.extend(c, 4)
    write_tokens(manager, c, range(1, 7))
    assert tokens_of(c) == [1, 2, 3, 4, 5, 6]


def test_a_step_that_finds_no_room_changes_nothing():
    manager = make_manager(clock=Clock())
    manager.allocate_blocks(11)
    handle = start(manager, "a", 2)
    before = whole(manager)
    ok = manager.run(extend_inside, [handle], np.asarray([2], np.int32), extends=True)
    assert not bool(ok) and whole(manager) == before


def test_a_step_may_cut_rows_back(manager):
    handle = start(manager, "a", 9)
    write_tokens(manager, handle, range(1, 10))
    manager.run(fj.truncate, [handle], 4, extends=True)
    assert (handle.num_tokens(), manager.free_block_count()) == (4, 10)
    assert tokens_of(handle) == [1, 2, 3, 4]
    manager.run(fj.truncate, [handle], 0, extends=True)
    assert (handle.num_tokens(), manager.free_block_count()) == (0, 12)
    manager.extend(handle, 2)
    manager.check()


def test_rows_that_share_blocks_are_counted_right(manager):
    parent, child = start(manager, "parent", 7), start(manager, "child")
    write_tokens(manager, parent, range(1, 8))
    manager.run(lambda s, rows: fj.fork(s, rows[:1], rows[1:]), [parent, child], extends=True)
    assert (child.num_tokens(), manager.free_block_count()) == (7, 12 - 3 - 1)
    manager.defragment()
    assert tokens_of(child) == list(range(1, 8))
    manager.extend(child, 3)
    manager.check()
    manager.deallocate("parent")
    assert manager.free_block_count() == 12 - 4
    write_tokens(manager, child, [8, 9, 10], begin=7)
    assert tokens_of(child) == list(range(1, 11))
    manager.deallocate("child")
    assert manager.free_block_count() == 12
    manager.check()


def test_a_dead_handle_is_refused_before_the_step_runs(manager):
    handle, dead = start(manager, "a", 1), start(manager, "dead", 1)
    manager.deallocate("dead")
    ran = []

    def step(state, seq_ids):
        ran.append(seq_ids)
        return state, None

    assert refused(manager.run, step, [handle, dead]) is InvalidHandleError
    assert not ran


WRONG_RESULTS = {
    "no state": lambda state, rows: rows,
    "the state alone": lambda state, rows: state,
    "three things": lambda state, rows: (state, rows, rows),
    "the state last": lambda state, rows: (rows, state),
    "the pool alone": lambda state, rows: (state.pool, rows),
    "a larger pool": lambda state, rows: (
        jax.tree.map(lambda x: jnp.concatenate([x, x]) if x.ndim else x, state),
        rows,
    ),
    "nothing": lambda state, rows: None,
}


@pytest.mark.parametrize("kind", WRONG_RESULTS)
@pytest.mark.parametrize("is_jitted", [False, True], ids=["plain", "donating"])
def test_a_step_must_return_the_state_first(manager, kind, is_jitted):
    handle = start(manager, "a", 4)
    write_tokens(manager, handle, [1, 2, 3, 4])
    before, step = whole(manager), WRONG_RESULTS[kind]
    step = jax.jit(step, donate_argnums=0) if is_jitted else step
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of donated arrays that come to no use.
        with pytest.raises(
            TypeError, match=r"must return \(state, output\).* Return the CacheState"
        ):
            manager.run(step, [handle])
    assert whole(manager) == before
    assert tokens_of(handle) == [1, 2, 3, 4]


def test_a_state_that_was_donated_and_stands_in_a_wrong_place_is_kept(manager):
    handle = start(manager, "a", 1)
    tokens = last_tokens(manager, [5])

    def logits_first(state, seq_ids):
        state, output = write_last_in_place(state, seq_ids, *tokens)
        return output, state

    with pytest.raises(TypeError, match=r"must return \(state, output\)"):
        manager.run(logits_first, [handle])
    assert tokens_of(handle) == [5]
    manager.extend(handle, 1)
    manager.check()


@pytest.mark.parametrize("error", [RuntimeError, CacheLostError])
def test_a_cache_that_a_step_has_lost_is_named_so_from_then_on(manager, error):
    handle = start(manager, "a", 1)
    tokens = last_tokens(manager, [5])

    def lose(state, seq_ids):
        write_last_in_place(state, seq_ids, *tokens)
        if error is RuntimeError:
            raise error("a bug of the model")
        return state, None  # As it was given, and is no more.

    with pytest.raises(error):
        manager.run(lose, [handle])
    for call in (
        lambda: manager.extend(handle, 1),
        lambda: manager.run(write_last, [handle], *tokens),
        lambda: manager.deallocate("a"),
        lambda: start(manager, "b", 1),
    ):
        with pytest.raises(CacheLostError, match="took it, donated, .* make another"):
            call()


def test_lengths_that_a_step_changed_without_a_word_are_found_out(manager):
    a, b = start(manager, "a", 3), start(manager, "b", 3)
    write_tokens(manager, a, [1, 2, 3])
    ok = manager.run(extend_inside, [a, b], np.asarray([4, 4], np.int32))
    jax.block_until_ready((ok, manager._cache.state))
    with pytest.raises(UncountedTokensError, match="Pass extends=True"):
        start(manager, "c", 15)  # Which fits by the manager's counts.
    assert [handle.num_tokens() for handle in (a, b)] == [7, 7]
    assert tokens_of(a) == [1, 2, 3, 0, 0, 0, 0]
    manager.check()
    c = start(manager, "c", 15)
    manager.extend(a, 2)
    assert [handle.num_tokens() for handle in (a, b, c)] == [9, 7, 15]
    manager.check()


def test_a_step_that_cannot_be_traced_leaves_the_cache_usable(manager):
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


def test_a_step_is_traced_once(manager):
    handles = [start(manager, i, 1 + i) for i in range(3)]
    traces = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, seq_ids, k, v):
        traces.append(1)
        return write_last(state, seq_ids, k, v)

    for i in range(5):
        manager.extend(handles[i % 3], 1)
        rows = [handles[i % 3], None, handles[(i + 1) % 3]]
        manager.run(step, rows, *last_tokens(manager, [1, 2, 3]))
    assert len(traces) == 1


def test_what_a_step_attends_to_is_its_own_whoever_had_the_blocks_before():
    @functools.partial(jax.jit, donate_argnums=0)
    def decode(state, seq_ids, k, v):
        state, _ = write_last(state, seq_ids, k, v)
        tables = state.tables
        rows = {"block_ids": tables.block_ids[seq_ids], "seq_lens": tables.seq_lens[seq_ids]}
        q = jnp.ones((1, 2, 2), jnp.float32)
        return state, jnp.stack([fj.paged_attention(q, state.pool, i, **rows) for i in range(2)])

    def outputs(manager):
        handle, results = start(manager, "b"), []
        for token in range(1, 8):
            manager.extend(handle, 1)
            results.append(manager.run(decode, [handle], *last_tokens(manager, [token])))
        return np.stack(results)

    used = make_manager()
    write_tokens(used, start(used, "a", 15), range(42, 57))
    used.gc()
    np.testing.assert_array_equal(outputs(used), outputs(make_manager()))


# The hot path.


@functools.partial(jax.jit, donate_argnums=0)
def slow(state, seq_ids, num_rounds):
    """Computes for as long as asked; every array of the state depends on it."""
    ones = jnp.ones((128, 128), jnp.float32)
    last = jax.lax.fori_loop(0, num_rounds, lambda _, x: x @ x * jnp.float32(1 / 128), ones)
    zero = (jnp.sum(last) < 0).astype(jnp.int32)
    return jax.tree.map(lambda x: x + zero.astype(x.dtype), state), zero


def hot_path(manager, num_rounds, is_done):
    """Yields the name of each call that was made after a step of `num_rounds` rounds."""
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


def test_only_what_reads_the_cache_waits_for_the_device(manager):
    gc.collect()
    hot_path(manager, 1, {})  # Compiles everything.
    waited = {}
    hot_path(manager, 30_000, waited)
    assert waited.pop("key_cache"), "the step was really under way, and is noticed when over"
    assert not any(waited.values()), f"waited: {[name for name, done in waited.items() if done]}"
    manager.check()


def test_no_call_compiles_again_for_other_ids_or_lengths(manager):
    compiled = [programs.allocate_rows, programs.extend_rows, programs.free_rows]

    def live(first, second, length):
        handles = [start(manager, first, length), start(manager, second, 1 + length)]
        manager.extend(handles[0], 2)
        manager.extend_all(handles, 3)
        manager.deallocate(first)
        manager.deallocate(second)

    live("a", "b", 1)
    sizes = [program._cache_size() for program in compiled]
    waiting = start(manager, "c", 1)  # So that the others get other rows and blocks.
    for length in range(2, 8):
        live(length, -length, length)
    assert [program._cache_size() for program in compiled] == sizes
    assert waiting.num_tokens() == 1
