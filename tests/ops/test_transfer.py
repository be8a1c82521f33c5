"""Export and import of blocks: bit for bit, in order, in place, in chunks of bounded size."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.errors import GeometryMismatchError
from ferrum_jax.ops import transfer
from ferrum_jax.ops.transfer import BlockPayload, BlockShape, export_blocks, import_blocks
from ferrum_jax.payload import KeysAndValues
from ferrum_jax.state import BlockPool
from ferrum_jax.types import NULL_BLOCK
from tests.support.caches import same_bits, snapshot, tiny_spec
from tests.support.pools import keys, kv_pool, pool_bytes, values, with_arrays

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "int8"]


def pool_of(dtype="float32", seed=0, **changes) -> BlockPool:
    """A pool of random bits: among them NaNs of all kinds, and denormal numbers."""
    pool = fj.init(tiny_spec(dtype=dtype, num_kv_heads=2, head_dim=4, **changes)).pool
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda array: jnp.array(random_bits(rng, array)), pool)


def random_bits(rng, like) -> np.ndarray:
    return np.frombuffer(rng.bytes(like.nbytes), like.dtype).reshape(like.shape)


def stacked(payload: BlockPayload) -> KeysAndValues:
    """All blocks of a payload, as bits."""
    return KeysAndValues(
        **{
            name: np.concatenate([bits(chunk[name]) for chunk in payload.chunks])
            for name, _ in payload.block_shape.arrays
        }
    )


def bits(array) -> np.ndarray:
    array = np.array(array, copy=True)
    return array.reshape(array.shape[0], -1).view(np.uint8)


@pytest.fixture(params=["numpy", "pinned_host", "unpinned"])
def route(request, monkeypatch) -> str:
    """Each way out of a pool: that of CPU, that of accelerators, and that of odd ones."""
    if request.param != "numpy":
        monkeypatch.setattr(transfer, "_is_in_host_memory", lambda pool: False)
    if request.param == "unpinned":
        monkeypatch.setattr(transfer, "_HOST_MEMORY", "nowhere")
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Four blocks at a time."""
    chunk_bytes = 4 * BlockShape.of(pool_of()).block_bytes
    monkeypatch.setattr(transfer, "CHUNK_BYTES", chunk_bytes)
    return chunk_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_export_and_import_keep_every_bit(dtype, route):
    source, target = pool_of(dtype, seed=1), pool_of(dtype, seed=2)
    want = {name: bits(array) for name, array in target.arrays.items()}
    for name in want:
        want[name][[0, 11, 4]] = bits(source.arrays[name])[[7, 2, 11]]
    payload = export_blocks(source, [7, 2, 11])
    target = import_blocks(target, [0, 11, 4], payload)
    for name in want:
        np.testing.assert_array_equal(bits(target.arrays[name]), want[name])


def test_import_works_jitted_and_eager(transform):
    source, target = pool_of(seed=1), pool_of(seed=2)
    want, payload = bits(keys(target)), export_blocks(source, [7, 2])
    want[[0, 4]] = bits(keys(source))[[7, 2]]
    after = transform(lambda pool: import_blocks(pool, [0, 4], payload))(target)
    np.testing.assert_array_equal(bits(keys(after)), want)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_export_and_import_keep_every_nan(dtype, route):
    pool = pool_of(dtype)
    unsigned = np.dtype(f"uint{8 * pool.dtype.itemsize}")
    info = jnp.finfo(pool.dtype)
    exponent = ((1 << info.nexp) - 1) << info.nmant
    size = keys(pool).size
    nans = (exponent | (1 + np.arange(size) % ((1 << info.nmant) - 1))).astype(unsigned)
    nans[1::2] |= unsigned.type(1 << (8 * unsigned.itemsize - 1))
    stored = nans.view(pool.stored_dtype).reshape(keys(pool).shape)
    pool = with_arrays(pool, jnp.array(stored), values(pool))
    payload = export_blocks(pool, np.arange(12))
    back = import_blocks(pool_of(dtype, seed=3), np.arange(12), payload)
    np.testing.assert_array_equal(bits(keys(back)), bits(stored))


@hypothesis.settings(max_examples=60)
@hypothesis.given(st.permutations(range(12)), st.permutations(range(12)), st.integers(0, 12))
def test_import_takes_any_blocks_to_any_ids(sources, targets, num_blocks):
    source, target = pool_of(seed=1), pool_of(seed=2)
    want = bits(values(target))
    want[targets[:num_blocks]] = bits(values(source))[sources[:num_blocks]]
    payload = export_blocks(source, sources, num_blocks)
    assert payload.num_blocks == num_blocks
    np.testing.assert_array_equal(bits(values(import_blocks(target, targets, payload))), want)


def test_chunks_of_any_number_of_blocks_are_full_and_in_order(route, small_chunks):
    pool, ids = pool_of(), np.asarray([5, 0, 11, 3, 8, 1, 10, 2, 4, 7, 9, 6], np.int32)
    block_bytes = pool_bytes(pool) // pool.num_blocks
    for num_blocks in range(13):
        payload = export_blocks(pool, ids[:num_blocks])
        assert len(payload.chunks) == num_blocks // 4 + (num_blocks % 4).bit_count()
        sizes = [sum(array.nbytes for array in chunk.values()) for chunk in payload.chunks]
        assert max(sizes, default=0) <= small_chunks
        assert sum(sizes) == payload.num_bytes == num_blocks * block_bytes
        assert payload.num_blocks == num_blocks
        back = import_blocks(pool_of(seed=5), ids[:num_blocks], payload)
        want = bits(keys(pool_of(seed=5)))
        want[ids[:num_blocks]] = bits(keys(pool))[ids[:num_blocks]]
        np.testing.assert_array_equal(bits(keys(back)), want)


def test_a_block_larger_than_a_chunk_moves_alone(monkeypatch):
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1)
    pool = pool_of()
    payload = export_blocks(pool, [3, 9])
    assert [len(array) for chunk in payload.chunks for array in chunk.values()] == [1] * 4
    np.testing.assert_array_equal(stacked(payload).v, bits(values(pool))[[3, 9]])


def test_export_and_import_take_a_row_of_the_tables_on_the_device(route, small_chunks):
    state = fj.init(tiny_spec(num_kv_heads=2, head_dim=4))
    state, _ = fj.allocate(state, [0, 1], [15, 13])
    pool, row = pool_of(), state.tables.block_ids[1]
    payload = export_blocks(pool, row, num_blocks=5)
    np.testing.assert_array_equal(stacked(payload).k, bits(keys(pool))[np.asarray(row)])
    back = import_blocks(pool_of(seed=5), state.tables.block_ids[0], payload)
    targets = np.asarray(state.tables.block_ids[0])
    np.testing.assert_array_equal(bits(keys(back))[targets], bits(keys(pool))[np.asarray(row)])


def test_export_holds_the_blocks_as_they_were_before_later_writes(route):
    size = {"num_blocks": 256, "block_size": 64, "num_layers": 8}  # 8 MiB: time for a race.
    pool, ids = pool_of(**size), np.arange(256)
    other = export_blocks(pool_of(seed=9, **size), ids)
    for _ in range(5):
        want = bits(keys(pool))
        payload = export_blocks(pool, ids[::-1])
        pool = import_blocks(pool, ids, other)  # Donates the pool that the copy reads.
        np.testing.assert_array_equal(stacked(payload).k, want[::-1])
        np.testing.assert_array_equal(bits(keys(pool)), stacked(other).k)
        pool = import_blocks(pool, ids[::-1], payload)


def test_export_does_not_wait_for_an_accelerator(monkeypatch):
    monkeypatch.setattr(transfer, "_is_in_host_memory", lambda pool: False)

    @jax.jit
    def slowly(pool, steps):
        ones = jnp.ones((128, 128), jnp.float32)
        x = jax.lax.fori_loop(0, steps, lambda _, x: x @ x * np.float32(0.01), ones)
        return with_arrays(pool, keys(pool) + 0 * x[0, 0], values(pool))

    row = jnp.arange(8, dtype=jnp.int32)
    export_blocks(slowly(pool_of(), 1), row)  # Compiles both.
    pool = slowly(pool_of(), 30_000)
    payload = export_blocks(pool, row)
    assert not keys(pool).is_ready()
    np.testing.assert_array_equal(stacked(payload).k, bits(keys(pool))[:8])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_blocks", [1, 2, 8])
def test_import_works_in_place(dtype, num_blocks):
    pool = pool_of(dtype, num_blocks=256)
    payload = export_blocks(pool, np.arange(num_blocks))
    stacked(payload)  # Reading the payload does not hinder it.
    ids = np.arange(num_blocks, dtype=np.int32)
    lowered = transfer._scatter_blocks.lower(pool, ids, dict(payload.chunks[0]))
    memory = lowered.compile().memory_analysis()
    num_bytes = pool_bytes(pool)
    assert memory.alias_size_in_bytes == num_bytes
    assert memory.temp_size_in_bytes < num_bytes / 10
    pointers = [array.unsafe_buffer_pointer() for array in pool.arrays.values()]
    after = import_blocks(pool, ids, payload)
    assert keys(pool).is_deleted() and values(pool).is_deleted()
    assert [array.unsafe_buffer_pointer() for array in after.arrays.values()] == pointers


def test_export_needs_no_memory_except_for_its_blocks():
    pool = pool_of("bfloat16", num_blocks=256)
    ids = np.arange(8, dtype=np.int32)
    memory = transfer._gather_blocks.lower(pool, ids, to_host=True).compile().memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < keys(pool).nbytes / 10


def test_blocks_outside_the_pool_are_exported_as_zeros_and_not_imported(route):
    pool = pool_of()
    before = snapshot(pool)
    outside = [12, NULL_BLOCK, 2**31 - 1, -(2**31)]
    payload = export_blocks(pool, outside)
    assert not any(array.any() for array in stacked(payload))
    assert same_bits(import_blocks(pool, outside, payload), before)
    alone = export_blocks(pool_of(), [2])
    pool = pool_of()
    assert same_bits(import_blocks(pool, [NULL_BLOCK], alone), before)


@pytest.mark.parametrize(
    "other", [{"head_dim": 6}, {"num_layers": 3}, {"block_size": 4}, {"dtype": "float16"}]
)
def test_import_refuses_blocks_of_another_geometry(other):
    sizes = {"num_kv_heads": 2, "head_dim": 4, **other}
    foreign = export_blocks(fj.init(tiny_spec(**sizes)).pool, [1])
    pool = pool_of()
    before = snapshot(pool)
    with pytest.raises(GeometryMismatchError, match="the pool's are float32 as k float32"):
        import_blocks(pool, [1], foreign)
    assert same_bits(pool, before)


def test_import_does_not_take_bits_for_integers():
    stored_as_bits, integers = pool_of("bfloat16"), pool_of("float8_e4m3fn")
    assert stored_as_bits.stored_dtype == jnp.uint16
    plain = kv_pool(keys(stored_as_bits), values(stored_as_bits))
    with pytest.raises(GeometryMismatchError):
        import_blocks(plain, [0], export_blocks(pool_of("bfloat16"), [0]))
    assert BlockShape.of(integers) == BlockShape.of(pool_of("float8_e4m3fn", seed=4))


def test_export_and_import_refuse_too_few_ids():
    pool = pool_of()
    payload = export_blocks(pool, [1, 2, 3])
    with pytest.raises(AssertionError, match="3 blocks need as many block_ids, got 2"):
        import_blocks(pool, [1, 2], payload)
    for wrong in ({"block_ids": [1, 2], "num_blocks": 3}, {"block_ids": [[1, 2]]}):
        with pytest.raises(AssertionError):
            export_blocks(pool, **wrong)
    with pytest.raises(ValueError, match="integers"):
        export_blocks(pool, [0.5])
    assert not keys(pool).is_deleted()


def test_payloads_lie_where_the_route_says(route):
    payload = export_blocks(pool_of(), [1, 2, 3])
    for array in payload.chunks[0].values():
        if route == "pinned_host":
            assert array.sharding.memory_kind == "pinned_host"
        else:
            assert isinstance(array, np.ndarray)


def test_export_keeps_no_view_that_would_make_the_next_import_copy_the_pool(route):
    pool = pool_of()
    payload = export_blocks(pool, np.arange(12))
    pointer = keys(pool).unsafe_buffer_pointer()
    after = import_blocks(pool, np.arange(12)[::-1], payload)
    assert keys(pool).is_deleted() and keys(after).unsafe_buffer_pointer() == pointer


def test_empty_arrays_are_aligned_so_that_jax_reads_them_without_a_copy():
    block_shape = BlockShape.of(pool_of("bfloat16"))
    for num_blocks in range(1, 4):
        for (name, row), array in zip(
            block_shape.arrays, transfer.empty_arrays(block_shape, num_blocks).values(), strict=True
        ):
            assert array.shape == (num_blocks, *row.shape) and array.dtype == row.dtype, name
            assert array.ctypes.data % 64 == 0 and array.flags.c_contiguous


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_accelerators_are_told_to_move_between_device_and_host(platform):
    def placements(program, *args, **kwargs):
        lowered = program.trace(*args, **kwargs).lower(lowering_platforms=(platform,))
        return lowered.as_text().count("@annotate_device_placement")

    pool, ids = pool_of(), np.arange(4, dtype=np.int32)
    rows = transfer._gather_blocks(pool, ids, to_host=True)
    assert placements(transfer._gather_blocks, pool, ids, to_host=True) == 2
    assert placements(transfer._scatter_blocks, pool, ids, rows) == 2
