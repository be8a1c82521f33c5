"""The pressure callback: called on every change of level, outside the lock."""

import logging
import threading

import pytest

import ferrum_jax as fj
from ferrum_jax.config import MemoryPressureThresholds
from ferrum_jax.errors import OutOfBlocksError
from ferrum_jax.types import MemoryPressure
from tests.support.managers import make_manager, refused, start

Low, Medium, High, Critical = MemoryPressure
THRESHOLDS = MemoryPressureThresholds(
    medium_threshold=0.25, high_threshold=0.5, critical_threshold=0.75
)  # From 3, 6 and 9 of 12 blocks.


@pytest.fixture
def manager():
    return make_manager(pressure_thresholds=THRESHOLDS)


@pytest.fixture
def told(manager):
    """The levels that the callback was given."""
    levels = []
    manager.set_pressure_callback(levels.append)
    return levels


def test_pressure_callback_is_called_once_for_each_level_up_and_down(manager):
    told, blocks = [], []
    manager.set_pressure_callback(lambda level: told.append((manager.free_block_count(), level)))
    for _ in range(12):
        blocks += manager.allocate_blocks(1)
    assert told == [(9, Medium), (6, High), (3, Critical)]
    told.clear()
    for block in blocks:
        manager.free_blocks([block])
    assert told == [(4, High), (7, Medium), (10, Low)]


def test_pressure_callback_is_called_by_every_method_that_changes_the_level(manager, told):
    handle = start(manager, "a", 9)
    assert told == [Medium]
    manager.extend(handle, 6)
    assert told == [Medium]
    start(manager, "b", 3)
    assert told == [Medium, High]
    manager.gc()  # Frees "b".
    assert told == [Medium, High, Medium]
    manager.run(fj.truncate, [handle], 3, extends=True)
    assert told == [Medium, High, Medium, Low]
    manager.extend_all([handle], 12)
    manager.deallocate("a")
    assert told == [Medium, High, Medium, Low, Medium, Low]


def test_set_pressure_callback_does_not_report_the_present_level(manager):
    manager.allocate_blocks(3)
    told = []
    manager.set_pressure_callback(told.append)
    manager.allocate_blocks(1)
    assert told == []
    manager.allocate_blocks(2)
    assert told == [High]


def test_a_pressure_callback_may_call_the_manager(manager):
    told = []

    def relieve(level):
        told.append(level)
        if level >= High:
            manager.deallocate("a")
            assert manager.stats().active_caches == 1
            manager.check()

    manager.set_pressure_callback(relieve)
    a, b = start(manager, "a", 15), start(manager, "b", 6)
    assert (a.is_valid(), b.is_valid()) == (False, True)
    assert told == [Medium, High, Low]
    assert manager.free_block_count() == 10


def test_a_pressure_callback_runs_outside_the_lock(manager):
    finished = []

    def ask_from_another_thread(level):
        thread = threading.Thread(target=manager.stats, daemon=True)
        thread.start()
        thread.join(timeout=10)
        finished.append(not thread.is_alive())

    manager.set_pressure_callback(ask_from_another_thread)
    manager.deallocate(start(manager, "a", 15).request_id)
    assert finished == [True, True]


def test_an_error_of_a_pressure_callback_is_logged_and_not_raised(manager, caplog):
    def fail(level):
        raise RuntimeError("a bug of the caller")

    manager.set_pressure_callback(fail)
    with caplog.at_level(logging.ERROR, logger="ferrum_jax"):
        handle = start(manager, "a", 9)
    assert handle.num_tokens() == 9
    (record,) = caplog.records
    assert "Medium" in record.getMessage()
    assert "a bug of the caller" in str(record.exc_info[1])
    manager.extend(handle, 1)
    manager.check()


def test_pressure_callback_is_told_of_a_jump_once_and_of_no_refusal(manager, told):
    assert manager.allocate_blocks(0) == [] and told == []
    blocks = manager.allocate_blocks(12)
    assert refused(manager.allocate_blocks, 1) is OutOfBlocksError
    manager.free_blocks(blocks)
    assert told == [Critical, Low]
    others = []
    manager.set_pressure_callback(others.append)  # Replaces the callback.
    manager.allocate_blocks(3)
    assert (told, others) == ([Critical, Low], [Medium])
