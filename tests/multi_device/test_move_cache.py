"""`move_cache`: a request moves to another device with every bit, or nothing changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import (
    CorruptFileError,
    DuplicateRequestError,
    GeometryMismatchError,
    InvalidHandleError,
    OutOfBlocksError,
    OutOfRowsError,
    UnknownRequestError,
)
from ferrum_jax.manager.pool import RowShape, stored_for
from ferrum_jax.ops import transfer
from ferrum_jax.types import TokenFormat
from tests.support.managers import (
    BLOCK_BYTES,
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


def test_restore_row_takes_the_bits_of_another_platform():
    manager = make_multi(1, geometry={"dtype": "bfloat16"})
    handle = begin(manager, "a", 8)
    cache = handle.live_request().pool
    (kept,) = cache.queries.stream_seq(handle.live_request().seq_id)
    kept = kept.gathered()
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
    again = cache.restore_row(RowShape(8), stored_for(cache.state, [from_gpu]))
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
