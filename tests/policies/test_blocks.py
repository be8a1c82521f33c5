"""Which cached block goes first: what all block policies must do, and what each is for."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ferrum_jax.policies.blocks import (
    BlockEvictionPolicy,
    CachedBlock,
    Retention,
    block_policy_names,
    make_block_policy,
    register_block_policy,
    registry,
    return_times,
)
from ferrum_jax.policies.blocks.arc import ArcBlockPolicy
from ferrum_jax.policies.blocks.frequency import GdsfBlockPolicy, LfuBlockPolicy
from ferrum_jax.policies.blocks.ghost_list import GhostList
from ferrum_jax.policies.blocks.priority import PriorityBlockPolicy
from ferrum_jax.policies.blocks.recency import LruBlockPolicy, SegmentedLruBlockPolicy
from ferrum_jax.policies.blocks.return_rate import ReturnRateBlockPolicy
from ferrum_jax.policies.blocks.return_times import PERIOD, ReturnTimes
from ferrum_jax.policies.blocks.s3fifo import S3FifoBlockPolicy
from ferrum_jax.replay import TracedRequest, optimal_hit_rate, replay
from ferrum_jax.tokens import TokenIds
from ferrum_jax.types import Priority

EVERY_POLICY = block_policy_names()


def block(key, logical_index=0, retention=None):
    return CachedBlock(key, logical_index, key, retention or Retention())


def prompt(key, num_blocks):
    """Blocks of one prompt, deepest first."""
    return [block(f"{key}{i}", i) for i in reversed(range(num_blocks))]


def anything(_):
    return True


def evict_keys(policy, num_blocks, can_evict=anything):
    victims = [policy.evict(can_evict) for _ in range(num_blocks)]
    return [victim and victim.prefix_key for victim in victims]


def insert_each(policy, keys):
    blocks = {key: block(key) for key in keys}
    for each in blocks.values():
        policy.insert([each])
    return blocks


class KnownBlocks:
    """What a policy was told of, and random calls of it; the oracle of its contract."""

    def __init__(self, policy, rng):
        self.policy, self.rng = policy, rng
        self.known: list[CachedBlock] = []
        self.gone: list[CachedBlock] = []

    def choose(self, blocks):
        """Returns some of the blocks, deepest first."""
        chosen = [each for each in blocks if self.rng.random() < 0.4]
        return sorted(chosen, key=lambda each: -each.logical_index)

    def insert(self):
        """Caches the end of a prompt; its beginning may be touched next, as by a request."""
        begin, keys = self.rng.integers(3), self.rng.integers(6, size=self.rng.integers(1, 5))
        blocks = [
            CachedBlock(0, int(begin) + i, int(key), Retention(priority=self.priority()))
            for i, key in reversed(list(enumerate(keys)))
        ]
        if self.gone and self.rng.random() < 0.2:
            blocks = [self.gone.pop()]  # The same object may come back.
        found = [each for each in self.known if each.logical_index < blocks[-1].logical_index]
        self.policy.insert(blocks)
        self.known += blocks
        if self.rng.random() < 0.5:
            self.touch(found)

    def touch(self, blocks=None):
        """Finds blocks; a request may have changed their retention."""
        if found := self.choose(self.known if blocks is None else blocks):
            found[0].retention = Retention(priority=self.priority())
            self.policy.touch(found)

    def remove(self):
        if removed := self.choose(self.known):
            self.policy.remove(removed)
            self.forget(removed)

    def evict(self, can_go=None):
        """Evicts while all blocks, none, or some can go; checks that one goes if any can."""
        if can_go is None:
            part = self.rng.choice([0, 0.3, 0.9, 1])
            can_go = {each for each in self.known if self.rng.random() < part}
        victim = self.policy.evict(lambda each: each in can_go)
        assert victim in can_go if can_go else victim is None
        self.forget([] if victim is None else [victim])

    def forget(self, blocks):
        self.known = [each for each in self.known if each not in blocks]
        self.gone += blocks

    def priority(self):
        return Priority(int(self.rng.choice(sorted(Priority))))


CONTRACTED = {
    **{name: name for name in EVERY_POLICY},
    "slru, none protected": functools.partial(SegmentedLruBlockPolicy, protected_fraction=0),
    "slru, all protected": functools.partial(SegmentedLruBlockPolicy, protected_fraction=1),
    "s3fifo, all small": functools.partial(S3FifoBlockPolicy, small_fraction=1),
}


@pytest.mark.parametrize("policy", CONTRACTED.values(), ids=CONTRACTED)
def test_evict_returns_a_block_that_can_go_unless_there_is_none(policy):
    """After any calls of `insert`, `touch`, `remove` and `evict`, for blocks that may be in use."""
    for seed in range(60):
        rng = np.random.default_rng(seed)
        blocks = KnownBlocks(make_block_policy(policy, int(rng.integers(1, 41))), rng)
        steps = [blocks.insert, blocks.touch, blocks.remove, blocks.evict]
        odds = rng.dirichlet([2, 2, 0.5, 2])
        for step in rng.choice(len(steps), size=40, p=odds):
            steps[step]()
        while blocks.known:
            blocks.evict(set(blocks.known))
        blocks.evict(set())


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_nothing_goes_while_nothing_can_and_all_goes_later(name):
    policy = make_block_policy(name, 8)
    blocks = prompt("a", 3)
    policy.insert(blocks)
    assert policy.evict(lambda _: False) is None
    assert sorted(evict_keys(policy, 4)[:3]) == ["a0", "a1", "a2"]
    assert policy.evict(anything) is None


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_the_end_of_a_prompt_goes_before_its_beginning(name):
    policy = make_block_policy(name, 8)
    found, new = prompt("a", 5)[2:], prompt("a", 5)[:2]
    policy.insert(found)
    policy.insert(new)
    policy.touch(found)
    assert evict_keys(policy, 5) == ["a4", "a3", "a2", "a1", "a0"]


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_what_was_removed_is_not_evicted(name):
    policy = make_block_policy(name, 8)
    first, second = prompt("a", 2), prompt("b", 2)
    policy.insert(first)
    policy.insert(second)
    policy.touch(first)
    policy.remove(first)
    assert sorted(evict_keys(policy, 2)) == ["b0", "b1"]
    assert policy.evict(anything) is None


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_two_blocks_with_one_prefix_key_are_two(name):
    policy = make_block_policy(name, 8)
    twins = [block("same"), block("same")]
    for twin in twins:
        policy.insert([twin])
        policy.touch([twin])
    assert [policy.evict(anything) for _ in range(2)] in (twins, twins[::-1])
    policy.insert([twins[0]])
    assert policy.evict(anything) is twins[0]


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_a_block_that_cannot_go_is_not_asked_about_at_each_eviction(name):
    """One request holds half of all blocks: an eviction must not look at each of them."""
    num_asked = 0

    def can_evict(each):
        nonlocal num_asked
        num_asked += 1
        return each.prefix_key[0] != "h"

    policy = make_block_policy(name, 400)
    held = prompt("h", 200)
    policy.insert(held)
    for i in range(50):
        policy.insert(prompt(i, 4))
    assert None not in evict_keys(policy, 200, can_evict)
    assert num_asked < 3 * 400


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_a_policy_has_the_name_it_is_registered_by(name):
    assert make_block_policy(name, 8).name == name
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        make_block_policy(name, 0)


def test_lru_evicts_what_was_used_longest_ago():
    policy = LruBlockPolicy(8)
    blocks = insert_each(policy, "abcd")
    policy.touch([blocks["a"]])
    assert evict_keys(policy, 4) == list("bcda")


def test_a_block_that_could_not_go_counts_as_used_then():
    policy = LruBlockPolicy(8)
    insert_each(policy, "abc")
    assert evict_keys(policy, 1, lambda each: each.prefix_key != "a") == ["b"]
    assert evict_keys(policy, 2) == ["c", "a"]


@pytest.mark.parametrize("policy_class", [SegmentedLruBlockPolicy, ArcBlockPolicy])
def test_a_scan_spares_what_was_found_again(policy_class):
    policy = policy_class(10)
    liked = insert_each(policy, "xyz")
    policy.touch(list(liked.values()))
    insert_each(policy, "0123456")
    for i in range(7, 40):
        assert policy.evict(anything) not in liked.values()
        insert_each(policy, [str(i)])


def test_slru_protects_what_comes_back_soon():
    policy = SegmentedLruBlockPolicy(4)
    insert_each(policy, "abcd")
    assert evict_keys(policy, 1) == ["a"]
    insert_each(policy, "ae")  # The ghost of "a" is known: it is no longer on probation.
    assert evict_keys(policy, 5) == ["b", "c", "d", "e", "a"]


def test_slru_protects_no_more_than_its_fraction():
    policy = SegmentedLruBlockPolicy(4, protected_fraction=0.5)
    blocks = insert_each(policy, "abcd")
    for key in "abc":
        policy.touch([blocks[key]])
    assert evict_keys(policy, 4) == ["d", "a", "b", "c"]
    with pytest.raises(ValueError, match="protected_fraction must be from 0 to 1, got 1.5"):
        SegmentedLruBlockPolicy(4, protected_fraction=1.5)


def test_arc_gives_more_room_to_the_kind_that_is_missed():
    policy = ArcBlockPolicy(4)
    blocks = insert_each(policy, "abcd")
    policy.touch([blocks["a"], blocks["b"]])
    assert evict_keys(policy, 1) == ["c"]  # Blocks used once should have no room as yet.
    insert_each(policy, "c")  # It comes back, and gets some: now "a" goes rather than "d".
    assert evict_keys(policy, 1) == ["a"]
    insert_each(policy, "a")  # So does this one, and the boundary goes back.
    assert evict_keys(policy, 2) == ["d", "b"]


def test_s3fifo_lets_new_blocks_through_unless_they_are_used():
    policy = S3FifoBlockPolicy(10)
    blocks = insert_each(policy, "abcd")
    policy.touch([blocks["b"]])
    assert evict_keys(policy, 4) == ["a", "c", "d", "b"]


def test_s3fifo_lets_a_returning_block_into_the_main_queue():
    policy = S3FifoBlockPolicy(10)
    insert_each(policy, "a")
    assert evict_keys(policy, 1) == ["a"]
    insert_each(policy, "ab")
    assert evict_keys(policy, 2) == ["b", "a"]


def test_s3fifo_forgets_a_popular_block_within_three_rounds():
    policy = S3FifoBlockPolicy(10, small_fraction=0)
    popular = insert_each(policy, "a")["a"]
    for _ in range(100):
        policy.touch([popular])
    insert_each(policy, "b")
    assert evict_keys(policy, 2) == ["b", "a"]
    with pytest.raises(ValueError, match="small_fraction must be from 0 to 1, got -1"):
        S3FifoBlockPolicy(10, small_fraction=-1)


def test_lfu_evicts_what_was_used_least_and_lets_old_uses_fade():
    policy = LfuBlockPolicy(8)
    blocks = insert_each(policy, "abc")
    for _ in range(5):
        policy.touch([blocks["a"]])
    policy.touch([blocks["b"]])
    assert evict_keys(policy, 2) == ["c", "b"]
    for key in itertools.count():
        insert_each(policy, [key])
        if evict_keys(policy, 1) == ["a"]:
            break
        assert key < 10  # Six uses last for about as many evictions.
    assert key >= 3


def test_gdsf_keeps_what_is_dear_to_compute_again():
    policy = GdsfBlockPolicy(8, doubling_index=10)
    shallow, deep = block("shallow", 1), block("deep", 40)
    policy.insert([deep])
    policy.insert([shallow])
    assert evict_keys(policy, 2) == ["shallow", "deep"]
    policy.insert([deep])
    policy.insert([shallow])
    for _ in range(5):
        policy.touch([shallow])  # Six cheap uses are worth more than a dear one.
    assert evict_keys(policy, 2) == ["deep", "shallow"]
    with pytest.raises(ValueError, match="doubling_index must be at least 1, got 0"):
        GdsfBlockPolicy(8, doubling_index=0)


def test_priority_goes_before_recency():
    policy = PriorityBlockPolicy(8)
    blocks = {name: block(name, retention=Retention(priority=name)) for name in Priority}
    for name in (Priority.High, Priority.Low, Priority.Critical, Priority.Normal):
        policy.insert([blocks[name]])
    assert evict_keys(policy, 4) == sorted(Priority)


def test_priority_may_change():
    policy = PriorityBlockPolicy(8)
    blocks = insert_each(policy, "abc")
    blocks["a"].retention = Retention(priority=Priority.High)
    blocks["b"].retention = Retention(priority=Priority.Low)
    policy.touch(list(blocks.values()))
    assert evict_keys(policy, 3) == ["b", "c", "a"]


def test_ghosts_are_remembered_up_to_a_number():
    ghosts = GhostList(3)
    for key in range(5):
        ghosts.add(key)
    ghosts.add(2)  # Again: it is the latest now.
    ghosts.add(5)
    assert [key for key in range(6) if ghosts.pop(key)] == [2, 4, 5]
    assert len(ghosts) == 0


@hypothesis.settings(max_examples=100)
@hypothesis.given(
    returns=st.lists(st.tuples(st.integers(0, 2047), st.integers(1, 20)), max_size=20),
    num_others=st.integers(0, 100),
)
def test_a_rate_is_the_best_that_any_later_age_gives(returns, num_others):
    times = ReturnTimes()
    num_blocks = num_others + sum(number for _, number in returns)
    times.add_blocks(num_blocks)
    shares = [0.0] * 12
    for age, number in returns:
        times.add_return(age, number)
        shares[age.bit_length()] += number / num_blocks
    times.learn()
    begin = [0, 1, *(2**octave for octave in range(1, 12))]
    left = [1 - sum(shares[:octave]) for octave in range(13)]
    for octave in range(12):
        best = room = 0.0
        for end in range(octave, 12):
            room += (begin[end + 1] - begin[end]) * max(left[end], 1e-3)
            best = max(best, (left[octave] - left[end + 1]) / room)
        assert times.rate(begin[octave]) == pytest.approx(best, abs=1e-9)


def returning_late(num_periods, age_periods, parent=None):
    """Return times of blocks half of which come back at one age, after some time of watching."""
    times = ReturnTimes(parent)
    for period in range(num_periods):
        times.add_blocks(PERIOD)
        if period >= age_periods:
            times.add_return(age_periods * PERIOD, PERIOD // 2)
        times.learn()
    return times


@pytest.mark.parametrize("age_periods", [1, 3, 20])
def test_a_block_that_is_too_young_to_return_does_not_count_as_one_that_never_will(age_periods):
    soon, late = (returning_late(n * age_periods, age_periods) for n in (3, 30))
    for age in (0, PERIOD // 2, age_periods * PERIOD // 2):
        assert 0.6 < soon.rate(age) / late.rate(age) < 1.1
    assert soon.rate(age_periods * 4 * PERIOD) == late.rate(age_periods * 4 * PERIOD) == 0


def test_a_kind_counts_as_the_wider_one_until_it_has_been_seen():
    wider = returning_late(100, 1)
    unseen, seen = ReturnTimes(wider), ReturnTimes(wider)
    assert unseen.rate(0) == wider.rate(0) > 0
    seen.add_blocks(100 * PERIOD)
    for times in (wider, unseen, seen) * 2:
        times.learn()
    assert unseen.rate(0) == pytest.approx(wider.rate(0))
    assert seen.rate(0) < 0.1 * wider.rate(0)  # None came back.


def test_return_times_remember_no_more_periods_than_they_need(monkeypatch):
    monkeypatch.setattr(return_times, "_NUM_PERIODS", 16)
    times = returning_late(100, 3)
    times.add_return(1 << 60)  # Older than all of them.
    assert len(times._used_by_period) <= 32
    assert times.rate(0) == pytest.approx(returning_late(30, 3).rate(0), rel=0.2)


def conversations(num_requests):
    """Three conversations that grow by a block a turn; between turns, prompts seen once."""
    talks, lengths, trace = [0, 1, 2], [2, 2, 2], []
    for i in range(num_requests):
        if i % 6:
            ids = range(1_000_000 + 5 * i, 1_000_000 + 5 * i + 5)
        else:
            speaker = i // 6 % 3
            ids = range(100 * talks[speaker], 100 * talks[speaker] + lengths[speaker])
            lengths[speaker] += 1
            if lengths[speaker] > 16:  # The next turn begins another conversation.
                talks[speaker], lengths[speaker] = max(talks) + 1, 2
        trace.append(TracedRequest(float(i), TokenIds(ids)))
    return trace


def test_return_rate_learns_that_conversations_return_and_other_prompts_do_not():
    trace = conversations(1800)
    assert replay(trace, "lru", 40) == 0
    assert replay(trace, "return_rate", 40) > 0.6 * optimal_hit_rate(trace, 40)


def test_return_rate_evicts_all_even_if_a_run_has_two_ends():
    """An answer is cached, and another request that ends tells of a prompt as long as its."""
    policy = ReturnRateBlockPolicy(8)
    first, second, answer = prompt("a", 2), prompt("b", 2), [block("a2", 2)]
    policy.insert(first)
    policy.insert(second)
    policy.insert(answer)
    policy.touch(second)
    keys = evict_keys(policy, 4, lambda each: each.prefix_key[0] == "b" or each.logical_index == 9)
    assert keys == ["b1", "b0", None, None]


def test_an_own_policy_can_be_registered(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    register_block_policy("half", functools.partial(SegmentedLruBlockPolicy, protected_fraction=0))
    assert block_policy_names()[-1] == "half"
    policy = make_block_policy("half", 4)
    blocks = insert_each(policy, "ab")
    policy.touch([blocks["a"]])
    assert evict_keys(policy, 2) == ["b", "a"]
    with pytest.raises(ValueError, match="a block policy 'half' already"):
        register_block_policy("half", LruBlockPolicy)


def test_an_unknown_policy_is_refused_with_those_that_are_known():
    with pytest.raises(ValueError, match="no block policy 'lfu2'; known are lru, slru, arc"):
        make_block_policy("lfu2", 4)


def test_a_policy_may_be_given_instead_of_named():
    assert isinstance(make_block_policy(ArcBlockPolicy, 4), BlockEvictionPolicy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"priority": 2}, "priority must be a Priority, got 2"),
        ({"ttl_seconds": 0.0}, "ttl_seconds must be above 0, got 0.0"),
        ({"ttl_seconds": float("nan")}, "ttl_seconds must be a number, got nan"),
        ({"is_pinned": 1}, "is_pinned must be true or false, got 1"),
    ],
)
def test_a_retention_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        Retention(**fields)
