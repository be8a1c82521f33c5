"""Calls of a multi-device manager during which a device fails or Ctrl-C arrives."""

import random

import pytest

from ferrum_jax.errors import CacheLostError
from tests.support.failing_device import Fault, observed_device
from tests.support.failure_checks import check_failures, check_interrupt, outcome
from tests.support.internals import devices_of
from tests.support.interrupt_points import interrupted_at
from tests.support.multi_device import CPU
from tests.support.multi_device_situations import SITUATIONS, busy


@pytest.fixture(scope="module")
def device():
    with observed_device() as device:
        yield device


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_failed_call_on_several_devices_changes_nothing(device, name, fault):
    check_failures(device, SITUATIONS[name], fault)


@pytest.mark.parametrize("name", SITUATIONS)
def test_an_interrupted_call_on_several_devices_is_complete_or_changes_nothing(name):
    situation, dice = SITUATIONS[name], random.Random(name)
    _, expected = outcome(situation)
    case = situation.build()
    with interrupted_at(0) as points:
        situation.call(case)
    for at in dice.sample(range(1, points.num_points + 1), 4):
        check_interrupt(situation, at, expected)


def test_reset_prefixes_reaches_the_other_devices_when_one_is_lost(device):
    case = busy()
    one, other = devices_of(case.manager).values()
    with device.failing(1, Fault.AFTER), pytest.raises(Fault.AFTER.errors):
        case.manager.extend(case.handles["b"], 3)
    assert one.is_lost and other.stats().cached_blocks == 2
    with pytest.raises(CacheLostError):
        case.manager.reset_prefixes()
    assert other.stats().cached_blocks == 0
    case.manager.close()


def test_rebalance_devices_reports_the_completed_moves_when_interrupted(device):
    case = busy()
    with device.failing(1, Fault.INTERRUPT), pytest.raises(KeyboardInterrupt):
        case.manager.rebalance_devices()
    assert [move.request_id for move in case.manager.last_rebalance] == ["b"]
    assert case.manager.get_cache_device("b") == CPU[1]
