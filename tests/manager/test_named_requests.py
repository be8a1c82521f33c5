"""Every method of every manager takes a request by its id or by a handle of it."""

import asyncio
import dataclasses
import inspect

import pytest

from ferrum_jax.errors import InvalidHandleError, UnknownRequestError
from ferrum_jax.manager import AsyncKvCacheManager
from tests.support.managers import make_manager, start, write_tokens
from tests.support.multi_device import CPU, make_multi

MANAGERS = {
    "one device": make_manager,
    "several devices": lambda: make_multi(2),
    "async": lambda: AsyncKvCacheManager(make_manager()),
    "async over several devices": lambda: AsyncKvCacheManager(make_multi(2)),
}
CALLS = {
    "extend": lambda m, name: m.extend(name, 1),
    "extend_all": lambda m, name: m.extend_all(["b", name], 2),
    "commit": lambda m, name: m.commit(name, [1, 2, 3, 4]),
    "run": lambda m, name: m.run(lambda state, rows: (state, rows.tolist()), ["b", None, name]),
    "fork": lambda m, name: m.fork(name, ["c", "d"]),
    "share_prefix from": lambda m, name: m.share_prefix(name, "b", 2),
    "share_prefix to": lambda m, name: m.share_prefix("b", name, 2),
    "swap_out": lambda m, name: m.swap_out(name),
    "swap_in": lambda m, name: m.swap_in(name),
    "compress_cache": lambda m, name: m.compress_cache(name, 1.0),
    "deallocate": lambda m, name: m.deallocate(name),
    "move_cache": lambda m, name: m.move_cache(name, CPU[1]),
    "move_to": lambda m, name: m.move_to(name, make_manager()),
    "block_table": lambda m, name: m.block_table(name),
}
"""Calls that raise where the request is not live."""
QUESTIONS = {
    "get_handle": lambda m, name: m.get_handle(name) is not None,
    "holds": lambda m, name: m.holds(name),
    "get_cache_device": lambda m, name: m.get_cache_device(name) is not None,
}
ONLY_OF = {
    "move_cache": ["several devices", "async over several devices"],
    "get_cache_device": ["several devices", "async over several devices"],
    "move_to": ["one device"],
    "holds": ["one device"],
    "block_table": ["async", "async over several devices"],
}
CASES = [(kind, call) for kind in MANAGERS for call in CALLS if kind in ONLY_OF.get(call, MANAGERS)]
ASKED = [
    (kind, call) for kind in MANAGERS for call in QUESTIONS if kind in ONLY_OF.get(call, MANAGERS)
]


@pytest.fixture
def runner():
    with asyncio.Runner() as runner:
        yield runner


async def called(call, manager, name):
    """The result of a call, awaited if need be; a handle as its request's id."""
    result = call(manager, name)
    result = await result if inspect.isawaitable(result) else result
    return [handle.request_id for handle in result] if call is CALLS["fork"] else result


def inner(manager):
    """The manager itself, without coroutines."""
    return manager.manager if isinstance(manager, AsyncKvCacheManager) else manager


def prepare(kind):
    """A manager with requests "a" and "b", of four tokens each."""
    manager = MANAGERS[kind]()
    for name in "ab":
        write_tokens(inner(manager), start(inner(manager), name, 4), [1, 2, 3, 4])
    return manager


def picture(manager):
    """What is known of each request, and of all of them."""
    handles = [
        (name, handle.num_tokens(), handle.is_resident, handle.device(), handle.compression)
        for name, handle in inner(manager).list_handles()
    ]
    return handles, dataclasses.replace(inner(manager).stats(), allocation_failures=0)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_call_with_a_handle_does_what_it_does_with_the_id(kind, name, runner):
    results = []
    for is_handle in (False, True):
        manager = prepare(kind)
        request = inner(manager).get_handle("a").clone_handle() if is_handle else "a"
        results.append((runner.run(called(CALLS[name], manager, request)), picture(manager)))
        inner(manager).check()
    assert results[0] == results[1]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_call_refuses_a_request_that_is_not_live_and_changes_nothing(kind, name, runner):
    manager = prepare(kind)
    stale, foreign = start(inner(manager), "c", 1), start(make_manager(), "a", 1)
    unrelated = start(make_manager(), "z", 1)
    inner(manager).deallocate("c")
    start(inner(manager), "c", 2)  # Another request, which the old handle does not name.
    before = picture(manager)
    wrong = [
        (stale, InvalidHandleError, "after the request was deallocated.*use the new handle"),
        (foreign, InvalidHandleError, "another manager. Use the one that allocated it"),
        (unrelated, InvalidHandleError, "another manager. Use the one that allocated it"),
        ("z", UnknownRequestError, "'z' is not live.*never allocated here"),
    ]
    for request, error, told in wrong:
        if isinstance(request, str) or name != "block_table":
            with pytest.raises(error, match=told):
                runner.run(called(CALLS[name], manager, request))
            assert picture(manager) == before
    with pytest.raises(ValueError, match="must be hashable"):
        runner.run(called(CALLS[name], manager, ["a"]))
    inner(manager).check()


@pytest.mark.parametrize(("kind", "name"), ASKED)
def test_a_question_about_a_request_tells_whether_it_is_live(kind, name):
    manager = prepare(kind)
    live, stale = inner(manager).get_handle("a"), start(inner(manager), "c", 1)
    inner(manager).deallocate(stale)
    start(inner(manager), "c", 2)
    foreign = start(make_manager(), "a", 1)
    for request, wanted in (("a", True), (live, True), ("z", False)):
        assert QUESTIONS[name](manager, request) is wanted
    assert not QUESTIONS[name](manager, stale) and not QUESTIONS[name](manager, foreign)


@pytest.mark.parametrize("kind", MANAGERS)
def test_a_handle_is_no_id_of_a_new_request(kind):
    manager = inner(prepare(kind))
    handle, before = manager.get_handle("a"), picture(manager)
    for call in (
        lambda: start(manager, handle, 1),
        lambda: manager.fork("a", ["c", handle]),
    ):
        with pytest.raises(ValueError, match="request_id must be an id of your own"):
            call()
    assert picture(manager) == before
