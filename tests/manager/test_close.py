"""A manager that is closed holds nothing, leaves nothing behind, and says so."""

import asyncio
import gc
import subprocess
import sys

import pytest

from ferrum_jax.config import TierConfig
from ferrum_jax.errors import InvalidHandleError
from tests.support.loops import make_async, on_loop, settle
from tests.support.managers import make_manager, start
from tests.support.multi_device import CPU, make_multi
from tests.support.prefix_managers import CONFIG, keep, make


def on_disk(directory):
    return TierConfig(host_budget_bytes=0, disk_directory=directory)


def test_the_end_of_a_with_ends_every_request_wherever_it_is(tmp_path):
    with make(tiers=on_disk(tmp_path)) as manager:
        here, away = keep(manager, "here"), keep(manager, "away")
        manager.swap_out("away")
        assert len(list(tmp_path.glob("*.kvblocks"))) == 1
    assert not here.is_valid() and not away.is_valid()
    with pytest.raises(InvalidHandleError):
        here.num_tokens()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_directory_is_free_for_another_manager_once_its_own_is_closed(tmp_path):
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


def test_the_files_of_a_manager_go_when_its_process_exits_without_close(tmp_path):
    command = [sys.executable, "-c", EXIT_WITHOUT_CLOSE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_files_of_a_manager_go_when_it_is_dropped(tmp_path):
    manager = make_manager(tiers=on_disk(tmp_path))
    start(manager, "a", 3)
    manager.swap_out("a")
    del manager
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


CALLS = {
    "allocate": lambda manager, request: manager.allocate(request),
    "can_allocate": lambda manager, request: manager.can_allocate(request),
    "deallocate": lambda manager, _: manager.deallocate("a"),
    "get_handle": lambda manager, _: manager.get_handle("a"),
    "list_handles": lambda manager, _: manager.list_handles(),
    "swap_out": lambda manager, _: manager.swap_out("a"),
    "swap_in": lambda manager, _: manager.swap_in("a"),
    "share_prefix": lambda manager, _: manager.share_prefix("a", "b", 1),
    "compress_cache": lambda manager, _: manager.compress_cache("a", 0.5),
    "explain_lookup": lambda manager, _: manager.explain_lookup([1, 2, 3]),
    "enable_prefix_caching": lambda manager, _: manager.enable_prefix_caching(CONFIG),
    "compression_stats": lambda manager, _: manager.compression_stats(),
    "stats": lambda manager, _: manager.stats(),
    "defragment": lambda manager, _: manager.defragment(),
    "gc": lambda manager, _: manager.gc(),
    "check": lambda manager, _: manager.check(),
}
ALONE = {
    "run": lambda manager, _: manager.run(lambda state, rows: (state, None), []),
    "allocate_blocks": lambda manager, _: manager.allocate_blocks(1),
    "free_block_count": lambda manager, _: manager.free_block_count(),
    "total_block_count": lambda manager, _: manager.total_block_count(),
    "move_to": lambda manager, _: manager.move_to("a", make_manager()),
}
TOGETHER = {
    "get_cache_device": lambda manager, _: manager.get_cache_device("a"),
    "move_cache": lambda manager, _: manager.move_cache("a", CPU[0]),
    "rebalance_devices": lambda manager, _: manager.rebalance_devices(),
    "device_stats": lambda manager, _: manager.device_stats(),
}


@pytest.fixture(scope="module")
def closed_manager():
    manager = make_manager()
    start(manager, "a", 3)
    request = manager.new_request("b", 3)
    manager.close()
    return manager, request


@pytest.mark.parametrize("name", [*CALLS, *ALONE])
def test_whatever_needs_the_cache_of_a_closed_manager_is_told_that_it_is(closed_manager, name):
    with pytest.raises(RuntimeError, match="The manager is closed.*Make another"):
        {**CALLS, **ALONE}[name](*closed_manager)


@pytest.mark.parametrize("name", [*CALLS, *TOGETHER])
def test_a_closed_manager_of_several_devices_says_so_too(name):
    with make_multi(1) as manager:
        handle = start(manager, "a", 3)
        request = manager.new_request("b", 3)
    assert not handle.is_valid()
    with pytest.raises(RuntimeError, match="The manager is closed.*Make another"):
        {**CALLS, **TOGETHER}[name](manager, request)
    manager.close()


def test_a_step_cannot_close_the_manager_that_runs_it():
    manager = make_manager()
    handle = start(manager, "a", 3)

    def step(state, seq_ids):
        manager.close()
        return state, None

    with pytest.raises(RuntimeError, match="inside a step"):
        manager.run(step, [handle])
    assert handle.is_valid()
    manager.check()


@on_loop
async def test_who_waits_for_room_hears_that_there_will_be_none():
    async with make_async() as manager:
        inner = manager.manager
        inner.allocate_blocks(inner.free_block_count() - 1)  # These no end of a request frees.
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
async def test_a_held_request_that_a_close_has_ended_ends_in_peace():
    manager = make_async()
    async with manager.hold(manager.new_request("a", 3)):
        await manager.close()
    await manager.close()
    with pytest.raises(RuntimeError, match="The manager is closed"):
        await manager.allocate(manager.new_request("b", 3))
