"""Calls that may fail, one for each way that a method of a manager can take.

Their managers have few blocks, so that few programs serve them all.
"""

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from ferrum_jax import Priority
from ferrum_jax.compression import CompressionMethod
from ferrum_jax.manager import Retention
from ferrum_jax.types import TokenFormat
from tests.support.failure_cases import (
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
    with_child,
    with_few_prefixes,
    with_stranger,
    with_twin,
    write_arguments,
    write_step,
)
from tests.support.parts import pool_of
from tests.support.prefix_managers import CONFIG, PROMPT, make

PRUNE = CompressionMethod(
    token_format=TokenFormat.Native, scorer="window", num_sinks=1, num_recent=1
)


@dataclasses.dataclass(frozen=True)
class Situation:
    """A call, and what comes before.

    Attributes:
      covers: The methods that are called.
      build: Prepares a manager.
      call: Makes the call.
      may_end: Requests that may have ended though the call has failed.
      may_cache: Whether more may be cached though the call has failed.
      has_step: Whether it may be as after though the call has failed: the step has run.
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


def _situation(covers: str, build, call, **more) -> Situation:
    return Situation(covers.split(), build, call, **more)


NEW = [51, 52, 53, 54, 55]
SITUATIONS = {
    "allocate": _situation("allocate", busy, lambda c: allocate(c, NEW)),
    "allocate with a cached prefix": _situation(
        "allocate", busy, lambda c: allocate(c, [*PROMPT, 18])
    ),
    "allocate with a copied tail": _situation(
        "allocate", busy, lambda c: allocate(c, [*PROMPT[:4], 99, 98])
    ),
    "allocate with an eviction": _situation("allocate", short, lambda c: allocate(c, NEW)),
    "allocate with a preemption": _situation(
        "allocate", preempting, lambda c: allocate(c, [*NEW, 56, 57], priority=Priority.High)
    ),
    "allocate with growth": _situation("allocate", small, lambda c: allocate(c, NEW)),
    "extend": _situation("extend", busy, lambda c: c.manager.extend(c.handles["a"], 4)),
    "extend_all with growth": _situation(
        "extend_all", small, lambda c: c.manager.extend_all([c.handles["a"]], 6)
    ),
    "extend_all with an eviction": _situation(
        "extend_all",
        short,
        lambda c: c.manager.extend_all([c.handles["a"], c.handles["b"]], 3),
    ),
    "extend with a preemption": _situation(
        "extend", preempting, lambda c: c.manager.extend(c.handles["a"], 8)
    ),
    "deallocate": _situation("deallocate", busy, lambda c: c.manager.deallocate("a")),
    "deallocate what shares": _situation(
        "deallocate", sharing, lambda c: c.manager.deallocate("b")
    ),
    "deallocate what is away": _situation(
        "deallocate", busy, lambda c: c.manager.deallocate("away")
    ),
    "run": _situation("run", busy, run_write),
    "run with an eviction": _situation("run", short, lambda c: run_write(c, reserve_tokens=6)),
    "run with growth": _situation("run", small, lambda c: run_write(c, reserve_tokens=6)),
    "run that extends": _situation(
        "run",
        busy,
        lambda c: run(c, extend_step, "ab", np.int32([1, 4]), extends=True),
        has_step=True,
    ),
    "run that truncates": _situation(
        "run",
        busy,
        lambda c: run(c, truncate_step, "a", np.int32([4]), extends=True),
        has_step=True,
    ),
    "run that forks": _situation(
        "run",
        with_child,
        lambda c: run(c, fork_step, ["a", "child"], extends=True),
        has_step=True,
    ),
    "run that forks, uncached": _situation(
        "run",
        with_child,
        lambda c: run(c, fork_step, ["b", "child"], extends=True),
        has_step=True,
    ),
    "commit": _situation("commit", busy, lambda c: c.manager.commit(c.handles["b"])),
    "commit, pinned": _situation(
        "commit",
        busy,
        lambda c: c.manager.commit(
            c.handles["b"], num_tokens=3, retention=Retention(is_pinned=True)
        ),
    ),
    "commit what is cached": _situation(
        "commit", with_twin, lambda c: c.manager.commit(c.handles["twin"], PROMPT)
    ),
    "commit with an eviction": _situation(
        "commit", with_few_prefixes, lambda c: c.manager.commit(c.handles["b"])
    ),
    "commit what shares": _situation("commit", sharing, lambda c: c.manager.commit(c.handles["b"])),
    "reset_prefixes": _situation("reset_prefixes", busy, lambda c: c.manager.reset_prefixes()),
    "share_prefix": _situation(
        "share_prefix", with_stranger, lambda c: c.manager.share_prefix("a", "stranger", 6)
    ),
    "share_prefix with a copy": _situation(
        "share_prefix", with_stranger, lambda c: c.manager.share_prefix("a", "stranger", 7)
    ),
    "share_prefix of what is not cached": _situation(
        "share_prefix", with_stranger, lambda c: c.manager.share_prefix("b", "stranger", 4)
    ),
    "share_prefix with an eviction": _situation(
        "share_prefix", sharing_all, lambda c: c.manager.share_prefix("a", "s", 4)
    ),
    "swap_out": _situation("swap_out", busy, lambda c: c.manager.swap_out("a")),
    "swap_out what shares": _situation("swap_out", sharing, lambda c: c.manager.swap_out("b")),
    "swap_out to disk": _situation(
        "swap_out", lambda: on_disk(busy), lambda c: c.manager.swap_out("a")
    ),
    "swap_in": _situation("swap_in", busy, lambda c: c.manager.swap_in("away")),
    "swap_in what was cached": _situation(
        "swap_in",
        lambda: then(busy(), lambda m: m.swap_out("a")),
        lambda c: c.manager.swap_in("a"),
    ),
    "swap_in from disk": _situation(
        "swap_in",
        lambda: on_disk(short),
        lambda c: c.manager.swap_in("away"),
    ),
    "swap_in with a preemption": _situation(
        "swap_in",
        lambda: then(preempting(), lambda m: m.commit(m.get_handle("b"))),
        lambda c: c.manager.swap_in("away"),
    ),
    "compress_cache": _situation(
        "compress_cache", busy, lambda c: c.manager.compress_cache("b", 0.5, PRUNE)
    ),
    "compress_cache of what is cached": _situation(
        "compress_cache", busy, lambda c: c.manager.compress_cache("a", 0.7, PRUNE)
    ),
    "compress_cache in place": _situation(
        "compress_cache",
        lambda: then(short(), lambda m: m.commit(m.get_handle("b"))),
        lambda c: c.manager.compress_cache("a", 0.7, PRUNE),
    ),
    "defragment": _situation("defragment", fragmented, lambda c: c.manager.defragment()),
    "gc": _situation("gc", dropped, lambda c: c.manager.gc(), may_end=["b"]),
    "gc that shrinks": _situation("gc", grown, lambda c: c.manager.gc()),
    "allocate_blocks": _situation(
        "allocate_blocks", short, lambda c: len(c.manager.allocate_blocks(2))
    ),
    "allocate_blocks with growth": _situation(
        "allocate_blocks", small, lambda c: len(c.manager.allocate_blocks(2))
    ),
    "free_blocks": _situation(
        "free_blocks",
        short,
        lambda c: c.manager.free_blocks(sorted(pool_of(c.manager).counts.taken)),
    ),
    "enable_prefix_caching": _situation(
        "enable_prefix_caching",
        busy,
        lambda c: c.manager.enable_prefix_caching(dataclasses.replace(CONFIG, max_prefixes=1)),
    ),
    "move_to": _situation("move_to", lambda: beside(busy), move_away, may_cache=True),
    "move_to of what is away": _situation(
        "move_to",
        lambda: beside(lambda: then(busy(), lambda m: m.swap_out("a"))),
        move_away,
    ),
}
"""What changes a manager of one device, each way that it can go."""
