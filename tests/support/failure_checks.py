"""Checks of calls that fail at each of their calls of a device in turn, or are interrupted."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import pytest

from ferrum_jax import KvCacheHandle
from ferrum_jax.errors import CacheLostError
from ferrum_jax.manager import PagedKvCacheManager
from ferrum_jax.manager.moves import load_of
from tests.support.caches import snapshot
from tests.support.failing_calls import Situation
from tests.support.failing_device import Fault, ObservedDevice
from tests.support.internals import are_interrupts_delayed, device_of, devices_of, is_locked
from tests.support.interrupt_points import interrupted_at
from tests.support.manager_pictures import Picture, picture, require_as_before
from tests.support.prepared_managers import Case


def parts_of(case: Case) -> list[PagedKvCacheManager]:
    """The managers of one device in a case."""
    parts = list(devices_of(case.manager).values())
    return parts if case.target is None else [*parts, case.target]


def pictures(case: Case) -> list[Picture | None]:
    """Picture of each manager of one device; None where the cache is lost."""
    return [None if part.is_lost else picture(part) for part in parts_of(case)]


def check_failures(device: ObservedDevice, situation: Situation, fault: Fault) -> int:
    """Makes each call of the device fail in turn; returns how many there are.

    The situation's call is made again and again, with the first call of the device failing, then
    the second, until none fails. The same manager is used as long as nothing changes.
    """
    expected, case, at = outcome(situation), None, 0
    while True:
        at += 1
        if case is None:
            case = situation.build()
            before, wakings = pictures(case), listen(case)
        error, result = None, None
        with device.failing(at, fault) as failure:
            try:
                result = situation.call(case)
            except fault.errors as raised:
                error = raised
        if fault is Fault.UNREADABLE:
            _look(case)
        after = pictures(case)
        if error is None and None not in after:
            _require_same((result, after), expected)
            if not failure.has_happened:
                return at - 1
            assert fault is not Fault.INTERRUPT, "a signal was lost"
        else:
            assert failure.has_happened
            may_be_done = fault is Fault.INTERRUPT or error is None
            judge(situation, before, after, expected[1], may_be_done)
        if None in after:
            require_lost(case, wakings)
        elif error is not None and after != before and after != expected[1]:
            got = situation.call(case), pictures(case)
            _require_same(got, expected, only_requests=situation.may_cache)
        if after != before:
            case = None


def _look(case: Case) -> None:
    """Reads the whole state, so that the manager finds arrays that cannot be read."""
    for part in parts_of(case):
        with contextlib.suppress(jax.errors.JaxRuntimeError, CacheLostError):
            part.check()
            part.run(lambda state, rows: (state, snapshot(state)), [])


def call_failing(
    device: ObservedDevice,
    manager: Any,
    call: Callable[[], Any],
    at: int,
    fault: Fault,
    *,
    has_step: bool = False,
) -> str:
    """Makes a call while its `at`-th call of the device fails, in a random program.

    Args:
      device: The device of `observed_device`.
      manager: The manager, of one device or several.
      call: The call. A `FerrumError` without a fault is raised as usual.
      at: Number of the call of the device that fails, from 1.
      fault: How it fails.
      has_step: Whether the call runs a step, which may have run though the call has failed.

    Returns:
      "made" if the call has succeeded, or has failed after its change; "not made" if it has failed
      and has changed nothing except that room was made; "lost" if a cache is lost. A call that was
      not made can be made again.
    """
    case = Case(manager)
    before, error = pictures(case), None
    with device.failing(at, fault) as failure:
        try:
            call()
        except fault.errors as raised:
            if not failure.has_happened:
                raise
            error = raised
    if fault is Fault.UNREADABLE:
        _look(case)
    after = pictures(case)
    if None in after:
        return "lost"
    if error is None:
        return "made"
    try:
        for then, now in zip(before, after, strict=True):
            if then is not None and now is not None:
                require_as_before(then, now, may_cache=True)
    except AssertionError:
        if not (has_step or fault is Fault.INTERRUPT):
            raise
        return "made"
    return "not made"


def outcome(situation: Situation) -> tuple[Any, list[Picture | None]]:
    """Result of a call that does not fail, and pictures of the managers after it."""
    case = situation.build()
    return situation.call(case), pictures(case)


def check_interrupt(
    situation: Situation, at: int, expected: list[Picture | None], **options: Any
) -> bool:
    """Interrupts a call at a point; returns whether the point was reached. See `interrupted_at`."""
    case = situation.build()
    before = pictures(case)
    is_raised = False
    with interrupted_at(at, **options) as points:
        try:
            situation.call(case)
        except KeyboardInterrupt:
            is_raised = True
    assert is_raised == (points.place is not None), "the signal was lost"
    assert not are_interrupts_delayed()
    assert not any(map(is_locked, parts_of(case))), points.place
    after = pictures(case)
    judge(situation, before, after, expected, may_be_done=True)
    if after == before:
        situation.call(case)
        assert pictures(case) == expected
    return points.place is not None


def judge(
    situation: Situation,
    before: list[Picture | None],
    after: list[Picture | None],
    expected: list[Picture | None],
    may_be_done: bool,
) -> None:
    """Asserts that each manager is lost, unchanged, or, if `may_be_done`, as after the call."""
    may_be_done |= situation.has_step or situation.goes_by_device
    are_done = []
    for then, now, want in zip(before, after, expected, strict=True):
        if now is None or then is None:
            continue
        if now == want and may_be_done:
            are_done += [True] * (then != want)
        else:
            require_as_before(then, now, situation.may_end, may_cache=situation.may_cache)
            are_done += [False] * (then != want)
    assert situation.goes_by_device or len(set(are_done)) < 2, "done on some devices only"


def listen(case: Case) -> list[list[str]]:
    """Registers a room listener with each manager; returns the calls of each."""
    wakings: list[list[str]] = []
    for part in parts_of(case):
        wakings.append([])
        part.add_room_listener(lambda calls=wakings[-1]: calls.append("room"))
    return wakings


def require_lost(case: Case, wakings: list[list[str]]) -> None:
    """Asserts that a lost cache raises, has called its room listeners, and can be closed."""
    for part, calls in zip(parts_of(case), wakings, strict=True):
        if not part.is_lost:
            continue
        assert calls, "no room listener was called"

        def is_here(handle: KvCacheHandle, part: PagedKvCacheManager = part) -> bool:
            return part.holds(handle.request_id) and handle.is_resident

        request = case.manager.new_request("another", 1)
        request = dataclasses.replace(request, device=device_of(part).pool.device)
        refused: list[Callable[[], Any]] = [
            lambda part=part, request=request: part.allocate(request),
            lambda part=part: part.allocate_blocks(1),
            lambda part=part: part.run(lambda state, rows: (state, None), []),
            part.gc,
            part.defragment,
            part.check,
            lambda part=part: load_of(device_of(part)),
            *(h.block_table for h in case.handles.values() if is_here(h)),
            *(lambda h=h: h.key_cache(0) for h in case.handles.values() if is_here(h)),
        ]
        for call in refused:
            with pytest.raises(CacheLostError):
                call()
        assert not part.can_allocate(request)
    for manager in [case.manager, *parts_of(case)]:
        manager.close()
        manager.close()
    assert all(not handle.is_valid() for handle in case.handles.values())


def _require_same(got: Any, expected: Any, *, only_requests: bool = False) -> None:
    """Asserts that a call has ended as it ends without a fault."""
    assert jax.tree.map(str, got[0]) == jax.tree.map(str, expected[0])
    if only_requests:
        assert [part.requests for part in got[1]] == [part.requests for part in expected[1]]
    else:
        assert got[1] == expected[1]
