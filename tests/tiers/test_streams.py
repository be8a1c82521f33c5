"""Entries pass between the pool and the disk chunk by chunk, not as a whole in host memory."""

import weakref

import pytest

from ferrum_jax import LruEvictionPolicy, Priority, errors
from ferrum_jax.config import TierConfig
from ferrum_jax.ops import transfer
from ferrum_jax.tiers import files
from tests.support.managers import (
    BLOCK_BYTES,
    make_manager,
    refused,
    start,
    tokens_of,
    whole,
    write_tokens,
)
from tests.support.prefix_managers import keep, make
from tests.support.tier_stores import file_of

TOKENS = [*range(30, 45)]  # Five blocks.


class ChunksInMemory:
    """How many chunks are in host memory, and how many were at most."""

    def __init__(self, monkeypatch):
        self.num_made = self.num_now = self.num_most = 0
        self._make = transfer.empty_arrays
        for module in (transfer, files):
            monkeypatch.setattr(module, "empty_arrays", self.empty_arrays)

    def empty_arrays(self, *args):
        arrays = self._make(*args)
        self.num_made += 1
        self.num_now += 1
        self.num_most = max(self.num_most, self.num_now)
        weakref.finalize(
            next(iter(arrays.values())).base, self._forget
        )  # Its memory, whoever looks at it.
        return arrays

    def _forget(self):
        self.num_now -= 1


@pytest.fixture
def chunks(monkeypatch):
    """Chunks of one block, counted."""
    monkeypatch.setattr(transfer, "CHUNK_BYTES", 1)
    return ChunksInMemory(monkeypatch)


def on_disk(directory, host_blocks=0):
    return TierConfig(host_budget_bytes=host_blocks * BLOCK_BYTES, disk_directory=directory)


def begin_away(manager, name="a"):
    """A request of five blocks that is swapped out."""
    handle = start(manager, name, 15)
    write_tokens(manager, handle, TOKENS)
    manager.swap_out(name)
    return handle


def test_swap_out_and_swap_in_hold_at_most_two_chunks_in_host_memory(tmp_path, chunks):
    manager = make_manager(tiers=on_disk(tmp_path))
    handle = begin_away(manager)
    assert chunks.num_made == 5 and 1 <= chunks.num_most <= 2 and chunks.num_now == 0
    manager.swap_in("a")
    assert chunks.num_made == 10 and chunks.num_most <= 2 and chunks.num_now == 0
    assert tokens_of(handle) == TOKENS
    manager.check()


def test_swap_in_that_checks_a_file_first_holds_at_most_two_chunks(tmp_path, chunks):
    manager = make(num_blocks=5, tiers=on_disk(tmp_path))
    handle = begin_away(manager)
    keep(manager, "b")
    manager.deallocate("b")
    manager.swap_in("a")  # A cached block has to go for it.
    assert chunks.num_made == 15 and chunks.num_most <= 2 and chunks.num_now == 0
    assert tokens_of(handle) == TOKENS
    manager.check()


def test_move_to_copies_from_disk_to_disk_chunk_by_chunk(tmp_path, chunks):
    one, other = (make_manager(tiers=on_disk(tmp_path / name)) for name in ("one", "other"))
    handle = begin_away(one)
    one.move_to("a", other)
    assert chunks.num_made == 10 and chunks.num_most <= 2 and chunks.num_now == 0
    other.swap_in("a")
    assert tokens_of(handle) == TOKENS
    other.check()


def test_swap_out_to_host_memory_copies_before_blocks_are_overwritten(tmp_path, chunks):
    manager = make_manager(tiers=on_disk(tmp_path, host_blocks=5))
    handle = begin_away(manager)
    assert chunks.num_now == 5
    for name in "bc":
        write_tokens(manager, start(manager, name, 15), [99] * 15)
    manager.deallocate("b")
    manager.swap_in("a")
    assert tokens_of(handle) == TOKENS
    manager.check()


# Failures on the way.


def beside_another_request(tiers):
    manager = make_manager(tiers=tiers)
    begin_away(manager)
    write_tokens(manager, start(manager, "b", 6), TOKENS[:6])
    return manager


def beside_a_cached_prefix(tiers):
    manager = make(num_blocks=5, tiers=tiers)
    begin_away(manager)
    keep(manager, "b")
    manager.deallocate("b")
    return manager


def without_a_free_row(tiers):
    policy = LruEvictionPolicy()
    manager = make_manager(tiers=tiers, geometry={"max_seqs": 1}, preemption_policy=policy)
    begin_away(manager)
    start(manager, "low", 3, priority=Priority.Low)
    return manager


def with_a_pool_that_must_grow(tiers):
    manager = make_manager(tiers=tiers, initial_blocks=2, enable_pooling=False)
    handle = begin_away(manager)
    manager.gc()
    assert manager.total_block_count() == 2 and handle.is_valid()
    return manager


@pytest.mark.parametrize(
    "make_situation",
    [
        beside_another_request,
        beside_a_cached_prefix,
        without_a_free_row,
        with_a_pool_that_must_grow,
    ],
)
def test_swap_in_finds_a_damaged_end_before_it_changes_anything(tmp_path, chunks, make_situation):
    manager = make_situation(on_disk(tmp_path))
    before, data = whole(manager), file_of(tmp_path).read_bytes()
    file_of(tmp_path).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert refused(manager.swap_in, "a") is errors.CorruptFileError
    assert whole(manager) == before
    manager.check()


def test_swap_out_that_fails_in_the_middle_changes_nothing(tmp_path, chunks, monkeypatch):
    manager = make_manager(tiers=on_disk(tmp_path))
    handle = start(manager, "a", 15)
    write_tokens(manager, handle, TOKENS)
    before, copy, calls = whole(manager), transfer._take_blocks, []

    def fail_later(*args):
        calls.append(args)
        if len(calls) == 3:
            raise MemoryError
        return copy(*args)

    monkeypatch.setattr(transfer, "_take_blocks", fail_later)
    with pytest.raises(MemoryError):
        manager.swap_out("a")
    assert whole(manager) == before and tokens_of(handle) == TOKENS
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    manager.check()


def test_swap_in_reads_a_file_once_if_room_is_free_and_twice_if_not(tmp_path, monkeypatch):
    manager, reads = make(num_blocks=5, tiers=on_disk(tmp_path)), []
    read = files.EntryFile.read_chunks
    monkeypatch.setattr(
        files.EntryFile, "read_chunks", lambda *args: reads.append(args) or read(*args)
    )
    for num_reads in (1, 2):
        begin_away(manager)
        if num_reads == 2:
            keep(manager, "b")
            manager.deallocate("b")
        manager.swap_in("a")
        assert len(reads) == num_reads
        manager.deallocate("a")
        reads.clear()
