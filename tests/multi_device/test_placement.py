"""The device on which a multi-device manager allocates a request."""

import dataclasses

import pytest

from ferrum_jax import Device, LruEvictionPolicy, Priority
from ferrum_jax.errors import (
    DuplicateRequestError,
    GeometryMismatchError,
    InvalidHandleError,
    OutOfBlocksError,
    OutOfRowsError,
)
from tests.support.managers import (
    refused,
    start,
    tokens_of,
)
from tests.support.multi_device import (
    CPU,
    all_of,
    begin,
    make_multi,
    tokens_for,
    used,
    where,
)


def test_each_target_device_has_its_own_pool():
    manager = make_multi(3)
    assert manager.supported_devices() == CPU[:3]
    for device in CPU[:3]:
        handle = begin(manager, device.index, 4, device)
        assert handle.device() == device == manager.get_cache_device(device.index)
        assert [d.id for d in handle.key_cache(0).devices()] == [device.index]
        assert tokens_of(handle) == tokens_for(device.index, 4)
    assert used(manager) == [2, 2, 2]
    assert manager.get_cache_device("nobody") is None


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


def test_allocate_takes_the_device_that_a_request_names_unless_it_is_full():
    manager = make_multi(3)
    manager.set_device_preference([CPU[0]])
    assert start(manager, "a", 15, device=CPU[1]).device() == CPU[1]
    assert start(manager, "b", 15, device=CPU[1]).device() == CPU[0]


def test_allocate_takes_another_device_when_rows_run_out():
    manager = make_multi(2, geometry={"max_seqs": 1})
    assert start(manager, "a").device() == CPU[0]
    assert start(manager, "b").device() == CPU[1]
    assert refused(start, manager, "c") is OutOfRowsError


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


def test_extend_and_commit_refuse_none_as_a_handle_by_name():
    manager = make_multi()
    handle = start(manager, "a", 1)
    for call in (
        lambda: manager.extend(None, 1),
        lambda: manager.extend_all([handle, None], 1),
        lambda: manager.commit(None),
    ):
        with pytest.raises(InvalidHandleError, match="None is not a handle"):
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


def test_allocate_preempts_no_request_while_another_device_has_room():
    manager = make_multi(2, preemption_policy=LruEvictionPolicy())
    begin(manager, "low", 15, CPU[0], priority=Priority.Low)
    urgent = begin(manager, "urgent", 15, priority=Priority.High)
    assert urgent.device() == CPU[1]
    most = start(manager, "most urgent", 15, priority=Priority.Critical)
    assert most.device() == CPU[0]
    assert manager.get_handle("low").key_cache(0) is None
    assert manager.get_cache_device("low") == CPU[0]
    assert manager.stats().preemption_count == 1
    manager.deallocate("most urgent")
    manager.swap_in("low")
    assert tokens_of(manager.get_handle("low")) == tokens_for("low", 15)
