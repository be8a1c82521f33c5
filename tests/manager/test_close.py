"""Managers that are closed: no request, no file and no waiting call is left."""

import asyncio
import gc
import inspect
import subprocess
import sys

import numpy as np
import pytest

from ferrum_jax import GenerateOptions
from ferrum_jax.config import TierConfig
from ferrum_jax.errors import InvalidHandleError
from tests.support.event_loops import make_async, on_loop, settle
from tests.support.managers import make_manager, start
from tests.support.multi_device import CPU, make_multi
from tests.support.prefix_managers import CONFIG, keep, make


def on_disk(directory):
    return TierConfig(host_budget_bytes=0, disk_directory=directory)


def test_close_ends_every_request_on_the_device_and_on_disk(tmp_path):
    with make(tiers=on_disk(tmp_path)) as manager:
        here, away = keep(manager, "here"), keep(manager, "away")
        manager.swap_out("away")
        assert len(list(tmp_path.glob("*.kvblocks"))) == 1
    assert not here.is_valid() and not away.is_valid()
    with pytest.raises(InvalidHandleError):
        here.num_tokens()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_close_frees_the_disk_directory_for_another_manager(tmp_path):
    one = make_manager(tiers=on_disk(tmp_path))
    with pytest.raises(ValueError, match="in use by another cache.*close that one first"):
        make_manager(tiers=on_disk(tmp_path))
    one.close()
    with make_manager(tiers=on_disk(tmp_path)) as other:
        start(other, "a", 3)
        other.swap_out("a")
        one.close()
        assert one.holds("a") is False
        other.swap_in("a")
        other.check()


EXIT_WITHOUT_CLOSE = """
import sys
from ferrum_jax import GenerateOptions
from ferrum_jax.config import TierConfig
from tests.support.managers import make_manager, start
from tests.support.tier_stores import file_of
import pathlib

directory = pathlib.Path(sys.argv[1])
manager = make_manager(tiers=TierConfig(host_budget_bytes=0, disk_directory=directory))
start(manager, "a", 3)
manager.swap_out("a")
assert file_of(directory).exists()
sys.exit(7)
"""


def test_a_process_that_exits_without_close_removes_its_files(tmp_path):
    command = [sys.executable, "-c", EXIT_WITHOUT_CLOSE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_manager_that_is_collected_without_close_removes_its_files(tmp_path):
    manager = make_manager(tiers=on_disk(tmp_path))
    start(manager, "a", 3)
    manager.swap_out("a")
    del manager
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


ARGUMENTS = {
    "request_id": "a",
    "source": "a",
    "shared_tokens": 1,
    "new_ids": ["c"],
    "version": 1,
    "compression_ratio": 0.5,
    "token_ids": [1, 2, 3],
    "config": CONFIG,
    "num_blocks": 1,
    "step": lambda state, rows: (state, None),
    "handles": [],
    "target_device": CPU[0],
    "model_fn": lambda params, tokens, batch: None,
    "params": None,
    "tokens": np.zeros(0, np.int32),
    "options": GenerateOptions(max_new_tokens=1),
}
"""Arguments of the methods of managers, by name."""
WITHOUT_CACHE = {
    *("add_room_listener", "block_size", "close", "commit", "extend", "extend_all", "free_blocks"),
    *("holds", "keeping", "new_request", "set_device_preference", "set_pressure_callback"),
    *("supported_devices",),
}
"""Methods that do not use the cache, or are refused for their handle first."""


@pytest.mark.parametrize(
    "make_any", [make_manager, lambda: make_multi(1)], ids=["one device", "several"]
)
def test_methods_of_a_closed_manager_raise(make_any):
    with make_any() as manager:
        handle = start(manager, "a", 3)
        values = {**ARGUMENTS, "request": manager.new_request("b", 3)}
    assert not handle.is_valid()
    names = {name for name, _ in inspect.getmembers(type(manager), callable)}
    for name in sorted(name for name in names - WITHOUT_CACHE if not name.startswith("_")):
        values["target"] = make_manager() if name == "move_to" else "b"
        method = getattr(manager, name)
        parameters = inspect.signature(method).parameters.values()
        required = [
            p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
        ]
        with pytest.raises(RuntimeError, match="The manager is closed.*Make another"):
            method(**{parameter.name: values[parameter.name] for parameter in required})
    manager.close()


@on_loop
async def test_close_ends_allocate_calls_that_wait():
    async with make_async() as manager:
        inner = manager.manager
        inner.allocate_blocks(inner.free_block_count() - 1)  # No end of a request frees these.
        held = await manager.allocate(manager.new_request("held", 1))
        waiting = [
            asyncio.ensure_future(manager.allocate(manager.new_request("new", 3))),
            asyncio.ensure_future(manager.allocate(manager.new_request("other", 3))),
        ]
        await settle()
        assert manager.num_waiting == 2
    await settle()
    for call in waiting:
        with pytest.raises(RuntimeError, match="The manager is closed"):
            await call
    assert manager.num_waiting == 0 and not held.is_valid()


@on_loop
async def test_close_inside_hold_raises_nothing():
    manager = make_async()
    async with manager.hold(manager.new_request("a", 3)):
        await manager.close()
    await manager.close()
    with pytest.raises(RuntimeError, match="The manager is closed"):
        await manager.allocate(manager.new_request("b", 3))
