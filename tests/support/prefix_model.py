"""A simple model of a prefix cache: a dictionary from tokens to blocks, and their users."""

import dataclasses
import math
from collections.abc import Callable, Iterable

from ferrum_jax import PrefixCacheConfig
from ferrum_jax.policies.blocks import Retention
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.tree import TreeKey
from ferrum_jax.types import NULL_BLOCK


@dataclasses.dataclass
class Kept:
    """A cached block in the model, with an id in each layer group or `NULL_BLOCK`.

    Retentions leave some choice of when a block expires: not before `soonest`, and not after
    `latest` if it is looked up.
    """

    block_ids: list[int]
    ttl_seconds: float
    soonest: float = -math.inf
    latest: float = -math.inf


@dataclasses.dataclass
class Request:
    """One request: its tokens, the blocks of its row in each layer group, and its lease.

    Until the row has a copy of the block in which its cached prefix ends, `tail` names that block.
    """

    key: TreeKey
    tokens: tuple[int, ...]
    rows: list[list[int]]
    lease: Lease
    tail: tuple | None = None

    @property
    def num_released(self) -> list[int]:
        """Leading blocks that the row has released in each group."""
        return [row.count(NULL_BLOCK) for row in self.rows]


class PrefixModel:
    """What a cache should hold, by a search of every cached block each time.

    Attributes:
      cache: The cache under test.
      config: Its present configuration.
      block_size: Tokens per block.
      windows: Sliding window of each layer group.
      now: Seconds of the clock.
      version: Present version of the weights.
      free: Ids of free blocks, the last one next.
      ref_counts: References to each block.
      contents: Group and name of each block: salt and version, and all tokens up to its end.
      kept: Cached blocks by name.
      pins: Names of pinned prefixes.
      requests: Live requests.
    """

    cache: PrefixCache
    config: PrefixCacheConfig
    block_size: int
    windows: tuple[int | None, ...]
    now: float
    version: int
    free: list[int]
    ref_counts: list[int]
    contents: dict[int, tuple]
    kept: dict[tuple, Kept]
    pins: set[tuple]
    requests: list[Request]

    def covered(self, request: Request) -> list[tuple]:
        """Names of the cached blocks that a request holds, in order."""
        if request.tail is not None:
            return self.names(*request.tail)
        return self.names(request.key, request.tokens)[: request.lease.num_blocks]

    def names(self, key, tokens) -> list[tuple]:
        size = self.block_size
        return [(key, tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def in_use(self) -> set[tuple]:
        used = {name for request in self.requests for name in self.covered(request)}
        return used | {name for pin in self.pins for name in self.names(*pin)}

    def first_needed(self, group: int, num_tokens: int) -> int:
        """Logical index of the first block that a group needs to go on after some tokens."""
        window = self.windows[group]
        return 0 if window is None else max(0, num_tokens + 1 - max(window, 2)) // self.block_size

    def first_window(self, num_released: Iterable[int]) -> int:
        """Logical index of the first block of any window group, of a number per group."""
        pairs = zip(num_released, self.windows, strict=True)
        return min((first for first, window in pairs if window is not None), default=0)

    def used_ids(self, requests: Iterable[Request] | None = None) -> set[int]:
        """Ids of cached blocks that requests (all if absent) or pins hold."""
        used, windowed = set[tuple](), set[tuple]()
        for request in self.requests if requests is None else requests:
            names = self.covered(request)
            used.update(names)
            windowed.update(names[self.first_window(request.num_released) :])
        for pin in self.pins:
            names, groups = self.names(*pin), range(len(self.windows))
            used.update(names)
            firsts = [self.first_needed(group, len(pin[1])) for group in groups]
            windowed.update(names[self.first_window(firsts) :])
        return {
            block_id
            for name, group, block_id in self.cached_ids()
            if name in (used if self.windows[group] is None else windowed)
        }

    def cached_ids(self) -> list[tuple[tuple, int, int]]:
        """Name, group and id of every block that the cache should hold."""
        return [
            (name, group, block_id)
            for name, kept in self.kept.items()
            for group, block_id in enumerate(kept.block_ids)
            if block_id != NULL_BLOCK
        ]

    def followers(self, name) -> list[tuple]:
        """Names of a cached block and of all that follow it."""
        key, tokens = name
        return [
            other for other in self.kept if other[0] == key and other[1][: len(tokens)] == tokens
        ]

    def is_surely_alive(self, name) -> bool:
        used = self.in_use()
        return any(n in used or self.now < self.kept[n].soonest for n in self.followers(name))

    def may_be_alive(self, name) -> bool:
        return name in self.in_use() or self.now < self.kept[name].latest

    def shares(self, key) -> bool:
        return key.salt is not None or self.config.enable_cross_request_sharing

    def longest(self, key, tokens, is_alive, some: Callable = any) -> int:
        """Cached tokens of a prompt at its longest usable boundary, at least one left to compute.

        If several blocks continue the full ones, the cache looks at one of them: so it finds no
        less than what `some=all` can use, and no more than what `any` can.
        """
        limit = max(0, len(tokens) - 1) if self.shares(key) else 0
        best = 0
        for end in range(1, limit + 1):
            num_full, num_tail = divmod(end, self.block_size)
            path = self.names(key, tokens[:end])
            last = (num_full + (num_tail > 0)) * self.block_size
            ends = [
                name
                for name in self.kept
                if name[0] == key and len(name[1]) == last and name[1][:end] == tokens[:end]
            ]
            can_be = [name for name in ends if is_alive(name) or some is all]
            if any(map(is_alive, ends)) and some(
                self.is_usable([*path[:num_full], name], end) for name in can_be
            ):
                best = end
        return best if best >= self.config.min_prefix_length else 0

    def is_usable(self, names, num_tokens: int) -> bool:
        """Whether every group has the blocks that a request needs after some cached tokens."""
        return all(
            self.kept[names[i]].block_ids[group] != NULL_BLOCK
            for group in range(len(self.windows))
            for i in range(self.first_needed(group, num_tokens), -(-num_tokens // self.block_size))
        )

    def num_leaves(self) -> int:
        return sum(len(self.followers(name)) == 1 for name in self.kept)

    def num_idle(self) -> int:
        return len(self.cached_ids()) - len(self.used_ids())

    def num_idle_outdated(self) -> int:
        """Number of cached ids of other versions of the weights that nothing holds."""
        used = self.used_ids()
        ids = [i for name, _, i in self.cached_ids() if name[0].version != self.version]
        return len(set(ids) - used)

    def drop(self, block_ids):
        """Releases a reference to each block."""
        for block_id in block_ids:
            if block_id == NULL_BLOCK:
                continue
            self.ref_counts[block_id] -= 1
            if not self.ref_counts[block_id]:
                self.free.append(block_id)
                del self.contents[block_id]

    def take(self, group, name) -> int:
        block_id = self.free.pop()
        self.ref_counts[block_id], self.contents[block_id] = 1, (group, name)
        return block_id

    def forget(self, block_ids, used: set[int]) -> list[tuple]:
        """Removes ids that left the cache, and returns the names of blocks that left it wholly.

        A block leaves with its ids in full groups and all that it still has in window groups, the
        deepest first.
        """
        by_id = {block_id: (name, group) for name, group, block_id in self.cached_ids()}
        assert len(set(block_ids)) == len(block_ids), "an id was removed twice"
        assert not used & set(block_ids), "a block in use was removed"
        gone: dict[tuple, Kept] = {}
        for block_id in block_ids:
            name, group = by_id[block_id]
            kept = gone.get(name) or self.kept[name]
            kept.block_ids[group] = NULL_BLOCK
            if self.windows[group] is None and name not in gone:
                assert self.followers(name) == [name], "a block was removed before its followers"
                gone[name] = self.kept.pop(name)
        for kept in gone.values():
            assert set(kept.block_ids) == {NULL_BLOCK}, "a block leaves with all of its ids"
        self.drop(block_ids)
        return list(gone)

    def num_new(self, request: Request, tokens) -> int:
        """Number of blocks that a row has to take to hold tokens."""
        return sum(-(-len(tokens) // self.block_size) - len(row) for row in request.rows)

    def fill(self, request: Request):
        """Takes the blocks that a request needs for its tokens."""
        tokens, size = request.tokens, self.block_size
        for group, row in enumerate(request.rows):
            for first in range(len(row) * size, len(tokens), size):
                row.append(self.take(group, (request.key, tokens[: first + size])))

    def name_last(self, request: Request):
        """Corrects the names of a row's last blocks, which it alone holds, after a change."""
        for group, row in enumerate(request.rows):
            end = len(row) * self.block_size
            self.contents[row[-1]] = (group, (request.key, request.tokens[:end]))

    def release_passed(self, request: Request, num_released):
        """Releases leading blocks of a row in each group."""
        for row, count in zip(request.rows, num_released, strict=True):
            self.drop(row[:count])
            row[:count] = [NULL_BLOCK] * count

    def set_retention(self, request: Request, retention: Retention):
        ttl_seconds = retention.ttl_seconds or self.config.prefix_ttl_seconds
        covered = self.covered(request)
        for name in covered:
            kept = self.kept[name]
            if ttl_seconds < kept.ttl_seconds:
                kept.soonest = -math.inf
            kept.ttl_seconds = ttl_seconds
        if not retention.is_pinned:
            self.pins -= set(covered)
        elif covered:
            self.pins.add(covered[-1])

    def tail_name(self, match):
        return self.contents[match.tail.block_id][1]

    def retain(self, request: Request):
        """Restarts the time to live of the blocks that a request holds."""
        deadline = -math.inf
        for name in reversed(self.covered(request)):
            kept = self.kept[name]
            deadline = max(deadline, self.now + kept.ttl_seconds)
            kept.soonest, kept.latest = max(kept.soonest, deadline), max(kept.latest, deadline)


def num_common(first, second) -> int:
    """Number of tokens that both have in common at the beginning."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))
