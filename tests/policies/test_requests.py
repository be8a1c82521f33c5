"""The request policy: which requests are swapped out first."""

from types import SimpleNamespace

import numpy as np
import pytest

from ferrum_jax.interfaces import CacheEvictionPolicy
from ferrum_jax.policies.requests import LruEvictionPolicy


def cache(request_id, last_access, memory_bytes=10):
    stats = SimpleNamespace(last_access=last_access, memory_bytes=memory_bytes)
    return request_id, SimpleNamespace(stats=lambda: stats)


@pytest.fixture
def policy():
    return LruEvictionPolicy()


def test_the_longest_unused_are_named_and_no_more_than_are_needed():
    """Of random requests, some of which hold nothing, were recorded, or were used together."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        policy, ids = LruEvictionPolicy(), [f"r{i}" for i in range(rng.integers(7))]
        caches = [cache(i, float(rng.integers(4)), int(10 * rng.integers(3))) for i in ids]
        records = {i: float(rng.integers(4)) for i in ids if rng.random() < 0.4}
        for request_id, access_time in records.items():
            policy.record_access(request_id, access_time)
        sizes = {i: handle.stats().memory_bytes for i, handle in caches}
        used_at = {i: records.get(i, handle.stats().last_access) for i, handle in caches}
        oldest_first = sorted((i for i in ids if sizes[i]), key=used_at.__getitem__)
        required = int(rng.integers(80))
        named = policy.select_eviction_candidates(required, caches)
        assert named == oldest_first[: len(named)]
        assert sum(map(sizes.get, named)) >= required or named == oldest_first
        assert sum(map(sizes.get, named[:-1])) < required or not named


def test_a_record_counts_before_the_handles_last_access(policy):
    caches = [cache("a", 1.0), cache("b", 2.0)]
    policy.record_access("a", 3.0)
    assert policy.select_eviction_candidates(20, caches) == ["b", "a"]
    policy.record_access("a", 1.5)  # The latest record counts, even of an earlier time.
    assert policy.select_eviction_candidates(20, caches) == ["a", "b"]


def test_a_request_never_recorded_is_not_taken_for_just_used(policy):
    policy.record_access("recorded", 5.0)
    caches = [cache("recorded", 0.0), cache("never recorded", 1.0)]
    assert policy.select_eviction_candidates(1, caches) == ["never recorded"]


def test_ids_need_no_order_among_themselves(policy):
    caches = [cache(("tenant", 1), 1.0), cache(7, 1.0), cache("x", 1.0)]
    assert policy.select_eviction_candidates(30, caches) == [("tenant", 1), 7, "x"]


@pytest.mark.parametrize("how", ["by selection", "by name"])
def test_a_request_that_is_gone_is_forgotten(policy, how):
    policy.record_access("a", 100.0)
    if how == "by name":
        policy.forget("a")
        policy.forget("a")  # Nothing to forget is no error.
    else:
        policy.select_eviction_candidates(0, [cache("b", 1.0)])
    reused = [cache("b", 2.0), cache("a", 1.0)]
    assert policy.select_eviction_candidates(20, reused) == ["a", "b"]


@pytest.mark.parametrize("required", [-1, 1.5, None])
def test_required_memory_is_a_count_of_bytes(policy, required):
    with pytest.raises(ValueError, match="required_memory must be"):
        policy.select_eviction_candidates(required, [])


def test_lru_is_a_policy_and_says_its_name(policy):
    assert isinstance(policy, CacheEvictionPolicy)
    assert policy.name() == "lru"
