"""Small managers prepared for calls that fail: 12 blocks of 3 tokens at most."""

import dataclasses
import functools
import shutil
import tempfile
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

import ferrum_jax as fj
from ferrum_jax import KvCacheHandle, PagedKvCacheManager, Priority
from ferrum_jax.config import TierConfig
from ferrum_jax.ops.indexing import token_slots
from tests.support import grouped_managers
from tests.support.caches import payload
from tests.support.internals import taken_blocks
from tests.support.managers import MAX_TOKENS, Clock, make_manager
from tests.support.prefix_managers import CONFIG, PROMPT, make

OTHER = [21, 22, 23, 24, 25]
IDLE = [31, 32, 33, 34, 35, 36]


@dataclasses.dataclass
class Case:
    """A manager that is prepared for a call.

    Attributes:
      manager: The manager.
      handles: Handles of requests, by id.
      target: Another manager that a request moves to, if any.
    """

    manager: Any
    handles: dict[str, KvCacheHandle] = dataclasses.field(default_factory=dict)
    target: PagedKvCacheManager | None = None


@functools.partial(jax.jit, donate_argnums=0)
def write_step(state, seq_ids, positions, keys, values):
    """Writes tokens of one row at positions i32[T], -1 for none, in all layers."""
    pool, tables = state.pool, state.tables
    row = tables.block_ids[seq_ids[0]][None]
    slots = token_slots(
        row, positions[None], pool.num_blocks, pool.block_size, pool.slots_per_block
    )[0]
    for layer in range(pool.num_layers):
        pool = fj.write(pool, layer, slots, keys[layer], values[layer])
    return state.with_pools([pool]), None


@functools.partial(jax.jit, donate_argnums=0)
def extend_step(state, seq_ids, num_tokens):
    """Extends rows by i32[R] tokens."""
    return fj.extend(state, seq_ids, num_tokens, max_new_tokens=4)


@functools.partial(jax.jit, donate_argnums=0)
def truncate_step(state, seq_ids, lengths):
    """Truncates rows to i32[R] tokens."""
    return fj.truncate(state, seq_ids, lengths)


@functools.partial(jax.jit, donate_argnums=0)
def fork_step(state, seq_ids):
    """Forks the first row to the second one."""
    return fj.fork(state, seq_ids[:1], seq_ids[1:])


def write_arguments(manager: Any, tokens, begin: int = 0) -> tuple[np.ndarray, ...]:
    """Arguments of `write_step` that write tokens from a position on."""
    positions = np.full(MAX_TOKENS, -1, np.int32)
    positions[: len(tokens)] = range(begin, begin + len(tokens))
    padded = [*tokens, *[1] * (MAX_TOKENS - len(tokens))]
    model = manager.new_request("model")
    sizes: Any = SimpleNamespace(num_kv_heads=model.num_heads, head_dim=model.head_dim)
    layers = [payload(sizes, layer, padded) for layer in range(model.num_layers)]
    return positions, *(np.stack(x) for x in zip(*layers, strict=True))


def compute(case: Case, name: str, tokens, **more) -> KvCacheHandle:
    """Allocates a request, keeps its handle, and writes the tokens that are not cached."""
    manager = case.manager
    handle = manager.allocate(manager.new_request(name, prompt_token_ids=tokens, **more))
    case.handles[name] = handle
    skip = handle.num_cached_tokens
    manager.run(write_step, [handle], *write_arguments(manager, tokens[skip:], skip))
    return handle


def keep(case: Case, name: str, tokens, **more) -> KvCacheHandle:
    """Computes and commits a request."""
    handle = compute(case, name, tokens, **more)
    case.manager.commit(handle)
    return handle


def busy(**options) -> Case:
    """A manager with 8 of 12 blocks in use, 2 of them cached and idle.

    Request "a" holds 2 cached blocks and one other, "b" two; "away" is swapped out; one block is
    of `allocate_blocks`.
    """
    case = Case(make(**options))
    keep(case, "old", IDLE)
    case.manager.deallocate("old")
    keep(case, "a", PROMPT)
    compute(case, "away", [41, 42, 43, 44], priority=Priority.High)
    case.manager.swap_out("away")
    compute(case, "b", OTHER, priority=Priority.Low)
    case.manager.allocate_blocks(1)
    return case


def short(num_free: int = 0, **options) -> Case:
    """`busy` with `num_free` free blocks; `allocate_blocks` has taken the others."""
    case = busy(**options)
    case.manager.allocate_blocks(case.manager.free_block_count() - num_free)
    return case


def preempting(**options) -> Case:
    """`busy` without a free block, and with a preemption policy."""
    return short(preemption_policy=fj.LruEvictionPolicy(), **options)


def windowed(num_free: int = 5, **options) -> Case:
    """A manager of two layer groups, one with a window; "a" and "away" have released blocks.

    The window passes another block when "a" is extended.
    """
    case = Case(grouped_managers.make(clock=Clock(), **options))
    for name, num_tokens in (("a", 9), ("b", 5), ("away", 7)):
        case.handles[name] = grouped_managers.begin(case.manager, name, num_tokens)
    case.manager.swap_out("away")
    case.manager.allocate_blocks(case.manager.free_block_count() - num_free)
    return case


def small(num_used: int = 6, **options) -> Case:
    """A pool of 6 blocks that may grow to 12; `num_used` of them are in use."""
    caching = {"enable_prefix_caching": True, "prefix_cache_config": CONFIG}
    case = Case(make_manager(initial_blocks=6, clock=Clock(), **caching, **options))
    keep(case, "a", PROMPT)
    case.manager.allocate_blocks(num_used - 3)
    return case


def grown() -> Case:
    """A pool that has grown to 12 blocks and uses few, some with high ids."""
    case = small(enable_pooling=False)
    compute(case, "b", OTHER)
    compute(case, "c", IDLE)
    case.manager.free_blocks(taken_blocks(case.manager))
    case.manager.deallocate("c")
    case.manager.reset_prefixes()
    return case


def sharing() -> Case:
    """Requests "b" and "s" share uncached blocks."""
    case = busy()
    compute(case, "s", OTHER)
    case.manager.share_prefix("b", "s", 4)
    return case


def sharing_all() -> Case:
    """Requests share their last blocks too, and no block is free."""
    case = with_stranger()
    case.manager.deallocate("b")
    case.handles["s"] = case.manager.allocate(case.manager.new_request("s", 7))
    case.manager.share_prefix("stranger", "s", 6)
    case.manager.allocate_blocks(case.manager.free_block_count())
    return case


def on_disk(build: Callable[..., Case], **options) -> Case:
    """A manager whose requests are swapped out to disk."""
    directory = tempfile.mkdtemp()
    tiers = TierConfig(host_budget_bytes=0, disk_directory=directory)
    case = build(tiers=tiers, **options)
    weakref.finalize(case, shutil.rmtree, directory)
    return case


def with_twin() -> Case:
    """Request "twin" has written the tokens that "a" has committed."""
    case = busy()
    manager = case.manager
    handle = manager.allocate(manager.new_request("twin", 7))
    case.handles["twin"] = handle
    manager.run(write_step, [handle], *write_arguments(manager, PROMPT))
    return case


def with_few_prefixes() -> Case:
    """The limit of cached prefixes is reached."""
    case = busy()
    case.manager.enable_prefix_caching(dataclasses.replace(CONFIG, max_prefixes=2))
    return case


def with_stranger(build: Callable[[], Case] = busy) -> Case:
    """Request "stranger" holds 7 tokens that the manager does not know."""
    case = build()
    handle = case.manager.allocate(case.manager.new_request("stranger", 7))
    case.handles["stranger"] = handle
    case.manager.run(
        write_step, [handle], *write_arguments(case.manager, [61, 62, 63, 64, 65, 66, 67])
    )
    return case


def with_child() -> Case:
    """Request "child" has no tokens."""
    case = busy()
    case.handles["child"] = case.manager.allocate(case.manager.new_request("child", 0))
    return case


def fragmented() -> Case:
    """Blocks of requests have higher ids than free blocks."""
    case = busy()
    compute(case, "c", [*PROMPT, 18, 19])
    case.manager.deallocate("b")
    return case


def dropped() -> Case:
    """No handle of "b" is left: `gc` frees it."""
    case = busy()
    del case.handles["b"]
    return case


def then(case: Case, do: Callable[[PagedKvCacheManager], Any]) -> Case:
    """Calls a function with the manager of a case; returns the case."""
    do(case.manager)
    return case
