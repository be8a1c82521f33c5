"""Calls of a manager that fail on the device: each is done or changes nothing."""

import collections
import contextlib
import functools
import inspect
import itertools
import random
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from ferrum_jax import FerrumError, PagedKvCacheManager, Priority
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import UncountedTokensError
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from tests.support.failing_calls import SITUATIONS, run
from tests.support.failing_device import Fault, observed_device
from tests.support.failure_checks import (
    call_failing,
    check_failures,
    listen,
    pictures,
    require_lost,
)
from tests.support.internals import num_free, state_of, taken_blocks
from tests.support.manager_pictures import picture
from tests.support.multi_device_situations import SITUATIONS as ON_SEVERAL_DEVICES
from tests.support.prefix_managers import PROMPT
from tests.support.prepared_managers import (
    IDLE,
    OTHER,
    busy,
    extend_step,
    preempting,
    sharing,
    truncate_step,
    write_arguments,
    write_step,
)

UNUSED = [71, 72, 73]
WITHOUT_DEVICE = {
    "add_room_listener": lambda manager: manager.add_room_listener(lambda: None)(),
    "block_size": lambda manager: manager.block_size(),
    "compression_stats": lambda manager: manager.compression_stats(),
    "explain_lookup": lambda manager: manager.explain_lookup(UNUSED),
    "free_block_count": lambda manager: manager.free_block_count(),
    "get_handle": lambda manager: manager.get_handle("a").num_tokens(),
    "holds": lambda manager: manager.holds("a"),
    "list_handles": lambda manager: manager.list_handles(),
    "new_request": lambda manager: manager.new_request("new"),
    "set_pressure_callback": lambda manager: manager.set_pressure_callback(lambda level: None),
    "stats": lambda manager: manager.stats(),
    "total_block_count": lambda manager: manager.total_block_count(),
}
READS = {
    "can_allocate": lambda manager: manager.can_allocate(manager.new_request("new", 15)),
    "check": lambda manager: manager.check(),
}
ON_THE_HOST = {
    *("deallocate what is away", "enable_prefix_caching", "move_to of what is away"),
    "set_weights_version",
}
HERE = {"close"}  # Tested below.
STEPS_OF_RUN = {"generate", "prefill"}  # Methods that call `run`.
SEVERAL = {
    "device_stats",
    "get_cache_device",
    "plan_rebalance",
    "set_device_preference",
    "supported_devices",
}
each_fault = pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name.lower())


@pytest.fixture(scope="module")
def device():
    with observed_device() as device:
        yield device


@each_fault
@pytest.mark.parametrize("name", SITUATIONS)
def test_a_call_that_fails_on_the_device_changes_nothing(device, name, fault):
    num_calls = check_failures(device, SITUATIONS[name], fault)
    assert num_calls or name in ON_THE_HOST


def methods_of(cls) -> set[str]:
    members = inspect.getmembers(cls, callable)
    return {name for name, _ in members if not name.startswith("_")}


def test_every_method_is_in_a_table_of_failures():
    alone = {name for situation in SITUATIONS.values() for name in situation.covers}
    together = {name for situation in ON_SEVERAL_DEVICES.values() for name in situation.covers}
    reads = WITHOUT_DEVICE.keys() | READS.keys()
    assert methods_of(PagedKvCacheManager) == alone | reads | HERE | STEPS_OF_RUN
    # Methods that forward to the manager of one device are tested there.
    assert methods_of(MultiDevicePagedKvCacheManager) - methods_of(PagedKvCacheManager) <= (
        together | SEVERAL
    )
    own = vars(MultiDevicePagedKvCacheManager).keys() & alone
    assert own - {"commit"} <= together


@pytest.mark.parametrize("name", WITHOUT_DEVICE)
def test_stats_and_other_queries_do_not_call_the_device(device, name):
    case = sharing()
    with device.failing(0, Fault.BEFORE) as failure:
        WITHOUT_DEVICE[name](case.manager)
    assert not failure.calls


@each_fault
@pytest.mark.parametrize("name", READS)
def test_can_allocate_check_and_load_that_fail_change_nothing(device, name, fault):
    case = sharing()
    before = pictures(case)
    for at in itertools.count(1):
        with device.failing(at, fault) as failure, contextlib.suppress(*fault.errors):
            READS[name](case.manager)
        assert pictures(case) == before
        if not failure.has_happened:
            break


@each_fault
def test_close_that_fails_still_closes(device, fault, tmp_path, caplog):
    for at in itertools.count(1):
        directory = tmp_path / str(at)
        case = busy(tiers=TierConfig(host_budget_bytes=0, disk_directory=directory))
        wakings = listen(case)
        with device.failing(at, fault) as failure, contextlib.suppress(KeyboardInterrupt):
            case.manager.close()
        assert [path.name for path in directory.iterdir()] == ["lock"]
        assert wakings[0]
        assert not any(handle.is_valid() for handle in case.handles.values())
        with pytest.raises(RuntimeError, match="closed"):
            case.manager.stats()
        if not failure.has_happened:
            break
    assert at > 1


@each_fault
@pytest.mark.parametrize("step", [extend_step, truncate_step], ids=["extends", "truncates"])
def test_lengths_that_run_changed_without_extends_are_found_whatever_fails(device, step, fault):
    """They are found when the step ends, by the next call, or by the call after that."""
    for at, when in itertools.product(range(1, 20), ["in the step", "after it"]):
        case = busy()
        before = picture(case.manager).requests["a"]
        wakings = listen(case)
        with device.failing(at if when == "in the step" else 0, fault) as in_step:
            with contextlib.suppress(*fault.errors):
                run(case, step, "b", np.int32([4]))
        for array in jax.tree.leaves(state_of(case.manager)):
            if not array.is_deleted():  # The cache may be lost.
                array.block_until_ready()
        with device.failing(at if when == "after it" else 0, fault) as behind:
            with contextlib.suppress(*fault.errors, FerrumError):
                case.manager.extend(case.handles["a"], 0)
        for _ in range(2):
            with contextlib.suppress(*fault.errors, UncountedTokensError):
                case.manager.extend(case.handles["a"], 0)
        if case.manager.is_lost:
            require_lost(case, wakings)
        else:
            assert picture(case.manager).requests["a"] == before
        if not (in_step.has_happened or behind.has_happened):
            break


def test_run_that_is_interrupted_calls_the_room_listeners(device):
    for at in itertools.count(1):
        case = busy()
        num_before = case.manager.free_block_count()
        with device.failing(at, Fault.INTERRUPT) as failure, contextlib.suppress(KeyboardInterrupt):
            run(case, truncate_step, "b", np.int32([1]), extends=True)
        wakings, num_then = listen(case), num_free(case.manager)
        num_now = case.manager.free_block_count()
        assert wakings[0] or num_now == num_then
        assert num_now == num_before + 1
        if not failure.has_happened:
            break


# Random calls.


def allocate(manager, name, rng):
    tokens = rng.choice([PROMPT, PROMPT[:5], IDLE, [*PROMPT, *OTHER]])
    priority = rng.choice(list(Priority))
    manager.allocate(manager.new_request(name, priority=priority, prompt_token_ids=tokens))


def write(manager, name, rng):
    """Writes the known tokens of a request, also where they are cached already."""
    handle = manager.get_handle(name)
    tokens = list(handle.live_request().known.tokens) if handle is not None else []
    manager.run(write_step, [handle], *write_arguments(manager, tokens))


def truncate(manager, name, rng):
    lengths = np.int32([rng.randint(0, 6)])
    manager.run(truncate_step, [manager.get_handle(name)], lengths, extends=True)


OPERATIONS = {
    "allocate": allocate,
    "write": write,
    "truncate": truncate,
    "extend": lambda m, name, rng: m.extend(m.get_handle(name), rng.randint(1, 4)),
    "commit": lambda m, name, rng: m.commit(m.get_handle(name)),
    "deallocate": lambda m, name, rng: m.deallocate(name),
    "swap_out": lambda m, name, rng: m.swap_out(name),
    "swap_in": lambda m, name, rng: m.swap_in(name),
    "defragment": lambda m, name, rng: m.defragment(),
    "allocate_blocks": lambda m, name, rng: m.allocate_blocks(1),
    "free_blocks": lambda m, name, rng: m.free_blocks(taken_blocks(m)[:2]),
    "share_prefix": lambda m, name, rng: m.share_prefix("a", name, 3),
}
STEPS = {"write", "truncate"}


def attempt(call: Callable[[], Any]) -> Any:
    """Returns what a call returns, or the type of its error."""
    try:
        return call()
    except (FerrumError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("seed", range(3))
def test_random_calls_with_failures_end_as_the_same_calls_without(device, seed):
    rng, outcomes = random.Random(seed), collections.Counter[str]()
    twins = preempting(), preempting()
    for _ in range(80):
        operation, name, seed_of_call = rng.choice([*OPERATIONS]), rng.choice("abcd"), rng.random()
        at, fault = rng.randint(1, 5), rng.choice([Fault.BEFORE, Fault.BEFORE, Fault.INTERRUPT])

        def call(case, operation=operation, name=name, seed_of_call=seed_of_call):
            OPERATIONS[operation](case.manager, name, random.Random(seed_of_call))

        calls = [functools.partial(call, case) for case in twins]
        is_step, manager = operation in STEPS, twins[0].manager
        got = attempt(
            lambda calls=calls, manager=manager, at=at, fault=fault, is_step=is_step: call_failing(
                device, manager, calls[0], at, fault, has_step=is_step
            )
        )
        outcomes[str(got)] += 1
        if got == "lost":
            twins = preempting(), preempting()
            continue
        if got == "not made":
            got = attempt(calls[0])
        want = attempt(calls[1])
        assert want is None if got == "made" else got is want
        one, other = map(pictures, twins)
        assert one == other, f"{operation} {name}, {fault} at {at}"
    assert min(outcomes["made"], outcomes["not made"]) > 3
