"""Calls that may fail, one for each way that a method of a manager can go."""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from ferrum_jax import PagedKvCacheManager, Priority
from ferrum_jax.compression import CompressionMethod
from ferrum_jax.manager import Retention
from ferrum_jax.types import TokenFormat
from tests.support import grouped_managers
from tests.support.internals import taken_blocks
from tests.support.managers import Clock
from tests.support.prefix_managers import CONFIG, PROMPT, make
from tests.support.prepared_managers import (
    IDLE,
    Case,
    busy,
    dropped,
    extend_step,
    fork_step,
    fragmented,
    grown,
    keep,
    on_disk,
    preempting,
    sharing,
    sharing_all,
    short,
    small,
    then,
    truncate_step,
    windowed,
    with_child,
    with_few_prefixes,
    with_stranger,
    with_twin,
    write_arguments,
    write_step,
)

PRUNE = CompressionMethod(
    token_format=TokenFormat.Native, scorer="window", num_sinks=1, num_recent=1
)


@dataclasses.dataclass(frozen=True)
class Situation:
    """A call, and the manager that it is made on.

    Attributes:
      covers: Names of the methods that are called.
      build: Prepares a manager.
      call: Makes the call.
      may_end: Requests that may have ended though the call has failed.
      may_cache: Whether more may be cached though the call has failed.
      has_step: Whether the call runs a step: the change may be done though the call has failed.
      goes_by_device: Whether the call is made on one device after the other.
    """

    covers: Collection[str]
    build: Callable[[], Case]
    call: Callable[[Case], Any]
    may_end: Collection[str] = ()
    may_cache: bool = False
    has_step: bool = False
    goes_by_device: bool = False


def allocate(case: Case, tokens, **more):
    """Allocates request "new" and keeps its handle."""
    handle = case.manager.allocate(case.manager.new_request("new", prompt_token_ids=tokens, **more))
    case.handles["new"] = handle
    return handle.num_tokens(), handle.num_cached_tokens


def fork(case: Case, source):
    """Forks a request twice, and keeps the handles."""
    for handle in case.manager.fork(source, ["new", "newer"]):
        case.handles[handle.request_id] = handle
    return case.handles["newer"].num_tokens()


def run(case: Case, step, names, *args, **more):
    """Runs a step, and returns its output on the host."""
    handles = [case.handles[name] for name in names]
    return jax.tree.map(np.asarray, case.manager.run(step, handles, *args, **more))


def run_write(case: Case, **more):
    """Writes the last token of "a" again."""
    return run(case, write_step, "a", *write_arguments(case.manager, [17], 6), **more)


def move_away(case: Case):
    """Moves "a" to a manager beside it."""
    case.manager.move_to("a", case.target)


def beside(build: Callable[[], Case]) -> Case:
    """A manager, and another one beside it that has cached something."""
    case, target = build(), Case(make())
    keep(target, "there", IDLE)
    case.target = target.manager
    return case


def windowed_target() -> PagedKvCacheManager:
    """A manager of the layer groups of `windowed`, without requests."""
    return grouped_managers.make(clock=Clock())


NEW = [51, 52, 53, 54, 55]
_MORE_TOKENS = [*NEW, 56, 57]
_FEW_PREFIXES = dataclasses.replace(CONFIG, max_prefixes=1)
_CALLS: dict[str, tuple[Callable[[], Case], Callable[[Case], Any]]] = {
    "allocate": (busy, lambda c: allocate(c, NEW)),
    "allocate with a cached prefix": (busy, lambda c: allocate(c, [*PROMPT, 18])),
    "allocate with a copied tail": (busy, lambda c: allocate(c, [*PROMPT[:4], 99, 98])),
    "allocate with an eviction": (short, lambda c: allocate(c, NEW)),
    "allocate with a preemption": (
        preempting,
        lambda c: allocate(c, _MORE_TOKENS, priority=Priority.High),
    ),
    "allocate with growth": (small, lambda c: allocate(c, NEW)),
    "extend": (busy, lambda c: c.manager.extend(c.handles["a"], 4)),
    "extend_all with growth": (small, lambda c: c.manager.extend_all([c.handles["a"]], 6)),
    "extend_all with an eviction": (
        short,
        lambda c: c.manager.extend_all([c.handles["a"], c.handles["b"]], 3),
    ),
    "extend with a preemption": (preempting, lambda c: c.manager.extend(c.handles["a"], 8)),
    "extend past a window": (
        windowed,
        lambda c: c.manager.extend_all([c.handles["a"], c.handles["b"]], 2),
    ),
    "extend past a window into its block": (
        lambda: windowed(num_free=1),
        lambda c: c.manager.extend(c.handles["a"], 1),
    ),
    "deallocate": (busy, lambda c: c.manager.deallocate("a")),
    "deallocate what shares": (sharing, lambda c: c.manager.deallocate("b")),
    "deallocate what is away": (busy, lambda c: c.manager.deallocate("away")),
    "run": (busy, run_write),
    "run with an eviction": (short, lambda c: run_write(c, reserve_tokens=6)),
    "run with growth": (small, lambda c: run_write(c, reserve_tokens=6)),
    "run that extends": (busy, lambda c: run(c, extend_step, "ab", np.int32([1, 4]), extends=True)),
    "run that truncates": (busy, lambda c: run(c, truncate_step, "a", np.int32([4]), extends=True)),
    "run that forks": (with_child, lambda c: run(c, fork_step, ["a", "child"], extends=True)),
    "run that forks, uncached": (
        with_child,
        lambda c: run(c, fork_step, ["b", "child"], extends=True),
    ),
    "commit": (busy, lambda c: c.manager.commit(c.handles["b"])),
    "commit pinned blocks": (
        busy,
        lambda c: c.manager.commit(
            c.handles["b"], num_tokens=3, retention=Retention(is_pinned=True)
        ),
    ),
    "commit what is cached": (with_twin, lambda c: c.manager.commit(c.handles["twin"], PROMPT)),
    "commit with an eviction": (with_few_prefixes, lambda c: c.manager.commit(c.handles["b"])),
    "commit what shares": (sharing, lambda c: c.manager.commit(c.handles["b"])),
    "reset_prefixes": (busy, lambda c: c.manager.reset_prefixes()),
    "fork": (busy, lambda c: fork(c, "b")),
    "fork with an eviction": (short, lambda c: fork(c, "a")),
    "fork with growth": (small, lambda c: fork(c, "a")),
    "fork with a preemption": (preempting, lambda c: fork(c, "a")),
    "fork behind a window": (windowed, lambda c: fork(c, "b")),
    "set_weights_version": (busy, lambda c: c.manager.set_weights_version(1)),
    "share_prefix": (with_stranger, lambda c: c.manager.share_prefix("a", "stranger", 6)),
    "share_prefix with a copy": (
        with_stranger,
        lambda c: c.manager.share_prefix("a", "stranger", 7),
    ),
    "share_prefix of what is not cached": (
        with_stranger,
        lambda c: c.manager.share_prefix("b", "stranger", 4),
    ),
    "share_prefix with an eviction": (sharing_all, lambda c: c.manager.share_prefix("a", "s", 4)),
    "swap_out": (busy, lambda c: c.manager.swap_out("a")),
    "swap_out what shares": (sharing, lambda c: c.manager.swap_out("b")),
    "swap_out to disk": (lambda: on_disk(busy), lambda c: c.manager.swap_out("a")),
    "swap_in": (busy, lambda c: c.manager.swap_in("away")),
    "swap_in what was cached": (
        lambda: then(busy(), lambda m: m.swap_out("a")),
        lambda c: c.manager.swap_in("a"),
    ),
    "swap_in from disk": (lambda: on_disk(short), lambda c: c.manager.swap_in("away")),
    "swap_in with a preemption": (
        lambda: then(preempting(), lambda m: m.commit(m.get_handle("b"))),
        lambda c: c.manager.swap_in("away"),
    ),
    "swap_in behind a window": (windowed, lambda c: c.manager.swap_in("away")),
    "share_prefix within a window": (windowed, lambda c: c.manager.share_prefix("b", "a", 5)),
    "compress_cache beside a window": (
        windowed,
        lambda c: c.manager.compress_cache("a", 0.7, PRUNE),
    ),
    "compress_cache": (busy, lambda c: c.manager.compress_cache("b", 0.5, PRUNE)),
    "compress_cache of what is cached": (busy, lambda c: c.manager.compress_cache("a", 0.7, PRUNE)),
    "compress_cache in place": (
        lambda: then(short(), lambda m: m.commit(m.get_handle("b"))),
        lambda c: c.manager.compress_cache("a", 0.7, PRUNE),
    ),
    "defragment": (fragmented, lambda c: c.manager.defragment()),
    "gc": (dropped, lambda c: c.manager.gc()),
    "gc that shrinks": (grown, lambda c: c.manager.gc()),
    "allocate_blocks": (short, lambda c: len(c.manager.allocate_blocks(2))),
    "allocate_blocks with growth": (small, lambda c: len(c.manager.allocate_blocks(2))),
    "free_blocks": (short, lambda c: c.manager.free_blocks(taken_blocks(c.manager))),
    "enable_prefix_caching": (busy, lambda c: c.manager.enable_prefix_caching(_FEW_PREFIXES)),
    "move_to": (lambda: beside(busy), move_away),
    "move_to behind a window": (
        lambda: dataclasses.replace(windowed(), target=windowed_target()),
        move_away,
    ),
    "move_to of what is away": (
        lambda: beside(lambda: then(busy(), lambda m: m.swap_out("a"))),
        move_away,
    ),
}
"""How a manager is prepared for each call, and the call; a name begins with the method."""
SITUATIONS = {
    name: Situation(
        name.split()[:1],
        build,
        call,
        may_end=["b"] if name == "gc" else (),
        may_cache=name == "move_to",
        has_step=name.startswith("run that"),
    )
    for name, (build, call) in _CALLS.items()
}
"""Calls that change a manager of one device."""
