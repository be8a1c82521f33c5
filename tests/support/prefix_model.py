"""A simple model of a prefix cache: a dictionary from tokens to blocks, and their users."""

import dataclasses
import math

from ferrum_jax import PrefixCacheConfig
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.lease import Lease


@dataclasses.dataclass
class Kept:
    """A cached block in the model.

    Retentions leave some choice of when a block expires: not before `soonest`, and not after
    `latest` if it is looked up.
    """

    block_id: int
    ttl_seconds: float
    soonest: float = -math.inf
    latest: float = -math.inf


@dataclasses.dataclass
class Request:
    """One request: its tokens, the blocks of its row, and its lease."""

    salt: str | None
    tokens: tuple[int, ...]
    block_ids: list[int]
    lease: Lease


class PrefixModel:
    """What a cache should hold, by a search of every cached block each time.

    Attributes:
      cache: The cache under test.
      config: Its present configuration.
      block_size: Tokens per block.
      now: Seconds of the clock.
      free: Ids of free blocks, the last one next.
      ref_counts: References to each block.
      contents: Name of each block: salt, and all tokens up to its end.
      kept: Cached blocks by name.
      pins: Names of pinned prefixes.
      requests: Live requests.
    """

    cache: PrefixCache
    config: PrefixCacheConfig
    block_size: int
    now: float
    free: list[int]
    ref_counts: list[int]
    contents: dict[int, tuple]
    kept: dict[tuple, Kept]
    pins: set[tuple]
    requests: list[Request]

    def covered(self, request: Request) -> list[tuple]:
        """Names of the cached blocks that a request holds, in order."""
        return self.names(request.salt, request.tokens)[: request.lease.num_blocks]

    def names(self, salt, tokens) -> list[tuple]:
        size = self.block_size
        return [(salt, tokens[:end]) for end in range(size, len(tokens) + 1, size)]

    def in_use(self) -> set[tuple]:
        used = {name for request in self.requests for name in self.covered(request)}
        return used | {name for pin in self.pins for name in self.names(*pin)}

    def followers(self, name) -> list[tuple]:
        """Names of a cached block and of all that follow it."""
        salt, tokens = name
        return [
            other for other in self.kept if other[0] == salt and other[1][: len(tokens)] == tokens
        ]

    def is_surely_alive(self, name) -> bool:
        used = self.in_use()
        return any(n in used or self.now < self.kept[n].soonest for n in self.followers(name))

    def may_be_alive(self, name) -> bool:
        return name in self.in_use() or self.now < self.kept[name].latest

    def shares(self, salt) -> bool:
        return salt is not None or self.config.enable_cross_request_sharing

    def longest(self, salt, tokens, is_alive) -> int:
        """Number of cached tokens of a prompt, with at least one left to compute."""
        limit = max(0, len(tokens) - 1) if self.shares(salt) else 0
        names = [name for name in self.kept if name[0] == salt and is_alive(name)]
        found = max((num_common(name[1], tokens[:limit]) for name in names), default=0)
        return found if found >= self.config.min_prefix_length else 0

    def num_leaves(self) -> int:
        return sum(len(self.followers(name)) == 1 for name in self.kept)

    def num_idle(self) -> int:
        return len(self.kept.keys() - self.in_use())

    def drop(self, block_ids):
        """Releases a reference to each block."""
        for block_id in block_ids:
            self.ref_counts[block_id] -= 1
            if not self.ref_counts[block_id]:
                self.free.append(block_id)
                del self.contents[block_id]

    def take(self, name) -> int:
        block_id = self.free.pop()
        self.ref_counts[block_id], self.contents[block_id] = 1, name
        return block_id

    def forget(self, block_ids, used) -> list[tuple]:
        """Removes blocks that left the cache, the deepest first, and returns their names."""
        by_id = {kept.block_id: name for name, kept in self.kept.items()}
        gone = [by_id[block_id] for block_id in block_ids]
        for name in gone:
            assert name not in used, "a block in use was removed"
            assert self.followers(name) == [name], "a block was removed before those that follow"
            del self.kept[name]
        self.drop(block_ids)
        return gone

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
