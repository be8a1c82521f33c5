"""The prefix cache by itself: what is found, what stays, and what goes."""

import pytest

from ferrum_jax import Priority
from ferrum_jax.policies.blocks import Retention, make_block_policy
from ferrum_jax.prefix import forest, report
from ferrum_jax.prefix.report import Stop
from ferrum_jax.tokens import TokenIds
from tests.support.bad_policies import BadBlockPolicy, complaints
from tests.support.prefix_books import BLOCK_SIZE, HELLO, Books

# What is found.


def test_what_was_committed_is_found_but_for_the_last_token():
    books = Books()
    books.keep(HELLO)
    assert books.found([*HELLO, 9]) == 8
    assert books.found(HELLO) == 7, "one token is left to compute"
    assert books.found(HELLO[:4]) == 3
    assert books.found(HELLO[:1]) == books.found([]) == 0


def test_only_full_blocks_are_kept():
    books = Books()
    books.keep(HELLO[:7])
    assert books.cache.num_blocks == 1 and books.found([*HELLO, 9]) == 4


def test_tokens_that_agree_are_found_up_to_the_first_that_does_not():
    books = Books()
    books.keep(HELLO)
    for position in range(8):
        prompt = [*HELLO, 9]
        prompt[position] = 77
        assert books.found(prompt) == position


def test_a_block_that_agrees_in_part_is_named_so_that_it_can_be_copied():
    books = Books()
    books.keep(HELLO)
    match = books.cache.lookup(TokenIds([1, 2, 3, 4, 5, 6, 0, 0]), None, books.now)
    assert match.num_tokens == 6 and match.block_ids == [0]
    assert match.tail is not None and match.tail.block_id == 1


def test_prompts_that_part_share_what_comes_before():
    books = Books()
    books.keep(HELLO)
    books.keep([*HELLO[:4], 9, 9, 9, 9])
    assert books.cache.num_blocks == 3, "the first block is there once"
    assert books.found([*HELLO, 0]) == 8 and books.found([*HELLO[:4], 9, 9, 9, 9, 0]) == 8


def test_no_collision_of_hashes_can_hand_over_another_prompts_block(monkeypatch):
    for module in (forest, report):
        monkeypatch.setattr(module, "hash", lambda _: 7, raising=False)
    books = Books(policy=make_block_policy("slru", 1000))
    books.keep(HELLO, "a")
    books.keep([5, 6, 7, 8])
    keys = {block.prefix_key for node in books.cache.forest.nodes() for block in node.blocks}
    assert keys == {7}, "every prefix has the same key"
    assert books.found([*HELLO, 9]) == 0 and books.found([*HELLO, 9], "a") == 8
    assert books.found([5, 6, 7, 8, 9]) == 4 and books.found([1, 2, 3, 5, 5]) == 0
    books.check()


def test_a_salt_finds_only_what_carries_it():
    books = Books()
    for salt in (None, "a", "b"):
        books.keep(HELLO, salt)
        for other in {None, "a", "b", "ab", ""} - {None, "a", "b"}:
            assert books.found([*HELLO, 9], other) == 0
        assert books.found([*HELLO, 9], salt) == 8
    assert books.cache.num_blocks == 6, "each salt has its own"


def test_without_sharing_only_what_carries_a_salt_is_kept_or_found():
    books = Books(enable_cross_request_sharing=False)
    books.keep(HELLO)
    books.keep(HELLO, "a")
    assert books.cache.num_blocks == 2
    assert books.found([*HELLO, 9]) == 0 and books.found([*HELLO, 9], "a") == 8


def test_what_was_shared_is_not_found_once_sharing_is_off():
    books = Books()
    books.keep(HELLO)
    books.cache.configure(Books(enable_cross_request_sharing=False).cache.config)
    assert books.found([*HELLO, 9]) == 0


@pytest.mark.parametrize(("min_prefix_length", "want"), [(8, 8), (9, 0)])
def test_prefixes_below_the_minimum_are_neither_kept_nor_found(min_prefix_length, want):
    books = Books(min_prefix_length=min_prefix_length)
    books.keep(HELLO)
    assert books.cache.num_blocks == want // BLOCK_SIZE
    books.keep([*HELLO, 1, 1, 1, 1])
    assert books.found([*HELLO, 9]) == want
    assert books.found([*HELLO[:7], 0]) == 0, "so much of it is too short to be used"


def test_equal_content_computed_twice_ends_as_one_copy():
    books, root = Books(), TokenIds(())
    first, second = (
        books.cache.acquire(books.cache.lookup(root, None, 0.0), None) for _ in range(2)
    )
    one = books.cache.commit(first, TokenIds(HELLO), [10, 11], 0.0)
    two = books.cache.commit(second, TokenIds([*HELLO, 1, 1, 1, 1]), [20, 21, 22], 0.0)
    assert (one.adopted, one.added) == ([], [10, 11])
    assert (two.first, two.adopted, two.added) == (0, [10, 11], [22])
    books.leases += [first, second]
    books.check()


# What stays, and what goes.


def test_nothing_in_use_goes_and_nothing_goes_before_what_follows_it():
    books = Books()
    long = books.hold([*HELLO, 1, 1, 1, 1])
    books.keep([*HELLO, 2, 2, 2, 2])
    assert books.cache.num_idle_blocks == 1
    assert books.cache.evict(10, books.now) == [3], "only the block that nobody uses"
    books.end(long)
    assert [books.cache.evict(1, books.now) for _ in range(3)] == [[2], [1], [0]]
    books.check()


def test_what_was_used_last_goes_last():
    books = Books()
    for first in (10, 20, 30):
        books.keep([first] * 8)
    books.keep([10] * 8)
    assert books.cache.evict(4, books.now) == [3, 2, 5, 4]
    assert books.found([*[10] * 8, 0]) == 8


def test_a_prefix_is_forgotten_when_nobody_used_it_for_its_time_to_live():
    books = Books(prefix_ttl_seconds=10.0)
    books.keep(HELLO)
    books.now = 9.9
    assert books.found([*HELLO, 9]) == 8
    books.keep(HELLO)  # So the time counts anew.
    books.now = 19.8
    assert books.found([*HELLO, 9]) == 8
    books.now = 19.9
    assert books.found([*HELLO, 9]) == 0
    assert sorted(books.cache.expire(books.now)) == [0, 1] and books.cache.num_expired == 2


def test_what_is_in_use_does_not_expire_and_its_time_counts_from_the_end_of_that():
    books = Books(prefix_ttl_seconds=10.0)
    lease = books.hold(HELLO)
    books.now = 1000.0
    assert books.found([*HELLO, 9]) == 8 and not books.cache.expire(books.now)
    books.end(lease)
    books.now = 1009.0
    assert books.found([*HELLO, 9]) == 8
    books.now = 1010.0
    assert books.found([*HELLO, 9]) == 0


def test_what_a_truncated_request_lets_go_is_kept_for_its_time_to_live():
    books = Books(prefix_ttl_seconds=10.0)
    lease = books.hold(HELLO)
    books.now = 1000.0
    books.cache.shorten(lease, 1, books.now)
    books.now = 1009.0
    assert not books.cache.expire(books.now) and books.found([*HELLO, 9]) == 8
    books.now = 1010.0
    assert books.cache.expire(books.now) == [1] and books.found([*HELLO, 9]) == 4


def test_what_has_expired_but_is_computed_anew_lives_on():
    books = Books(prefix_ttl_seconds=10.0)
    books.keep(HELLO)
    books.now = 50.0
    lease = books.hold(HELLO)
    assert lease.block_ids == [0, 1], "no second copy"
    assert books.found([*HELLO, 9]) == 8


def test_a_run_that_outlives_its_ends_is_no_copy_of_anything():
    """What two prompts share inside a block is in no block once both have gone."""
    books = Books(policy=BadBlockPolicy(1000, "newest"), prefix_ttl_seconds=10.0)
    books.keep([1, 2, 3, 3])
    books.now = 5.0
    books.keep([1, 2, 4, 4])
    books.cache.evict(1, books.now)  # The newer one.
    books.now = 10.0
    assert books.found([1, 2, 5, 5]) == books.why([1, 2, 5, 5]).num_cached_tokens == 0
    assert books.why([1, 2, 5, 5]).stop is Stop.EXPIRED


def test_expired_blocks_go_before_all_others():
    books = Books(prefix_ttl_seconds=10.0)
    books.keep([1] * 8)
    books.now = 9.0
    books.keep([2] * 4)
    books.now = 11.0
    assert sorted(books.cache.evict(1, books.now)) == [0, 1], "all that has expired, at once"
    assert (books.cache.num_expired, books.cache.num_evicted) == (2, 0)
    assert books.cache.evict(1, books.now) == [2]
    assert (books.cache.num_expired, books.cache.num_evicted) == (2, 1)


def test_at_most_so_many_prefixes_are_kept_and_the_oldest_go():
    books = Books(max_prefixes=2)
    for first in (10, 20, 30):
        books.keep([first] * 8)
    assert books.cache.forest.num_prefixes == 2
    assert books.found([10] * 9) == 0
    assert books.found([20] * 9) == books.found([30] * 9) == 8
    books.keep([30] * 16)
    assert books.cache.forest.num_prefixes == 2, "a longer one is no other one"
    assert books.found([20] * 9) == 8


def test_a_prefix_is_not_kept_when_all_that_may_be_kept_are_in_use():
    books = Books(max_prefixes=1)
    lease = books.hold([10] * 8)
    books.keep([20] * 8)
    assert books.found([20] * 9) == 0 and books.found([10] * 9) == 8
    books.end(lease)
    books.keep([20] * 8)
    assert books.found([20] * 9) == 8 and books.cache.forest.num_prefixes == 1


def test_what_is_pinned_stays_until_a_commit_says_otherwise():
    books = Books(prefix_ttl_seconds=10.0)
    books.keep(HELLO, retention=Retention(is_pinned=True))
    books.now = 1000.0
    assert not books.cache.evict(10, books.now) and books.found([*HELLO, 9]) == 8
    books.keep(HELLO)
    assert not books.cache.evict(10, books.now), "a commit that says nothing changes nothing"
    books.keep(HELLO, retention=Retention())
    books.now = 1009.0
    assert books.found([*HELLO, 9]) == 8
    books.now = 1010.0
    assert books.found([*HELLO, 9]) == 0 and len(books.cache.evict(10, books.now)) == 2
    books.check()


def test_a_time_to_live_of_its_own_goes_before_the_common_one():
    books = Books(prefix_ttl_seconds=10.0)
    books.keep([1] * 8, retention=Retention(ttl_seconds=100.0))
    books.keep([2] * 8, retention=Retention(ttl_seconds=1.0))
    books.keep([3] * 8)
    for now, want in ((0.9, [8, 8, 8]), (1.0, [8, 0, 8]), (10.0, [8, 0, 0]), (100.0, [0, 0, 0])):
        books.now = now
        assert [books.found([first] * 9) for first in (1, 2, 3)] == want


def test_what_follows_a_prefix_of_other_terms_has_the_common_ones():
    books = Books(prefix_ttl_seconds=10.0)
    books.keep(HELLO, retention=Retention(ttl_seconds=100.0))
    books.keep([*HELLO, 1, 1, 1, 1])
    books.now = 50.0
    assert books.found([*HELLO, 1, 1, 1, 1, 0]) == 8


def test_a_shorter_life_takes_nothing_from_what_others_continue():
    books = Books(prefix_ttl_seconds=100.0)
    books.keep([*HELLO, 1, 1, 1, 1])
    books.keep([*HELLO, 2, 2, 2, 2], retention=Retention(ttl_seconds=1.0))
    books.now = 50.0
    assert books.found([*HELLO, 1, 1, 1, 1, 0]) == 12
    assert books.found([*HELLO, 2, 2, 2, 2, 0]) == 8


# Policies.


@pytest.mark.parametrize("mode", BadBlockPolicy.MODES)
def test_whatever_a_policy_answers_what_can_go_goes_and_nothing_else(mode):
    books = Books(policy=BadBlockPolicy(1000, mode))
    with complaints() as told:
        lease = books.hold(HELLO)
        books.keep([*HELLO, 1, 1, 1, 1])
        books.keep([2] * 4)
        assert sorted(books.cache.evict(10, books.now)) == [2, 3]
        books.end(lease)
        books.check()
    assert bool(told) == (mode not in ("newest", "oldest")), "what is wrong with it is logged"


def test_a_policy_of_two_caches_cannot_make_one_lose_the_others_blocks():
    policy = BadBlockPolicy(1000, "oldest")
    books, others = Books(policy), Books(policy)
    books.keep([1] * 4)
    others.keep([2] * 4)
    with complaints() as told:
        assert others.cache.evict(1, 0.0) == [0]
    assert told and others.cache.num_blocks == 0 and books.cache.num_blocks == 1
    books.check()
    others.check()


def test_a_retentions_fields_are_checked():
    with pytest.raises(ValueError, match="ttl_seconds"):
        Retention(ttl_seconds=0)
    with pytest.raises(ValueError, match="is_pinned"):
        Retention(is_pinned=1)
    with pytest.raises(ValueError, match="priority"):
        Retention(priority=2)
    assert Retention() == Retention(priority=Priority.Normal, ttl_seconds=None, is_pinned=False)
