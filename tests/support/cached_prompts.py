"""A prefix cache without a manager, and requests that commit prompts to it."""

import itertools
import math
from collections.abc import Sequence

from ferrum_jax import PrefixCacheConfig
from ferrum_jax.policies.blocks.recency import LruBlockPolicy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.report import LookupReport, explain_lookup
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK

BLOCK_SIZE = 4
HELLO = list(range(1, 9))  # Two blocks.


class CachedPrompts:
    """A cache of 4 tokens per block, and requests with block ids that are never reused."""

    def __init__(self, policy=None, windows=(None,), **config):
        fields = {
            "max_prefixes": 100,
            "min_prefix_length": 1,
            "prefix_ttl_seconds": math.inf,
            "enable_cross_request_sharing": True,
            **config,
        }
        self.cache = PrefixCache(
            PrefixCacheConfig(**fields), BLOCK_SIZE, policy or LruBlockPolicy(1000), windows
        )
        self.now, self.ids, self.leases = 0.0, itertools.count(), list[Lease]()

    def found(self, tokens: Sequence[int], salt=None) -> int:
        """Number of tokens that a request would not have to compute."""
        return self.cache.lookup(TokenIds(tokens), salt, self.now).num_tokens

    def hold(self, tokens: Sequence[int], salt=None, retention=None) -> Lease:
        """Starts a request that commits tokens, and returns its lease.

        Before the commit, its row has released what the windows have passed.
        """
        tokens = TokenIds(tokens)
        match = self.cache.lookup(tokens, salt, self.now)
        lease = self.cache.acquire(match)
        self.cache.cover(lease, lease.node, len(match.blocks))
        num_new = len(tokens) // BLOCK_SIZE - len(match.blocks)
        rows = [[*row, *itertools.islice(self.ids, num_new)] for row in match.row_blocks]
        for row, count in zip(rows, self.cache.groups.num_released(len(tokens)), strict=True):
            row[:count] = [NULL_BLOCK] * count
        self.cache.advance(lease, self.cache.groups.num_released(len(tokens)))
        plan = self.cache.plan_commit(lease, tokens, rows, self.now)
        self.cache.apply_commit(lease, plan, self.now, retention)
        self.leases.append(lease)
        return lease

    def end(self, lease: Lease):
        self.cache.release(lease, self.now)
        self.leases.remove(lease)

    def keep(self, tokens: Sequence[int], salt=None, retention=None):
        """Commits tokens for a request that ends."""
        self.end(self.hold(tokens, salt, retention))

    def why(self, tokens: Sequence[int], salt=None) -> LookupReport:
        return explain_lookup(self.cache, TokenIds(tokens), salt, self.now)

    def check(self):
        self.cache.check(self.leases)
