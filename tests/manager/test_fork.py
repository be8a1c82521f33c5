"""`fork`: requests with all tokens of another one, which share its full blocks."""

import asyncio

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import PagedKvCacheManager, Priority, errors
from ferrum_jax.manager import Retention
from tests.support.internals import requests_of, row_blocks
from tests.support.managers import make_manager, refused, start, tokens_of, whole, write_tokens
from tests.support.multi_device import CPU, all_of, begin, make_multi
from tests.support.prefix_managers import PROMPT, compute, found, keep, make


def computed(manager, request_id="a", num_tokens=7, **more):
    handle = start(manager, request_id, num_tokens, **more)
    write_tokens(manager, handle, range(1, 1 + num_tokens))
    return handle


def test_forks_share_full_blocks_and_go_on_apart():
    manager = make_manager()
    a = computed(manager)
    b, c = manager.fork("a", ["b", "c"])
    rows = row_blocks(manager)
    assert rows["a"][:2] == rows["b"][:2] == rows["c"][:2]
    assert len({rows[name][2] for name in "abc"}) == 3
    assert manager.stats().free_blocks == 12 - 5 and manager.stats().allocation_count == 3
    for i, handle in enumerate((a, b, c)):
        manager.extend(handle, 3)
        write_tokens(manager, handle, [100 * i + 1, 100 * i + 2, 100 * i + 3], begin=7)
    for i, handle in enumerate((a, b, c)):
        assert tokens_of(handle) == [*range(1, 8), 100 * i + 1, 100 * i + 2, 100 * i + 3]
    manager.check()
    manager.deallocate("a")
    assert tokens_of(b)[:7] == list(range(1, 8))
    for name in "bc":
        manager.deallocate(name)
    assert manager.stats().free_blocks == 12


def test_a_fork_is_like_its_source_and_knows_its_tokens():
    manager = make()
    keep(manager, "a", salt="tenant", priority=Priority.High, max_sequence_length=12)
    (b,) = manager.fork("a", ["b"])
    assert b.request_id == "b" and b.request.cache_salt == "tenant"
    assert (b.request.priority, b.request.max_sequence_length) == (Priority.High, 12)
    assert b.num_cached_tokens == 7 and b.num_tokens() == 7
    manager.extend(b, 2)
    write_tokens(manager, b, [18, 19], begin=7)
    with pytest.raises(errors.PrefixMismatchError):
        manager.share_prefix("b", compute(manager, "c", [1, 2, 3]).request_id, 3)
    assert manager.commit(b, [18, 19]) == 9
    assert found(manager, [*PROMPT, 18, 19, 20], "tenant") == 9
    assert found(manager, [*PROMPT, 18, 19, 20]) == 0
    with pytest.raises(errors.SequenceTooLongError):
        manager.extend(b, 4)
    manager.check()


def test_a_fork_holds_cached_blocks_after_its_source_has_ended():
    manager = make(num_blocks=6)
    keep(manager, "a")
    (b,) = manager.fork("a", ["b"])
    manager.deallocate("a")
    assert refused(manager.allocate, manager.new_request("c", 12)) is errors.OutOfBlocksError
    manager.allocate(manager.new_request("c", 9))
    assert tokens_of(b) == PROMPT and found(manager, [*PROMPT, 1]) == 6
    manager.check()


def test_what_forks_share_uncached_is_cached_once_a_single_one_holds_it():
    manager = make()
    a = compute(manager, "a")
    (b,) = manager.fork("a", ["b"])
    assert manager.commit(a) == 0 and found(manager) == 0
    manager.deallocate("a")
    assert manager.commit(b) == 6 and found(manager) == 6


def test_a_fork_of_what_must_not_be_cached_is_not_cached_either():
    manager = make()
    compute(manager, "a")
    manager.reset_prefixes()
    (b,) = manager.fork("a", ["b"])
    manager.deallocate("a")
    assert manager.commit(b) == 0


def test_a_fork_is_swapped_moved_and_compressed_by_itself():
    manager, other = make(), make()
    a = compute(manager, "a")
    manager.commit(a, retention=Retention(is_pinned=True))
    b, c = manager.fork("a", ["b", "c"])
    manager.swap_out("b")
    manager.move_to("c", other)
    manager.deallocate("a")
    manager.swap_in("b")
    assert tokens_of(b) == PROMPT == tokens_of(c)
    assert found(other) == 6 and found(manager) == 6
    manager.check()
    other.check()


def test_a_fork_of_a_compressed_request_has_its_bytes_and_its_report():
    manager = make_manager()
    a = computed(manager, num_tokens=15)
    method = fj.CompressionMethod(
        token_format=fj.types.TokenFormat.Native, scorer="window", num_sinks=1, num_recent=2
    )
    manager.compress_cache("a", 0.6, method)
    (b,) = manager.fork("a", ["b"])
    assert b.compression == a.compression and b.num_tokens() == 15
    for one, other in zip(a.kv_cache(0), b.kv_cache(0), strict=True):
        np.testing.assert_array_equal(one, other)
    manager.check()


def test_an_empty_request_is_forked_to_empty_ones():
    manager = make_manager()
    start(manager, "a", 0)
    handles = manager.fork("a", ["b", "c"])
    assert [handle.num_tokens() for handle in handles] == [0, 0]
    assert manager.fork("a", []) == []
    manager.check()


@pytest.mark.parametrize(
    "source, new_ids, error, message",
    [
        ("?", ["b"], errors.UnknownRequestError, "'[?]' is not live"),
        ("a", ["b", "a"], errors.DuplicateRequestError, "'a' is live already"),
        ("a", ["b", "b"], errors.DuplicateRequestError, "'b' is live already, or named twice"),
        ("a", ["b", "c", "d"], errors.OutOfRowsError, "3 rows are needed, and 2 of 5"),
        ("a", ["b", "c"], errors.OutOfBlocksError, "2 blocks are needed, and 1 of 12"),
        ("away", ["b"], errors.SwappedOutError, "swapped out"),
        ("unwritten", ["b"], errors.RefusedError, "no step has computed its tokens from 0 on"),
    ],
)
def test_a_refused_fork_changes_nothing(source, new_ids, error, message):
    manager = make_manager()
    computed(manager)
    computed(manager, "away", 4)
    manager.swap_out("away")
    start(manager, "unwritten", 4)
    start(manager, "room", 0)
    manager.allocate_blocks(manager.free_block_count() - 1)
    before, num_refused = whole(manager), manager.stats().allocation_failures
    with pytest.raises(error, match=message):
        manager.fork(source, new_ids)
    assert whole(manager) == before
    counted = error in (errors.OutOfRowsError, errors.OutOfBlocksError, errors.RefusedError)
    counted |= error is errors.DuplicateRequestError
    assert manager.stats().allocation_failures == num_refused + counted * len(new_ids)


def test_a_fork_may_hold_room_that_is_not_computed_in_its_own_block():
    manager = make_manager()
    a = computed(manager, num_tokens=4)
    manager.extend(a, 1)
    (b,) = manager.fork("a", ["b"])
    assert b.num_cached_tokens == 4 and b.num_tokens() == 5
    manager.extend(a, 1)
    with pytest.raises(errors.RefusedError):
        manager.fork("a", ["c"])


def test_a_fork_preempts_a_less_urgent_request():
    manager = make_manager(preemption_policy=fj.LruEvictionPolicy())
    computed(manager, priority=Priority.High)
    low = computed(manager, "low", 4, priority=Priority.Low)
    manager.allocate_blocks(manager.free_block_count())
    manager.fork("a", ["b"])
    assert not low.is_resident and requests_of(manager).get("b") is not None
    manager.check()


@pytest.mark.parametrize("value", ["bc", 7, None, [["x"]]])
def test_new_ids_are_a_collection_of_keys(value):
    manager = make_manager()
    computed(manager)
    with pytest.raises(ValueError, match="new_ids"):
        manager.fork("a", value)


def test_a_fork_is_on_the_device_of_its_source_and_new_on_all():
    manager = make_multi(2)
    begin(manager, "a", 7, CPU[1])
    begin(manager, "there", 1, CPU[0])
    (b,) = manager.fork("a", ["b"])
    assert manager.get_cache_device("b") == CPU[1] and tokens_of(b) == tokens_of(
        manager.get_handle("a")
    )
    before = all_of(manager)
    with pytest.raises(errors.DuplicateRequestError):
        manager.fork("a", ["there"])
    assert all_of(manager) == before
    manager.check()


def test_fork_is_a_coroutine_of_the_async_manager():
    async def serve():
        manager = fj.AsyncKvCacheManager(make_manager())
        assert isinstance(manager.manager, PagedKvCacheManager)
        computed(manager.manager)
        b, c = await manager.fork("a", ["b", "c"])
        assert tokens_of(b) == tokens_of(c) == list(range(1, 8))

    asyncio.run(serve())


def test_an_empty_request_can_be_committed_while_others_share():
    manager = make()
    compute(manager, "a")
    manager.fork("a", ["b"])
    empty = start(manager, "empty", 0)
    assert manager.commit(empty, retention=Retention(is_pinned=True)) == 0
