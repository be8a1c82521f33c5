"""Block policies: the contract that all of them keep, and what each one evicts first."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from ferrum_jax.policies.blocks import (
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
    """Random calls of a policy, and the blocks that it must hold: the oracle of its contract."""

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
            blocks = [self.gone.pop()]  # The same object may be cached again.
        found = [each for each in self.known if each.logical_index < blocks[-1].logical_index]
        self.policy.insert(blocks)
        self.known += blocks
        if self.rng.random() < 0.5:
            self.touch(found)

    def touch(self, blocks=None):
        """Uses blocks; a request may have changed their retention."""
        if found := self.choose(self.known if blocks is None else blocks):
            found[0].retention = Retention(priority=self.priority())
            self.policy.touch(found)

    def remove(self):
        if removed := self.choose(self.known):
            self.policy.remove(removed)
            self.forget(removed)

    def evict(self, can_go=None):
        """Evicts while all blocks, none, or some are evictable."""
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
def test_evict_returns_an_evictable_block_unless_there_is_none(policy):
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
def test_evict_takes_the_end_of_a_prompt_before_its_beginning(name):
    policy = make_block_policy(name, 8)
    found, new = prompt("a", 5)[2:], prompt("a", 5)[:2]
    policy.insert(found)
    policy.insert(new)
    policy.touch(found)
    assert evict_keys(policy, 5) == ["a4", "a3", "a2", "a1", "a0"]


@pytest.mark.parametrize("name", EVERY_POLICY)
def test_evict_does_not_examine_a_block_in_use_each_time(name):
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
def test_make_block_policy_makes_the_policy_of_that_name(name):
    assert make_block_policy(name, 8).name == name
    with pytest.raises(ValueError, match="capacity must be at least 1, got 0"):
        make_block_policy(name, 0)


def test_lru_evicts_the_least_recently_used_and_counts_a_block_in_use_as_used():
    policy = LruBlockPolicy(8)
    blocks = insert_each(policy, "abcd")
    policy.touch([blocks["d"], blocks["a"]])
    assert evict_keys(policy, 1, lambda each: each.prefix_key != "b") == ["c"]
    assert evict_keys(policy, 3) == ["d", "a", "b"]


@pytest.mark.parametrize("policy_class", [SegmentedLruBlockPolicy, ArcBlockPolicy])
def test_slru_and_arc_keep_used_blocks_during_a_scan(policy_class):
    policy = policy_class(10)
    liked = insert_each(policy, "xyz")
    policy.touch(list(liked.values()))
    insert_each(policy, "0123456")
    for i in range(7, 40):
        assert policy.evict(anything) not in liked.values()
        insert_each(policy, [str(i)])


def test_slru_protects_a_block_that_returns_while_its_ghost_is_remembered():
    policy = SegmentedLruBlockPolicy(4)
    insert_each(policy, "abcd")
    assert evict_keys(policy, 1) == ["a"]
    insert_each(policy, "ae")  # The ghost of "a" is known: it is no longer on probation.
    assert evict_keys(policy, 5) == ["b", "c", "d", "e", "a"]


def test_slru_protects_its_fraction_of_the_blocks_only():
    policy = SegmentedLruBlockPolicy(4, protected_fraction=0.5)
    blocks = insert_each(policy, "abcd")
    for key in "abc":
        policy.touch([blocks[key]])
    assert evict_keys(policy, 4) == ["d", "a", "b", "c"]
    with pytest.raises(ValueError, match="protected_fraction must be from 0 to 1, got 1.5"):
        SegmentedLruBlockPolicy(4, protected_fraction=1.5)


def test_arc_gives_more_room_to_the_list_whose_ghost_returns():
    policy = ArcBlockPolicy(4)
    blocks = insert_each(policy, "abcd")
    policy.touch([blocks["a"], blocks["b"]])
    assert evict_keys(policy, 1) == ["c"]  # Blocks used once should have no room as yet.
    insert_each(policy, "c")  # It comes back, and gets some: now "a" goes rather than "d".
    assert evict_keys(policy, 1) == ["a"]
    insert_each(policy, "a")  # So does this one, and the boundary goes back.
    assert evict_keys(policy, 2) == ["d", "b"]


def test_s3fifo_evicts_new_blocks_first_unless_they_are_used():
    policy = S3FifoBlockPolicy(10)
    blocks = insert_each(policy, "abcd")
    policy.touch([blocks["b"]])
    assert evict_keys(policy, 4) == ["a", "c", "d", "b"]


def test_s3fifo_queues_a_returning_block_in_the_main_queue():
    policy = S3FifoBlockPolicy(10)
    insert_each(policy, "a")
    assert evict_keys(policy, 1) == ["a"]
    insert_each(policy, "ab")
    assert evict_keys(policy, 2) == ["b", "a"]


def test_s3fifo_evicts_a_popular_block_within_three_rounds():
    policy = S3FifoBlockPolicy(10, small_fraction=0)
    popular = insert_each(policy, "a")["a"]
    for _ in range(100):
        policy.touch([popular])
    insert_each(policy, "b")
    assert evict_keys(policy, 2) == ["b", "a"]
    with pytest.raises(ValueError, match="small_fraction must be from 0 to 1, got -1"):
        S3FifoBlockPolicy(10, small_fraction=-1)


def test_lfu_evicts_the_least_used_block_with_ageing():
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


def test_gdsf_keeps_blocks_that_cost_more_work():
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


def test_priority_evicts_the_lowest_priority_first():
    policy = PriorityBlockPolicy(8)
    blocks = {name: block(name, retention=Retention(priority=name)) for name in Priority}
    for name in (Priority.High, Priority.Low, Priority.Critical, Priority.Normal):
        policy.insert([blocks[name]])
    assert evict_keys(policy, 4) == sorted(Priority)


def test_priority_reads_a_changed_priority_at_touch():
    policy = PriorityBlockPolicy(8)
    blocks = insert_each(policy, "abc")
    blocks["a"].retention = Retention(priority=Priority.High)
    blocks["b"].retention = Retention(priority=Priority.Low)
    policy.touch(list(blocks.values()))
    assert evict_keys(policy, 3) == ["b", "c", "a"]


def test_ghost_list_keeps_the_newest_keys_up_to_its_capacity():
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
def test_return_times_rate_is_the_maximum_over_later_ages(returns, num_others):
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
def test_return_times_ignore_blocks_too_young_to_have_returned(age_periods):
    soon, late = (returning_late(n * age_periods, age_periods) for n in (3, 30))
    for age in (0, PERIOD // 2, age_periods * PERIOD // 2):
        assert 0.6 < soon.rate(age) / late.rate(age) < 1.1
    assert soon.rate(age_periods * 4 * PERIOD) == late.rate(age_periods * 4 * PERIOD) == 0


def test_return_times_use_the_parent_until_there_are_observations():
    wider = returning_late(100, 1)
    unseen, seen = ReturnTimes(wider), ReturnTimes(wider)
    assert unseen.rate(0) == wider.rate(0) > 0
    seen.add_blocks(100 * PERIOD)
    for times in (wider, unseen, seen) * 2:
        times.learn()
    assert unseen.rate(0) == pytest.approx(wider.rate(0))
    assert seen.rate(0) < 0.1 * wider.rate(0)  # None came back.


def test_return_times_keep_a_bounded_number_of_periods(monkeypatch):
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


def test_return_rate_evicts_from_inside_a_run_with_two_branches():
    """An answer is cached, and another request that ends tells of a prompt as long as its."""
    policy = ReturnRateBlockPolicy(8)
    first, second, answer = prompt("a", 2), prompt("b", 2), [block("a2", 2)]
    policy.insert(first)
    policy.insert(second)
    policy.insert(answer)
    policy.touch(second)
    keys = evict_keys(policy, 4, lambda each: each.prefix_key[0] == "b" or each.logical_index == 9)
    assert keys == ["b1", "b0", None, None]


def test_register_block_policy_adds_a_policy_by_name(monkeypatch):
    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    register_block_policy("half", functools.partial(SegmentedLruBlockPolicy, protected_fraction=0))
    assert block_policy_names()[-1] == "half"
    policy = make_block_policy("half", 4)
    blocks = insert_each(policy, "ab")
    policy.touch([blocks["a"]])
    assert evict_keys(policy, 2) == ["b", "a"]
    with pytest.raises(ValueError, match="'half' is registered already"):
        register_block_policy("half", LruBlockPolicy)


def test_make_block_policy_refuses_an_unknown_name():
    with pytest.raises(ValueError, match="'lfu2' is not registered. Use one of lru, slru, arc"):
        make_block_policy("lfu2", 4)


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
