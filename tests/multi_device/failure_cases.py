"""Calls on several devices while a device fails. Run by `test_manager_failures.py`."""

import random

import pytest

from ferrum_jax.errors import CacheLostError
from tests.support.failing_device import Fault, observed_device
from tests.support.failure_cases import IDLE, OTHER, Case, compute, keep
from tests.support.failure_situations import NEW, Situation, allocate
from tests.support.failures import check_failures, check_interrupt, outcome
from tests.support.interrupted_points import interrupted_at
from tests.support.managers import Clock
from tests.support.multi_device import CPU, make_multi
from tests.support.parts import devices_of
from tests.support.prefix_managers import CONFIG, PROMPT


def busy(**options) -> Case:
    """On each of two devices, 8 blocks.

    On the first one, request "a" holds 2 cached blocks and one of its own, "b" two, and "away" is
    swapped out. On the second one, 2 blocks are cached for no request.
    """
    caching = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG}
    case = Case(make_multi(2, clock=Clock(), **caching, **options))
    keep(case, "old", IDLE, device=CPU[1])
    case.manager.deallocate("old")
    keep(case, "a", PROMPT)
    compute(case, "away", [41, 42, 43, 44])
    case.manager.swap_out("away")
    compute(case, "b", OTHER)
    return case


def full_target() -> Case:
    """The second device has room for "a" only if cached blocks go."""
    case = busy()
    part = devices_of(case.manager)[CPU[1]]
    part.allocate_blocks(part.block_counts()[0] - 2)
    return case


def dropped() -> Case:
    """No handle is left of "b"."""
    case = busy()
    del case.handles["b"]
    return case


def _by_device(name: str, build=busy, **more) -> Situation:
    return Situation(
        [name], build, lambda c: getattr(c.manager, name)(), goes_by_device=True, **more
    )


SITUATIONS = {
    "allocate": Situation(["allocate"], busy, lambda c: allocate(c, NEW, device=CPU[1])),
    "move_cache": Situation(
        ["move_cache"], busy, lambda c: c.manager.move_cache("a", CPU[1]), may_cache=True
    ),
    "move_cache with an eviction": Situation(
        ["move_cache"], full_target, lambda c: c.manager.move_cache("a", CPU[1]), may_cache=True
    ),
    "move_cache of what is away": Situation(
        ["move_cache"], busy, lambda c: c.manager.move_cache("away", CPU[1])
    ),
    "rebalance_devices": Situation(
        ["rebalance_devices"],
        busy,
        lambda c: (c.manager.rebalance_devices(), c.manager.last_rebalance)[1],
        may_cache=True,
    ),
    "enable_prefix_caching": Situation(
        ["enable_prefix_caching"], busy, lambda c: c.manager.enable_prefix_caching(CONFIG)
    ),
    "gc": _by_device("gc", dropped, may_end=["b"]),
    "defragment": _by_device("defragment"),
    "reset_prefixes": _by_device("reset_prefixes"),
}
"""What concerns several devices; what concerns one is handed on to its manager."""


@pytest.fixture(scope="module")
def device():
    with observed_device() as device:
        yield device


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_call_that_fails_is_as_if_it_was_not_made(device, name, fault):
    check_failures(device, SITUATIONS[name], fault)


@pytest.mark.parametrize("name", SITUATIONS)
def test_an_interrupted_call_is_made_or_is_not(name):
    situation, dice = SITUATIONS[name], random.Random(name)
    _, expected = outcome(situation)
    case = situation.build()
    with interrupted_at(0) as points:
        situation.call(case)
    for at in dice.sample(range(1, points.num_points + 1), 4):
        check_interrupt(situation, at, expected)


def test_a_device_that_is_lost_keeps_no_other_from_what_concerns_all(device):
    case = busy()
    one, other = devices_of(case.manager).values()
    with device.failing(1, Fault.AFTER), pytest.raises(Fault.AFTER.errors):
        case.manager.extend(case.handles["b"], 3)
    assert one.is_lost and other.stats().cached_blocks == 2
    with pytest.raises(CacheLostError):
        case.manager.reset_prefixes()
    assert other.stats().cached_blocks == 0
    case.manager.close()


def test_what_was_moved_is_told_when_the_rest_is_interrupted(device):
    case = busy()
    with device.failing(1, Fault.INTERRUPT), pytest.raises(KeyboardInterrupt):
        case.manager.rebalance_devices()
    assert [move.request_id for move in case.manager.last_rebalance] == ["b"]
    assert case.manager.get_cache_device("b") == CPU[1]
