"""Why a prompt is not found, and what it costs to look for one."""

import pytest

from ferrum_jax.arithmetic import PerPool
from ferrum_jax.policies.blocks.recency import LruBlockPolicy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.ghosts import Ghost, Ghosts, Reason
from ferrum_jax.prefix.report import Stop, explain_lookup
from ferrum_jax.prefix.tree import Node
from ferrum_jax.tokens import TokenIds
from tests.support.cached_prompts import BLOCK_SIZE, HELLO, CachedPrompts

# Why a lookup stops.


@pytest.fixture
def kept() -> CachedPrompts:
    prompts = CachedPrompts(prefix_ttl_seconds=100.0)
    prompts.keep([*HELLO, 1, 1, 1, 1])
    return prompts


def test_explain_lookup_complete(kept):
    assert kept.why(HELLO).stop is Stop.COMPLETE
    assert str(kept.why(HELLO)) == (
        "7 of 8 tokens are reused: at token 7, all tokens are cached except for the last one, "
        "which is always computed."
    )
    assert kept.why([]).stop is kept.why([7]).stop is Stop.COMPLETE, "there is no more to find"


def test_explain_lookup_never_seen(kept):
    told = kept.why([*HELLO[:5], 0, 0, 0, 0])
    assert told.stop is Stop.NEVER_SEEN
    assert (told.num_matched_tokens, told.num_cached_tokens, told.num_tokens) == (5, 5, 9)


def test_explain_lookup_partial_tail(kept):
    assert kept.why([*HELLO, 1, 1, 1, 1, 5, 5]).stop is Stop.PARTIAL_TAIL


def test_explain_lookup_evicted_with_its_age(kept):
    kept.cache.evict(PerPool([1]), 2.0)
    kept.now = 5.0
    told = kept.why([*HELLO, 1, 1, 1, 1, 0])
    assert (told.stop, told.seconds_ago, told.num_cached_tokens) == (Stop.EVICTED, 3.0, 8)
    assert str(told).endswith("evicted 3 s ago.")


def test_explain_lookup_expired_with_its_age_before_and_after_removal(kept):
    kept.now = 103.0
    for _ in range(2):
        told = kept.why([*HELLO, 9])
        assert (told.stop, told.seconds_ago, told.num_cached_tokens) == (Stop.EXPIRED, 3.0, 0)
        kept.cache.expire(kept.now)


def test_explain_lookup_other_salt(kept):
    told = kept.why([*HELLO, 9], "a")
    assert (told.stop, told.num_matched_tokens) == (Stop.OTHER_SALT, 0)
    assert kept.found([*HELLO, 9], "a") == 0


def test_explain_lookup_unusable():
    assert CachedPrompts(enable_cross_request_sharing=False).why(HELLO).stop is Stop.NOT_SHARED
    short = CachedPrompts(min_prefix_length=7)
    short.keep(HELLO)
    told = short.why([*HELLO[:6], 0, 0, 0])
    assert told.stop is Stop.BELOW_MINIMUM
    assert (told.num_matched_tokens, told.num_cached_tokens) == (6, 0)
    off = PrefixCache(None, BLOCK_SIZE, LruBlockPolicy(8))
    assert explain_lookup(off, TokenIds(HELLO), "a", 0.0).stop is Stop.OFF


def test_every_stop_has_its_own_text():
    assert len({stop.value for stop in Stop}) == len(Stop)


def test_explain_lookup_changes_nothing(kept):
    before = [(node.packed, node.expires_at) for node in kept.cache.forest.nodes()]
    for prompt in (HELLO, [*HELLO, 9], [3, 3], []):
        kept.why(prompt)
    assert before == [(node.packed, node.expires_at) for node in kept.cache.forest.nodes()]


# What it costs.


@pytest.fixture
def num_looks(monkeypatch):
    """Counts the nodes that are asked whether they have expired, walked up from, or moved."""
    looks = []
    for name in ("is_expired", "count_as_last", "path"):
        method = getattr(Node, name)

        def counted(self, *args, method=method):
            looks.append(self)
            return method(self, *args)

        monkeypatch.setattr(Node, name, counted)
    return looks


@pytest.mark.parametrize("kind", ["siblings", "expired siblings", "other salts", "longer prompts"])
def test_lookup_and_commit_cost_does_not_depend_on_other_prefixes(num_looks, kind):
    costs = []
    for number in (3, 300):
        prompts = CachedPrompts(prefix_ttl_seconds=1000.0, max_prefixes=10**6)
        for i in range(number):
            end, salt = [100 + i] * 7, str(i) if kind == "other salts" else None
            prompts.keep([*HELLO, 50, *end], salt)
        prompts.now = 2000.0 if kind == "expired siblings" else 1.0
        prompts.keep([*HELLO, 50, *[60] * 7])
        if kind == "longer prompts":
            prompts.keep([*HELLO, 50, *[60] * 7, *range(4 * number)])
        num_looks.clear()
        assert prompts.found([*HELLO, 50, 51]) == 9, "a tail that all have in common"
        prompts.keep([*HELLO, 50, *[61] * 7])
        costs.append(len(num_looks))
    assert costs[0] == costs[1]


def test_ghosts_and_deadlines_are_bounded():
    prompts = CachedPrompts(prefix_ttl_seconds=1e9)
    ghosts = Ghosts(capacity=3)
    for i in range(1000):
        prompts.keep([i] * 8)
        prompts.cache.evict(PerPool([2]), float(i))
        ghosts.add(i, Ghost(Reason.EVICTED, 0.0, None))
    assert len(prompts.cache.forest._deadlines) < 10, "not those of nodes that are no more"
    assert [i for i in range(1000) if ghosts.get(i)] == [997, 998, 999]
    assert not prompts.cache.forest.keys()
