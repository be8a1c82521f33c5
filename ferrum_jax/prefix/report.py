"""Reports on lookups in the prefix cache: how much of a prompt is cached, and why not more."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Hashable

from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.tree import Match, TreeKey, find
from ferrum_jax.tokens import TOKEN_BYTES, TokenIds


class Stop(enum.Enum):
    """Why a lookup found no more tokens."""

    COMPLETE = "all tokens are cached except for the last one, which is always computed"
    OFF = "prefix caching is off"
    NOT_SHARED = "requests without a salt share nothing (enable_cross_request_sharing is off)"
    BELOW_MINIMUM = "the cached prefix is shorter than min_prefix_length"
    EXPIRED = "the next block was cached, and has expired"
    EVICTED = "the next block was cached, and has been evicted"
    RESET = "the next block was cached, and has been removed by reset_prefixes"
    WINDOW = "a sliding-window group lacks blocks that the next token can see"
    OTHER_VERSION = "the next block was computed by another version of the weights"
    OTHER_SALT = "the next tokens are cached under another salt only"
    PARTIAL_TAIL = "the next tokens do not fill a block, and only full blocks are cached"
    NEVER_SEEN = "the next block is not known to have been cached"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupReport:
    """Cached tokens that `allocate` would find for a prompt now, and why not more.

    Attributes:
      num_tokens: Number of tokens of the prompt.
      num_cached_tokens: Number of its first tokens that need not be computed.
      num_matched_tokens: Number of its first tokens that are cached, usable or not.
      stop: Why no more tokens were found.
      seconds_ago: Time since the next block left the cache, in seconds; None if it is not known
        to have left.
      group: Index of the layer group that lacks blocks; None unless `stop` is `WINDOW`.
      group_name: Name of that group; None if it is not known, or there is none.
    """

    num_tokens: int
    num_cached_tokens: int
    num_matched_tokens: int
    stop: Stop
    seconds_ago: float | None = None
    group: int | None = None
    group_name: str | None = None

    def __str__(self) -> str:
        """Returns the report as a sentence."""
        ago = "" if self.seconds_ago is None else f" {self.seconds_ago:.0f} s ago"
        group = "" if self.group_name is None else f" (group {self.group_name!r})"
        return (
            f"{self.num_cached_tokens} of {self.num_tokens} tokens are reused: "
            f"at token {self.num_matched_tokens}, {self.stop.value}{group}{ago}."
        )


def explain_lookup(
    cache: PrefixCache, tokens: TokenIds, salt: Hashable, now: float
) -> LookupReport:
    """Reports how much of a prompt is cached, and why not more; changes nothing.

    For operators only: the report says that a prompt is cached under another tenant's salt.

    Args:
      cache: The cache.
      tokens: The prompt.
      salt: Salt of the request.
      now: Seconds of the clock.

    Returns:
      The report.
    """
    limit = max(0, len(tokens) - 1)
    match = cache.forest.find(cache.key_of(salt), tokens, limit, now)
    found = cache.lookup(tokens, salt, now).num_tokens
    stop, removed_at = _why(cache, tokens, salt, match, now)
    group = cache.groups.usable(match)[1] if stop is Stop.WINDOW else None
    return LookupReport(
        num_tokens=len(tokens),
        num_cached_tokens=found,
        num_matched_tokens=match.num_tokens,
        stop=stop,
        seconds_ago=None if removed_at is None else now - removed_at,
        group=group,
    )


def _why(
    cache: PrefixCache, tokens: TokenIds, salt: Hashable, match: Match, now: float
) -> tuple[Stop, float | None]:
    """Returns why a match has no more tokens, and when the next block left the cache, if known."""
    config = cache.config
    if config is None:
        return Stop.OFF, None
    if not cache.shares(salt):
        return Stop.NOT_SHARED, None
    if cache.groups.usable(match)[0] < match.num_tokens:
        return Stop.WINDOW, None
    if match.num_tokens >= len(tokens) - 1:
        is_too_short = 0 < match.num_tokens < config.min_prefix_length
        return (Stop.BELOW_MINIMUM if is_too_short else Stop.COMPLETE), None
    stale = find(match.start, tokens, len(tokens), cache.block_size, float("-inf"))
    if stale.num_tokens > match.num_tokens:
        return Stop.EXPIRED, _expired_at(stale, now)
    ghost = cache.ghosts.get(_next_key(match, tokens, salt, cache.block_size))
    if ghost is not None and ghost.version == cache.forest.version:
        return Stop[ghost.reason.name], ghost.removed_at
    others = _keys_of_more(cache, tokens, match.num_tokens, now)
    if ghost is not None or any(key.salt == salt for key in others):
        return Stop.OTHER_VERSION, None if ghost is None else ghost.removed_at
    if any(key.version == cache.forest.version for key in others):
        return Stop.OTHER_SALT, None
    if 0 < match.num_tokens < config.min_prefix_length:
        return Stop.BELOW_MINIMUM, None
    num_full = len(tokens) // cache.block_size
    is_tail = match.num_tokens // cache.block_size >= num_full
    return (Stop.PARTIAL_TAIL if is_tail else Stop.NEVER_SEEN), None


def _keys_of_more(
    cache: PrefixCache, tokens: TokenIds, num_tokens: int, now: float
) -> list[TreeKey]:
    """Returns the salts and versions under which more than `num_tokens` of a prompt are cached."""
    find_in = cache.forest.find
    keys = cache.forest.keys()
    return [key for key in keys if find_in(key, tokens, len(tokens), now).num_tokens > num_tokens]


def _expired_at(stale: Match, now: float) -> float:
    """Returns when a match's first expired node expired."""
    last = stale.node if stale.tail is None else stale.tail.node
    return min(node.expires_at for node in last.path() if node.is_expired(now))


def _next_key(match: Match, tokens: TokenIds, salt: Hashable, block_size: int) -> int:
    """Returns the prefix key of the block after the matched ones."""
    key = match.blocks[-1].prefix_key if match.blocks else hash(salt)
    size, index = block_size * TOKEN_BYTES, len(match.blocks)
    return hash((key, tokens.packed[index * size : (index + 1) * size]))
