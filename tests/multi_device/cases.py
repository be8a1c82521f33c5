"""A manager of several devices, on three of four CPU devices. Run by `test_multi_device.py`."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax import Device, LruEvictionPolicy, MemoryPressure, Priority
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    DuplicateRequestError,
    FerrumError,
    GeometryMismatchError,
    InvalidHandleError,
    OutOfBlocksError,
    OutOfHostMemoryError,
    OutOfRowsError,
    SwappedOutError,
    UnknownRequestError,
)
from ferrum_jax.manager.balance import CacheMove
from ferrum_jax.manager.moves import load_of
from ferrum_jax.manager.pool import DevicePool, RowShape, stored_for
from ferrum_jax.ops import transfer
from ferrum_jax.state import BlockPool
from tests.support.managers import (
    BLOCK_BYTES,
    PREFIXES,
    make_manager,
    refused,
    start,
    tokens_of,
    write_tokens,
)
from tests.support.multi_device import (
    CPU,
    BrokenCopyError,
    all_of,
    break_arrival,
    break_export,
    break_import,
    make_multi,
)
from tests.support.parts import devices_of

PATIENCE_SECONDS = 60


def begin(manager, request_id, num_tokens, device=None, **limits):
    """Allocates a request and writes tokens that no other one has."""
    handle = start(manager, request_id, num_tokens, device=device, **limits)
    write_tokens(manager, handle, tokens_for(request_id, num_tokens))
    return handle


def begin_with(manager, request_id, prompt, device):
    """Allocates a request with a prompt, computes it, and keeps it for later prompts."""
    request = manager.new_request(request_id, prompt_token_ids=prompt, device=device)
    handle = manager.allocate(request)
    write_tokens(manager, handle, prompt)
    manager.commit(handle)
    return handle


def tokens_for(request_id, num_tokens):
    first = 1 + 100 * sum(map(ord, str(request_id)))
    return list(range(first, first + num_tokens))


def where(manager):
    """Which requests are on which device."""
    return {name: manager.get_cache_device(name) for name, _ in manager.list_handles()}


def used(manager):
    """Blocks in use on each device."""
    stats = manager.device_stats().values()
    return [part.total_blocks - part.free_blocks for part in stats]


# Where a request goes.


def test_every_target_device_has_a_pool_of_its_own():
    manager = make_multi(3)
    assert manager.supported_devices() == CPU[:3]
    for device in CPU[:3]:
        handle = begin(manager, device.index, 4, device)
        assert handle.device() == device == manager.get_cache_device(device.index)
        assert [d.id for d in handle.key_cache(0).devices()] == [device.index]
        assert tokens_of(handle) == tokens_for(device.index, 4)
    assert used(manager) == [2, 2, 2]
    assert manager.get_cache_device("nobody") is None


def test_requests_go_to_the_first_device_in_the_order_of_preference_that_has_room():
    manager = make_multi(3)
    manager.set_device_preference([CPU[2], CPU[0]])
    for name in "abcd":
        start(manager, name, 12)
    assert where(manager) == {"a": CPU[2], "b": CPU[2], "c": CPU[0], "d": CPU[0]}
    late = manager.new_request("e", 12)
    assert not manager.can_allocate(late)
    with pytest.raises(OutOfBlocksError, match=r"4 blocks.*on cpu:2; nor has cpu:0 room"):
        manager.allocate(late)
    manager.deallocate("c")
    assert manager.can_allocate(late)
    assert manager.allocate(late).device() == CPU[0]


def test_a_request_may_name_any_device_and_goes_elsewhere_only_if_that_is_full():
    manager = make_multi(3)
    manager.set_device_preference([CPU[0]])
    assert start(manager, "a", 15, device=CPU[1]).device() == CPU[1]
    assert start(manager, "b", 15, device=CPU[1]).device() == CPU[0]


def test_rows_run_out_as_blocks_do():
    manager = make_multi(2, geometry={"max_seqs": 1})
    assert start(manager, "a").device() == CPU[0]
    assert start(manager, "b").device() == CPU[1]
    assert refused(start, manager, "c") is OutOfRowsError


def test_a_device_without_a_pool_is_refused_in_words_that_name_those_with_one():
    manager = make_multi(2)
    start(manager, "a")
    unknown = dataclasses.replace(manager.new_request("b"), device=CPU[3])
    assert not manager.can_allocate(unknown)
    for call in (
        lambda: manager.new_request("b", device=CPU[3]),
        lambda: manager.allocate(unknown),
        lambda: manager.move_cache("a", CPU[3]),
        lambda: manager.set_device_preference([CPU[3]]),
        lambda: manager.run(lambda state, _: (state, None), [], device=CPU[3]),
    ):
        with pytest.raises(GeometryMismatchError, match="cpu:3; there are pools on cpu:0, cpu:1"):
            call()


@pytest.mark.parametrize("devices", [[], [CPU[0], CPU[0]]])
def test_an_order_of_preference_names_each_device_once(devices):
    with pytest.raises(ValueError, match="devices must name at least one, and none twice"):
        make_multi(2).set_device_preference(devices)


def test_a_config_of_one_device_or_of_a_device_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="enable_multi_device must be true"):
        make_multi(2, enable_multi_device=False)
    with pytest.raises(ValueError, match="no device cpu:7"):
        make_multi(2, target_devices=(CPU[0], Device("cpu", 7)))


def test_a_refusal_counts_once_and_names_what_no_device_could_take():
    manager = make_multi(3)
    begin(manager, "a", 3, CPU[1])
    before = all_of(manager)
    asked = manager.new_request("b")
    for request, error in (
        (dataclasses.replace(asked, request_id="a"), DuplicateRequestError),
        (dataclasses.replace(asked, head_dim=7), GeometryMismatchError),
        (dataclasses.replace(asked, dtype="int8"), GeometryMismatchError),
    ):
        count = manager.stats().allocation_failures
        assert not manager.can_allocate(request)
        assert refused(manager.allocate, request) is error
        assert manager.stats().allocation_failures == count + 1
    assert all_of(manager) == before


def test_nobody_is_swapped_out_while_another_device_has_room():
    manager = make_multi(2, preemption_policy=LruEvictionPolicy())
    begin(manager, "low", 15, CPU[0], priority=Priority.Low)
    urgent = begin(manager, "urgent", 15, priority=Priority.High)
    assert urgent.device() == CPU[1]
    most = start(manager, "most urgent", 15, priority=Priority.Critical)
    assert most.device() == CPU[0]
    assert manager.get_handle("low").key_cache(0) is None
    assert manager.get_cache_device("low") == CPU[0]
    assert manager.stats().preemption_count == 1
    manager.deallocate("most urgent")
    manager.swap_in("low")
    assert tokens_of(manager.get_handle("low")) == tokens_for("low", 15)


# Moving.


@pytest.mark.parametrize("grows", [False, True])
def test_a_cache_moves_bit_for_bit_with_all_its_handles(dtype, grows):
    sizes = {"initial_blocks": 2} if grows else {}
    manager = make_multi(3, geometry={"dtype": dtype}, **sizes)
    begin(manager, "other", 7, CPU[2])
    handle = begin(manager, "a", 11, CPU[0])
    clone, name = handle.clone_handle(), handle.cache_id()
    bits = [np.asarray(part) for layer in range(2) for part in handle.kv_cache(layer)]
    for target in (CPU[2], CPU[1], CPU[1], CPU[0], CPU[2]):
        manager.move_cache("a", target)
        assert manager.get_cache_device("a") == target == clone.device() == handle.device()
        now = [np.asarray(part) for layer in range(2) for part in clone.kv_cache(layer)]
        assert [part.tobytes() for part in now] == [part.tobytes() for part in bits]
        assert [d.id for d in handle.key_cache(1).devices()] == [target.index]
        assert sum(used(manager)) == 3 + 4
        manager.check()
    assert handle.cache_id() == name and handle.is_valid()
    manager.extend(handle, 2)
    write_tokens(manager, handle, [60_000, 60_001], begin=11)
    assert tokens_of(clone) == [*tokens_for("a", 11), 60_000, 60_001]
    assert tokens_of(manager.get_handle("other")) == tokens_for("other", 7)
    manager.deallocate("a")
    assert refused(handle.num_tokens) is InvalidHandleError


def test_a_request_without_tokens_moves_too():
    manager = make_multi(2)
    handle = start(manager, "a")
    manager.move_cache("a", CPU[1])
    manager.extend(handle, 4)
    assert (handle.device(), used(manager)) == (CPU[1], [0, 2])
    manager.check()


def test_a_move_that_cannot_fit_changes_nothing():
    manager = make_multi(2, geometry={"max_seqs": 2})
    begin(manager, "a", 15, CPU[0])
    begin(manager, "b", 12, CPU[1])
    begin(manager, "c", 1, CPU[0])
    before = all_of(manager)
    with pytest.raises(OutOfBlocksError, match="5 blocks are needed, and 4 of 8"):
        manager.move_cache("a", CPU[1])
    assert refused(manager.move_cache, "nobody", CPU[1]) is UnknownRequestError
    manager.move_cache("a", CPU[0])
    assert all_of(manager) == before
    begin(manager, "d", 0, CPU[1])
    before = all_of(manager)
    assert refused(manager.move_cache, "c", CPU[1]) is OutOfRowsError
    assert all_of(manager) == before


def test_a_move_swaps_nobody_out():
    manager = make_multi(2, preemption_policy=LruEvictionPolicy())
    begin(manager, "low", 15, CPU[1], priority=Priority.Low)
    begin(manager, "high", 15, CPU[0], priority=Priority.High)
    assert refused(manager.move_cache, "high", CPU[1]) is OutOfBlocksError
    assert manager.stats().preemption_count == 0


@pytest.mark.parametrize(
    ("break_it", "after"),
    [(break_export, 0), (break_import, 0), (break_import, 2), (break_arrival, 0)],
    ids=["leaving", "arriving", "half arrived", "on the device"],
)
def test_a_copy_that_fails_loses_nothing_on_either_device(monkeypatch, break_it, after):
    manager = make_multi(2)
    monkeypatch.setattr(transfer, "CHUNK_BYTES", BLOCK_BYTES)
    handle = begin(manager, "a", 14, CPU[0])
    other = begin(manager, "b", 8, CPU[1])
    with monkeypatch.context() as broken:
        break_it(broken, after)
        with pytest.raises(BrokenCopyError):
            manager.move_cache("a", CPU[1])
    manager.check()
    assert (handle.device(), used(manager)) == (CPU[0], [5, 3])
    assert tokens_of(handle) == tokens_for("a", 14)
    assert tokens_of(other) == tokens_for("b", 8)
    manager.move_cache("a", CPU[1])
    assert tokens_of(handle) == tokens_for("a", 14)


def test_the_source_is_freed_only_after_the_bytes_have_arrived(monkeypatch):
    manager, order = make_multi(2), []
    begin(manager, "a", 4, CPU[0])
    wait, free = jax.block_until_ready, DevicePool.free

    def note_arrival(tree):
        done = wait(tree)
        if isinstance(tree, BlockPool):
            order.append("arrived")
        return done

    def note_end(cache, seq_ids):
        order.append(f"freed on {cache.device}")
        free(cache, seq_ids)

    monkeypatch.setattr(jax, "block_until_ready", note_arrival)
    monkeypatch.setattr(DevicePool, "free", note_end)
    manager.move_cache("a", CPU[1])
    assert order == ["arrived", "freed on cpu:0"]


def test_blocks_of_a_request_that_left_are_erased():
    manager = make_multi(2)
    begin(manager, "a", 8, CPU[0])
    manager.move_cache("a", CPU[1])
    state = manager.run(lambda state, _: (state, state), [], device=CPU[0])
    assert not np.asarray(state.pool.k).any() and not np.asarray(state.pool.v).any()


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_swapped_out_moves_as_it_is_and_comes_back_over_there(tmp_path, on_disk):
    tiers = TierConfig(host_budget_bytes=0, disk_directory=tmp_path) if on_disk else TierConfig()
    manager = make_multi(2, tiers=tiers)
    handle = begin(manager, "a", 8, CPU[0])
    manager.swap_out("a")
    manager.move_cache("a", CPU[1])
    assert manager.get_cache_device("a") == CPU[1]
    assert (handle.num_tokens(), used(manager)) == (8, [0, 0])
    stats = manager.device_stats()
    assert stats[CPU[0]].host_bytes == 0 < stats[CPU[1]].host_bytes
    manager.check()
    manager.swap_in("a")
    assert handle.device() == CPU[1]
    assert tokens_of(handle) == tokens_for("a", 8)


def test_what_is_swapped_out_stays_where_it_is_if_the_other_host_memory_is_full():
    manager = make_multi(2, tiers=TierConfig(host_budget_bytes=3 * BLOCK_BYTES))
    begin(manager, "a", 8, CPU[0])
    begin(manager, "b", 4, CPU[1])
    manager.swap_out("a")
    manager.swap_out("b")
    before = all_of(manager)
    assert refused(manager.move_cache, "a", CPU[1]) is OutOfHostMemoryError
    assert all_of(manager) == before
    manager.swap_in("a")
    assert tokens_of(manager.get_handle("a")) == tokens_for("a", 8)


def test_a_prompt_stays_cached_where_it_was_and_is_cached_where_its_request_goes():
    manager = make_multi(2, enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    prompt = tokens_for("a", 10)
    begin_with(manager, "a", prompt, CPU[0])
    manager.move_cache("a", CPU[1])
    manager.check()
    lookups = manager.explain_lookup(prompt)
    assert [lookups[device].num_cached_tokens for device in CPU[:2]] == [9, 9]
    assert [part.evictable_blocks for part in manager.device_stats().values()] == [3, 0]
    for device in CPU[:2]:
        again = manager.allocate(
            manager.new_request(device.index, prompt_token_ids=prompt, device=device)
        )
        assert again.num_cached_tokens == 9
        assert tokens_of(again)[:9] == prompt[:9]
    assert manager.stats().cache_hit_rate == pytest.approx(18 / 30)


def test_cached_prefixes_make_room_for_a_request_that_comes():
    manager = make_multi(2, enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    prompt = tokens_for("p", 15)
    begin_with(manager, "p", prompt, CPU[1])
    manager.deallocate("p")
    begin(manager, "a", 15, CPU[0])
    manager.move_cache("a", CPU[1])
    assert tokens_of(manager.get_handle("a")) == tokens_for("a", 15)
    assert manager.device_stats()[CPU[1]].eviction_count == 2
    manager.check()


def test_a_pool_of_one_platform_takes_the_bits_of_another_ones():
    manager = make_multi(1, geometry={"dtype": "bfloat16"})
    handle = begin(manager, "a", 8)
    cache = handle.live_request().pool
    kept = cache.queries.stream_row(handle.live_request().seq_id).gathered()
    gpu_format = transfer.BlockFormat(
        kept.format.dtype,
        tuple(
            (name, jax.ShapeDtypeStruct(part.shape, jnp.bfloat16))
            for name, part in kept.format.arrays
        ),
    )
    chunks = [
        {name: np.asarray(part).view(jnp.bfloat16) for name, part in chunk.items()}
        for chunk in kept.chunks
    ]
    from_gpu = transfer.BlockPayload(gpu_format, tuple(chunks))
    assert gpu_format != kept.format
    again = cache.restore_row(RowShape(8), stored_for(cache.state.pool, from_gpu))
    for layer in range(2):
        for got, want in zip(
            cache.queries.read_row(again, layer), handle.kv_cache(layer), strict=True
        ):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_managers_of_different_geometries_do_not_exchange_requests():
    one, other = make_manager(), make_manager(geometry={"head_dim": 4})
    start(one, "a", 4)
    assert refused(one.move_to, "a", other) is GeometryMismatchError
    other = make_manager()
    start(other, "a")
    assert refused(one.move_to, "a", other) is DuplicateRequestError


# Working on one device.


def test_a_step_works_on_the_requests_of_one_device():
    manager = make_multi(2)
    a, b = begin(manager, "a", 3, CPU[0]), begin(manager, "b", 3, CPU[1])
    with pytest.raises(GeometryMismatchError, match="names cpu:0, cpu:1"):
        manager.run(lambda state, _: (state, None), [a, b])
    with pytest.raises(GeometryMismatchError, match="names cpu:0, cpu:1"):
        manager.extend_all([a, b], 1)
    with pytest.raises(GeometryMismatchError, match="names none"):
        manager.run(lambda state, _: (state, None), [None])
    with pytest.raises(GeometryMismatchError, match="names cpu:0, cpu:1"):
        manager.run(lambda state, _: (state, None), [a], device=CPU[1])
    manager.move_cache("b", CPU[0])
    rows_of = manager.run(lambda state, seq_ids: (state, seq_ids.tolist()), [a, None, b])
    assert len(set(rows_of)) == 3 and rows_of[1] == -1
    manager.extend_all([a, b], 4)
    manager.extend_all([], 4)
    assert (a.num_tokens(), b.num_tokens()) == (7, 7)


def test_a_step_runs_where_its_requests_are():
    manager = make_multi(3)
    step = jax.jit(lambda state, seq_ids: (state, state.tables.seq_lens[seq_ids]), donate_argnums=0)
    for device in reversed(CPU[:3]):
        handle = begin(manager, device.index, 2 + device.index, device)
        lengths = manager.run(step, [handle])
        assert [d.id for d in lengths.devices()] == [device.index]
        assert lengths.tolist() == [2 + device.index]


def test_a_step_may_lengthen_its_rows():
    manager = make_multi(2)
    handle = begin(manager, "a", 3, CPU[1])

    def step(state, seq_ids):
        return fj.extend(state, seq_ids, 4, max_new_tokens=4)

    assert bool(manager.run(step, [handle], extends=True, reserve_tokens=4))
    assert (handle.num_tokens(), used(manager)) == (7, [0, 3])
    manager.check()


def test_handles_that_are_not_of_a_live_request_here_are_refused():
    manager, stranger = make_multi(2), start(make_manager(), "a", 1)
    gone = start(manager, "b", 1)
    manager.deallocate("b")
    away = begin(manager, "c", 4, CPU[1])
    manager.swap_out("c")
    for handle, error in (
        (stranger, InvalidHandleError),
        (gone, InvalidHandleError),
        (object(), InvalidHandleError),
        (away, SwappedOutError),
    ):
        assert refused(manager.extend, handle, 1) is error
        assert refused(manager.commit, handle) is error
        assert refused(manager.run, lambda state, _: (state, None), [handle]) is error
    start(manager, "a", 1)
    assert refused(manager.extend, stranger, 1) is InvalidHandleError
    for call in (manager.deallocate, manager.swap_in, manager.swap_out):
        assert refused(call, "nobody") is UnknownRequestError
    assert manager.get_handle("nobody") is None


def test_a_step_must_not_use_the_manager():
    manager = make_multi(2)
    handle = begin(manager, "a", 3)
    for call in (
        lambda: manager.move_cache("a", CPU[1]),
        lambda: manager.allocate(manager.new_request("b")),
        lambda: manager.extend(handle, 1),
        manager.stats,
    ):
        with pytest.raises(RuntimeError, match="inside a step"):
            manager.run(lambda state, _, call=call: (state, call()), [handle])
    manager.move_cache("a", CPU[1])
    assert tokens_of(handle) == tokens_for("a", 3)


# Balance.


def test_rebalancing_moves_the_fewest_bytes_and_tells_which():
    manager = make_multi(3)
    for name, num_tokens in {"a": 9, "b": 6, "c": 3, "d": 3}.items():
        begin(manager, name, num_tokens, CPU[0])
    assert used(manager) == [7, 0, 0]
    plan = manager.plan_rebalance(tolerance=0.2)
    assert used(manager) == [7, 0, 0] and manager.last_rebalance == ()
    manager.rebalance_devices(tolerance=0.2)
    assert manager.last_rebalance == tuple(plan)
    assert sum(move.num_bytes for move in plan) == 4 * BLOCK_BYTES
    assert sorted(used(manager)) == [2, 2, 3]
    for name, num_tokens in {"a": 9, "b": 6, "c": 3, "d": 3}.items():
        assert tokens_of(manager.get_handle(name)) == tokens_for(name, num_tokens)
    manager.check()
    manager.rebalance_devices(0.2)
    assert manager.last_rebalance == ()


def test_rebalancing_leaves_devices_alone_that_are_not_preferred():
    manager = make_multi(3)
    for name in "abc":
        begin(manager, name, 6, CPU[0])
    begin(manager, "d", 3, CPU[2])
    manager.set_device_preference([CPU[1], CPU[0]])
    manager.rebalance_devices()
    assert manager.get_cache_device("d") == CPU[2]
    assert sorted(used(manager)[:2]) == [2, 4] and used(manager)[2] == 1


def test_rebalancing_counts_cached_prefixes_as_room_and_moves_whole_requests():
    manager = make_multi(2, enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    prompt = tokens_for("p", 12)
    for name in "ab":
        begin_with(manager, name, prompt, CPU[0])
    begin_with(manager, "gone", prompt[::-1], CPU[1])
    manager.deallocate("gone")
    load = load_of(devices_of(manager)[CPU[0]])
    assert [cache.num_bytes for cache in load.caches] == [4 * BLOCK_BYTES] * 2
    assert sum(cache.freed_bytes for cache in load.caches) == 0  # What one leaves, the other holds.
    assert load_of(devices_of(manager)[CPU[1]]).used_bytes == 0
    assert manager.plan_rebalance(0.1) == []
    manager.check()


def test_a_copy_that_fails_ends_a_rebalance_with_what_is_done_and_nothing_lost(monkeypatch):
    manager = make_multi(2)
    for name in "abcd":
        begin(manager, name, 6, CPU[0])
    with monkeypatch.context() as broken:
        break_import(broken, after=1)
        with pytest.raises(BrokenCopyError):
            manager.rebalance_devices(0.0)
    manager.check()
    (done,) = manager.last_rebalance
    assert done.num_bytes == 2 * BLOCK_BYTES and used(manager) == [6, 2]
    for name in "abcd":
        assert tokens_of(manager.get_handle(name)) == tokens_for(name, 6)
    manager.rebalance_devices(0.0)
    assert used(manager) == [4, 4]


def test_a_move_that_has_become_impossible_or_needless_is_left_out(monkeypatch):
    manager = make_multi(2)
    for name, num_tokens, device in (("a", 6, 0), ("b", 6, 0), ("c", 3, 1), ("big", 15, 1)):
        begin(manager, name, num_tokens, CPU[device])
    move = {"source": CPU[0], "target": CPU[1], "num_bytes": 1}
    plan = [CacheMove(request_id=name, **move) for name in ("a", "nobody", "c", "b")]
    monkeypatch.setattr(manager, "plan_rebalance", lambda tolerance: plan)
    manager.rebalance_devices()
    assert [done.request_id for done in manager.last_rebalance] == ["a"]
    assert where(manager) == {"b": CPU[0], "c": CPU[1], "big": CPU[1], "a": CPU[1]}


@pytest.mark.parametrize("tolerance", [-0.1, 1.1, float("nan")])
def test_a_tolerance_is_a_share(tolerance):
    with pytest.raises(ValueError, match="tolerance"):
        make_multi(1).rebalance_devices(tolerance)


# The whole.


def test_what_the_devices_say_adds_up_to_the_whole():
    manager = make_multi(3, initial_blocks=2)
    for name, device in (("a", 0), ("b", 1), ("c", 1)):
        begin(manager, name, 5, CPU[device])
    manager.swap_out("c")
    manager.move_cache("a", CPU[2])
    refused(start, manager, "a")
    parts, whole = manager.device_stats(), manager.stats()
    assert list(parts) == CPU[:3]
    for field in dataclasses.fields(whole):
        numbers = [getattr(part, field.name) for part in parts.values()]
        assert getattr(whole, field.name) == sum(numbers), field.name
    assert (whole.active_caches, whole.allocation_count, whole.allocation_failures) == (3, 3, 1)
    assert whole.host_bytes == 2 * BLOCK_BYTES


def test_dropped_handles_are_collected_on_every_device():
    manager = make_multi(2)
    kept = start(manager, "kept", 3, device=CPU[1])
    for name, device in (("a", 0), ("b", 1)):
        start(manager, name, 4, device=CPU[device])
    got = manager.gc()
    assert (got.caches_freed, got.memory_freed) == (2, 4 * BLOCK_BYTES)
    assert where(manager) == {"kept": CPU[1]} and kept.is_valid()


def test_pressure_is_that_of_all_pools_together():
    manager, told = make_multi(2), []
    manager.set_pressure_callback(lambda level: (told.append(level), manager.stats()))
    handles = [start(manager, "a", 15), start(manager, "b", 9, device=CPU[0])]
    assert told == []  # The first pool is full, the second empty.
    handles.append(start(manager, "c", 12))
    assert told.pop() == MemoryPressure.Medium and not told  # 12 of 16 blocks.
    manager.extend(handles[2], 3)
    assert told.pop() == MemoryPressure.High and not told
    for name in "ab":
        refused(manager.move_cache, name, CPU[1])
    assert not told
    manager.deallocate("c")
    assert told.pop() == MemoryPressure.Low and not told


def test_a_broken_book_is_noticed():
    manager = make_multi(2)
    handle = begin(manager, "a", 4)
    manager.check()
    handle.live_request().pool = devices_of(manager)[CPU[1]].pool
    with pytest.raises(AssertionError, match="not its own"):
        manager.check()


# Threads.


def run_together(*jobs):
    """Runs each job in a thread of its own, and raises what one raises."""
    failures = []

    def work(job):
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a deadlock"
    if failures:
        raise failures[0]


def test_a_long_step_on_one_device_does_not_hold_up_another():
    manager = make_multi(2)
    a, b = begin(manager, "a", 3, CPU[0]), begin(manager, "b", 3, CPU[1])
    has_begun, may_end = threading.Event(), threading.Event()

    def long_step(state, seq_ids):
        has_begun.set()
        assert may_end.wait(PATIENCE_SECONDS)
        return state, None

    def meanwhile():
        assert has_begun.wait(PATIENCE_SECONDS)
        manager.extend(b, 2)
        write_tokens(manager, b, [7, 8], begin=3)
        assert tokens_of(manager.get_handle("b")) == [*tokens_for("b", 3), 7, 8]
        manager.deallocate("b")
        may_end.set()

    run_together(lambda: manager.run(long_step, [a]), meanwhile)
    manager.check()


def test_requests_may_be_used_by_threads_while_another_one_moves_them():
    manager = make_multi(3, geometry={"max_seqs": 8}, max_blocks=12)
    names, finished = ["a", "b", "c"], threading.Event()

    def live(name):
        try:
            for _ in range(2):
                handle = begin(manager, name, 5)
                for length in range(5, 10):
                    manager.extend(handle, 1)
                    write_tokens(manager, handle, [60_000 + length], begin=length)
                    want = [*tokens_for(name, 5), *range(60_005, 60_001 + length)]
                    assert tokens_of(handle)[:length] == want[:length]
                    assert manager.get_cache_device(name) in CPU
                    assert handle.stats().tokens_stored == handle.num_tokens() == length + 1
                manager.deallocate(name)
        finally:
            finished.set()

    def move():
        for turn in range(10_000):
            if finished.is_set():
                return
            try:
                manager.move_cache(names[turn % 3], CPU[turn // 3 % 3])
            except UnknownRequestError:
                pass
            if turn % 50 == 0:
                manager.rebalance_devices(0.3)

    run_together(move, *[lambda name=name: live(name) for name in names])
    assert where(manager) == {} and used(manager) == [0, 0, 0]
    manager.check()


def test_an_id_that_two_threads_want_is_given_once():
    manager, winners = make_multi(3), []

    def want(device):
        try:
            winners.append(start(manager, "a", 3, device=device))
        except FerrumError as error:
            assert isinstance(error, DuplicateRequestError)

    run_together(*[lambda device=device: want(device) for device in CPU[:3]])
    assert len(winners) == 1
