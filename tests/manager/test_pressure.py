"""Who is told of pressure: on every change of level, outside the lock."""

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
)  # Of 12 blocks: from 3, 6 and 9 on.


@pytest.fixture
def manager():
    return make_manager(pressure_thresholds=THRESHOLDS)


@pytest.fixture
def told(manager):
    """The levels that the callback was given."""
    levels = []
    manager.set_pressure_callback(levels.append)
    return levels


def test_each_level_is_told_once_on_the_way_up_and_once_on_the_way_down(manager, told):
    history, blocks = {}, []
    for used in range(1, 13):
        blocks += manager.allocate_blocks(1)
        history[used] = list(told)
        told.clear()
    assert {used: levels for used, levels in history.items() if levels} == {
        3: [Medium],
        6: [High],
        9: [Critical],
    }
    history.clear()
    for used in range(11, -1, -1):
        manager.free_blocks([blocks.pop()])
        history[used] = list(told)
        told.clear()
    assert {used: levels for used, levels in history.items() if levels} == {
        8: [High],
        5: [Medium],
        2: [Low],
    }


def test_an_empty_pool_is_low(manager, told):
    start(manager, "a", 0)
    manager.gc()
    manager.allocate_blocks(0)
    assert told == []
    handle = start(manager, "b", 1)
    manager.extend(handle, 1)
    assert told == []


def test_room_to_grow_is_room():
    manager, told = make_manager(initial_blocks=1, pressure_thresholds=THRESHOLDS), []
    manager.set_pressure_callback(told.append)
    start(manager, "a", 3)
    assert (manager.free_block_count(), told) == (0, [])
    start(manager, "b", 6)
    assert told == [Medium]


def test_a_jump_over_levels_is_told_as_one(manager, told):
    blocks = manager.allocate_blocks(12)
    assert told == [Critical]
    manager.free_blocks(blocks)
    assert told == [Critical, Low]


def test_whatever_changes_the_level_tells(manager, told):
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


def test_what_is_refused_tells_nothing(manager, told):
    manager.allocate_blocks(8)
    told.clear()
    assert refused(manager.allocate_blocks, 5) is OutOfBlocksError
    assert refused(manager.allocate, manager.new_request("a", 15)) is OutOfBlocksError
    assert told == []


def test_only_the_last_callback_is_told(manager, told):
    others = []
    manager.set_pressure_callback(others.append)
    manager.allocate_blocks(3)
    assert (told, others) == ([], [Medium])


def test_the_callback_is_not_told_of_the_present_level(manager):
    manager.allocate_blocks(3)
    told = []
    manager.set_pressure_callback(told.append)
    manager.allocate_blocks(1)
    assert told == []
    manager.allocate_blocks(2)
    assert told == [High]


def test_the_callback_may_use_the_manager(manager):
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


def test_the_callback_runs_outside_the_lock(manager):
    finished = []

    def ask_from_another_thread(level):
        thread = threading.Thread(target=manager.stats, daemon=True)
        thread.start()
        thread.join(timeout=10)
        finished.append(not thread.is_alive())

    manager.set_pressure_callback(ask_from_another_thread)
    manager.deallocate(start(manager, "a", 15).request_id)
    assert finished == [True, True]


def test_what_the_callback_raises_is_logged_and_not_fatal(manager, caplog):
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
