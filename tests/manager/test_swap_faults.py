"""Disks that fail, and files that are damaged, cost a manager only what was in the file."""

import errno
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

import ferrum_jax as fj
from ferrum_jax import Priority, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.tiers import TieredStore, files
from ferrum_jax.tiers.disk import open_private
from tests.support.managers import BLOCK_BYTES, refused, start, tokens_of, whole, write_tokens
from tests.support.parts import store_of
from tests.support.prefix_managers import PROMPT, found, keep, make
from tests.support.tier_entries import BLOCK, FORMAT, file_of, payload_of, stores_on


@pytest.fixture
def make_on_disk(tmp_path):
    """Makes managers whose lower tier is a directory, and whose upper one holds some blocks."""

    def make_with(num_blocks, host_blocks=0, disk_bytes=None):
        tiers = TierConfig(
            host_budget_bytes=host_blocks * BLOCK_BYTES,
            disk_directory=tmp_path,
            disk_budget_bytes=disk_bytes,
        )
        return make(num_blocks, preemption_policy=fj.LruEvictionPolicy(), tiers=tiers)

    return make_with


def disk_of(manager):
    return store_of(manager)._disk


def break_disk(manager, num_writes: int) -> None:
    """Lets a disk take so many files more, and no other."""
    writes = iter(range(num_writes))

    def open_file(path, mode):
        if mode == "xb" and next(writes, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_private(path, mode)

    disk_of(manager)._open = open_file


def damage(path: pathlib.Path) -> None:
    path.write_bytes(b"x" + path.read_bytes()[1:])


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:10])


# What is known of files that are not what was written.


@pytest.mark.parametrize("harm", [damage, truncate, pathlib.Path.unlink])
def test_a_damaged_file_costs_its_request_and_no_check(make_on_disk, tmp_path, harm):
    manager = make_on_disk(num_blocks=6)
    start(manager, "a", 6)
    manager.swap_out("a")
    harm(file_of(tmp_path))
    manager.check()
    assert refused(manager.swap_in, "a") is errors.CorruptFileError
    manager.check()
    manager.deallocate("a")
    manager.check()


def test_a_check_reads_no_file(make_on_disk, monkeypatch):
    manager = make_on_disk(num_blocks=6)
    for name in "ab":
        start(manager, name, 3)
        manager.swap_out(name)
    monkeypatch.setattr(disk_of(manager), "_open", None)
    manager.check()


def test_a_check_finds_what_is_stored_for_nobody_or_not_at_all(make_on_disk):
    manager = make_on_disk(num_blocks=6, host_blocks=2)
    start(manager, "a", 3)
    manager.swap_out("a")
    store, cache_id = store_of(manager), manager.get_handle("a").cache_id()
    payload, metadata = store.get(cache_id)
    for key in ("nobody", cache_id):
        store.put("nobody", payload, metadata)
        if key == cache_id:
            store.drop(key)
        with pytest.raises(AssertionError, match="not what is stored"):
            manager.check()
        store.drop("nobody")


def test_a_damaged_file_costs_no_cached_prefix(make_on_disk, tmp_path):
    manager = make_on_disk(num_blocks=5)
    start(manager, "away", 15)
    manager.swap_out("away")
    keep(manager, "a", PROMPT)
    manager.deallocate("a")
    damage(file_of(tmp_path))
    before = whole(manager)
    assert refused(manager.swap_in, "away") is errors.CorruptFileError
    assert whole(manager) == before and found(manager) == 6
    manager.check()


# Disks that fill up while room is made.


@pytest.mark.parametrize("call", ["allocate", "extend", "swap_in", "allocate_blocks"])
@pytest.mark.parametrize("num_writes", [0, 1])
def test_a_disk_full_at_any_victim_leaves_all_of_them(make_on_disk, call, num_writes):
    manager = make_on_disk(num_blocks=8)
    start(manager, "away", 15, priority=Priority.High)
    manager.swap_out("away")
    urgent = start(manager, "urgent", 3, priority=Priority.High)
    for name in "ab":  # They share two cached blocks, which no copy of one of them frees.
        keep(manager, name, PROMPT, priority=Priority.Low)
    start(manager, "c", 6, priority=Priority.Low)
    calls = {
        "allocate": lambda: start(manager, "new", 15, priority=Priority.High),
        "extend": lambda: manager.extend(urgent, 12),
        "swap_in": lambda: manager.swap_in("away"),
        "allocate_blocks": lambda: manager.allocate_blocks(5),
    }
    before = whole(manager)
    break_disk(manager, num_writes)
    assert refused(calls[call]) is errors.OutOfHostMemoryError
    assert whole(manager) == before
    manager.check()
    disk_of(manager)._open = open_private
    calls[call]()
    assert manager.stats().preemption_count >= 2
    manager.check()


# What is foretold of the tiers.


@pytest.mark.parametrize(
    ("host_blocks", "disk_blocks", "lengths", "fits"),
    [
        (1, 3, [12], False),  # Neither tier holds four blocks, though both together could.
        (4, 0, [12], True),
        (0, 4, [12], True),
        (2, 2, [6, 6], True),
        (2, 2, [6, 9], False),
        (3, 1, [3, 9], True),  # The first one goes to disk for the second.
    ],
)
def test_who_may_be_allocated_is_who_can_be(make_on_disk, host_blocks, disk_blocks, lengths, fits):
    num_blocks = sum(lengths) // 3
    header_bytes = files.file_bytes(
        "cache-100000", disk_format(), 0, {"num_tokens": 12, "token_format": 0, "num_pruned": 0}
    )
    disk_bytes = header_bytes + disk_blocks * (BLOCK_BYTES + 16) if disk_blocks else 0
    manager = make_on_disk(num_blocks, host_blocks, disk_bytes)
    for i, length in enumerate(lengths):
        start(manager, i, length, priority=Priority.Low)
    request = manager.new_request("new", 3 * num_blocks, priority=Priority.High)
    can = manager.can_allocate(request)
    before = whole(manager)
    error = refused(manager.allocate, request)
    assert (can, error) == ((True, None) if fits else (False, errors.OutOfBlocksError))
    assert fits or whole(manager) == before
    manager.check()


def disk_format():
    return store_of(make(num_blocks=1))._format


def test_the_headers_of_files_count_too(make_on_disk):
    manager = make_on_disk(num_blocks=4, disk_bytes=4 * BLOCK_BYTES)
    start(manager, "a", 12, priority=Priority.Low)
    request = manager.new_request("new", 12, priority=Priority.High)
    assert not manager.can_allocate(request)
    assert refused(manager.allocate, request) is errors.OutOfBlocksError


SIZES = st.lists(st.integers(0, 4), max_size=4)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    host_blocks=st.integers(0, 4), disk_blocks=st.integers(0, 8), held=SIZES, asked=SIZES
)
def test_a_store_foretells_every_put(tmp_path_factory, host_blocks, disk_blocks, held, asked):
    directory = tmp_path_factory.mktemp("tiers")
    with stores_on(directory) as open_store:
        store: TieredStore = open_store(host_blocks, disk_blocks * (BLOCK + 100))
        for i, num_blocks in enumerate(held):
            if store.has_room_for({f"held-{i}": (num_blocks, {})}):
                store.put(f"held-{i}", payload_of(num_blocks), {})
        before = store.stats()
        foretold = store.has_room_for({f"new-{i}": (n, {"n": n}) for i, n in enumerate(asked)})
        assert store.stats() == before
        num_put = 0
        for i, num_blocks in enumerate(asked):
            if refused(store.put, f"new-{i}", payload_of(num_blocks), {"n": num_blocks}) is None:
                num_put += 1
            else:
                break
        assert foretold == (num_put == len(asked))


def test_looking_at_what_waits_does_not_change_who_goes_to_disk_first():
    store = TieredStore(FORMAT, 4 * BLOCK)
    for key in "ab":
        store.put(key, payload_of(1), {})
    store.peek("a")
    assert store.keys() == ["a", "b"]
    store.get("a")
    assert store.keys() == ["b", "a"]


# Files that cannot be removed.


@pytest.fixture
def stuck(monkeypatch):
    """Lets no file be removed until it is called."""

    def fails(path, missing_ok=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", fails)
        yield patch.undo


@pytest.mark.parametrize("call", ["swap_in", "deallocate"])
def test_a_file_that_cannot_be_removed_fails_no_call(make_on_disk, tmp_path, stuck, caplog, call):
    manager = make_on_disk(num_blocks=6)
    write_tokens(manager, start(manager, "a", 6), [40] * 6)
    manager.swap_out("a")
    getattr(manager, call)("a")
    assert manager.stats().host_bytes == 0 and "cannot be removed" in caplog.text
    manager.check()
    if call == "swap_in":
        assert tokens_of(manager.get_handle("a")) == [40] * 6
        manager.swap_out("a")
        manager.swap_in("a")
    assert file_of(tmp_path).exists()
    stuck()
    store_of(manager).clear()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    manager.check()


def test_a_disk_that_fails_to_write_and_to_remove_says_what_it_could_not_write(tmp_path, stuck):
    def open_full(path, mode):
        path.touch()
        return open("/dev/full", "wb")

    with stores_on(tmp_path) as open_store:
        store = open_store(open_file=open_full)
        assert refused(store.put, "a", payload_of(1), {}) is errors.OutOfHostMemoryError
        assert not len(store)
        stuck()
        store.clear()
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
