"""`run` and other calls with handles: all requests must be on one device."""

import jax
import pytest

from ferrum_jax.errors import (
    GeometryMismatchError,
    InvalidHandleError,
    SwappedOutError,
    UnknownRequestError,
)
from tests.support.managers import make_manager, refused, start, tokens_of
from tests.support.multi_device import CPU, begin, make_multi, tokens_for


def test_run_and_extend_all_refuse_requests_of_two_devices():
    manager = make_multi(2)
    a, b = begin(manager, "a", 3, CPU[0]), begin(manager, "b", 3, CPU[1])
    with pytest.raises(GeometryMismatchError, match="names cpu:0, cpu:1"):
        manager.run(lambda state, _: (state, None), [a, b])
    with pytest.raises(GeometryMismatchError, match="names cpu:0, cpu:1"):
        manager.extend_all([a, b], 1)
    with pytest.raises(GeometryMismatchError, match="names none"):
        manager.run(lambda state, _: (state, None), [None])
    with pytest.raises(GeometryMismatchError, match="names cpu:0, cpu:1"):
        manager.run(lambda state, _: (state, None), [a], device=CPU[1])
    manager.move_cache("b", CPU[0])
    rows_of = manager.run(lambda state, seq_ids: (state, seq_ids.tolist()), [a, None, b])
    assert len(set(rows_of)) == 3 and rows_of[1] == -1
    manager.extend_all([a, b], 4)
    manager.extend_all([], 4)
    assert (a.num_tokens(), b.num_tokens()) == (7, 7)


def test_run_executes_on_the_device_of_its_requests():
    manager = make_multi(3)
    step = jax.jit(lambda state, seq_ids: (state, state.tables.seq_lens[seq_ids]), donate_argnums=0)
    for device in reversed(CPU[:3]):
        handle = begin(manager, device.index, 2 + device.index, device)
        lengths = manager.run(step, [handle])
        assert [d.id for d in lengths.devices()] == [device.index]
        assert lengths.tolist() == [2 + device.index]


def test_handles_of_another_manager_or_of_an_ended_request_are_refused():
    manager, stranger = make_multi(2), start(make_manager(), "a", 1)
    gone = start(manager, "b", 1)
    manager.deallocate("b")
    away = begin(manager, "c", 4, CPU[1])
    manager.swap_out("c")
    for handle, error in (
        (stranger, InvalidHandleError),
        (gone, InvalidHandleError),
        (object(), UnknownRequestError),
        (away, SwappedOutError),
    ):
        assert refused(manager.extend, handle, 1) is error
        assert refused(manager.commit, handle) is error
        assert refused(manager.run, lambda state, _: (state, None), [handle]) is error
    start(manager, "a", 1)
    assert refused(manager.extend, stranger, 1) is InvalidHandleError
    for call in (manager.deallocate, manager.swap_in, manager.swap_out):
        assert refused(call, "nobody") is UnknownRequestError
    assert manager.get_handle("nobody") is None


@pytest.mark.parametrize("make", [make_manager, lambda: make_multi(2)], ids=["one", "several"])
def test_run_refuses_calls_of_the_manager_inside_a_step(make):
    manager = make()
    handle = begin(manager, "a", 3)
    several = manager.stats, lambda: manager.move_cache("a", CPU[1])
    for call in (
        lambda: manager.allocate(manager.new_request("b")),
        lambda: manager.extend(handle, 1),
        manager.close,
        *(several if hasattr(manager, "move_cache") else ()),
    ):
        with pytest.raises(RuntimeError, match="inside a step.*before or after run"):
            manager.run(lambda state, _, call=call: (state, call()), [handle])
    manager.extend(handle, 1)
    assert tokens_of(handle)[:3] == tokens_for("a", 3)
    manager.check()
