"""Calls of a multi-device manager that may fail, one for each way a method can take."""

from tests.support.failing_calls import NEW, Situation, allocate
from tests.support.internals import devices_of
from tests.support.managers import Clock
from tests.support.multi_device import CPU, make_multi
from tests.support.prefix_managers import CONFIG, PROMPT
from tests.support.prepared_managers import IDLE, OTHER, Case, compute, keep


def busy(**options) -> Case:
    """On each of two devices, 8 blocks.

    On the first device, request "a" holds 2 cached blocks and one that is not cached, "b" holds 2,
    and "away" is swapped out. On the second device, 2 cached blocks belong to no request.
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
    """The second device has room for "a" only if it evicts cached blocks."""
    case = busy()
    part = devices_of(case.manager)[CPU[1]]
    part.allocate_blocks(part.free_block_count() - 2)
    return case


def dropped() -> Case:
    """The caller holds no handle of "b"."""
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
"""Calls that concern several devices. Other calls are forwarded to one device's manager."""
