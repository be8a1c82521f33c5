"""Interrupts (Ctrl-C) at any point of a call: the call is done, or changes nothing."""

import random

import pytest

from tests.support.failing_calls import SITUATIONS
from tests.support.failure_checks import check_interrupt, outcome
from tests.support.interrupt_points import interrupted_at

EVERYWHERE = ["allocate with a preemption", "commit", "run that truncates", "swap_out to disk"]
"""Calls that are interrupted at every point outside their change."""


@pytest.mark.parametrize("name", SITUATIONS)
def test_a_call_interrupted_at_a_random_point_is_done_or_undone(name):
    situation = SITUATIONS[name]
    expected, rng = outcome(situation)[1], random.Random(name)
    for is_delayed in (False, True):
        case = situation.build()
        with interrupted_at(0, is_delayed=is_delayed) as points:
            situation.call(case)
        at = rng.randint(1, points.num_points)
        check_interrupt(situation, at, expected, is_delayed=is_delayed)


@pytest.mark.slow
@pytest.mark.parametrize("name", EVERYWHERE)
def test_a_call_interrupted_at_any_point_outside_its_change_is_done_or_undone(name):
    situation, at = SITUATIONS[name], 1
    expected = outcome(situation)[1]
    while check_interrupt(situation, at, expected, is_delayed=False):
        at += 1
    assert at > 10
