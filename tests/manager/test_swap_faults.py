"""Disks that fail: full ones, files that cannot be removed, and predictions of their room.

The random programs of `random_operations.py` test damaged files.
"""

import errno
import os
import pathlib

import hypothesis
import hypothesis.strategies as st
import pytest

import ferrum_jax as fj
from ferrum_jax import Priority, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.tiers import TieredStore
from ferrum_jax.tiers.disk import open_private
from tests.support.internals import disk_format_of, set_disk_open, store_of
from tests.support.managers import BLOCK_BYTES, refused, start, tokens_of, whole, write_tokens
from tests.support.prefix_managers import PROMPT, keep, make
from tests.support.tier_stores import (
    BLOCK,
    FORMAT,
    file_of,
    file_size,
    open_full,
    payload_of,
    stores_on,
)


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


def break_disk(manager, num_writes: int) -> None:
    """Makes a disk fail after `num_writes` more files."""
    writes = iter(range(num_writes))

    def open_file(path, mode):
        if mode == "xb" and next(writes, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return open_private(path, mode)

    set_disk_open(manager, open_file)


# Checks.


def test_check_reads_no_file(make_on_disk):
    manager = make_on_disk(num_blocks=6)
    for name in "ab":
        start(manager, name, 3)
        manager.swap_out(name)
    set_disk_open(manager, None)
    manager.check()
    set_disk_open(manager, open_private)


def test_check_finds_entries_of_the_store_without_a_request_and_missing_entries(make_on_disk):
    manager = make_on_disk(num_blocks=6, host_blocks=2)
    start(manager, "a", 3)
    manager.swap_out("a")
    store, name = store_of(manager), f"{manager.get_handle('a').cache_id()}/0"
    payload = store.stream(name)
    for key in ("unknown", name):
        store.put("unknown", payload)
        if key == name:
            store.discard(key)
        with pytest.raises(AssertionError, match="not what is stored"):
            manager.check()
        store.discard("unknown")


# Full disks.


@pytest.mark.parametrize("call", ["allocate", "extend", "swap_in", "allocate_blocks"])
@pytest.mark.parametrize("num_writes", [0, 1])
def test_a_preemption_that_fails_on_a_full_disk_changes_nothing(make_on_disk, call, num_writes):
    manager = make_on_disk(num_blocks=8)
    start(manager, "away", 15, priority=Priority.High)
    manager.swap_out("away")
    urgent = start(manager, "urgent", 3, priority=Priority.High)
    for name in "ab":  # Both share two cached blocks: swapping one out does not free them.
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
    set_disk_open(manager, open_private)
    calls[call]()
    assert manager.stats().preemption_count >= 2
    manager.check()


# Predictions.


@pytest.mark.parametrize(
    ("host_blocks", "disk_blocks", "lengths", "fits"),
    [
        (1, 3, [12], False),  # Neither tier holds four blocks, though both together could.
        (4, 0, [12], True),
        (0, 4, [12], True),
        (2, 2, [6, 6], True),
        (2, 2, [6, 9], False),
        (3, 1, [3, 9], True),  # The first request moves to disk for the second.
    ],
)
def test_can_allocate_predicts_whether_the_tiers_have_room(
    make_on_disk, host_blocks, disk_blocks, lengths, fits
):
    num_blocks = sum(lengths) // 3
    header_bytes = file_size("a longer name than any cache has", 0, disk_format_of(make()))
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


def test_can_allocate_counts_the_headers_of_files(make_on_disk):
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
def test_has_room_for_predicts_every_put(tmp_path_factory, host_blocks, disk_blocks, held, asked):
    directory = tmp_path_factory.mktemp("tiers")
    with stores_on(directory) as open_store:
        store: TieredStore = open_store(host_blocks, disk_blocks * (BLOCK + 100))
        for i, num_blocks in enumerate(held):
            if store.has_room_for({f"held-{i}": (FORMAT, num_blocks)}):
                store.put(f"held-{i}", payload_of(num_blocks))
        before = store.host_used_bytes, store.disk_used_bytes
        predicted = store.has_room_for({f"new-{i}": (FORMAT, n) for i, n in enumerate(asked)})
        assert (store.host_used_bytes, store.disk_used_bytes) == before
        num_put = 0
        for i, num_blocks in enumerate(asked):
            if refused(store.put, f"new-{i}", payload_of(num_blocks)) is None:
                num_put += 1
            else:
                break
        assert predicted == (num_put == len(asked))


# Files that cannot be removed.


@pytest.fixture
def stuck(monkeypatch):
    """Makes files impossible to remove until it is called."""

    def fails(path, missing_ok=False):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "unlink", fails)
        yield patch.undo


@pytest.mark.parametrize("call", ["swap_in", "deallocate"])
def test_swap_in_and_deallocate_succeed_though_the_file_cannot_be_removed(
    make_on_disk, tmp_path, stuck, caplog, call
):
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
    manager.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_put_reports_a_write_that_fails_though_the_file_cannot_be_removed(tmp_path, stuck):
    with stores_on(tmp_path) as open_store:
        store = open_store(open_file=open_full)
        assert refused(store.put, "a", payload_of(1)) is errors.OutOfHostMemoryError
        assert not len(store)
        stuck()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
