"""The manager over layer groups that share a pool: a group of all tokens, and one of a window."""

import asyncio
import dataclasses

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import CacheGeometry, CompressionMethod, LayerGroup, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.types import TokenFormat
from tests.support.grouped_managers import (
    GROUP_BLOCK_BYTES,
    PAYLOAD,
    TWO_GROUPS,
    WINDOW,
    begin,
    fill,
    first_needed,
    grow,
    make,
    make_large,
    require_tokens,
    tokens_for,
    tokens_in,
)
from tests.support.internals import num_free, row_blocks, state_of, wait_for_device
from tests.support.manager_pictures import picture
from tests.support.managers import BLOCK_SIZE, MAX_TOKENS, start, whole, write_tokens
from tests.support.prepared_managers import extend_step, fork_step, truncate_step


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_window_releases_blocks_as_a_request_is_extended(step):
    manager = make()
    handle, tokens, released = start(manager, "a"), tokens_for("a", MAX_TOKENS), 0
    for begin_at in range(0, MAX_TOKENS, step):
        grow(manager, handle, tokens[begin_at : begin_at + step], step)
        released = first_needed(begin_at)
        require_tokens(handle, tokens[: begin_at + step], released)
        used = handle.stats().blocks_allocated
        assert manager.free_block_count() == 16 - used
        assert manager.stats().used_memory_bytes == used * GROUP_BLOCK_BYTES
        picture(manager)  # Free blocks are zero.
    assert released == first_needed(MAX_TOKENS - step) > 0
    groups = manager.stats().group_blocks
    assert groups == {"full": 5, "local": 5 - released}
    table = handle.block_table()
    assert table.num_blocks() == 5 and table.num_pruned == 0
    manager.deallocate("a")
    assert manager.free_block_count() == 16
    picture(manager)


def test_extend_takes_the_blocks_that_it_releases_and_is_refused_by_one_block():
    manager = make(max_blocks=8)
    a, b = begin(manager, "a", 6), begin(manager, "b", 6)  # 4 blocks each: none is free.
    assert manager.free_block_count() == 0
    before = whole(manager)
    with pytest.raises(errors.OutOfBlocksError, match=r"2 blocks are needed, and 0 of 8"):
        manager.extend_all([a, b], 1)  # 4 blocks, of which the windows release 2.
    assert whole(manager) == before
    manager.deallocate("b")
    manager.allocate_blocks(3)
    manager.extend(a, 1)
    write_tokens(manager, a, [7], 6)
    assert manager.free_block_count() == 0
    require_tokens(a, [*tokens_for("a", 6), 7], 1)
    picture(manager)


def test_a_released_block_that_is_taken_again_is_blank():
    manager = make(max_blocks=4)
    handle = begin(manager, "a", 6)
    manager.extend(handle, 0)
    assert manager.free_block_count() == 0
    manager = make(max_blocks=5)
    handle = begin(manager, "a", 6)
    manager.extend(handle, 1)  # Takes the free block, and the one that it has released.
    assert manager.free_block_count() == 0
    assert tokens_in(handle, 0) == [*tokens_for("a", 6), 0]
    assert tokens_in(handle, 1) == [0, 0, 0, *tokens_for("a", 6)[3:], 0]


def test_blocks_that_requests_share_are_released_by_the_last_of_them():
    manager = make()
    a, b = begin(manager, "a", 6), start(manager, "b", 6)
    manager.share_prefix("a", "b", 6)
    require_tokens(b, tokens_for("a", 6), 0)
    assert manager.free_block_count() == 12
    grow(manager, a, [7])
    assert manager.free_block_count() == 10 and manager.stats().group_blocks["local"] == 4
    grow(manager, b, [8])
    assert manager.free_block_count() == 9  # Two blocks more, one less.
    require_tokens(a, [*tokens_for("a", 6), 7], 1)
    require_tokens(b, [*tokens_for("a", 6), 8], 1)
    picture(manager)
    manager.deallocate("a")
    require_tokens(b, [*tokens_for("a", 6), 8], 1)
    manager.deallocate("b")
    assert manager.free_block_count() == 16


def test_extend_under_sharing_counts_only_blocks_of_one_request():
    manager = make(max_blocks=8)
    a = begin(manager, "a", 6)
    start(manager, "b", 6, max_sequence_length=6)
    manager.share_prefix("a", "b", 6)
    manager.allocate_blocks(3)
    assert manager.free_block_count() == 1
    before = whole(manager)
    with pytest.raises(errors.OutOfBlocksError, match=r"2 blocks are needed, and 1 of 8"):
        manager.extend(a, 1)
    assert whole(manager) == before
    manager.deallocate("b")
    grow(manager, a, [7])
    require_tokens(a, [*tokens_for("a", 6), 7], 1)


@pytest.mark.parametrize("num_tokens", range(1, 13))
def test_share_is_refused_where_a_needed_token_is_gone(num_tokens):
    manager = make(max_blocks=24)
    a, b = begin(manager, "a", 12), start(manager, "b", 12)
    released, before = first_needed(11), whole(manager)
    if first_needed(num_tokens) < released:
        with pytest.raises(errors.RefusedError, match=r"a sliding window has passed tokens"):
            manager.share_prefix("a", "b", num_tokens)
        assert whole(manager) == before
        return
    manager.share_prefix("a", "b", num_tokens)
    tokens = tokens_for("a", num_tokens) + [0] * (12 - num_tokens)
    assert tokens_in(b, 0) == tokens
    assert tokens_in(b, 1) == [0] * (3 * released) + tokens[3 * released :]
    grow(manager, b, [7])
    assert tokens_in(a, 0) == tokens_for("a", 12)
    picture(manager)


@pytest.mark.parametrize("has_disk", [False, True])
@pytest.mark.parametrize("num_tokens", [2, 7, 14])
def test_a_request_is_swapped_in_as_it_was_and_goes_on(tmp_path, has_disk, num_tokens):
    tiers = TierConfig(host_budget_bytes=0, disk_directory=tmp_path) if has_disk else TierConfig()
    manager = make(tiers=tiers)
    a, other = begin(manager, "a", num_tokens), begin(manager, "b", 5)
    released, num_blocks = first_needed(num_tokens - 1), a.stats().blocks_allocated
    manager.swap_out("a")
    num_bytes = manager.stats().host_bytes
    assert has_disk or num_bytes == num_blocks * GROUP_BLOCK_BYTES
    assert a.num_tokens() == num_tokens and a.stats().blocks_allocated == 0
    grow(manager, other, [7, 7, 7])  # Takes blocks of others.
    manager.swap_in("a")
    require_tokens(a, tokens_for("a", num_tokens), released)
    assert a.stats().blocks_allocated == num_blocks
    picture(manager)
    grow(manager, a, [9])
    require_tokens(a, [*tokens_for("a", num_tokens), 9], first_needed(num_tokens))
    picture(manager)


def test_preemption_swaps_out_all_groups():
    manager = make(max_blocks=9, preemption_policy=fj.LruEvictionPolicy())
    low = begin(manager, "a", 9, priority=fj.Priority.Low)
    high = start(manager, "b", 9, priority=fj.Priority.High)
    assert not low.is_resident and manager.stats().preemption_count == 1
    manager.deallocate("b")
    assert not high.is_valid()
    manager.swap_in("a")
    require_tokens(low, tokens_for("a", 9), first_needed(8))


def test_a_request_moves_to_another_manager_with_what_its_windows_hold():
    source, target = make(), make()
    a = begin(source, "a", 8)
    begin(target, "b", 5)
    source.move_to("a", target)
    require_tokens(a, tokens_for("a", 8), first_needed(7))
    grow(target, a, [9])
    require_tokens(a, [*tokens_for("a", 8), 9], first_needed(8))
    assert source.free_block_count() == 16
    picture(source)
    picture(target)
    other = make({"groups": [TWO_GROUPS["groups"][0], LayerGroup("local", [1], PAYLOAD, 5)]})
    with pytest.raises(errors.GeometryMismatchError):
        target.move_to("a", other)


# Steps.


def test_steps_extend_truncate_and_fork_in_all_groups():
    manager = make(max_blocks=24)
    a, child = begin(manager, "a", 8), start(manager, "b")
    assert bool(manager.run(extend_step, [a], np.asarray([2]), extends=True))
    write_tokens(manager, a, [8, 9], 8)
    tokens = [*tokens_for("a", 8), 8, 9]
    require_tokens(a, tokens, first_needed(8))
    picture(manager)
    assert not bool(manager.run(truncate_step, [a], np.asarray([4]), extends=True))
    require_tokens(a, tokens, first_needed(8))
    assert bool(manager.run(fork_step, [a, child], extends=True))
    require_tokens(child, tokens, first_needed(8))
    assert bool(manager.run(truncate_step, [a], np.asarray([9]), extends=True))
    require_tokens(a, tokens[:9], first_needed(8))
    grow(manager, a, [7, 7])
    grow(manager, child, [6, 6, 6, 6])
    require_tokens(a, [*tokens[:9], 7, 7], first_needed(10))
    require_tokens(child, [*tokens, 6, 6, 6, 6], first_needed(13))
    picture(manager)


def test_a_step_that_releases_blocks_unasked_is_noticed():
    manager = make()
    a = begin(manager, "a", 6)
    manager.run(extend_step, [a], np.asarray([1]))
    wait_for_device(manager)
    with pytest.raises(errors.UncountedTokensError):
        manager.extend(a, 1)
    assert a.num_tokens() == 7 and a.stats().blocks_allocated == 5
    picture(manager)


def test_matching_tables_are_told_from_those_that_only_released_a_block():
    manager = make()
    a = begin(manager, "a", 6)

    @jax.jit
    def release(state, seq_ids):
        tables = state.tables
        released = tables.num_released.at[5 + seq_ids[0]].add(1)
        return state.with_tables([dataclasses.replace(tables, num_released=released)]), None

    manager.run(release, [a])
    with pytest.raises(errors.UncountedTokensError):
        manager.extend(a, 1)


def test_a_step_reserves_what_it_takes_beside_what_it_releases():
    manager = make(max_blocks=32, initial_blocks=5)
    a = begin(manager, "a", 6)
    assert bool(manager.run(extend_step, [a], np.asarray([1]), extends=True, reserve_tokens=1)), (
        "one free block and one that the window releases"
    )
    assert manager.total_block_count() == 5
    assert bool(manager.run(extend_step, [a], np.asarray([4]), extends=True, reserve_tokens=4))
    assert manager.total_block_count() == 10


# Upkeep.


def test_defragment_growth_and_shrinking_keep_all_groups():
    manager = make(max_blocks=32, initial_blocks=4, enable_pooling=False)
    handles = {name: begin(manager, name, 7, max_sequence_length=15) for name in "abc"}
    assert manager.total_block_count() == 16
    manager.deallocate("a")
    del handles["b"]
    manager.gc()
    assert manager.total_block_count() == 8
    require_tokens(handles["c"], tokens_for("c", 7), 1)
    assert sorted(row_blocks(manager)["c"]) <= list(range(5))
    assert num_free(manager) == 3
    picture(manager)
    grow(manager, handles["c"], [7, 7, 7])
    require_tokens(handles["c"], [*tokens_for("c", 7), 7, 7, 7], first_needed(9))
    manager.defragment()
    require_tokens(handles["c"], [*tokens_for("c", 7), 7, 7, 7], first_needed(9))
    picture(manager)


def test_without_scrubbing_blocks_are_released_all_the_same():
    manager = make(scrub_freed_blocks=False)
    a = begin(manager, "a", 10)
    require_tokens(a, tokens_for("a", 10), first_needed(9))
    manager.check()


def test_a_row_filled_for_no_request_is_emptied_in_all_groups():
    manager = make()
    a = begin(manager, "a", 4)

    def step(state, seq_ids):
        return fj.extend(state, [int(seq_ids[0]) + 1], [7], max_new_tokens=7)

    with pytest.raises(errors.UncountedTokensError, match="belong to no request"):
        manager.run(step, [a], extends=True)
    assert manager.free_block_count() == 16 - 4
    picture(manager)


def test_an_extension_that_frees_what_it_takes_does_not_wait_behind_another_one():
    local = LayerGroup("local", [0, 1], PAYLOAD, WINDOW)
    manager = make({"groups": [local]}, max_blocks=3)
    a, b = begin(manager, "a", 6), begin(manager, "b", 2)
    assert manager.free_block_count() == 0

    async def run():
        waiting_manager = fj.AsyncKvCacheManager(manager)
        waiting = asyncio.create_task(waiting_manager.extend(b, 4, timeout_seconds=60))
        await asyncio.sleep(0)
        await waiting_manager.extend(a, 1, timeout_seconds=5)
        assert not waiting.done() and a.num_tokens() == 7
        await waiting_manager.deallocate("a")
        await waiting

    asyncio.run(run())
    manager.check()


# Geometries.


def test_layers_have_the_models_numbers_and_may_share_a_cache():
    groups = [LayerGroup("local", [3], PAYLOAD, WINDOW), LayerGroup("full", [1], PAYLOAD)]
    manager = make({"groups": groups, "shared_layers": {4: 1}})
    a = begin(manager, "a", 7)
    tokens = tokens_for("a", 7)
    assert tokens_in(a, 1, number=1) == tokens_in(a, 4, number=1) == tokens
    assert tokens_in(a, 3, number=0) == [0, 0, 0, *tokens[3:]]
    assert a.block_table().num_blocks() == 3  # Of the group that keeps all tokens.
    assert (a.num_layers(), a.num_heads(), a.head_dim()) == (2, 1, 2)
    with pytest.raises(errors.LayerOutOfRangeError, match=r"the cache has layers \[1, 3\]"):
        a.kv_cache(0)


def test_a_cache_of_windows_alone_holds_no_more_than_these():
    groups = [LayerGroup("short", [0], PAYLOAD, 1), LayerGroup("long", [1], PAYLOAD, WINDOW)]
    manager = make({"groups": groups}, max_blocks=6)
    a = begin(manager, "a", MAX_TOKENS)
    released = [first_needed(14, 1), first_needed(14)]
    assert manager.stats().group_blocks == {"short": 5 - released[0], "long": 5 - released[1]}
    tokens = tokens_for("a", MAX_TOKENS)
    for layer, count in enumerate(released):
        assert tokens_in(a, layer) == [0] * 3 * count + tokens[3 * count :]
    table = a.block_table()
    assert table.num_blocks() == 5 - released[0] and table.num_pruned == 3 * released[0]
    stats = a.stats()
    assert stats.tokens_stored == MAX_TOKENS - 3 * released[0] and stats.utilization == 1
    with pytest.raises(errors.CompressionError, match="only layers with a sliding window"):
        manager.compress_cache("a", 0.5)
    manager.swap_out("a")
    manager.swap_in("a")
    assert tokens_in(a, 1) == [0] * 3 * released[1] + tokens[3 * released[1] :]
    picture(manager)


def test_tokens_are_known_without_prefix_caching():
    manager = make()
    a = manager.allocate(manager.new_request("a", prompt_token_ids=[1, 2, 3, 4]))
    write_tokens(manager, a, [1, 2, 3, 4])
    assert manager.commit(a) == 0
    manager.allocate(manager.new_request("b", prompt_token_ids=[1, 2, 3, 5]))
    with pytest.raises(errors.PrefixMismatchError):
        manager.share_prefix("a", "b", 4)


# Compression.


@pytest.mark.parametrize("format_and_ratio", [(TokenFormat.Int8, 0.5), (TokenFormat.Native, 0.5)])
def test_compression_changes_the_groups_that_keep_all_tokens(format_and_ratio):
    token_format, ratio = format_and_ratio
    manager = make_large()
    a = start(manager, "a", 24)
    fill(manager, a, 0, 24)
    manager.extend(a, 6)
    fill(manager, a, 24, 30)
    window = [np.asarray(x) for x in a.kv_cache(2)]
    num_window = manager.stats().group_blocks["local"]
    assert num_window == 8 - (24 + 1 - 6) // 4
    method = CompressionMethod(token_format=token_format, num_sinks=1, num_recent=2)
    manager.compress_cache("a", ratio, method)
    report = a.compression
    assert report is not None and report.groups == ("late", "early")
    full = -(-report.num_kept_tokens // (12 if token_format else 4))
    assert report.ratio == full / 8 <= ratio
    assert manager.stats().group_blocks == {"late": full, "local": num_window, "early": full}
    assert report.freed_bytes == 2 * (8 - full) * manager.stats().used_memory_bytes / (
        2 * full + num_window
    )
    for have, want in zip(a.kv_cache(2), window, strict=True):
        np.testing.assert_array_equal(have, want)
    assert np.asarray(a.kv_cache(1)[0]).shape[0] == report.num_kept_tokens
    assert a.num_tokens() == 30
    picture(manager)
    before = [[np.asarray(x) for x in a.kv_cache(layer)] for layer in (1, 2, 3)]
    manager.swap_out("a")
    manager.swap_in("a")
    for layer, kv in zip((1, 2, 3), before, strict=True):
        for have, want in zip(a.kv_cache(layer), kv, strict=True):
            np.testing.assert_array_equal(have, want)
    manager.extend(a, 4)
    assert manager.stats().group_blocks["local"] == 9 - (30 + 1 - 6) // 4
    picture(manager)


def test_compression_gives_each_layer_its_own_queries():
    """Of each layer, the tokens that its queries attend to are kept."""
    manager = make_large()
    a = start(manager, "a", 24)
    fill(manager, a, 0, 24)
    keys = {layer: np.asarray(a.kv_cache(layer)[0]) for layer in (1, 3)}
    wanted = {1: 7, 3: 16}
    queries = np.stack([8 * keys[layer][None, wanted[layer]].swapaxes(0, 1) for layer in (1, 3)])
    method = CompressionMethod(
        token_format=TokenFormat.Native, scorer="observed_attention", num_sinks=0, num_recent=1
    )
    manager.compress_cache("a", 0.2, method, queries)
    for layer in (1, 3):
        kept = np.asarray(a.kv_cache(layer)[0])
        assert (kept == keys[layer][wanted[layer]]).all(-1).all(-1).any()
    with pytest.raises(ValueError, match=r"queries must be \[2, Hq, Q, 16\]"):
        manager.compress_cache("a", 0.2, method, np.zeros((3, 2, 1, 16), np.float32))


def test_a_geometry_of_groups_derives_what_describes_each_layer():
    groups = fj.equal_sized(
        [LayerGroup("full", [5], PAYLOAD), LayerGroup("local", range(5), PAYLOAD, 8)]
    )
    geometry = CacheGeometry(groups=groups, max_seqs=2, max_sequence_length=9)
    assert (geometry.num_layers, geometry.num_kv_heads, geometry.head_dim) == (6, 1, 2)
    assert geometry == dataclasses.replace(geometry) and hash(geometry)
    assert state_of(make({"groups": groups, "num_layers": 6})).tables.num_groups == 6
    assert geometry.spec(4, BLOCK_SIZE).max_blocks_per_seq == 3
