"""Delayed signals: each handler is called once, at the end, and always restored."""

import signal
import threading

import pytest

from ferrum_jax.interrupts import DelayedInterrupts
from tests.support.interrupt_points import interrupted_at

NUMBERS = signal.SIGTERM, signal.SIGALRM


class Stop(Exception):
    """What a handler raises."""


@pytest.fixture
def told():
    """The signals of which a handler was told; each of them raises."""
    told: list[int] = []

    def handle(number, frame):
        told.append(number)
        raise Stop(number)

    before = {number: signal.signal(number, handle) for number in NUMBERS}
    yield told
    for number, handler in before.items():
        assert signal.signal(number, handler) is handle, "the handler was not put back"


def test_delayed_holds_a_signal_until_the_block_ends(told):
    interrupts, done = DelayedInterrupts(), []
    with pytest.raises(Stop), interrupts.delayed():
        signal.raise_signal(NUMBERS[0])
        with interrupts.delayed():
            signal.raise_signal(NUMBERS[0])
        done.append(list(told))
    assert done == [[]] and told == [NUMBERS[0]] * 2


def test_delayed_calls_each_handler_though_the_first_raises(told):
    interrupts = DelayedInterrupts()
    with pytest.raises(Stop), interrupts.delayed():
        for number in NUMBERS:
            signal.raise_signal(number)
    assert told == list(NUMBERS)


def test_delayed_calls_handlers_after_a_block_that_fails(told):
    interrupts = DelayedInterrupts()
    with pytest.raises(Stop) as raised, interrupts.delayed():
        signal.raise_signal(NUMBERS[0])
        raise ValueError
    assert told == [NUMBERS[0]] and isinstance(raised.value.__context__, ValueError)


def test_allowed_lets_a_signal_stop_its_part_only(told):
    interrupts, done = DelayedInterrupts(), []
    with pytest.raises(Stop), interrupts.delayed():
        with pytest.raises(Stop), interrupts.allowed():
            signal.raise_signal(NUMBERS[0])
            done.append("not stopped")
        signal.raise_signal(NUMBERS[1])
        done.append("completed")
    assert done == ["completed"] and told == list(NUMBERS)


def test_delayed_does_nothing_in_other_threads(told):
    interrupts = DelayedInterrupts()

    def hold():
        with interrupts.delayed(), interrupts.allowed():
            assert not interrupts._handlers

    thread = threading.Thread(target=hold)
    thread.start()
    thread.join()


def test_an_interrupt_between_any_two_lines_leaves_the_handlers_as_they_were(told):
    at = 0
    while True:
        at += 1
        told.clear()
        raised: list[BaseException] = []
        interrupts = DelayedInterrupts()
        with interrupted_at(at) as points:
            try:
                with interrupts.delayed():
                    signal.raise_signal(NUMBERS[0])
                    with interrupts.allowed():
                        pass
            except (KeyboardInterrupt, Stop) as error:
                raised.append(error)  # It keeps alive what it came through.
        assert not interrupts._handlers and not interrupts._arrived
        assert len(told) <= 1
        for number in NUMBERS:
            with pytest.raises(Stop):
                signal.raise_signal(number)
        if points.place is None:
            break
    assert at > 15
