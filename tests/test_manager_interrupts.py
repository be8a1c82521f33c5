"""Ctrl-C at any point of a call: the manager is as before, or as after."""

import random
import threading

import pytest

from ferrum_jax.interrupts import interrupts
from tests.failing_device import Fault
from tests.failure_situations import SITUATIONS, Situation
from tests.failures import judge, listen, parts_of, pictures
from tests.interrupted_lines import interrupted_at

EVERYWHERE = ["allocate with a preemption", "commit", "run that truncates", "swap_out to disk"]
"""Calls that are interrupted at each point outside the change."""


def interrupt(situation: Situation, at: int, expected, **options) -> bool:
    """Makes a call that is interrupted at a point, and says whether it was."""
    case = situation.build()
    before, wakings = pictures(case), listen(case)
    is_raised = False
    with interrupted_at(at, **options) as points:
        try:
            situation.call(case)
        except KeyboardInterrupt:
            is_raised = True
    assert is_raised == (points.place is not None), "the signal got lost"
    assert not interrupts._handlers
    assert not any(map(is_locked, parts_of(case))), points.place
    after = pictures(case)
    judge(situation, Fault.INTERRUPT, before, after, expected)
    if after == before:
        situation.call(case)
        assert pictures(case) == expected
    return points.place is not None


def is_locked(manager) -> bool:
    """Whether another thread cannot use a manager."""
    got: list[bool] = []

    def take() -> None:
        got.append(manager._lock.acquire(blocking=False))
        if got[0]:
            manager._lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return not got[0]


def result_of(situation: Situation):
    case = situation.build()
    situation.call(case)
    return pictures(case)


@pytest.mark.parametrize("name", SITUATIONS)
def test_an_interrupted_call_is_made_or_is_not(name):
    situation = SITUATIONS[name]
    expected, dice = result_of(situation), random.Random(name)
    for is_delayed in (False, True):
        case = situation.build()
        with interrupted_at(0, is_delayed=is_delayed) as points:
            situation.call(case)
        at = dice.randint(1, points.num_points)
        interrupt(situation, at, expected, is_delayed=is_delayed)


@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_call_that_is_interrupted_outside_the_change_is_made_or_is_not(name):
    situation, at = SITUATIONS[name], 1
    expected = result_of(situation)
    while interrupt(situation, at, expected, is_delayed=False):
        at += 1
    assert at > 10
