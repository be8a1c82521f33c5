"""Hostile arguments in each position of each public method: every call ends, and refuses cleanly.

The methods are found by inspection, so that a new one is tried too.
"""

import asyncio
import contextlib
import dataclasses
import faulthandler
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.compression.methods import CompressionMethod
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import RequestTooLargeError, SequenceTooLongError
from ferrum_jax.manager import ManagerOptions, handle
from ferrum_jax.manager.aio import AsyncKvCacheManager
from ferrum_jax.manager.multi_device import MultiDevicePagedKvCacheManager
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import DataType
from tests.support.event_loops import PATIENCE_SECONDS
from tests.support.internals import device_of, devices_of, pool_of, requests_of
from tests.support.managers import PREFIXES, make_manager, start
from tests.support.multi_device import CPU, make_multi

HOSTILE = (
    *(None, -1, 1, 2**31, 2**63, 10**30, 10**400, float("nan"), float("inf"), True),
    *("", "x", b"", b"x", [], [1], [None], [[]], (), {}, object()),
    *(np.bool_(True), np.int8(-1), np.int32(1), np.int64(2**63 - 1), np.uint64(2**64 - 1)),
    *(np.float16("nan"), np.float32(1.5), np.float64("inf"), np.complex64(1j)),
    *(np.str_("x"), np.bytes_(b"x"), np.datetime64("NaT", "s"), np.zeros(()), np.zeros(2)),
)
STATES = ("empty", "full", "lost", "closed")


@dataclasses.dataclass
class Subject:
    """What is called, and how it is seen whether a call has changed anything.

    Attributes:
      target: The object; each of its methods is called.
      managers: The managers of one device behind it.
      sane: Arguments that make sense, by the name of a parameter, or of a method and a parameter.
      kept: Handles, which `gc` counts.
    """

    target: Any
    managers: list[fj.PagedKvCacheManager]
    sane: dict[str, Any]
    kept: list[fj.KvCacheHandle]

    def picture(self) -> tuple:
        """All that a call could change; a state that is the same object has the same bits."""
        return tuple(
            (
                pool_of(manager).state,
                device_of(manager).access.is_closed,
                list(requests_of(manager)),
                [(h.is_valid(), h.is_valid() and (h.num_tokens(), h.stats())) for h in self.kept],
                [counts.tolist() for counts in pool_of(manager).counts.of_rows.values()],
                sorted(pool_of(manager).counts.taken),
                device_of(manager).prefixes.cache.config,
                device_of(manager).access.is_closed or self._stats_of(manager),
            )
            for manager in self.managers
        )

    @staticmethod
    def _stats_of(manager: fj.PagedKvCacheManager) -> fj.CacheManagerStats:
        return dataclasses.replace(manager.stats(), allocation_failures=0)

    def check(self) -> None:
        for manager in self.managers:
            if not (device_of(manager).access.is_closed or manager.is_lost):
                manager.check()


def lose(state, seq_ids):
    """A step that consumes the state, and fails before it returns another one."""
    jax.tree.map(lambda leaf: leaf.delete(), state)
    raise RuntimeError("the model failed")


def prepare(manager: Any, single: fj.PagedKvCacheManager, state: str) -> Subject:
    """Brings a manager into a state, and names arguments that make sense there."""
    request = manager.new_request("new", 1)
    kept: list[Any] = [start(manager, "a", 4), start(manager, "b", 3)]
    blocks = single.allocate_blocks(1)
    start(manager, "away", 2)
    manager.swap_out("away")
    if state in ("full", "lost"):
        for name in range(9):
            with contextlib.suppress(fj.FerrumError):
                kept.append(start(manager, name, 3))
        single.allocate_blocks(single.free_block_count())
    else:
        for name in ("a", "b", "away"):
            manager.deallocate(name)
    if state == "lost":
        with pytest.raises(RuntimeError, match="the model failed"):
            single.run(lose, [])
    if state == "closed":
        manager.close()
    sane = {
        **{"request_id": "a", "source": "a", "target": "b", "request_ids": ["a"]},
        **{"request": request, "handle": kept[0], "handles": kept[:2], "blocks": blocks},
        **{"additional_tokens": 1, "num_blocks": 1, "shared_tokens": 1, "layer": 0},
        **{"step": lambda state, rows: (state, None), "callback": print, "config": PREFIXES},
        **{"token_ids": [], "compression_ratio": 1.0, "devices": CPU[:1], "timeout_seconds": 0.0},
        **{"target_device": CPU[0], "move_to.target": make_manager()},
    }
    return Subject(manager, [single], sane, kept)


def make_single(state: str) -> Subject:
    manager = make_manager(enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    return prepare(manager, manager, state)


def make_multiple(state: str) -> Subject:
    manager = make_multi(1, enable_prefix_caching=True, prefix_cache_config=PREFIXES)
    return prepare(manager, devices_of(manager)[CPU[0]], state)


def make_handle(state: str) -> Subject:
    subject = make_single(state)
    subject.target = subject.kept[0]
    return subject


def make_async(state: str) -> Subject:
    subject = make_single(state)
    subject.target = AsyncKvCacheManager(subject.target)
    return subject


SUBJECTS: dict[type, Callable[[str], Subject]] = {
    fj.PagedKvCacheManager: make_single,
    MultiDevicePagedKvCacheManager: make_multiple,
    handle.PagedKvCacheHandle: make_handle,
    AsyncKvCacheManager: make_async,
}


def methods_of(cls: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(cls, callable) if not name.startswith("_")]


def calls_of(subject: Subject, name: str) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Each call of a method with one hostile argument, or without any if it takes none."""
    method = getattr(subject.target, name)
    parameters = inspect.signature(method).parameters.values()
    parameters = [p for p in parameters if p.kind != p.VAR_POSITIONAL]
    for tried in parameters:
        for value in HOSTILE:
            args, options = [], {}
            for other in parameters:
                sane = subject.sane.get(other.name, other.default)
                sane = subject.sane.get(f"{name}.{other.name}", sane)
                sane = None if sane is other.empty else sane
                given = value if other is tried else sane
                if other.kind == other.KEYWORD_ONLY:
                    options[other.name] = given
                else:
                    args.append(given)
            yield (
                f"{name}({tried.name}={value!r:.40})",
                functools.partial(method, *args, **options),
            )
    if not parameters:
        yield f"{name}()", method


async def outcome_of(call: Callable[[], Any], patience_seconds: float | None) -> None:
    """Calls, and enters and leaves what it returns; cancels what waits for longer than that."""
    try:
        async with asyncio.timeout(patience_seconds) as limit:
            result: Any = call()
            if inspect.isawaitable(result):
                await result
            elif isinstance(result, contextlib.AsyncContextDecorator):
                async with result:
                    pass
            elif isinstance(result, contextlib.ContextDecorator):
                with result:
                    pass
    except TimeoutError:
        if not limit.expired():
            raise


async def try_all(subject: Subject, name: str, state: str, last: list[str]) -> None:
    """Makes each call of a method, and looks after each whether what it did is right."""
    allowed = (ValueError, fj.FerrumError) + (RuntimeError,) * (state == "closed")
    parameters = inspect.signature(getattr(subject.target, name)).parameters
    patience_seconds = 0.01 if "timeout_seconds" in parameters else None
    before = subject.picture()
    for label, call in calls_of(subject, name):
        last[:] = [f"{type(subject.target).__name__}.{label}, {state}"]
        try:
            await outcome_of(call, patience_seconds)
        except allowed as error:
            assert str(error).strip(), f"{last[0]} says nothing"
            assert subject.picture() == before, f"{last[0]} raised and changed something"
        except Exception as error:
            raise AssertionError(f"{last[0]} raised {error!r}") from error
        before = subject.picture()
    subject.check()


def watched(work: Callable[[list[str]], None]) -> None:
    """Runs work in a thread, and fails if it does not end; work notes what it does."""
    last, errors = ["nothing"], []

    def run() -> None:
        try:
            work(last)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE_SECONDS)
    if thread.is_alive():
        faulthandler.dump_traceback(sys.__stderr__)
        pytest.fail(f"{last[0]} does not end")
    if errors:
        raise errors[0]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("cls", SUBJECTS, ids=lambda cls: cls.__name__)
def test_hostile_arguments_are_refused_cleanly_and_in_time(cls, state):
    def work(last: list[str]) -> None:
        for name in methods_of(cls):
            asyncio.run(try_all(SUBJECTS[cls](state), name, state, last))

    watched(work)


def try_values(makers: dict[str, Callable[[Any], Any]]) -> None:
    """Each maker takes each hostile value, or says in words why not."""
    for name, make in makers.items():
        for value in HOSTILE:
            try:
                make(value)
            except (ValueError, IndexError, fj.FerrumError) as error:
                assert str(error).strip()
            except Exception as error:
                raise AssertionError(f"{name}={value!r:.40} raised {error!r}") from error


def test_hostile_options_are_refused_before_there_is_a_manager():
    manager = make_manager()
    config, geometry = device_of(manager).config, device_of(manager).geometry
    names = {field.name for field in dataclasses.fields(ManagerOptions)}
    try_values(
        {
            "config": lambda value: fj.PagedKvCacheManager(value, geometry),
            "geometry": lambda value: fj.PagedKvCacheManager(config, value),
            "options": lambda value: fj.PagedKvCacheManager(config, geometry, value),
            "several": lambda value: MultiDevicePagedKvCacheManager(value, geometry),
            "manager": lambda value: AsyncKvCacheManager(value),
            "ageing_seconds": lambda value: AsyncKvCacheManager(manager, ageing_seconds=value),
            "clock": lambda value: AsyncKvCacheManager(manager, clock=value),
        }
        | {name: lambda value, name=name: make_manager(**{name: value}) for name in names}
    )


def test_hostile_fields_are_refused():
    manager = make_manager()
    table, geometry = fj.BlockTable.new(4).add_blocks([1]), device_of(manager).geometry
    records = [
        *(device_of(manager).config, geometry, geometry.spec(4, 4), PREFIXES),
        *(TierConfig(), fj.MemoryPressureThresholds(), Retention(), CompressionMethod()),
        *(fj.Device("cpu"), manager.new_request("a"), table),
    ]
    try_values(
        {
            f"{type(record).__name__}.{field.name}": lambda value, record=record, name=field.name: (
                dataclasses.replace(record, **{name: value})
            )
            for record in records
            for field in dataclasses.fields(record)
        }
        | {"logical_index": table.logical_to_physical, "blocks": table.add_blocks}
        | {"tokens": table.extend_sequence, "parse": fj.Device.parse, "of": fj.Device.of}
        | {"dtype": DataType.of, "token_ids": TokenIds}
    )


# What is told of some of them.


@pytest.mark.parametrize(
    "request_id",
    [float("nan"), np.float32("nan"), np.datetime64("NaT", "s"), [1], np.zeros(1)],
    ids=repr,
)
def test_a_request_id_that_cannot_be_found_again_is_refused(request_id):
    manager = make_manager()
    with pytest.raises(ValueError, match="request_id must be (hashable|equal to itself)"):
        manager.new_request(request_id)
    for call in (manager.deallocate, manager.get_handle, manager.swap_out, manager.holds):
        with pytest.raises(ValueError, match="request_id must be"):
            call(request_id)


def test_blocks_are_named_by_integers():
    manager = make_manager()
    blocks = manager.allocate_blocks(3)
    for wrong in ("a", b"\x02", [2.0], [True], 2, None, [[2]], np.asarray([2.0])):
        with pytest.raises(ValueError, match="blocks must be"):
            manager.free_blocks(wrong)
    assert manager.free_block_count() == 9
    manager.free_blocks(np.asarray(blocks))
    assert manager.free_block_count() == 12


def test_counts_of_any_integer_type_are_the_same_counts():
    manager = make_manager()
    handle = start(manager, "a", 3)
    largest = np.int64(2**63 - 1)  # One more would be below zero.
    for error, call in [
        (SequenceTooLongError, lambda: manager.extend(handle, largest)),
        (RequestTooLargeError, lambda: manager.allocate_blocks(largest)),
        (ValueError, lambda: manager.share_prefix("a", "a", largest)),
    ]:
        with pytest.raises(error):
            call()
    request = dataclasses.replace(manager.new_request("b"), max_sequence_length=np.int8(100))
    assert request.estimated_memory_bytes() == 2 * 2 * 100 * 2 * 4
    geometry = dataclasses.replace(device_of(manager).geometry, max_sequence_length=np.int32(2**16))
    with pytest.raises(ValueError, match=r"below 2\*\*31"):
        geometry.spec(np.int32(2**20), np.int32(2**16))


def test_a_config_of_several_devices_is_not_for_a_manager_of_one():
    with pytest.raises(ValueError, match="Use a MultiDevicePagedKvCacheManager"):
        make_manager(enable_multi_device=True)


@pytest.mark.parametrize("make", [make_manager, lambda: make_multi(1)], ids=["one", "several"])
def test_handles_may_come_from_an_iterator(make):
    manager = make()
    handles = [start(manager, name, 1) for name in "ab"]
    manager.extend_all(iter(handles), 2)
    assert [handle.num_tokens() for handle in handles] == [3, 3]
    rows = manager.run(lambda state, seq_ids: (state, seq_ids), iter([*handles, None]))
    assert len(rows) == 3 and rows[-1] == -1
