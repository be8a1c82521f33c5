"""What is known of a request's tokens, and which requests share them.

A request that holds another request's first tokens holds *those* tokens, whether or not they are
known yet: tokens that become known of one request are then known of all that share them.
"""

from __future__ import annotations

import dataclasses

from ferrum_jax.policies.blocks import Retention
from ferrum_jax.tokens import TokenIds


@dataclasses.dataclass(eq=False, kw_only=True)
class KnownTokens:
    """Token ids of one request, as far as they are known, and how many of them are computed.

    Attributes:
      tokens: The prompt, and the tokens committed since.
      num_computed: Leading tokens that are known to be computed: cached, or committed.
      max_computed: Upper bound on the leading tokens that can be computed: those that were
        cached, or the request's length when a step last had its row.
      inherited: Leading tokens as known from requests that share them, or from cached blocks that
        a step put into the row.
      num_shared_with: Requests that share leading tokens outside the prefix cache, with the
        number of these tokens.
      may_be_cached: Whether the request's blocks may join the prefix cache: false after a reset,
        and after sharing with a request that was computed before one.
      retention: Retention of the last commit that named one.
      num_retained: Leading tokens that `retention` applies to.
    """

    tokens: TokenIds
    num_computed: int = 0
    max_computed: int = 0
    inherited: TokenIds = TokenIds(())
    num_shared_with: dict[KnownTokens, int] = dataclasses.field(default_factory=dict)
    may_be_cached: bool = True
    retention: Retention | None = None
    num_retained: int = 0

    @property
    def longest(self) -> TokenIds:
        """The tokens, from this request or from those that share them: whichever are more."""
        return max(self.tokens, self.inherited, key=len)

    def commit(self, tokens: TokenIds, num_computed: int, retention: Retention | None) -> None:
        """Records the tokens of a commit, here and in the requests that share them.

        Args:
          tokens: All tokens that are known now.
          num_computed: Leading tokens of these that are computed.
          retention: The retention that the commit named, if any.
        """
        self.tokens = tokens
        self.num_computed = max(num_computed, self.num_computed)
        if retention is not None:
            self.retention, self.num_retained = retention, self.num_computed
        self.spread()

    def note_step(self, max_computed: int) -> None:
        """Records how many leading tokens a step may have computed."""
        self.max_computed = max_computed

    def truncate(self, length: int) -> None:
        """Discards what is known of tokens past the request's length: they are no longer held."""
        self.inherited = self.inherited[:length]
        for other, num_shared in self.num_shared_with.items():
            self.num_shared_with[other] = other.num_shared_with[self] = min(num_shared, length)
        self.tokens = self.tokens[:length]
        self.num_computed = min(self.num_computed, len(self.tokens))
        self.num_retained = min(self.num_retained, len(self.tokens))
        self.max_computed = min(self.max_computed, length)

    def inherit(self, tokens: TokenIds) -> None:
        """Records leading tokens that another source knows, if these are more."""
        if len(tokens) > len(self.inherited):
            self.inherited = tokens

    def forbid_caching(self) -> None:
        """Keeps the request's blocks out of the prefix cache from now on."""
        self.may_be_cached = False

    def share(self, source: KnownTokens, num_tokens: int, num_cached: int) -> None:
        """Records that the request now holds another one's first tokens in place of its own.

        Args:
          source: What is known of the other request's tokens.
          num_tokens: Tokens that are shared.
          num_cached: Leading tokens of this request that stay as they are, in cached blocks.
        """
        if source.num_computed < num_tokens:
            self.num_computed = min(self.num_computed, max(source.num_computed, num_cached))
        if source.max_computed < num_tokens:
            self.max_computed = min(self.max_computed, max(source.max_computed, num_cached))
        else:
            self.max_computed = max(self.max_computed, num_tokens)
        self.may_be_cached &= source.may_be_cached
        self.link(source, num_tokens)

    def fork(self, num_tokens: int) -> KnownTokens:
        """Returns what is known of another request that begins with all `num_tokens` tokens."""
        known = dataclasses.replace(self, num_shared_with={})
        known.link(self, num_tokens)
        return known

    def link(self, other: KnownTokens, num_tokens: int) -> None:
        """Records that two requests begin with the same `num_tokens` tokens."""
        pairs = [
            (first, second, min(num_tokens, m, n))
            for first, m in [(self, num_tokens), *self.num_shared_with.items()]
            for second, n in [(other, num_tokens), *other.num_shared_with.items()]
            if first is not second
        ]
        for first, second, length in pairs:
            first.num_shared_with[second] = max(length, first.num_shared_with.get(second, 0))
            second.num_shared_with[first] = max(length, second.num_shared_with.get(first, 0))
        self.spread()
        other.spread()

    def unlink(self) -> None:
        """Ends all sharing; the other requests keep the tokens that they know."""
        for other in self.num_shared_with:
            del other.num_shared_with[self]
        self.num_shared_with.clear()

    def spread(self) -> None:
        """Passes the known tokens on to the requests that share them."""
        known = self.longest
        for other, num_tokens in self.num_shared_with.items():
            if min(num_tokens, len(known)) > len(other.inherited):
                other.inherited = known[:num_tokens]
