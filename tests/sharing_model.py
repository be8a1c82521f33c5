"""A dull model of a manager whose requests share blocks: what each one reads, and what is cached.

Every token has one payload for each (salt, tokens up to it). So equal content is equal wherever
it lies, and all else is seen. Who holds which block is read from the tables; what may go, what
is found, and what fits follows from that by looking at everything each time.
"""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np

from ferrum_jax import KvCacheHandle, PagedKvCacheManager, Priority
from ferrum_jax.types import MemoryPressure
from tests.helpers import payload
from tests.managers import BLOCK_SIZE, Clock, cached_prefixes, rows_of
from tests.prefix_model import num_common


@dataclasses.dataclass
class Request:
    """What one request should hold.

    Attributes:
      salt: Whose it is.
      priority: How urgent.
      handle: None once nobody holds one.
      tokens: The truth, told to the manager or not.
      num_known: Tokens that the manager was told.
      num_computed: Those of them that it may take as computed.
      cells: Payloads in its blocks, those behind its tokens included; 0 for none.
      is_away: Whether it is swapped out.
    """

    salt: str | None
    priority: Priority
    handle: KvCacheHandle | None
    tokens: list[int]
    num_known: int = 0
    num_computed: int = 0
    cells: list[int] = dataclasses.field(default_factory=list)
    is_away: bool = False

    @property
    def num_blocks(self) -> int:
        return num_blocks_for(len(self.tokens))

    def num_new(self, num_tokens: int) -> int:
        """Blocks that it lacks for so many more tokens."""
        return num_blocks_for(len(self.tokens) + num_tokens) - self.num_blocks

    def grow(self, tokens):
        """Adds tokens that are not written yet, and the room for them."""
        self.tokens = self.tokens + list(tokens)
        self.cells += [0] * (self.num_blocks * BLOCK_SIZE - len(self.cells))

    def cut(self, num_tokens: int):
        self.tokens = self.tokens[:num_tokens]
        self.num_known = min(self.num_known, num_tokens)
        self.num_computed = min(self.num_computed, num_tokens)
        del self.cells[self.num_blocks * BLOCK_SIZE :]


def num_blocks_for(num_tokens: int) -> int:
    return -(-num_tokens // BLOCK_SIZE)


class SharingModel:
    """What a manager should hold, and what it should answer."""

    def __init__(self, manager: PagedKvCacheManager, clock: Clock, max_seqs: int, max_blocks: int):
        self.manager, self.clock = manager, clock
        self.max_seqs, self.max_blocks = max_seqs, max_blocks
        self.config = None
        self.requests: dict[int, Request] = {}
        self.taken: list[int] = []
        self.kept: dict[tuple, float] = {}
        self.pins: set[tuple] = set()
        self._payloads: dict[tuple, int] = {}
        self._num_gone = 0

    # What is written.

    def payloads_of(self, salt, tokens) -> list[int]:
        """The payload of each token."""
        names = [(salt, tuple(tokens[: i + 1])) for i in range(len(tokens))]
        return [self._payloads.setdefault(name, len(self._payloads) + 1) for name in names]

    def num_written(self, i: int) -> int:
        """Tokens of a request, from the first one on, whose payload is there."""
        request = self.requests[i]
        return num_common(request.cells, self.payloads_of(request.salt, request.tokens))

    def check_bytes(self):
        """Every block of the pool holds what it should, in every layer and bit."""
        k, v, num_blocks = self.manager.run(
            lambda state, _: (
                state,
                (np.array(state.pool.k), np.array(state.pool.v), state.pool.num_blocks),
            ),
            [],
        )
        expected: dict[int, list[int]] = {}
        for i, block_ids in rows_of(self.manager).items():
            cells = self.requests[i].cells
            assert len(cells) == len(block_ids) * BLOCK_SIZE
            for place, block_id in enumerate(block_ids):
                held = cells[place * BLOCK_SIZE :][:BLOCK_SIZE]
                assert expected.setdefault(block_id, held) == held, "who shares reads the same"
        for (salt, tokens), block_id in cached_prefixes(self.manager).items():
            held = self.payloads_of(salt, tokens)[-BLOCK_SIZE:]
            assert expected.setdefault(block_id, held) == held, "cached blocks hold their tokens"
        nothing = [0] * BLOCK_SIZE  # Nobody finds anything in a block that nobody holds.
        cells = [x for block_id in range(num_blocks) for x in expected.get(block_id, nothing)]
        shape = SimpleNamespace(num_kv_heads=k.shape[2], head_dim=k.shape[4])
        for layer in range(k.shape[1]):
            for got, want in zip((k, v), payload(shape, layer, cells), strict=True):
                have = got[:, layer].transpose(0, 2, 1, 3).reshape(want.shape)
                np.testing.assert_array_equal(have, want)

    # Who holds what.

    def residents(self) -> dict[int, Request]:
        return {i: request for i, request in self.requests.items() if not request.is_away}

    def lease_of(self, i: int) -> int:
        """Blocks of a request that are cached, and held by it as such."""
        return self.manager._entries[i].lease.num_blocks

    def num_known(self, i: int) -> int:
        """Tokens of a request that the manager was told, or knows from the cache."""
        return max(self.requests[i].num_known, BLOCK_SIZE * self.lease_of(i))

    def covered(self, i: int) -> list[tuple]:
        return self.names(self.requests[i].salt, self.requests[i].tokens)[: self.lease_of(i)]

    def names(self, salt, tokens) -> list[tuple]:
        """The names of a sequence's full blocks."""
        ends = range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)
        return [(salt, tuple(tokens[:end])) for end in ends]

    def in_use(self, but=()) -> set[int]:
        """Blocks that cannot go: of requests (but some), taken, and pinned."""
        rows = rows_of(self.manager)
        used = {b for i, blocks in rows.items() if i not in but for b in blocks} | set(self.taken)
        cached = cached_prefixes(self.manager)
        return used | {cached[name] for pin in self.pins for name in self.names(*pin)}

    def num_available(self, more=()) -> int:
        """Blocks that can be had without swapping anybody out, `more` being held too."""
        return self.max_blocks - len(self.in_use() | set(more))

    def num_shared_tails(self, places: dict[int, int]) -> int:
        """Requests that would end, at so many tokens, inside a block that others hold too."""
        rows, cached = rows_of(self.manager), set(cached_prefixes(self.manager).values())
        holders = [block for blocks in rows.values() for block in blocks]
        tails = [rows[i][n // BLOCK_SIZE] for i, n in places.items() if n % BLOCK_SIZE]
        return sum(holders.count(block) > 1 or block in cached for block in tails)

    def fits(self, num_new: int, priority: Priority, policy, *, more=(), but=(), rows=0) -> bool:
        """Says whether so many blocks and rows can be had, by swapping out if the policy would."""
        residents = self.residents()
        num_rows = self.max_seqs - len(residents)
        if num_new <= self.num_available(more) and rows <= num_rows:
            return True
        victims = {i for i, r in residents.items() if r.priority < priority and i not in but}
        if policy == "lru":
            victims = {i for i in victims if residents[i].tokens}
        if policy not in ("lru", "all", "last", "repeated") or not victims:
            return False
        left = self.max_blocks - len(self.in_use(victims) | set(more))
        return num_new <= left and rows <= num_rows + len(victims)

    def level(self) -> MemoryPressure:
        share = len(self.in_use()) / self.max_blocks
        return MemoryPressure(sum(share >= threshold for threshold in (0.6, 0.8, 0.95)))

    # What is cached.

    def shares(self, salt) -> bool:
        return self.config is not None and (
            salt is not None or self.config.enable_cross_request_sharing
        )

    def is_alive(self, name) -> bool:
        used = {held for i in self.residents() for held in self.covered(i)}
        used |= {held for pin in self.pins for held in self.names(*pin)}
        return name in used or self.clock.now < self.kept[name]

    def found(self, salt, prompt) -> int:
        """Tokens of a prompt that a dull search finds, at least one being left to compute."""
        if not self.shares(salt):
            return 0
        prompt = tuple(prompt)[: max(0, len(prompt) - 1)]
        alive = [name for name in self.kept if name[0] == salt and self.is_alive(name)]
        most = max((num_common(tokens, prompt) for _, tokens in alive), default=0)
        return most if most >= self.config.min_prefix_length else 0

    def to_keep(self, i: int, num_tokens: int) -> list[tuple]:
        """The blocks that should be cached of a request whose first tokens are computed."""
        request, rows = self.requests[i], rows_of(self.manager)
        names = self.names(request.salt, request.tokens[:num_tokens])
        others = {b for j, blocks in rows.items() if j != i for b in blocks}
        shared = [n for n, b in enumerate(rows[i]) if n >= self.lease_of(i) and b in others]
        names = names[: min(shared, default=len(names))]
        is_long = self.config and len(names) * BLOCK_SIZE >= self.config.min_prefix_length
        return names if is_long and self.shares(request.salt) else []

    def block_of(self, name) -> int:
        return cached_prefixes(self.manager)[name]

    def retain(self, i: int):
        """Counts the time to live of what a request holds from now."""
        self.retain_names(self.covered(i))

    def retain_names(self, names):
        ttl = self.config.prefix_ttl_seconds if self.config else math.inf
        for name in names:
            self.kept[name] = max(self.kept[name], self.clock.now + ttl)

    def end(self, ids):
        """Notes that requests let go of what they hold."""
        for i in self.residents().keys() & set(ids):
            self.retain(i)

    def learn(self, added=()):
        """Takes note of what has been cached, which must be `added`, and of what is gone."""
        now_cached, stats = cached_prefixes(self.manager), self.manager.stats()
        for name in now_cached.keys() - self.kept.keys():
            assert name in added, "only what was committed is cached"
            self.kept[name] = -math.inf
        gone = self.kept.keys() - now_cached.keys()
        num_gone = stats.eviction_count + stats.expiration_count
        assert len(gone) <= num_gone - self._num_gone, "what goes is counted"
        assert num_gone > self._num_gone or not set(added) - now_cached.keys(), "all is kept"
        self._num_gone = num_gone
        for name in gone:
            del self.kept[name]
