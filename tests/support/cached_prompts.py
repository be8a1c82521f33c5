"""A prefix cache by itself, and requests that come, commit and go."""

import itertools
import math
from collections.abc import Sequence

from ferrum_jax import PrefixCacheConfig
from ferrum_jax.policies.blocks.recency import LruBlockPolicy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.lease import Lease
from ferrum_jax.prefix.report import LookupReport, explain_lookup
from ferrum_jax.tokens import TokenIds

BLOCK_SIZE = 4
HELLO = list(range(1, 9))  # Two blocks.


class Books:
    """A cache of 4 tokens a block, and ids for it that never come back."""

    def __init__(self, policy=None, **config):
        fields = {
            "max_prefixes": 100,
            "min_prefix_length": 1,
            "prefix_ttl_seconds": math.inf,
            "enable_cross_request_sharing": True,
            **config,
        }
        self.cache = PrefixCache(
            PrefixCacheConfig(**fields), BLOCK_SIZE, policy or LruBlockPolicy(1000)
        )
        self.now, self.ids, self.leases = 0.0, itertools.count(), list[Lease]()

    def found(self, tokens: Sequence[int], salt=None) -> int:
        """Tokens that a request would not have to compute."""
        return self.cache.lookup(TokenIds(tokens), salt, self.now).num_tokens

    def hold(self, tokens: Sequence[int], salt=None, retention=None) -> Lease:
        """Lets a request compute and commit tokens, and go on."""
        tokens = TokenIds(tokens)
        match = self.cache.lookup(tokens, salt, self.now)
        lease = self.cache.acquire(match, salt)
        num_new = len(tokens) // BLOCK_SIZE - len(match.blocks)
        block_ids = [*match.block_ids, *itertools.islice(self.ids, num_new)]
        self.cache.commit(lease, tokens, block_ids, self.now, retention)
        self.leases.append(lease)
        return lease

    def end(self, lease: Lease):
        self.cache.release(lease, self.now)
        self.leases.remove(lease)

    def keep(self, tokens: Sequence[int], salt=None, retention=None):
        """Lets a request compute and commit tokens, and end."""
        self.end(self.hold(tokens, salt, retention))

    def why(self, tokens: Sequence[int], salt=None) -> LookupReport:
        return explain_lookup(self.cache, TokenIds(tokens), salt, self.now)

    def check(self):
        self.cache.check(self.leases)
