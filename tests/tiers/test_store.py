"""TieredStore keeps entries within budgets, in host memory or on disk, bit for bit."""

import pathlib
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ferrum_jax as fj
from ferrum_jax.errors import GeometryMismatchError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockShape, export_blocks, import_blocks
from ferrum_jax.tiers import TieredStore
from tests.support.caches import tiny_spec
from tests.support.tier_stores import BLOCK, FORMAT, bits, file_of, file_size, payload_of, picture

HOST_BLOCKS = pytest.mark.parametrize("host_blocks", [0, 16], ids=["disk", "host"])


@HOST_BLOCKS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_stream_returns_what_was_put_bit_for_bit(open_store, host_blocks, dtype):
    pool = fj.init(tiny_spec(dtype=dtype)).pool
    block_shape = BlockShape.of(pool)
    store = open_store(host_blocks, block_shape=block_shape)
    ones = jnp.ones((36, 1, 2), dtype)
    pool = fj.write(pool, 1, np.arange(36), ones, -ones)
    payloads = {
        "random": payload_of(5, block_shape=block_shape),
        "exported": export_blocks(pool, [7, 3, 4]),
    }
    for key, payload in payloads.items():
        store.put(key, payload)
        assert bits(store.stream(key)) == bits(payload)
    assert (store.disk_used_bytes > 0) == (host_blocks == 0)
    pool = import_blocks(pool, np.arange(5), store.stream("random"))
    assert bits(export_blocks(pool, np.arange(5))) == bits(payloads["random"])
    store.discard("random")
    assert "random" not in store and len(store) == 1


@HOST_BLOCKS
def test_stream_and_discard_of_an_unknown_key_raise_key_error(open_store, host_blocks):
    store = open_store(host_blocks)
    store.put("b", payload_of(1))
    store.discard("b")
    for use in (store.stream, store.discard):
        with pytest.raises(KeyError, match="no entry 'b'"):
            use("b")


@HOST_BLOCKS
def test_put_refuses_a_key_in_use_and_blocks_of_another_format(open_store, host_blocks):
    store = open_store(host_blocks)
    store.put("a", payload_of(1))
    with pytest.raises(ValueError, match="'a' is in use"):
        store.put("a", payload_of(1, seed=1))
    other = BlockShape.of(fj.init(tiny_spec()).pool)
    with pytest.raises(GeometryMismatchError, match="float32"):
        store.put("b", payload_of(1, block_shape=other))
    assert bits(store.stream("a")) == bits(payload_of(1)) and len(store) == 1


@pytest.mark.parametrize("key", ["", "../../outside", "/etc/x", "a\0b", "ü" * 500, "\ud800", "."])
def test_put_writes_private_files_in_its_directory_only_for_any_key(open_store, tmp_path, key):
    store = open_store()
    store.put(key, payload_of(1))
    assert bits(store.stream(key)) == bits(payload_of(1))
    assert sorted(tmp_path.iterdir()) == sorted([file_of(tmp_path), tmp_path / "lock"])
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


# Budgets.


def test_put_fills_host_memory_to_its_last_byte(tmp_path):
    store = TieredStore([FORMAT], 4 * BLOCK)
    store.put("a", payload_of(3))
    store.put("b", payload_of(1))
    assert (store.host_used_bytes, store.disk_used_bytes) == (4 * BLOCK, 0)
    before = picture(store, tmp_path)
    with pytest.raises(OutOfHostMemoryError, match=rf"'c' asks for {BLOCK} bytes.*disk_directory"):
        store.put("c", payload_of(1))
    assert picture(store, tmp_path) == before
    store.discard("b")
    store.put("c", payload_of(1))


def test_put_fills_the_disk_to_its_last_byte(open_store, tmp_path):
    size = file_size("a", 2)
    store = open_store(disk_bytes=2 * size)
    store.put("a", payload_of(2))
    assert store.disk_used_bytes == size == file_of(tmp_path).stat().st_size
    store.put("b", payload_of(2))
    before = picture(store, tmp_path)
    with pytest.raises(OutOfHostMemoryError, match=f"the disk {2 * size} of {2 * size}"):
        store.put("c", payload_of(1))
    assert picture(store, tmp_path) == before


@pytest.mark.parametrize(
    ("host_blocks", "disk_files", "put", "in_host"),
    [
        (4, 9, {"a": 1, "b": 1, "c": 1, "d": 1, "e": 2}, "cde"),  # The oldest go to disk.
        (2, 9, {"small": 1, "large": 3}, ["small"]),  # Too large for host memory.
        (3, 1, {"a": 3, "b": 1}, "a"),  # Displacing "a" would not fit on disk; "b" does.
        (2, 9, {"empty": 0, "old": 2, "new": 1}, ["empty", "new"]),  # No bytes make no room.
        (0, 9, {"empty": 0, "a": 1}, ["empty"]),
    ],
)
def test_put_moves_the_oldest_entries_to_disk_where_that_makes_room(
    open_store, host_blocks, disk_files, put, in_host
):
    store = open_store(host_blocks, disk_bytes=disk_files * file_size("b", 1))
    for key, num_blocks in put.items():
        store.put(key, payload_of(num_blocks, seed=num_blocks))
    assert list(store._host) == list(in_host)
    for key, num_blocks in put.items():
        assert bits(store.stream(key)) == bits(payload_of(num_blocks, seed=num_blocks))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"host_budget_bytes": -1}, "host_budget_bytes"),
        ({"host_budget_bytes": 1.5}, "host_budget_bytes"),
        ({"disk_budget_bytes": 5}, "disk_directory"),
        ({"disk_budget_bytes": -5, "disk_directory": "."}, "disk_budget_bytes"),
        ({"disk_directory": __file__}, "disk_directory"),
    ],
)
def test_a_store_with_wrong_settings_names_the_field(options, field):
    with pytest.raises(ValueError, match=field):
        TieredStore([FORMAT], **{"host_budget_bytes": 10, **options})


class Tiers(RuleBasedStateMachine):
    """Any program of puts, reads and discards, beside a dictionary of what must be stored."""

    host_blocks, disk_files = 4, 3

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.disk_bytes = self.disk_files * file_size("a", 2)
        self.kept: dict[str, tuple[int, int]] = {}
        self.store = TieredStore(
            [FORMAT],
            self.host_blocks * BLOCK,
            disk_directory=self.directory.name,
            disk_budget_bytes=self.disk_bytes,
        )

    def teardown(self):
        self.store.close()
        self.directory.cleanup()

    @rule(key=st.sampled_from("abcdefgh"), num_blocks=st.integers(0, 6), seed=st.integers(10, 99))
    def put(self, key, num_blocks, seed):
        used = self.store.host_used_bytes, self.store.disk_used_bytes
        has_room = key in self.kept or self.store.has_room_for({key: (FORMAT, num_blocks)})
        try:
            self.store.put(key, payload_of(num_blocks, seed))
        except ValueError:
            assert key in self.kept
        except OutOfHostMemoryError:
            assert not has_room and key not in self.kept
            assert used == (self.store.host_used_bytes, self.store.disk_used_bytes)
            assert used[0] + num_blocks * BLOCK > self.host_blocks * BLOCK
            assert used[1] + file_size(key, num_blocks) > self.disk_bytes
        else:
            assert has_room and key not in self.kept
            self.kept[key] = num_blocks, seed

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), is_dropped=st.booleans())
    def stream(self, data, is_dropped):
        key = data.draw(st.sampled_from(sorted(self.kept)))
        assert bits(self.store.stream(key)) == bits(payload_of(*self.kept[key]))
        if is_dropped:
            self.store.discard(key)
            del self.kept[key]

    @invariant()
    def nothing_is_lost_and_budgets_hold(self):
        assert len(self.store) == len(self.kept) and all(key in self.store for key in self.kept)
        host, paths = self.store._host, list(pathlib.Path(self.directory.name).glob("*.kvblocks"))
        assert len(paths) == len(self.kept.keys() - host.keys())
        on_host = sum(self.kept[key][0] for key in host)
        assert self.store.host_used_bytes == on_host * BLOCK <= self.host_blocks * BLOCK
        on_disk = sum(path.stat().st_size for path in paths)
        assert self.store.disk_used_bytes == on_disk <= self.disk_bytes


TestTiers = Tiers.TestCase
TestTiers.settings = hypothesis.settings(max_examples=40, stateful_step_count=15)
