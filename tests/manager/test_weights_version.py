"""`set_weights_version`: what other weights have computed is not found, and is evicted first."""

import asyncio

import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.manager import Retention
from ferrum_jax.prefix.report import Stop
from tests.support.internals import cached_blocks
from tests.support.managers import tokens_of
from tests.support.multi_device import CPU, begin_with, make_multi
from tests.support.prefix_managers import CONFIG, PROMPT, ask, compute, found, keep, make

OTHER, THIRD = [21, 22, 23, 24], [31, 32, 33, 34]


def why(manager, prompt=PROMPT, salt=None):
    return manager.explain_lookup(prompt, salt).stop


def test_prefixes_of_another_version_are_not_found_until_it_is_set_again():
    manager = make()
    keep(manager, "a")
    manager.set_weights_version("v1")
    assert found(manager) == 0 and why(manager) is Stop.OTHER_VERSION
    assert "another version of the weights" in str(manager.explain_lookup(PROMPT))
    manager.deallocate("a")
    b = keep(manager, "b")
    assert b.num_cached_tokens == 0 and found(manager) == 6
    assert manager.stats().cached_blocks == 4
    manager.set_weights_version("v1")
    assert found(manager) == 6, "the present version again changes nothing"
    manager.deallocate("b")
    manager.set_weights_version(None)
    assert found(manager) == 6
    manager.check()


def test_salts_are_kept_apart_under_each_version():
    manager = make()
    manager.set_weights_version(1)
    keep(manager, "a", salt="x")
    assert why(manager, salt="y") is Stop.OTHER_SALT and found(manager, salt="x") == 6
    manager.set_weights_version(2)
    assert why(manager, salt="x") is Stop.OTHER_VERSION
    assert why(manager, salt="y") is Stop.NEVER_SEEN
    manager.reset_prefixes("x")
    assert not cached_blocks(manager), "a reset of a salt removes it under every version"


@pytest.mark.parametrize("is_away", [False, True])
def test_a_request_that_began_before_caches_nothing_under_any_version(is_away):
    manager = make()
    a = keep(manager, "a")
    manager.extend(a, 2)
    if is_away:
        manager.swap_out("a")
    manager.set_weights_version(1)
    if is_away:
        manager.swap_in("a")
    assert manager.commit(a, [18, 19], num_tokens=7) == (0 if is_away else 6)
    assert found(manager) == 0 and tokens_of(a)[:7] == PROMPT
    manager.set_weights_version(None)
    assert found(manager, [*PROMPT, 18, 19, 20]) <= 7, "what was computed by both is not cached"
    manager.check()


def test_outdated_blocks_are_evicted_first_and_lose_their_pins():
    manager = make(num_blocks=6)
    old = compute(manager, "old", PROMPT[:6])
    manager.commit(old, retention=Retention(is_pinned=True))
    manager.deallocate("old")
    manager.set_weights_version(1)
    assert manager.stats().evictable_blocks == 2
    for name, prompt in (("b", OTHER[:3]), ("c", THIRD[:3])):
        keep(manager, name, prompt)
        manager.deallocate(name)
    # Another use makes the outdated ones the most recently used for a policy.
    manager.set_weights_version(None)
    ask(manager, "again", PROMPT)
    manager.deallocate("again")
    manager.set_weights_version(1)
    ask(manager, "d", [41, 42, 43, 44, 45, 46, 47, 48, 49, 50])
    assert found(manager, [*OTHER[:3], 1]) == found(manager, [*THIRD[:3], 1]) == 3
    assert manager.stats().eviction_count == 2 and manager.stats().cached_blocks == 2
    assert why(manager) is Stop.OTHER_VERSION, "also after they were evicted"
    manager.check()


def test_outdated_prefixes_are_evicted_first_to_stay_within_max_prefixes():
    manager = make()
    manager.enable_prefix_caching(
        fj.PrefixCacheConfig(
            max_prefixes=2,
            min_prefix_length=1,
            prefix_ttl_seconds=CONFIG.prefix_ttl_seconds,
            enable_cross_request_sharing=True,
        )
    )
    keep(manager, "a", OTHER)
    manager.deallocate("a")
    manager.set_weights_version(1)
    keep(manager, "b", THIRD)
    manager.deallocate("b")
    manager.set_weights_version(None)
    ask(manager, "c", OTHER)
    manager.deallocate("c")
    manager.set_weights_version(1)
    keep(manager, "d", PROMPT)
    assert found(manager, THIRD) == 3 and manager.stats().cached_blocks == 3


def test_requests_of_different_versions_share_nothing():
    manager = make()
    compute(manager, "a")
    manager.set_weights_version(1)
    compute(manager, "b")
    with pytest.raises(errors.PrefixMismatchError, match="different versions"):
        manager.share_prefix("a", "b", 3)
    (c,) = manager.fork("a", ["c"])
    manager.deallocate("a")
    assert manager.commit(c) == 0 and found(manager) == 0
    with pytest.raises(errors.PrefixMismatchError, match="different versions"):
        manager.share_prefix("c", "b", 3)


def test_a_request_that_moves_keeps_its_version():
    manager, other = make(), make()
    manager.set_weights_version(1)
    keep(manager, "a")
    manager.move_to("a", other)
    assert found(other) == 0 and why(other) is Stop.OTHER_VERSION
    other.set_weights_version(1)
    assert found(other) == 6
    other.check()


def test_all_devices_have_the_version():
    manager = make_multi(2, enable_prefix_caching=True, prefix_cache_config=CONFIG)
    begin_with(manager, "a", PROMPT, CPU[0])
    begin_with(manager, "b", PROMPT, CPU[1])
    manager.set_weights_version((1, "x"))
    reports = manager.explain_lookup(PROMPT).values()
    assert {report.stop for report in reports} == {Stop.OTHER_VERSION}


def test_the_version_is_a_key():
    manager = make()
    for version in ([1], float("nan")):
        with pytest.raises(ValueError, match="version"):
            manager.set_weights_version(version)


def test_the_async_manager_sets_the_version():
    async def serve():
        manager = fj.AsyncKvCacheManager(make())
        keep(manager.manager, "a")
        await manager.set_weights_version(1)
        assert found(manager.manager) == 0

    asyncio.run(serve())
