"""The manager over layer groups of two head sizes, which need a pool each.

Layer 0 keeps all tokens; layer 1 has larger heads and a window of 4. A block has 3 tokens. Random
lives of such managers are in `test_prefix_groups`, and a model in `tests/examples`.
"""

import asyncio

import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import KeyValue, LayerGroup, MemoryPressure, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.types import TokenFormat
from tests.support.grouped_managers import (
    GROUPS,
    PAYLOAD,
    TWO_POOLS,
    WIDE,
    WINDOW,
    begin,
    first_needed,
    grow,
    make,
    require_tokens,
    tokens_for,
    tokens_in,
)
from tests.support.grouped_prefixes import ask, require_cached_contents, require_contents
from tests.support.internals import devices_of, pool_of, state_of, taken_blocks
from tests.support.manager_pictures import picture
from tests.support.managers import BLOCK_SIZE, start, whole
from tests.support.multi_device import CPU, make_multi
from tests.support.prefix_managers import CONFIG, found

FULL_BYTES, WIDE_BYTES = 2 * BLOCK_SIZE * 2 * 4, 2 * BLOCK_SIZE * 4 * 4  # Bytes per block.
PROMPT = list(range(11, 24))


def free_blocks(manager) -> tuple[int, ...]:
    return tuple(pool_of(manager).counts.num_free)


def of_sizes(num_full: int | None, num_local: int | None, **config):
    """A manager of which each pool has its own number of blocks, if one is given."""
    full = LayerGroup("full", [0], PAYLOAD, num_blocks=num_full)
    local = LayerGroup("local", [1], WIDE, WINDOW, num_blocks=num_local)
    return make({"groups": (full, local)}, **{"max_blocks": 12, **config})


def test_blocks_and_bytes_are_counted_in_each_pool():
    manager = make(TWO_POOLS, max_blocks=12)
    handle = begin(manager, "a", 12)
    released = first_needed(11)
    require_tokens(handle, tokens_for("a", 12), released)
    stats = manager.stats()
    assert free_blocks(manager) == (8, 8 + released) and manager.free_block_count() == 16 + released
    assert stats.total_blocks == 24 and stats.group_blocks == {"full": 4, "local": 4 - released}
    used = 4 * FULL_BYTES + (4 - released) * WIDE_BYTES
    assert stats.used_memory_bytes == handle.stats().memory_bytes == used
    assert stats.total_memory_bytes == 12 * (FULL_BYTES + WIDE_BYTES)
    picture(manager)


def test_a_call_is_refused_if_one_pool_is_short_and_changes_nothing():
    manager = of_sizes(8, 4)
    first = begin(manager, "a", 9)
    start(manager, "b", 3)
    assert free_blocks(manager) == (4, 1)
    before = whole(manager)
    with pytest.raises(errors.OutOfBlocksError, match=r"2 \+ 2 blocks .* 4 \+ 1 of 8 \+ 4"):
        start(manager, "c", 4)
    assert whole(manager) == before and not manager.can_allocate(manager.new_request("c", 4))
    with pytest.raises(errors.RequestTooLargeError, match=r"5 \+ 5 blocks at once; the pools"):
        start(manager, "c", 13)
    grow(manager, first, [7])  # Its window releases what it takes.
    assert free_blocks(manager) == (3, 1)
    with pytest.raises(errors.RequestTooLargeError, match=r"5 \+ 5 blocks at once; the pools"):
        manager.allocate(manager.new_request("c", 12, prompt_token_ids=range(13)))
    c = manager.allocate(manager.new_request("c", 3, prompt_token_ids=range(13)))
    assert c.num_tokens() == 3 and free_blocks(manager) == (2, 0), "5 + 5 blocks are never held"
    picture(manager)


def test_each_pool_grows_by_itself_and_shrinks_again():
    manager = of_sizes(None, 5, max_blocks=12, initial_blocks=3, enable_pooling=False)
    assert manager.total_block_count() == 3 + 5, "groups with a number of blocks have them at once"
    begin(manager, "x", 3)
    handle = begin(manager, "a", 12)
    assert tuple(pool_of(manager).counts.num_blocks) == (6, 5)
    assert manager.stats().growth_count == 1
    manager.deallocate("x")
    manager.defragment()
    require_tokens(handle, tokens_for("a", 12), first_needed(11))
    picture(manager)
    manager.deallocate("a")
    manager.gc()
    assert tuple(pool_of(manager).counts.num_blocks) == (3, 5)
    picture(manager)


def test_pressure_is_that_of_the_fullest_pool():
    manager, levels = of_sizes(10, 5), []
    manager.set_pressure_callback(levels.append)
    start(manager, "a", 12)
    assert levels == [MemoryPressure.High], "4 of 5 blocks, and 4 of 10"


def test_blocks_without_a_request_are_of_the_first_pool():
    manager = of_sizes(4, 12)
    taken = manager.allocate_blocks(4)
    assert sorted(taken) == taken_blocks(manager) == [0, 1, 2, 3] and free_blocks(manager) == (
        0,
        12,
    )
    with pytest.raises(errors.OutOfBlocksError):
        manager.allocate_blocks(1)
    with pytest.raises(errors.RequestTooLargeError):
        manager.allocate_blocks(5)
    with pytest.raises(errors.ForeignBlockError):
        manager.free_blocks([4])
    manager.free_blocks(taken)
    picture(manager)


@pytest.mark.parametrize("host_bytes", [10**6, FULL_BYTES * 4, 0])
def test_swapping_keeps_the_bytes_of_all_pools_in_each_tier(tmp_path, host_bytes):
    tiers = TierConfig(host_budget_bytes=host_bytes, disk_directory=tmp_path)
    manager = make(TWO_POOLS, max_blocks=12, tiers=tiers)
    handle = begin(manager, "a", 11)
    before, released = picture(manager).requests["a"]["data"], first_needed(10)
    manager.swap_out("a")
    assert free_blocks(manager) == (12, 12)
    assert picture(manager).requests["a"]["data"] == before
    num_bytes = 4 * FULL_BYTES + (4 - released) * WIDE_BYTES
    assert manager.stats().host_bytes >= num_bytes
    begin(manager, "b", 12)
    manager.swap_in("a")
    assert picture(manager).requests["a"]["data"] == before
    assert manager.stats().host_bytes == 0
    grow(manager, handle, [7])


def test_a_request_is_stored_with_the_blocks_of_all_pools_or_of_none():
    tiers = TierConfig(host_budget_bytes=4 * FULL_BYTES + WIDE_BYTES)
    manager = make(TWO_POOLS, max_blocks=12, tiers=tiers)
    begin(manager, "a", 11)
    before = whole(manager)
    with pytest.raises(errors.OutOfHostMemoryError):
        manager.swap_out("a")
    assert whole(manager) == before and manager.stats().host_bytes == 0
    picture(manager)


def test_only_the_pool_that_is_short_evicts_cached_blocks():
    caching = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG}
    manager = of_sizes(8, 5, **caching)
    ask(manager, "a", PROMPT[:9])
    manager.deallocate("a")
    assert manager.stats().evictable_blocks == 6 and free_blocks(manager) == (5, 2)
    start(manager, "b", 9)  # One block of the second pool is short.
    assert free_blocks(manager) == (2, 0)
    assert manager.stats().cached_blocks == 5, "the first pool keeps its blocks"
    picture(manager)
    require_cached_contents(manager)
    manager.deallocate("b")
    prompt = [*PROMPT[:9], 99]
    assert found(manager, prompt) == 9, "the window does not need the block that was evicted"
    require_contents(manager, ask(manager, "c", prompt), prompt)


def test_window_blocks_stay_cached_where_only_the_other_pool_is_short():
    caching = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG}
    manager = of_sizes(5, 8, **caching)
    ask(manager, "a", PROMPT[:9])
    manager.deallocate("a")
    start(manager, "b", 9)  # One block of the first pool is short: the last block is evicted.
    assert free_blocks(manager) == (0, 3) and manager.stats().cached_blocks == 4
    assert found(manager, [*PROMPT[:9], 99]) == 6, "with what the window needs there"
    picture(manager)
    require_cached_contents(manager)


def test_a_request_moves_with_the_blocks_of_all_pools():
    config = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG, "max_blocks": 12}
    manager = make_multi(2, geometry=TWO_POOLS, **config)
    source, target = (devices_of(manager)[CPU[i]] for i in range(2))
    handle = ask(source, "a", PROMPT[:12])
    manager.move_cache("a", CPU[1])
    source.check()
    picture(target)
    require_contents(target, handle, PROMPT[:12])
    assert manager.stats().group_blocks["full"] == 4
    manager.swap_out("a")
    manager.move_cache("a", CPU[0])
    manager.swap_in("a")
    require_contents(source, handle, PROMPT[:12])
    target.check()


def test_a_coroutine_waits_until_the_pool_that_is_short_has_room():
    async def main() -> None:
        manager = fj.AsyncKvCacheManager(of_sizes(12, 4))
        await manager.allocate(manager.new_request("a", 9))
        waiting = asyncio.create_task(manager.allocate(manager.new_request("b", 6)))
        await asyncio.sleep(0)
        assert not waiting.done()
        await manager.deallocate("a")
        assert (await waiting).num_tokens() == 6

    asyncio.run(main())


def test_compression_changes_the_groups_of_all_tokens_in_every_pool():
    narrow, wide = KeyValue(2, 16, "float32"), KeyValue(1, 32, "float32")
    groups = [
        LayerGroup("narrow", [1], narrow),
        LayerGroup("local", [2], KeyValue(1, 8, "float32"), 6),
        LayerGroup("wide", [3], wide),
    ]
    model = {"groups": groups, "num_layers": 3, "num_kv_heads": 2, "head_dim": 16}
    limits = {"max_seqs": 3, "max_sequence_length": 40}
    manager = make({**model, **limits}, block_size=4, max_blocks=40)
    handle = start(manager, "a", 32)

    def write(state, seq_ids):
        batch = fj.PagedBatch.of(state, seq_ids, np.asarray([32], np.int32), num_tokens=32)
        for layer, heads, size in ((1, 2, 16), (2, 1, 8), (3, 1, 32)):
            k, v = np.random.default_rng(layer).normal(size=(2, 1, 32, heads, size))
            batch = batch.write(layer, np.float32(k), np.float32(v))
        return state.with_pools(batch.pools), None

    manager.run(write, [handle])
    before = {layer: [np.asarray(x) for x in handle.kv_cache(layer)] for layer in (1, 2, 3)}
    with pytest.raises(ValueError, match="queries are one array"):
        manager.compress_cache("a", 0.5, queries=np.ones((2, 2, 4, 16)))
    manager.compress_cache("a", 0.5)
    report = handle.compression
    assert report is not None and report.groups == ("narrow", "wide")
    assert report.token_format is not TokenFormat.Native and report.num_kept_tokens == 32
    blocks = manager.stats().group_blocks
    assert blocks["local"] == 8 and blocks["narrow"] <= 4 and blocks["wide"] <= 4
    for layer in (1, 3):
        for have, want in zip(handle.kv_cache(layer), before[layer], strict=True):
            assert 0 < np.abs(np.asarray(have) - want).max() < 0.1
    for have, want in zip(handle.kv_cache(2), before[2], strict=True):
        np.testing.assert_array_equal(have, want)
    manager.check()
    manager.swap_out("a")
    manager.swap_in("a")
    manager.check()
    manager.deallocate("a")
    assert manager.free_block_count() == 120


def test_groups_of_one_geometry_and_other_numbers_of_blocks_have_pools_of_their_own():
    groups = (GROUPS[0], LayerGroup("local", [1], PAYLOAD, WINDOW, num_blocks=12))
    manager = make({"groups": groups}, max_blocks=12)
    assert len(state_of(manager).pools) == 2, "though both have 12 blocks now"
    handle = begin(manager, "a", 9)
    assert tokens_in(handle, 0) == tokens_for("a", 9)
    manager.check()
