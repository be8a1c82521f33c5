"""`move_cache`: a request moves to another device with every bit, or nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax import LruEvictionPolicy, Priority
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    CorruptFileError,
    DuplicateRequestError,
    GeometryMismatchError,
    InvalidHandleError,
    OutOfBlocksError,
    OutOfHostMemoryError,
    OutOfRowsError,
    UnknownRequestError,
)
from ferrum_jax.manager.pool import RowShape, stored_for
from ferrum_jax.ops import transfer
from ferrum_jax.types import TokenFormat
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
    DAMAGES,
    all_of,
    begin,
    begin_with,
    damage,
    make_multi,
    tokens_for,
    used,
)

PRUNING = CompressionMethod(token_format=TokenFormat.Native, num_sinks=1, num_recent=2)


@pytest.mark.parametrize("grows", [False, True])
def test_move_cache_keeps_every_bit_and_every_handle(dtype, grows):
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


def test_move_cache_moves_a_request_without_tokens():
    manager = make_multi(2)
    handle = start(manager, "a")
    manager.move_cache("a", CPU[1])
    manager.extend(handle, 4)
    assert (handle.device(), used(manager)) == (CPU[1], [0, 2])
    manager.check()


def test_move_cache_that_does_not_fit_changes_nothing():
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


def test_move_cache_preempts_no_request():
    manager = make_multi(2, preemption_policy=LruEvictionPolicy())
    begin(manager, "low", 15, CPU[1], priority=Priority.Low)
    begin(manager, "high", 15, CPU[0], priority=Priority.High)
    assert refused(manager.move_cache, "high", CPU[1]) is OutOfBlocksError
    assert manager.stats().preemption_count == 0


def test_move_cache_erases_the_blocks_that_it_frees():
    manager = make_multi(2)
    begin(manager, "a", 8, CPU[0])
    manager.move_cache("a", CPU[1])
    state = manager.run(lambda state, _: (state, state), [], device=CPU[0])
    assert not np.asarray(state.pool.k).any() and not np.asarray(state.pool.v).any()


@pytest.mark.parametrize("on_disk", [False, True])
def test_move_cache_of_a_swapped_out_request_is_restored_on_the_new_device(tmp_path, on_disk):
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


def test_move_cache_of_a_swapped_out_request_needs_host_memory_of_the_new_device():
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


def test_move_cache_leaves_the_prompt_cached_on_both_devices():
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


def test_move_cache_evicts_cached_prefixes_to_make_room():
    manager = make_multi(2, enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    prompt = tokens_for("p", 15)
    begin_with(manager, "p", prompt, CPU[1])
    manager.deallocate("p")
    begin(manager, "a", 15, CPU[0])
    manager.move_cache("a", CPU[1])
    assert tokens_of(manager.get_handle("a")) == tokens_for("a", 15)
    assert manager.device_stats()[CPU[1]].eviction_count == 2
    manager.check()


def test_restore_row_takes_the_bits_of_another_platform():
    manager = make_multi(1, geometry={"dtype": "bfloat16"})
    handle = begin(manager, "a", 8)
    cache = handle.live_request().pool
    kept = cache.queries.stream_row(handle.live_request().seq_id).gathered()
    gpu_format = transfer.BlockShape(
        kept.block_shape.dtype,
        tuple(
            (name, jax.ShapeDtypeStruct(part.shape, jnp.bfloat16))
            for name, part in kept.block_shape.arrays
        ),
    )
    chunks = [
        {name: np.asarray(part).view(jnp.bfloat16) for name, part in chunk.items()}
        for chunk in kept.chunks
    ]
    from_gpu = transfer.BlockPayload(gpu_format, tuple(chunks))
    assert gpu_format != kept.block_shape
    again = cache.restore_row(RowShape(8), stored_for(cache.state.pool, from_gpu))
    for layer in range(2):
        for got, want in zip(
            cache.queries.read_row(again, layer), handle.kv_cache(layer), strict=True
        ):
            assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_move_to_refuses_another_geometry_and_a_duplicate_request():
    one, other = make_manager(), make_manager(geometry={"head_dim": 4})
    start(one, "a", 4)
    assert refused(one.move_to, "a", other) is GeometryMismatchError
    other = make_manager()
    start(other, "a")
    assert refused(one.move_to, "a", other) is DuplicateRequestError


def test_move_cache_keeps_every_bit_of_a_compressed_request():
    manager = make_multi(2)
    for name, device in (("a", CPU[0]), ("b", CPU[1])):
        begin(manager, name, 12, device)
    manager.compress_cache("a", 0.5, PRUNING)
    handle = manager.get_handle("a")
    kept = [np.asarray(part) for part in handle.kv_cache(1)]
    assert len(kept[0]) == 6 and handle.num_tokens() == 12
    for target in (CPU[1], CPU[0], CPU[1]):
        manager.move_cache("a", target)
        now = [np.asarray(part) for part in handle.kv_cache(1)]
        assert [part.tobytes() for part in now] == [part.tobytes() for part in kept]
    manager.compress_cache("b", 0.25, PRUNING)
    stats = manager.compression_stats()
    assert stats.compressed_caches == 2
    assert stats.avg_compression_ratio == pytest.approx((0.5 + 0.25) / 2)
    assert stats.memory_saved_bytes == 5 * BLOCK_BYTES
    assert stats.avg_compression_time_ms > 0
    manager.check()


@pytest.mark.parametrize("how", DAMAGES)
def test_move_cache_and_swap_in_of_a_damaged_file_change_nothing(tmp_path, how):
    manager = make_multi(2, tiers=TierConfig(host_budget_bytes=0, disk_directory=tmp_path))
    begin(manager, "a", 8, CPU[0])
    other = begin(manager, "b", 4, CPU[1])
    manager.swap_out("a")
    (path,) = (tmp_path / "cpu-0").glob("*.kvblocks")
    good = damage(path, how)
    before = all_of(manager)
    for call in (lambda: manager.move_cache("a", CPU[1]), lambda: manager.swap_in("a")):
        assert refused(call) is CorruptFileError
        assert all_of(manager) == before
    path.write_bytes(good)
    manager.move_cache("a", CPU[1])
    manager.swap_in("a")
    assert tokens_of(manager.get_handle("a")) == tokens_for("a", 8)
    manager.swap_out("a")
    (path,) = (tmp_path / "cpu-1").glob("*.kvblocks")
    damage(path, how)
    manager.deallocate("a")
    assert refused(manager.swap_in, "a") is UnknownRequestError
    write_tokens(manager, other, [7], begin=3)
    assert tokens_of(other)[3:] == [7]
    manager.check()
