"""Random lives of a prefix cache beside a model: a dictionary from tokens to blocks.

The model compares a prompt with every cached prefix. Block ids are reused as soon as they are
free, so a block that is found must hold the tokens that were committed.
"""

import functools
import math
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
from ferrum_jax.policies.blocks import Retention, block_policy_names, make_block_policy
from ferrum_jax.prefix.cache import PrefixCache
from ferrum_jax.prefix.commit import CommitPlan
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import Priority
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


class PrefixMachine(PrefixModel, RuleBasedStateMachine):
    """A cache, and a pool of block ids."""

    def __init__(self, policy: str):
        super().__init__()
        self.policy_name = policy
        self.listening = complaints()
        self.told = self.listening.__enter__()

    def teardown(self):
        self.listening.__exit__(None, None, None)

    @initialize(block_size=st.integers(1, 3), config=CONFIGS)
    def begin(self, block_size, config):
        self.block_size, self.config, self.now = block_size, config, 0.0
        if self.policy_name == "bad":
            self.policy = BadBlockPolicy(NUM_BLOCKS)
        else:
            self.policy = make_block_policy(self.policy_name, NUM_BLOCKS)
        self.cache = PrefixCache(config, block_size, self.policy)
        self.free, self.ref_counts = list(range(NUM_BLOCKS)), [0] * NUM_BLOCKS
        self.contents: dict[int, tuple] = {}
        self.kept: dict[tuple, Kept] = {}
        self.pins: set[tuple] = set()
        self.requests: list[Request] = []
        self.max_prefixes = config.max_prefixes

    # Steps.

    @rule(tokens=TOKENS, salt=SALTS)
    def look_up(self, tokens, salt):
        self.found(tokens, salt)

    def found(self, tokens, salt):
        """Looks a prompt up, and compares the match with a search of the model."""
        match = self.cache.lookup(TokenIds(tokens), salt, self.now)
        least = self.longest(salt, tokens, self.is_surely_alive)
        assert least <= match.num_tokens <= self.longest(salt, tokens, self.may_be_alive)
        num_full, num_tail = divmod(match.num_tokens, self.block_size)
        names = self.names(salt, tokens)[:num_full]
        assert match.block_ids == [self.kept[name].block_id for name in names]
        assert (match.tail is not None) == (num_tail > 0)
        for block_id, name in zip(match.block_ids, names, strict=True):
            assert self.contents[block_id] == name
        if match.tail is not None:
            name = self.contents[match.tail.block_id]
            assert self.kept[name].block_id == match.tail.block_id and name[0] == salt
            assert len(name[1]) == (num_full + 1) * self.block_size
            assert name[1][: match.num_tokens] == tokens[: match.num_tokens]
        event(f"found {'nothing' if not match.num_tokens else 'tail' if num_tail else 'blocks'}")
        return match

    @precondition(lambda self: len(self.requests) < MAX_REQUESTS)
    @rule(tokens=TOKENS, salt=SALTS)
    def start(self, tokens, salt):
        match = self.found(tokens, salt)
        lease = self.cache.acquire(match, salt)
        block_ids = list(match.block_ids)
        request = Request(salt, tokens, block_ids, lease)
        assert lease.num_blocks == len(block_ids)
        self.requests.append(request)
        for block_id in block_ids:
            self.ref_counts[block_id] += 1
        num_new = -(-len(tokens) // self.block_size) - len(block_ids)
        if num_new > len(self.free):
            self.evict(num_new - len(self.free))
        if num_new > len(self.free):
            event("no room")
            self.cache.undo_acquire(lease)
            self.requests.remove(request)
            self.drop(block_ids)
            return
        self.fill(request)

    def fill(self, request: Request):
        """Takes the blocks that a request needs for its tokens."""
        tokens, size = request.tokens, self.block_size
        for first in range(len(request.block_ids) * size, len(tokens), size):
            request.block_ids.append(self.take((request.salt, tokens[: first + size])))

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), more=TOKENS)
    def grow(self, data, more):
        request = data.draw(st.sampled_from(self.requests))
        tokens = (request.tokens + more)[:MAX_TOKENS]
        num_new = -(-len(tokens) // self.block_size) - len(request.block_ids)
        if num_new <= len(self.free):
            if len(request.tokens) % self.block_size:
                self.contents[request.block_ids[-1]] = (
                    request.salt,
                    tokens[: len(request.block_ids) * self.block_size],
                )
            request.tokens = tokens
            self.fill(request)

    @precondition(lambda self: self.requests)
    @rule(data=st.data(), retention=RETENTIONS)
    def commit(self, data, retention):
        request = data.draw(st.sampled_from(self.requests))
        length = len(request.tokens)
        num_tokens = data.draw(st.one_of(st.just(length), st.integers(0, length)))
        num_tokens = max(num_tokens, request.lease.num_blocks * self.block_size)
        names = self.names(request.salt, request.tokens[:num_tokens])
        first, num_leaves, used = request.lease.num_blocks, self.num_leaves(), self.in_use()
        tokens, block_ids = TokenIds(request.tokens[:num_tokens]), list(request.block_ids)
        done = self.cache.plan_commit(request.lease, tokens, [block_ids], self.now)
        self.cache.apply_commit(request.lease, done, self.now, retention)
        is_long = len(names) * self.block_size >= self.config.min_prefix_length
        if not names or not is_long or not self.shares(request.salt):
            assert not (done.adopted[0] or done.added or done.evicted)
            assert request.lease.num_blocks == first
            return
        evicted = self.forget(done.evicted, used)
        assert not evicted or num_leaves >= self.config.max_prefixes
        self.check_commit(request, names, done, num_leaves)
        assert request.lease.num_blocks == first + len(done.adopted[0]) + len(done.added)
        if retention is not None:
            self.set_retention(request, retention)
        self.retain(request)

    def check_commit(self, request: Request, names, done: CommitPlan, num_leaves):
        first = done.first
        num_found = first + len(done.adopted[0])
        for name, block_id in zip(names[first:num_found], done.adopted[0], strict=True):
            assert self.kept[name].block_id == block_id, "equal content is kept once"
            self.ref_counts[block_id] += 1
        self.drop(request.block_ids[first:num_found])
        request.block_ids[first:num_found] = done.adopted[0]
        missing = names[num_found:]
        assert not missing or missing[0] not in self.kept, "every cached block is adopted"
        own = request.block_ids[num_found : len(names)]
        is_more = num_found == 0 or len(self.followers(names[num_found - 1])) > 1
        if not missing or not is_more or num_leaves < self.config.max_prefixes:
            assert done.added == own
        elif done.added != own:
            event("max_prefixes")
            assert not done.added and not self.num_idle()
        for name, block_id in zip(missing, done.added, strict=False):
            self.kept[name] = Kept(block_id, self.config.prefix_ttl_seconds)
            self.ref_counts[block_id] += 1
            if name != names[0]:
                # The run of its predecessor may have grown.
                self.kept[name].latest = self.kept[names[names.index(name) - 1]].latest

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

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def cut(self, data):
        """Truncates a request, as a step may do."""
        request = data.draw(st.sampled_from(self.requests))
        num_tokens = data.draw(st.integers(0, len(request.tokens)))
        num_full, num_tail = divmod(num_tokens, self.block_size)
        is_copied = num_tail and num_full < request.lease.num_blocks
        if is_copied and not self.free:
            return
        if num_full < request.lease.num_blocks:
            self.retain(request)
        self.cache.truncate_lease(request.lease, num_full, self.now)
        request.tokens = request.tokens[:num_tokens]
        num_kept = num_full + (num_tail > 0)
        gone, request.block_ids = request.block_ids[num_kept:], request.block_ids[:num_kept]
        if is_copied:
            gone.append(request.block_ids.pop())
        self.drop(gone)
        self.fill(request)
        if num_tail and not is_copied:
            self.contents[request.block_ids[-1]] = (request.salt, request.tokens)

    @precondition(lambda self: len(self.requests) > 1)
    @rule(data=st.data())
    def share(self, data):
        """Makes a request share the blocks of another one with the same beginning."""
        giver, taker = data.draw(st.permutations(self.requests))[:2]
        common = num_common(giver.tokens, taker.tokens) if giver.salt == taker.salt else 0
        num_blocks = min(giver.lease.num_blocks, common // self.block_size)
        if num_blocks <= taker.lease.num_blocks:
            return
        self.cache.cover(taker.lease, giver.lease.node, num_blocks)
        for block_id in giver.block_ids[:num_blocks]:
            self.ref_counts[block_id] += 1
        self.drop(taker.block_ids[:num_blocks])
        taker.block_ids[:num_blocks] = giver.block_ids[:num_blocks]
        event("shared")

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def finish(self, data):
        request = data.draw(st.sampled_from(self.requests))
        self.cache.release(request.lease, self.now)
        self.retain(request)
        self.requests.remove(request)
        self.drop(request.block_ids)

    @rule(num_blocks=st.integers(0, 5))
    def evict(self, num_blocks):
        stale = [n for n in self.kept if not self.is_surely_alive(n)]
        num_stale = sum(not self.may_be_alive(n) for n in self.kept)
        num_idle, before = self.num_idle(), (self.cache.num_evicted, self.cache.num_expired)
        gone = self.forget(self.cache.evict(num_blocks, self.now), self.in_use())
        num_evicted, num_expired = self.cache.num_evicted, self.cache.num_expired
        num_evicted, num_expired = num_evicted - before[0], num_expired - before[1]
        assert num_evicted + num_expired == len(gone)
        assert num_stale <= num_expired <= len(stale)
        assert set(gone[:num_expired]) <= set(stale), "expired blocks are removed first"
        assert num_evicted == max(0, min(num_blocks, num_idle) - num_expired)
        event(f"evicted {'some' if num_evicted else 'none'}")

    @rule()
    def expire(self):
        stale = {n for n in self.kept if not self.is_surely_alive(n)}
        overdue = {n for n in self.kept if not self.may_be_alive(n)}
        gone = set(self.forget(self.cache.expire(self.now), self.in_use()))
        assert overdue <= gone <= stale
        event(f"expired {'some' if gone else 'none'}")

    @rule(seconds=st.sampled_from([1.0, 3.0, 8.0, 40.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule(config=CONFIGS)
    def configure(self, config):
        self.cache.configure(config)
        self.config = config
        self.max_prefixes = max(config.max_prefixes, self.num_leaves())

    @rule(seed=st.integers(0, 9))
    def defragment(self, seed):
        """Moves every block to another id."""
        ids = list(range(NUM_BLOCKS))
        random.Random(seed).shuffle(ids)
        new_ids = dict(enumerate(ids))
        self.cache.renumber(new_ids)
        self.free = [new_ids[i] for i in self.free]
        self.contents = {new_ids[i]: name for i, name in self.contents.items()}
        old_counts, self.ref_counts = self.ref_counts, [0] * NUM_BLOCKS
        for old, new in new_ids.items():
            self.ref_counts[new] = old_counts[old]
        for request in self.requests:
            request.block_ids = [new_ids[i] for i in request.block_ids]
        for kept in self.kept.values():
            kept.block_id = new_ids[kept.block_id]

    @precondition(lambda self: isinstance(self.policy, BadBlockPolicy))
    @rule(mode=st.sampled_from(BadBlockPolicy.MODES))
    def misbehave(self, mode):
        self.policy.mode = mode

    # Invariants.

    @invariant()
    def agrees_with_the_model(self):
        self.cache.check([request.lease for request in self.requests])
        by_id = sorted(kept.block_id for kept in self.kept.values())
        assert sorted(self.cache.block_ids()) == by_id
        assert (self.cache.num_blocks, self.cache.num_idle_blocks) == (len(by_id), self.num_idle())
        for name, kept in self.kept.items():
            assert self.contents[kept.block_id] == name
        num_leaves = self.num_leaves()
        assert self.cache.forest.num_prefixes == num_leaves <= self.max_prefixes
        self.max_prefixes = max(self.config.max_prefixes, num_leaves)

    @invariant()
    def every_reference_is_known(self):
        counts = [0] * NUM_BLOCKS
        for block_id in (*self.cache.block_ids(), *(i for r in self.requests for i in r.block_ids)):
            counts[block_id] += 1
        assert counts == self.ref_counts
        assert sorted(self.free) == [i for i, count in enumerate(counts) if not count]

    @invariant()
    def would_be_idle_is_foretold(self):
        for some in (self.requests, self.requests[:1], self.requests[1:]):
            others = [request for request in self.requests if request not in some]
            used = {name for request in others for name in self.covered(request)}
            used |= {name for pin in self.pins for name in self.names(*pin)}
            num_more = len(self.kept.keys() - used) - self.num_idle()
            assert self.cache.num_idle_without(r.lease for r in some) == num_more

    @invariant()
    def only_bad_policies_are_complained_about(self):
        assert self.policy_name == "bad" or not self.told


def search(policy: str, share: int):
    """Runs one example of `share` in Hypothesis' profile."""
    examples = max(1, settings.default.max_examples // share)
    run_state_machine_as_test(
        functools.partial(PrefixMachine, policy),
        settings=settings(settings.default, max_examples=examples, stateful_step_count=40),
    )


@pytest.mark.parametrize("policy", ["lru", "bad"])
def test_random_lives_agree_with_the_model(policy):
    search(policy, share=10)


@pytest.mark.parametrize("policy", sorted(set(block_policy_names()) - {"lru"}))
def test_every_registered_policy_decides_without_a_complaint(policy):
    search(policy, share=50)
