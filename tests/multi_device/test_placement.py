"""The device on which a multi-device manager allocates a request."""

import dataclasses

import pytest

from ferrum_jax import Device
from ferrum_jax.errors import (
    DuplicateRequestError,
    GeometryMismatchError,
    OutOfBlocksError,
    UnknownRequestError,
)
from tests.support.managers import refused, start
from tests.support.multi_device import CPU, all_of, begin, make_multi, where


def test_allocate_takes_the_first_device_of_set_device_preference_that_has_room():
    manager = make_multi(3)
    manager.set_device_preference([CPU[2], CPU[0]])
    for name in "abcd":
        start(manager, name, 12)
    assert where(manager) == {"a": CPU[2], "b": CPU[2], "c": CPU[0], "d": CPU[0]}
    late = manager.new_request("e", 12)
    assert not manager.can_allocate(late)
    with pytest.raises(OutOfBlocksError, match=r"4 blocks.*on cpu:2; nor has cpu:0 room"):
        manager.allocate(late)
    manager.deallocate("c")
    assert manager.can_allocate(late)
    assert manager.allocate(late).device() == CPU[0]


def test_a_device_without_a_pool_is_refused_with_the_devices_that_have_one():
    manager = make_multi(2)
    start(manager, "a")
    unknown = dataclasses.replace(manager.new_request("b"), device=CPU[3])
    assert not manager.can_allocate(unknown)
    for call in (
        lambda: manager.new_request("b", device=CPU[3]),
        lambda: manager.allocate(unknown),
        lambda: manager.move_cache("a", CPU[3]),
        lambda: manager.set_device_preference([CPU[3]]),
        lambda: manager.run(lambda state, _: (state, None), [], device=CPU[3]),
    ):
        with pytest.raises(GeometryMismatchError, match="cpu:3; there are pools on cpu:0, cpu:1"):
            call()


def test_extend_and_commit_refuse_none_as_a_request():
    manager = make_multi()
    handle = start(manager, "a", 1)
    for call in (
        lambda: manager.extend(None, 1),
        lambda: manager.extend_all([handle, None], 1),
        lambda: manager.commit(None),
    ):
        with pytest.raises(UnknownRequestError, match="Request None is not live"):
            call()


@pytest.mark.parametrize("devices", [[], [CPU[0], CPU[0]]])
def test_set_device_preference_refuses_an_empty_or_repeated_order(devices):
    with pytest.raises(ValueError, match="devices must name at least one, and none twice"):
        make_multi(2).set_device_preference(devices)


def test_a_config_without_enable_multi_device_or_with_an_absent_device_is_refused():
    with pytest.raises(ValueError, match="enable_multi_device must be true"):
        make_multi(2, enable_multi_device=False)
    with pytest.raises(ValueError, match="no device cpu:7"):
        make_multi(2, target_devices=(CPU[0], Device("cpu", 7)))


def test_a_refused_allocate_counts_one_failure_and_changes_nothing():
    manager = make_multi(3)
    begin(manager, "a", 3, CPU[1])
    before = all_of(manager)
    asked = manager.new_request("b")
    for request, error in (
        (dataclasses.replace(asked, request_id="a"), DuplicateRequestError),
        (dataclasses.replace(asked, head_dim=7), GeometryMismatchError),
        (dataclasses.replace(asked, dtype="int8"), GeometryMismatchError),
    ):
        count = manager.stats().allocation_failures
        assert not manager.can_allocate(request)
        assert refused(manager.allocate, request) is error
        assert manager.stats().allocation_failures == count + 1
    assert all_of(manager) == before
