"""Blocks without requests, and the gathering of live blocks at the low ids."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import ForeignBlockError, OutOfBlocksError
from tests.support.helpers import payload, snapshot
from tests.support.managers import (
    BLOCK_BYTES,
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


def held_blocks(manager) -> list[int]:
    """The blocks of all requests, in ascending order."""
    return sorted(i for _, h in manager.list_handles() for i in h.block_table().physical_blocks)


def write_block(manager, block_id: int, tokens) -> None:
    """Fills a block that no request holds."""

    def step(state, seq_ids):
        pool = state.pool
        slots = np.arange(3, dtype=np.int32) + block_id * 3
        for layer in range(pool.num_layers):
            pool = fj.write(pool, layer, slots, *payload(pool, layer, tokens))
        return fj.CacheState(pool, state.tables), None

    manager.run(step, [])


def read_block(manager, block_id: int) -> list[np.ndarray]:
    """Keys and values of one block, copied."""
    return manager.run(lambda s, _: (s, snapshot((s.pool.k[block_id], s.pool.v[block_id]))), [])


# Blocks.


def test_blocks_are_handed_out_once_and_counted(manager):
    start(manager, "a", 4)
    blocks = manager.allocate_blocks(3)
    assert (len(blocks), len(set(blocks)), all(isinstance(i, int) for i in blocks)) == (3, 3, True)
    assert not set(blocks) & set(held_blocks(manager))
    assert (manager.free_block_count(), manager.total_block_count()) == (7, 12)
    stats = manager.stats()
    assert (stats.free_blocks, stats.used_memory_bytes) == (7, 5 * BLOCK_BYTES)
    assert (stats.active_caches, stats.allocation_count) == (1, 1)
    assert manager.block_size() == 3
    manager.check()


def test_blocks_given_back_are_free_again(manager):
    blocks = manager.allocate_blocks(12)
    assert sorted(blocks) == list(range(12))
    assert refused(manager.allocate_blocks, 1) is OutOfBlocksError
    manager.free_blocks(blocks[:5])
    assert manager.free_block_count() == 5
    assert sorted(manager.allocate_blocks(5)) == sorted(blocks[:5])
    manager.free_blocks(blocks)
    assert manager.free_block_count() == 12
    manager.check()


def test_no_blocks_can_be_asked_for_and_given_back(manager):
    before = whole(manager)
    assert manager.allocate_blocks(0) == []
    manager.free_blocks([])
    assert whole(manager) == before


def test_ids_may_come_back_as_an_array(manager):
    manager.free_blocks(np.asarray(manager.allocate_blocks(3)))
    assert manager.free_block_count() == 12
    manager.check()


def test_a_request_cannot_take_a_block_that_was_handed_out(manager):
    blocks = manager.allocate_blocks(9)
    handle = start(manager, "a", 9)
    assert set(held_blocks(manager)) == set(range(12)) - set(blocks)
    assert refused(manager.extend, handle, 1) is OutOfBlocksError
    manager.free_blocks(blocks[:1])
    manager.extend(handle, 1)
    assert blocks[0] in held_blocks(manager)
    assert refused(manager.free_blocks, blocks[:1]) is ForeignBlockError
    manager.check()


def test_handed_out_blocks_survive_gc(manager):
    blocks = manager.allocate_blocks(2)
    write_block(manager, blocks[0], [1, 2, 3])
    before = read_block(manager, blocks[0])
    start(manager, "dropped", 15)
    assert manager.gc().caches_freed == 1
    assert manager.free_block_count() == 10
    for now, then in zip(read_block(manager, blocks[0]), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_blocks_make_the_pool_grow():
    manager = make_manager(initial_blocks=3)
    first = manager.allocate_blocks(2)
    write_block(manager, first[1], [1, 2, 3])
    before = read_block(manager, first[1])
    second = manager.allocate_blocks(3)
    assert (manager.total_block_count(), manager.stats().growth_count) == (6, 1)
    assert not set(first) & set(second)
    for now, then in zip(read_block(manager, first[1]), before, strict=True):
        np.testing.assert_array_equal(now, then)
    manager.check()


# Defragmentation.


@functools.partial(jax.jit, donate_argnums=0)
def attend(state, seq_ids, q):
    """Decodes one query a row in each layer."""
    tables = state.tables
    rows = {"block_ids": tables.block_ids[seq_ids], "seq_lens": tables.seq_lens[seq_ids]}
    return state, [
        fj.paged_attention(q, state.pool, i, **rows) for i in range(state.pool.num_layers)
    ]


def scattered(manager):
    """Requests "b" and "d" with gaps below and between them, and a taken block above."""
    handles = [
        start(manager, name, length) for name, length in zip("abcd", (4, 4, 5, 5), strict=True)
    ]
    taken = manager.allocate_blocks(2)
    for i, handle in enumerate(handles):
        write_tokens(manager, handle, range(100 * i + 1, 100 * i + 1 + handle.num_tokens()))
    manager.extend(handles[1], 5)
    write_tokens(manager, handles[1], range(105, 110), begin=4)
    manager.deallocate("a")
    manager.deallocate("c")
    manager.free_blocks(taken[:1])
    return handles[1], handles[3], taken[1]


def test_defragment_gathers_live_blocks_and_changes_nothing_they_hold(dtype):
    manager = make_manager(geometry={"dtype": dtype})
    b, d, taken = scattered(manager)
    write_block(manager, taken, [7, 8, 9])
    q = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 2)), jnp.float32)
    assert held_blocks(manager) == [2, 3, 6, 7, 10]

    outputs = jax.device_get(manager.run(attend, [b, d], q))
    raw, before = read_block(manager, taken), whole(manager)
    keys = snapshot([handle.kv_cache(i) for handle in (b, d) for i in range(2)])
    manager.defragment()

    assert held_blocks(manager) == [0, 1, 2, 3, 4]
    assert refused(manager.free_blocks, [4]) is ForeignBlockError
    manager.check()
    assert whole(manager)[-1] == before[-1], "the books are as they were"
    assert tokens_of(b) == [101, 102, 103, 104, 105, 106, 107, 108, 109]
    assert tokens_of(d) == [301, 302, 303, 304, 305]
    after = snapshot([handle.kv_cache(i) for handle in (b, d) for i in range(2)])
    for now, then in zip(after, keys, strict=True):
        assert now.tobytes() == then.tobytes()
    assert taken == 9, "a caller knows it by this id"
    for now, then in zip(read_block(manager, taken), raw, strict=True):
        assert now.tobytes() == then.tobytes()
    for now, then in zip(jax.device_get(manager.run(attend, [b, d], q)), outputs, strict=True):
        assert now.any() and now.tobytes() == then.tobytes()


def test_defragmenting_twice_moves_nothing_more(manager):
    scattered(manager)
    manager.defragment()
    before = whole(manager)
    manager.defragment()
    assert whole(manager) == before


def test_defragmenting_an_empty_or_a_full_pool_moves_nothing(manager):
    before = whole(manager)
    manager.defragment()
    assert whole(manager) == before
    handles = [start(manager, i, length) for i, length in enumerate([15, 15, 6])]
    before = whole(manager)
    manager.defragment()
    assert whole(manager) == before and len(handles) == 3


def test_requests_go_on_after_defragmentation(manager):
    b, d, taken = scattered(manager)
    manager.defragment()
    manager.extend_all([b, d], 4)
    write_tokens(manager, b, range(110, 114), begin=9)
    write_tokens(manager, d, range(306, 310), begin=5)
    assert tokens_of(b) == list(range(101, 114))
    assert tokens_of(d) == list(range(301, 310))
    manager.free_blocks([taken])
    manager.check()
    assert manager.free_block_count() == 12 - 5 - 3


def test_the_lowest_free_block_is_taken_after_defragmentation(manager):
    scattered(manager)
    manager.defragment()
    assert manager.allocate_blocks(2) == [5, 6]
