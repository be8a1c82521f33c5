"""Random lives of a prefix cache beside a model: a dictionary from tokens to blocks.

The model compares a prompt with every cached prefix. Block ids are reused as soon as they are
free, so a block that is found must hold the tokens that were committed. Rows release what the
windows of their layer groups have passed; the model finds by search where a lookup may end.
"""

import functools
import math
import operator
import random

import pytest
from hypothesis import event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ferrum_jax import PrefixCacheConfig
from ferrum_jax.arithmetic import PerPool
from ferrum_jax.policies.blocks import Retention, block_policy_names, make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.commit import CommitPlan
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import NULL_BLOCK, Priority
from tests.support.bad_policies import BadBlockPolicy, complaints
from tests.support.prefix_model import Kept, PrefixModel, Request, num_common

pytestmark = pytest.mark.state_machine

NUM_BLOCKS, MAX_TOKENS, MAX_REQUESTS = 14, 9, 6
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=MAX_TOKENS).map(tuple)
SALTS = st.sampled_from([None, None, "a", "b"])
CONFIGS = st.builds(
    PrefixCacheConfig,
    max_prefixes=st.sampled_from([100, 1, 2, 4]),
    min_prefix_length=st.sampled_from([1, 1, 2, 4]),
    prefix_ttl_seconds=st.sampled_from([math.inf, 4.0, 30.0]),
    enable_cross_request_sharing=st.sampled_from([True, True, False]),
)
RETENTIONS = st.one_of(
    st.none(),
    st.builds(
        Retention,
        priority=st.sampled_from(Priority),
        ttl_seconds=st.sampled_from([None, 2.0, 10.0, 100.0]),
        is_pinned=st.booleans(),
    ),
)


# A block without a full group may be left without ids, so a removal of it would not show here.
WINDOWS = [(None,), (None, None), (None, 3), (2, None, 2), (1, None, 5), (None, 4, 6)]


class PrefixMachine(PrefixModel, RuleBasedStateMachine):
    """A cache, and a pool of block ids."""

    def __init__(self, policy: str, windows: tuple[int | None, ...]):
        super().__init__()
        self.policy_name, self.windows = policy, windows
        self.num_blocks = NUM_BLOCKS * len(windows)
        self.listening = complaints()
        self.told = self.listening.__enter__()

    def teardown(self):
        self.listening.__exit__(None, None, None)

    @initialize(block_size=st.integers(1, 3), config=CONFIGS)
    def begin(self, block_size, config):
        self.block_size, self.config, self.now, self.version = block_size, config, 0.0, 0
        if self.policy_name == "bad":
            self.policy = BadBlockPolicy(self.num_blocks)
        else:
            self.policy = make_block_policy(self.policy_name, self.num_blocks)
        self.cache = PrefixCache(config, block_size, self.policy, self.windows)
        self.cache.set_version(0)
        self.free, self.ref_counts = list(range(self.num_blocks)), [0] * self.num_blocks
        self.contents: dict[int, tuple] = {}
        self.kept: dict[tuple, Kept] = {}
        self.pins: set[tuple] = set()
        self.requests: list[Request] = []
        self.max_prefixes = config.max_prefixes

    # Steps.

    @rule(tokens=TOKENS, salt=SALTS)
    def look_up(self, tokens, salt):
        self.found(tokens, self.cache.key_of(salt))

    def found(self, tokens, key):
        """Looks a prompt up, and compares the match with a search of the model."""
        assert key.version == self.version
        match = self.cache.lookup(TokenIds(tokens), key.salt, self.now)
        least = self.longest(key, tokens, self.is_surely_alive, all)
        assert least <= match.num_tokens <= self.longest(key, tokens, self.may_be_alive)
        num_full, num_tail = divmod(match.num_tokens, self.block_size)
        names = self.names(key, tokens)[:num_full]
        for group, row in enumerate(match.row_blocks):
            first = self.first_needed(group, match.num_tokens)
            ids = [self.kept[name].block_ids[group] for name in names]
            assert row == [NULL_BLOCK] * first + ids[first:]
            assert NULL_BLOCK not in row[first:], "every needed block is there"
            assert [self.contents[i] for i in row[first:]] == [(group, n) for n in names[first:]]
        assert (match.tail is not None) == (num_tail > 0)
        if match.tail is not None:
            name = self.tail_name(match)
            assert self.kept[name].block_ids == list(match.tail.block_ids) and name[0] == key
            assert NULL_BLOCK not in match.tail.block_ids, "every group can copy its tail"
            assert len(name[1]) == (num_full + 1) * self.block_size
            assert name[1][: match.num_tokens] == tokens[: match.num_tokens]
        event(f"found {'nothing' if not match.num_tokens else 'tail' if num_tail else 'blocks'}")
        return match

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(tokens=TOKENS, salt=SALTS)
    def start(self, tokens, salt):
        key = self.cache.key_of(salt)
        match = self.found(tokens, key)
        lease = self.cache.acquire(match)
        assert lease.key == key
        has_windows = any(window is not None for window in self.windows)
        tail = self.tail_name(match) if match.tail and has_windows else None
        request = Request(key, tokens, match.row_blocks, lease, tail)
        assert lease.num_blocks == len(match.blocks) + (tail is not None)
        self.requests.append(request)
        for block_id in (i for row in request.rows for i in row if i != NULL_BLOCK):
            self.ref_counts[block_id] += 1
        num_new = self.num_new(request, tokens)
        if num_new > len(self.free):
            self.evict(num_new - len(self.free))
        if num_new > len(self.free):
            event("no room")
            self.cache.undo_acquire(lease)
            self.requests.remove(request)
            self.drop(i for row in request.rows for i in row)
            return
        if tail is not None:
            self.cache.cover(lease, lease.node, len(match.blocks))
            request.tail = None
        self.fill(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), more=TOKENS)
    def grow(self, data, more):
        request = data.draw(st.sampled_from(self.requests))
        before, tokens = len(request.tokens), (request.tokens + more)[:MAX_TOKENS]
        if len(tokens) == before or self.num_new(request, tokens) > len(self.free):
            return
        firsts = [self.first_needed(group, before) for group in range(len(self.windows))]
        self.release_passed(request, map(max, request.num_released, firsts))
        self.cache.advance(request.lease, firsts)
        was_partial, request.tokens = before % self.block_size, tokens
        if was_partial:
            self.name_last(request)
        self.fill(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), retention=RETENTIONS)
    def commit(self, data, retention):
        request = data.draw(st.sampled_from(self.requests))
        length = len(request.tokens)
        num_tokens = data.draw(st.one_of(st.just(length), st.integers(0, length)))
        self.commit_some(request, num_tokens, retention)

    def commit_some(self, request: Request, num_tokens, retention):
        """Commits the first tokens of a request, and compares with what should be cached."""
        num_tokens = max(num_tokens, request.lease.num_blocks * self.block_size)
        names = self.names(request.key, request.tokens[:num_tokens])
        first, num_leaves, used = request.lease.num_blocks, self.num_leaves(), self.used_ids()
        tokens, rows = TokenIds(request.tokens[:num_tokens]), [list(row) for row in request.rows]
        done = self.cache.plan_commit(request.lease, tokens, rows, self.now)
        self.cache.apply_commit(request.lease, done, self.now, retention)
        is_long = len(names) * self.block_size >= self.config.min_prefix_length
        if not names or not is_long or not self.shares(request.key):
            assert not (any(done.adopted) or done.added or done.evicted)
            assert request.lease.num_blocks == first
            return
        evicted = self.forget(done.evicted, used)
        assert bool(evicted) == bool(done.evicted)
        assert not evicted or num_leaves >= self.config.max_prefixes
        self.check_commit(request, names, done, num_leaves)
        assert request.lease.num_blocks == first + len(done.adopted[0]) + len(done.new)
        if retention is not None:
            self.set_retention(request, retention)
        self.retain(request)

    def check_commit(self, request: Request, names, done: CommitPlan, num_leaves):
        first, num_found = done.first, done.first + len(done.adopted[0])
        added: list[int] = []
        for i, name in enumerate(names[first:num_found], first):
            for group, row in enumerate(request.rows):
                cached, own = self.kept[name].block_ids[group], row[i]
                is_both = NULL_BLOCK not in (cached, own)
                assert done.adopted[group][i - first] == (cached if is_both else NULL_BLOCK)
                if is_both:  # Equal content is kept once.
                    self.ref_counts[cached] += 1
                    self.drop([own])
                    row[i] = cached
                elif own != NULL_BLOCK:
                    event("filled a gap")
                    added.append(own)
                    self.kept[name].block_ids[group] = own
        missing = names[num_found:]
        assert not missing or missing[0] not in self.kept, "every cached block is adopted"
        own = list(zip(*(row[num_found : len(names)] for row in request.rows), strict=True))
        is_more = num_found == 0 or len(self.followers(names[num_found - 1])) > 1
        if not missing or not is_more or num_leaves < self.config.max_prefixes:
            assert list(done.new) == own
        elif list(done.new) != own:
            event("max_prefixes")
            assert not done.new and not self.kept.keys() - self.in_use()
        for name, ids in zip(missing, done.new, strict=False):
            self.kept[name] = Kept(list(ids), self.config.prefix_ttl_seconds)
            added += [i for i in ids if i != NULL_BLOCK]
            if name != names[0]:
                # The run of its predecessor may have grown.
                self.kept[name].latest = self.kept[names[names.index(name) - 1]].latest
        assert sorted(done.added) == sorted(added)
        for block_id in added:
            self.ref_counts[block_id] += 1

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cut(self, data):
        """Truncates a request, as a step may do."""
        request = data.draw(st.sampled_from(self.requests))
        num_tokens = data.draw(st.integers(0, len(request.tokens)))
        num_full, num_tail = divmod(num_tokens, self.block_size)
        firsts = [self.first_needed(group, num_tokens) for group in range(len(self.windows))]
        if num_tokens and any(map(operator.gt, request.num_released, firsts)):
            event("truncated behind a window")
            return
        is_copied = num_tail and num_full < request.lease.num_blocks
        if is_copied and len(self.free) < len(self.windows):
            return
        if num_full < request.lease.num_blocks:
            self.retain(request)
        self.cache.truncate_lease(request.lease, num_full, self.now)
        request.tokens = request.tokens[:num_tokens]
        for row in request.rows:
            num_kept = num_full + (num_tail > 0 and not is_copied)
            self.drop(row[num_kept:])
            del row[num_kept:]
        self.fill(request)
        if num_tail and not is_copied:
            self.name_last(request)

    @precondition(lambda self: len(self.requests) > 1)
    @rule(data=st.data())
    def share(self, data):
        """Makes a request share the blocks of another one with the same beginning."""
        giver, taker = data.draw(st.permutations(self.requests))[:2]
        common = num_common(giver.tokens, taker.tokens) if giver.key == taker.key else 0
        num_blocks = min(giver.lease.num_blocks, common // self.block_size)
        if num_blocks <= taker.lease.num_blocks:
            return
        num_tokens, groups = num_blocks * self.block_size, range(len(self.windows))
        firsts = [self.first_needed(group, num_tokens) for group in groups]
        if any(map(operator.gt, giver.num_released, firsts)):
            return
        num_released = list(map(max, giver.num_released, taker.num_released))
        first = self.first_window(num_released)
        self.cache.cover(taker.lease, giver.lease.node, num_blocks, first)
        self.release_passed(taker, num_released)
        for row, other, count in zip(taker.rows, giver.rows, num_released, strict=True):
            for block_id in other[count:num_blocks]:
                self.ref_counts[block_id] += 1
            self.drop(row[count:num_blocks])
            row[count:num_blocks] = other[count:num_blocks]
        event("shared")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        self.end(data.draw(st.sampled_from(self.requests)))

    def end(self, request: Request):
        self.cache.release(request.lease, self.now)
        self.retain(request)
        self.requests.remove(request)
        self.drop(i for row in request.rows for i in row)

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(tokens=TOKENS, salt=SALTS)
    def serve(self, tokens, salt):
        """A request starts, commits its tokens and ends."""
        num_before = len(self.requests)
        self.start(tokens, salt)
        if len(self.requests) > num_before:
            request = self.requests[-1]
            self.commit_some(request, len(tokens), None)
            self.end(request)

    @rule(num_blocks=st.integers(0, 5))
    def evict(self, num_blocks):
        stale = [n for n in self.kept if not self.is_surely_alive(n)]
        overdue = [n for n in self.kept if not self.may_be_alive(n)]
        num_idle, before = self.num_idle(), (self.cache.num_evicted, self.cache.num_expired)
        names = {block_id: name for name, _, block_id in self.cached_ids()}
        removed = self.cache.evict(PerPool([num_blocks]), self.now)
        self.forget(removed, self.used_ids())
        num_evicted, num_expired = self.cache.num_evicted, self.cache.num_expired
        num_evicted, num_expired = num_evicted - before[0], num_expired - before[1]
        assert num_evicted + num_expired == len(removed)
        evicted = [names[block_id][0] for block_id in removed[num_expired:]]
        are_present = [key.version == self.version for key in evicted]
        assert are_present == sorted(are_present), "outdated blocks are evicted first"
        assert not any(are_present) or not self.num_idle_outdated()
        expired = {names[block_id] for block_id in removed[:num_expired]}
        assert set(overdue) <= expired <= set(stale), "expired blocks are removed first"
        least = max(0, min(num_blocks, num_idle) - num_expired)
        assert least <= num_evicted < least + len(self.windows) * bool(least) + (not least)
        event(f"evicted {'some' if num_evicted else 'none'}")

    @rule()
    def expire(self):
        stale = {n for n in self.kept if not self.is_surely_alive(n)}
        overdue = {n for n in self.kept if not self.may_be_alive(n)}
        gone = set(self.forget(self.cache.expire(self.now), self.used_ids()))
        assert overdue <= gone <= stale
        event(f"expired {'some' if gone else 'none'}")

    @rule(seconds=st.sampled_from([1.0, 3.0, 8.0, 40.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(version=st.integers(0, 2))
    def change_weights(self, version):
        """Sets the version of the weights, perhaps an earlier one again."""
        self.cache.set_version(version)
        self.version = version
        self.pins = {pin for pin in self.pins if pin[0].version == version}

    @rule(config=CONFIGS)
    def configure(self, config):
        self.cache.configure(config)
        self.config = config
        self.max_prefixes = max(config.max_prefixes, self.num_leaves())

    @rule(seed=st.integers(0, 9))
    def defragment(self, seed):
        """Moves every block to another id."""
        ids = list(range(self.num_blocks))
        random.Random(seed).shuffle(ids)
        new_ids = dict(enumerate(ids))
        self.cache.renumber(new_ids)
        self.free = [new_ids[i] for i in self.free]
        self.contents = {new_ids[i]: name for i, name in self.contents.items()}
        old_counts, self.ref_counts = self.ref_counts, [0] * self.num_blocks
        for old, new in new_ids.items():
            self.ref_counts[new] = old_counts[old]
        new_ids[NULL_BLOCK] = NULL_BLOCK
        for request in self.requests:
            request.rows = [[new_ids[i] for i in row] for row in request.rows]
        for kept in self.kept.values():
            kept.block_ids = [new_ids[i] for i in kept.block_ids]

    @precondition(lambda self: isinstance(self.policy, BadBlockPolicy))
    @rule(mode=st.sampled_from(BadBlockPolicy.MODES))
    def misbehave(self, mode):
        self.policy.mode = mode

    # Invariants.

    @invariant()
    def agrees_with_the_model(self):
        self.cache.check([request.lease for request in self.requests])
        by_id = sorted(block_id for _, _, block_id in self.cached_ids())
        assert sorted(self.cache.block_ids()) == by_id
        assert (self.cache.num_blocks, self.cache.num_idle_blocks.total) == (
            len(by_id),
            self.num_idle(),
        )
        for name, group, block_id in self.cached_ids():
            assert self.contents[block_id] == (group, name)
        num_leaves = self.num_leaves()
        assert self.cache.forest.num_prefixes == num_leaves <= self.max_prefixes
        self.max_prefixes = max(self.config.max_prefixes, num_leaves)

    @invariant()
    def every_reference_is_known(self):
        counts = [0] * self.num_blocks
        held = [i for r in self.requests for row in r.rows for i in row if i != NULL_BLOCK]
        for block_id in (*self.cache.block_ids(), *held):
            counts[block_id] += 1
        assert counts == self.ref_counts
        assert sorted(self.free) == [i for i, count in enumerate(counts) if not count]

    @invariant()
    def rows_hold_the_cached_blocks_that_their_leases_cover(self):
        for request in self.requests:
            for i, name in enumerate(self.covered(request)):
                ids = [row[i] for row in request.rows]
                pairs = zip(ids, self.kept[name].block_ids, strict=True)
                assert all(own in (NULL_BLOCK, cached) for own, cached in pairs)

    @invariant()
    def would_be_idle_is_foretold(self):
        for some in (self.requests, self.requests[:1], self.requests[1:]):
            others = [request for request in self.requests if request not in some]
            num_more = len(self.used_ids()) - len(self.used_ids(others))
            assert self.cache.num_idle_without(r.lease for r in some) == PerPool([num_more])

    @invariant()
    def only_bad_policies_are_complained_about(self):
        assert self.policy_name == "bad" or not self.told


def search(policy: str, windows: tuple[int | None, ...], share: int):
    """Runs one example of `share` in Hypothesis' profile."""
    examples = max(1, settings.default.max_examples // share)
    run_state_machine_as_test(
        functools.partial(PrefixMachine, policy, windows),
        settings=settings(settings.default, max_examples=examples, stateful_step_count=40),
    )


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("policy", ["lru", "bad"])
def test_random_lives_agree_with_the_model(policy, windows):
    search(policy, windows, share=10)


@pytest.mark.parametrize("policy", sorted(set(block_policy_names()) - {"lru"}))
def test_every_registered_policy_decides_without_a_complaint(policy):
    search(policy, (None, 3), share=50)
