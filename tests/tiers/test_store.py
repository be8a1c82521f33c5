"""What leaves the device is kept within budgets, by tier, until it is asked for again."""

import contextlib
import pathlib
import signal
import subprocess
import sys
import tempfile

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ferrum_jax as fj
from ferrum_jax.errors import GeometryMismatchError, OutOfHostMemoryError
from ferrum_jax.ops.transfer import BlockFormat, export_blocks, import_blocks
from ferrum_jax.tiers import TieredStore, files
from ferrum_jax.tiers.disk import DiskTier
from ferrum_jax.tiers.host import Entry
from ferrum_jax.tiers.space import Size
from tests.support.caches import tiny_spec
from tests.support.tier_entries import (
    BLOCK,
    FORMAT,
    TAGS,
    bits,
    file_of,
    payload_of,
    picture,
    stores_on,
)


@pytest.fixture
def open_store(tmp_path):
    with stores_on(tmp_path) as open_:
        yield open_


# Entries.


@pytest.mark.parametrize("host_blocks", [0, 8], ids=["disk", "host"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8"])
def test_an_entry_comes_back_bit_for_bit(open_store, host_blocks, dtype):
    pool = fj.init(tiny_spec(dtype=dtype)).pool
    block_format = BlockFormat.of(pool)
    payload = payload_of(5, block_format=block_format)
    store = open_store(host_blocks * 2, block_format=block_format)
    store.put("a", payload, TAGS)
    assert store.stats().disk_entries == (host_blocks == 0)
    got, metadata = store.pop("a")
    assert bits(got) == bits(payload) and metadata == TAGS
    assert "a" not in store and not store.keys()
    pool = import_blocks(pool, np.arange(5), got)
    assert bits(export_blocks(pool, np.arange(5))) == bits(payload)


def test_what_a_device_exports_goes_through_the_disk(open_store):
    pool = fj.init(tiny_spec(dtype="bfloat16")).pool
    pool = fj.write(pool, 1, np.arange(36), jnp.ones((36, 1, 2)), jnp.full((36, 1, 2), jnp.nan))
    payload = export_blocks(pool, [7, 3, 4])
    store = open_store()
    store.put("a", payload, {})
    assert bits(store.get("a")[0]) == bits(payload)


@pytest.mark.parametrize("host_blocks", [0, 8], ids=["disk", "host"])
def test_metadata_comes_back_as_json_has_it_from_every_tier(open_store, host_blocks):
    store = open_store(host_blocks)
    tokens = [1, 2]
    store.put("a", payload_of(1), {"tokens": (1, (2, 3)), "mutable": tokens, "text": "ü\ud800"})
    tokens.append(3)
    assert store.metadata("a") == {"tokens": [1, [2, 3]], "mutable": [1, 2], "text": "ü\ud800"}


@pytest.mark.parametrize("metadata", [{"x": object()}, {"x": float("nan")}, {"x": b"bytes"}])
def test_metadata_that_json_cannot_hold_is_refused(open_store, metadata):
    store = open_store(4)
    with pytest.raises(ValueError, match="metadata must be what JSON can hold"):
        store.put("a", payload_of(1), metadata)
    assert not store.keys()


@pytest.mark.parametrize("host_blocks", [0, 8], ids=["disk", "host"])
def test_an_unknown_key_is_a_key_error(open_store, host_blocks):
    store = open_store(host_blocks)
    store.put("b", payload_of(1), {})
    store.drop("b")
    for use in (store.get, store.pop, store.drop, store.metadata):
        with pytest.raises(KeyError, match="no entry 'b'"):
            use("b")


@pytest.mark.parametrize("host_blocks", [0, 8], ids=["disk", "host"])
def test_a_key_in_use_is_refused(open_store, host_blocks):
    store = open_store(host_blocks)
    store.put("a", payload_of(1), TAGS)
    with pytest.raises(ValueError, match="'a' is in use"):
        store.put("a", payload_of(1, seed=1), {})
    assert bits(store.get("a")[0]) == bits(payload_of(1)) and store.metadata("a") == TAGS


def test_blocks_of_another_format_are_refused(open_store):
    store = open_store(8)
    other = BlockFormat.of(fj.init(tiny_spec()).pool)
    with pytest.raises(GeometryMismatchError, match="float32"):
        store.put("a", payload_of(1, block_format=other), {})


@pytest.mark.parametrize("key", ["", "../../outside", "/etc/x", "a\0b", "ü" * 500, "\ud800", "."])
def test_no_key_leads_out_of_the_directory(open_store, tmp_path, key):
    store = open_store()
    store.put(key, payload_of(1), {})
    assert store.keys() == [key] and bits(store.get(key)[0]) == bits(payload_of(1))
    assert file_of(tmp_path).parent == tmp_path
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([file_of(tmp_path).name, "lock"])


def test_nobody_else_may_read_the_files(open_store, tmp_path):
    open_store().put("a", payload_of(1), {})
    assert {path.stat().st_mode & 0o077 for path in tmp_path.iterdir()} == {0}


# Budgets.


def test_host_memory_may_be_filled_to_its_last_byte():
    store = TieredStore(FORMAT, 4 * BLOCK)
    store.put("a", payload_of(3), {})
    store.put("b", payload_of(1), {})
    stats = store.stats()
    assert (stats.host_used_bytes, stats.host_budget_bytes) == (4 * BLOCK, 4 * BLOCK)
    assert (stats.host_entries, stats.disk_entries, stats.disk_budget_bytes) == (2, 0, 0)
    before = picture(store)
    with pytest.raises(OutOfHostMemoryError, match=rf"'c' asks for {BLOCK} bytes.*disk_directory"):
        store.put("c", payload_of(1), {})
    assert picture(store) == before
    store.drop("b")
    store.put("c", payload_of(1), {})


def test_the_least_recently_used_entries_move_to_disk(open_store):
    store = open_store(4)
    for index, key in enumerate("abcd"):
        store.put(key, payload_of(1, seed=index), {"index": index})
    store.get("a")
    store.metadata("b")  # Looking at metadata is no use.
    store.put("e", payload_of(2, seed=4), {})
    assert store.stats().num_spilled == store.stats().disk_entries == 2
    assert store._host.keys() == ["d", "a", "e"]
    store.drop("e")
    store.put("f", payload_of(2), {})
    assert store.stats().num_spilled == 2, "d and a were in host memory still"
    for index, key in enumerate("abcd"):
        assert bits(store.get(key)[0]) == bits(payload_of(1, seed=index))
        assert store.metadata(key) == {"index": index}


def test_an_entry_larger_than_host_memory_goes_to_disk_at_once(open_store):
    store = open_store(2)
    store.put("small", payload_of(1), {})
    store.put("large", payload_of(3), {})
    stats = store.stats()
    assert (stats.host_entries, stats.disk_entries, stats.num_spilled) == (1, 1, 0)


def test_an_entry_without_blocks_comes_back_from_disk(open_store, tmp_path):
    with contextlib.closing(DiskTier(tmp_path, FORMAT)) as disk:
        disk.put("empty", Entry(payload_of(0), TAGS, Size(0, 0)))
    payload, metadata = open_store().get("empty")
    assert payload.num_blocks == 0 and metadata == TAGS


def test_the_disk_is_filled_to_its_last_byte(open_store, tmp_path):
    size = files.file_bytes("a", FORMAT, 2, TAGS)
    store = open_store(disk_bytes=2 * size)
    store.put("a", payload_of(2), TAGS)
    assert store.stats().disk_used_bytes == size == file_of(tmp_path).stat().st_size
    store.put("b", payload_of(2), TAGS)
    before = picture(store, tmp_path)
    with pytest.raises(OutOfHostMemoryError, match=f"the disk {2 * size} of {2 * size}"):
        store.put("c", payload_of(1), {})
    assert picture(store, tmp_path) == before


def test_when_those_to_displace_do_not_fit_on_disk_the_new_one_may(open_store):
    store = open_store(3, disk_bytes=files.file_bytes("b", FORMAT, 1, {}))
    store.put("a", payload_of(3), {})
    store.put("b", payload_of(1), {})
    assert (store.stats().host_entries, store.stats().disk_entries) == (1, 1)
    with pytest.raises(OutOfHostMemoryError):
        store.put("c", payload_of(1), {})


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
def test_wrong_settings_name_their_field(options, field):
    with pytest.raises(ValueError, match=field):
        TieredStore(FORMAT, **{"host_budget_bytes": 10, **options})


class Tiers(RuleBasedStateMachine):
    """Any program of puts, reads and drops, beside a dictionary that knows what must be there."""

    host_blocks, disk_files = 4, 3

    def __init__(self):
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.file_bytes = files.file_bytes("a", FORMAT, 2, {"seed": 10})
        self.kept: dict[str, tuple[int, int]] = {}
        self.open()

    def open(self):
        self.store = TieredStore(
            FORMAT,
            self.host_blocks * BLOCK,
            disk_directory=self.directory.name,
            disk_budget_bytes=self.disk_files * self.file_bytes,
        )

    def teardown(self):
        self.store.close()
        self.directory.cleanup()

    @rule(key=st.sampled_from("abcdefgh"), num_blocks=st.integers(0, 6), seed=st.integers(10, 99))
    def put(self, key, num_blocks, seed):
        stats = self.store.stats()
        try:
            self.store.put(key, payload_of(num_blocks, seed), {"seed": seed})
        except ValueError:
            assert key in self.kept
        except OutOfHostMemoryError:
            assert self.store.stats() == stats and key not in self.kept
            assert stats.host_used_bytes + num_blocks * BLOCK > stats.host_budget_bytes
            size = files.file_bytes(key, FORMAT, num_blocks, {"seed": seed})
            assert stats.disk_used_bytes + size > self.disk_files * self.file_bytes
        else:
            assert key not in self.kept
            self.kept[key] = num_blocks, seed

    @precondition(lambda self: self.kept)
    @rule(data=st.data(), forget=st.booleans())
    def get(self, data, forget):
        key = data.draw(st.sampled_from(sorted(self.kept)))
        payload, metadata = self.store.pop(key) if forget else self.store.get(key)
        num_blocks, seed = self.kept[key]
        assert bits(payload) == bits(payload_of(num_blocks, seed)) and metadata == {"seed": seed}
        if forget:
            del self.kept[key]

    @rule()
    def restart(self):
        on_disk = set(self.store.keys()[self.store.stats().host_entries :])
        self.store.close()
        self.open()
        self.kept = {key: value for key, value in self.kept.items() if key in on_disk}

    @invariant()
    def nothing_is_lost_and_budgets_hold(self):
        assert sorted(self.store.keys()) == sorted(self.kept)
        stats = self.store.stats()
        assert stats.host_used_bytes <= self.host_blocks * BLOCK
        paths = list(pathlib.Path(self.directory.name).glob("*.kvblocks"))
        assert stats.disk_used_bytes == sum(path.stat().st_size for path in paths)
        assert stats.disk_used_bytes <= self.disk_files * self.file_bytes
        assert (stats.host_entries + stats.disk_entries, stats.disk_entries) == (
            len(self.kept),
            len(paths),
        )


TestTiers = Tiers.TestCase
TestTiers.settings = hypothesis.settings(max_examples=40, stateful_step_count=15)


# Directories that were used before, or are in use.


def test_a_restart_finds_the_entries_and_clears_what_a_crash_left(open_store, tmp_path):
    store = open_store(host_blocks=2)
    store.put("a", payload_of(2), TAGS)
    store.put("b", payload_of(2, seed=1), {})  # Displaces "a".
    store.close()
    unfinished = tmp_path / (file_of(tmp_path).name + ".unfinished")
    unfinished.write_bytes(b"half a file")
    (tmp_path / "notes.txt").write_text("not ours")
    store = open_store(host_blocks=2)
    assert (
        store.keys() == ["a"] and store.stats().disk_used_bytes == file_of(tmp_path).stat().st_size
    )
    assert bits(store.get("a")[0]) == bits(payload_of(2)) and store.metadata("a") == TAGS
    assert not unfinished.exists() and (tmp_path / "notes.txt").exists()


def test_a_store_that_wants_nothing_of_before_is_cleared(open_store, tmp_path):
    store = open_store()
    store.put("a", payload_of(2), {})
    store.close()
    file_of(tmp_path).write_bytes(b"not even sound")
    store = open_store(host_blocks=2)
    store.put("b", payload_of(2), {})
    assert store.keys() == ["b"] and "a" in store
    store.clear()
    assert not store.keys() and "a" not in store and "b" not in store
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    stats = store.stats()
    assert stats.host_used_bytes == stats.disk_used_bytes == 0


def test_a_restart_with_a_smaller_budget_still_uses_host_memory(open_store):
    store = open_store()
    store.put("a", payload_of(4), {})
    store.close()
    store = open_store(host_blocks=1, disk_bytes=10)
    store.put("b", payload_of(1), {})
    with pytest.raises(OutOfHostMemoryError):
        store.put("c", payload_of(1), {})
    assert bits(store.get("a")[0]) == bits(payload_of(4))


def test_a_directory_serves_one_store_at_a_time(open_store, tmp_path):
    store = open_store()
    store.put("a", payload_of(1), {})
    (tmp_path / "x.kvblocks.unfinished").touch()
    with pytest.raises(ValueError, match="disk_directory .* is in use by another cache"):
        open_store()
    assert (tmp_path / "x.kvblocks.unfinished").exists(), "the second one touched nothing"
    store.close()
    assert "a" in open_store()


def test_a_store_that_is_forgotten_lets_its_directory_go(tmp_path):
    TieredStore(FORMAT, 0, disk_directory=tmp_path)
    TieredStore(FORMAT, 0, disk_directory=tmp_path).close()


def test_a_killed_process_lets_its_directory_go(open_store, tmp_path):
    program = (
        "import fcntl, os, sys, time\n"
        f"lock = os.open({str(tmp_path / 'lock')!r}, os.O_RDWR | os.O_CREAT)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(ValueError, match="in use"):
            open_store()
        process.send_signal(signal.SIGKILL)
    open_store().put("a", payload_of(1), {})
