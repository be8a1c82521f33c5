"""How many programs are compiled as callers choose lengths, counts and contents: a few.

Each public call is made with many numbers between two powers of two. All of these share their
programs, so that those of all numbers up to n are as many times more as n has powers of two.
"""

import dataclasses
import importlib
import inspect
from types import ModuleType

import jax
import numpy as np
import pytest

import ferrum_jax as fj
from ferrum_jax.manager import (
    AsyncKvCacheManager,
    MultiDevicePagedKvCacheManager,
    PagedKvCacheHandle,
    PagedKvCacheManager,
)
from ferrum_jax.ops import migration, transfer
from tests.support import compile_cases as cases
from tests.support.caches import num_compilations
from tests.support.compile_cases import Case, World, on_handle, on_manager

NUM_CALLS = 16
NUM_POWERS = 5
"""Powers of two up to 16: no case erases, moves or copies more blocks than one or the other."""


@dataclasses.dataclass(frozen=True)
class Bound:
    """How a name is called, and how many programs it runs at most."""

    case: Case
    num_programs: int


def without_programs(make, *names) -> dict[str, Bound]:
    """What asks the host alone."""
    return {name: Bound(make(name), 0) for name in names}


def ignore(*_):
    """What is called back."""


# Blocks that are erased or moved are counted by themselves, and so are the chunks of bytes that
# move: their numbers have other powers of two below them.
MANAGER = {
    "allocate": Bound(cases.allocate, 3),
    "allocate_blocks": Bound(cases.allocate_blocks, 1),
    "commit": Bound(cases.commit, 3),
    "compress_cache": Bound(cases.compress_cache, 5 + NUM_POWERS),
    "deallocate": Bound(cases.deallocate, 2),
    "defragment": Bound(cases.defragment, 2 * NUM_POWERS),
    "extend": Bound(cases.extend, 1),
    "extend_all": Bound(cases.extend_all, 1),
    "fork": Bound(cases.fork, 2),
    "free_blocks": Bound(cases.free_blocks, 2),
    "gc": Bound(cases.gc, 2),
    "generate": Bound(cases.manager_generate, 3),
    "prefill": Bound(cases.manager_prefill, 6),
    "move_to": Bound(cases.move_to, 4 + 2 * NUM_POWERS),
    "reset_prefixes": Bound(cases.reset_prefixes, 3 + NUM_POWERS),
    "run": Bound(cases.run, 2),
    "share_prefix": Bound(cases.share_prefix, 4 + NUM_POWERS),
    "swap_in": Bound(cases.swap_in, 1 + 2 * NUM_POWERS),
    "swap_out": Bound(cases.swap_out, 3),
    "add_room_listener": Bound(on_manager("add_room_listener", ignore), 0),
    "can_allocate": Bound(cases.can_allocate, 0),
    "close": Bound(cases.close, 0),
    "enable_prefix_caching": Bound(cases.enable_prefix_caching, 0),
    "explain_lookup": Bound(cases.explain_lookup, 0),
    "get_handle": Bound(on_manager("get_handle", "a"), 0),
    "holds": Bound(on_manager("holds", "a"), 0),
    "new_request": Bound(cases.new_request, 0),
    "set_weights_version": Bound(on_manager("set_weights_version", 1), 0),
    "set_pressure_callback": Bound(on_manager("set_pressure_callback", ignore), 0),
    **without_programs(on_manager, "block_size", "check", "compression_stats"),
    **without_programs(on_manager, "free_block_count", "is_lost", "list_handles"),
    **without_programs(
        on_manager, "caches_prefixes", "num_room_changes", "preempts", "stats", "total_block_count"
    ),
}

HANDLE = {
    "block_table": Bound(on_handle("block_table"), 1),
    "block_table_mut": Bound(on_handle("block_table_mut"), 1),
    "key_cache": Bound(on_handle("key_cache", 0), 1),
    "kv_cache": Bound(on_handle("kv_cache", 0), 1),
    "value_cache": Bound(on_handle("value_cache", 0), 1),
    **without_programs(on_handle, "as_any", "cache_id", "clone_handle", "compression", "device"),
    **without_programs(on_handle, "head_dim", "is_resident", "is_valid", "live_request"),
    **without_programs(on_handle, "num_cached_tokens", "num_heads", "num_layers", "num_tokens"),
    **without_programs(on_handle, "request", "request_id", "stats"),
}

OPERATIONS = {
    "allocate": Bound(cases.state_allocate, 1),
    "check_state": Bound(cases.check_state, 0),
    "copy_blocks": Bound(cases.copy_blocks, 1),
    "extend": Bound(cases.state_extend, 2),  # For many rows, and for many tokens.
    "fork": Bound(cases.state_fork, 1),
    "free": Bound(cases.state_free, 1),
    "gather": Bound(cases.gather, 2),  # One for each format.
    "require": Bound(cases.require, 0),
    "paged_attention": Bound(cases.paged_attention, 10),  # Operation by operation.
    "share": Bound(cases.state_share, 1),
    "truncate": Bound(cases.state_truncate, 1),
    "write": Bound(cases.write, 1),
}

OTHERS = {
    "generate": Bound(cases.generate, 1),
    "prefill": Bound(cases.prefill, 4),
    "prompt_logprobs": Bound(cases.prompt_logprobs, 8),
    "plan_chunks": Bound(cases.plan_chunks, 0),
    "serve": Bound(cases.serve, 2),
    "rollout": Bound(cases.rollout, 7),
    "record_queries": Bound(cases.record_queries, 3),
    "export_blocks": Bound(cases.export_blocks, 0),
    "stream_blocks": Bound(cases.stream_blocks, 0),
    "import_blocks": Bound(cases.import_blocks, NUM_POWERS),
    "move_blocks": Bound(cases.move_blocks, 1),
    "plan_defragment": Bound(cases.plan_defragment, 0),
}

COMPRESSED = {"kv_cache of compressed tokens": Bound(cases.kv_cache_of_compressed, 2)}

TABLES = {"manager": MANAGER, "handle": HANDLE, "operation": OPERATIONS, "other": OTHERS}
CALLS = {
    f"{kind} {name}": bound
    for kind, table in {**TABLES, "also": COMPRESSED}.items()
    for name, bound in table.items()
}


@pytest.fixture(scope="module")
def world():
    """The one of all calls; its programs are compiled as fast as may be."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield World()
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", CALLS)
def test_few_programs_are_compiled_whatever_numbers_a_call_is_given(world, name):
    bound, num_compiled = CALLS[name], 0
    numbers = cases.MAX_TOKENS - np.random.default_rng(0).permutation(cases.MAX_TOKENS // 2)
    for n in numbers[:NUM_CALLS].tolist():
        call = bound.case(world, n)
        before = num_compilations()
        call()
        num_compiled += num_compilations() - before
        world.tidy()
    print(f"{name}: {num_compiled} programs")
    assert num_compiled <= bound.num_programs


# Nothing public is left out.

# These read the host, or are for a caller's own program.
NOT_CALLED = {
    # A size of the pool is one that is compiled for.
    *("init", "load_config", "resize", "equal_sized"),
    *("attend_new", "call_model", "check_token_ids"),
    # Parts of `prefill` and of `prompt_logprobs`.
    *("checked_rows", "grow_rows", "keep_rows", "pack_chunks", "run_step", "token_ids"),
    # Parts of `serve`, of the programs of which `serve_replicas` is made too.
    *("checked_free_rows", "request_keys", "require_fitting", "serve_queue"),
    *("chunk_sizes", "empty_arrays"),
    # Parts of `serve` and `rollout`.
    *("checked_limits", "checked_prompts", "draw_seeds", "require_short"),
}


def methods_of(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def functions_of(module: ModuleType) -> set[str]:
    """Public functions that are written there, jitted ones included."""
    return {
        name
        for name, value in vars(module).items()
        if callable(value)
        and not inspect.isclass(value)
        and getattr(value, "__module__", None) == module.__name__
        and not name.startswith("_")
    }


def test_every_public_method_of_a_manager_and_a_handle_has_a_bound():
    assert methods_of(PagedKvCacheManager) == set(MANAGER)
    assert methods_of(PagedKvCacheHandle) == set(HANDLE)


def test_other_managers_add_only_what_runs_no_program_of_its_own():
    """They call managers of one device; a move between devices is `move_to`."""
    over_devices = methods_of(MultiDevicePagedKvCacheManager) - set(MANAGER)
    assert over_devices == {
        *("device_stats", "get_cache_device", "last_rebalance", "move_cache", "plan_rebalance"),
        *("rebalance_devices", "set_device_preference", "supported_devices"),
    }
    own = {"block_table", "hold", "manager", "num_waiting"}
    assert methods_of(AsyncKvCacheManager) - set(MANAGER) - over_devices == own


def test_every_public_function_has_a_bound():
    offered = {name for name in fj.__all__ if inspect.isroutine(getattr(fj, name))}
    assert offered - NOT_CALLED - set(OTHERS) == set(OPERATIONS)
    names = [f"decoding.{name}" for name in ("batch", "generate", "prefill")]
    names += [f"integrations.{name}" for name in ("prompt_logprobs", "queries", "serve", "rollout")]
    loops = [importlib.import_module(f"ferrum_jax.{name}") for name in names]
    modules = *loops, transfer, migration
    assert set().union(*map(functions_of, modules)) - NOT_CALLED == set(OTHERS)
