"""Signals of a manager: levels of pressure, and listeners to room."""

import logging

import pytest

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.config import MemoryPressureThresholds
from ferrum_jax.manager.signals import PressureMonitor, RoomSignals
from ferrum_jax.types import MemoryPressure


@pytest.fixture
def monitor():
    return PressureMonitor(MemoryPressureThresholds())


def test_observe_returns_each_change_of_level_once(monitor):
    assert monitor.level is MemoryPressure.Low
    seen = [monitor.observe([used], [100]) for used in (0, 59, 60, 61, 80, 95, 100, 10, 10)]
    low, medium, high, critical = MemoryPressure
    assert seen == [None, None, medium, None, high, critical, None, low, None]
    assert monitor.level is low


def test_observe_calls_no_callback_and_notify_does(monitor):
    told = []
    monitor.set_callback(told.append)
    changed = monitor.observe([9], [10])
    assert told == []
    monitor.notify(changed)
    assert told == [MemoryPressure.High]


def test_notify_without_a_change_or_a_callback_is_silent(monitor):
    monitor.notify(MemoryPressure.High)
    told = []
    monitor.set_callback(told.append)
    monitor.notify(None)
    monitor.set_callback(None)
    monitor.notify(MemoryPressure.High)
    assert told == []


def test_notify_logs_what_a_callback_raises(monitor, caplog):
    def fail(level):
        raise RuntimeError("no such pager")

    monitor.set_callback(fail)
    with caplog.at_level(logging.ERROR, logger="ferrum_jax"):
        monitor.notify(MemoryPressure.Critical)
    assert "failed at level Critical" in caplog.text
    assert "no such pager" in caplog.text


def test_room_signals_have_grown_if_one_of_them_has():
    before = RoomSignals(PerPool([3, 5]), 1, -100, 0, 0)
    assert not before.has_grown(before)
    assert not RoomSignals(PerPool([2, 5]), 0, -200, 0, 0).has_grown(before)
    for blocks in ([4, 5], [2, 6]):
        assert before._replace(obtainable=PerPool(blocks)).has_grown(before)
    for name in before._fields[1:]:
        assert before._replace(**{name: getattr(before, name) + 1}).has_grown(before)
