"""What a manager refuses: each wrong use by its own name, told in full, and with no effect."""

import dataclasses

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

import ferrum_jax as fj
from ferrum_jax import errors
from ferrum_jax.errors import (
    DoubleFreeError,
    DuplicateRequestError,
    ForeignBlockError,
    GeometryMismatchError,
    InvalidHandleError,
    LayerOutOfRangeError,
    OutOfBlocksError,
    OutOfRowsError,
    RequestTooLargeError,
    SequenceTooLongError,
    UnknownRequestError,
)
from tests.support.managers import make_manager, refused, start, tokens_of, whole, write_tokens


class Crowd:
    """A manager of 4 blocks, all in use, and of 3 rows.

    Request "a" holds 4 tokens in 2 blocks, "b" none; blocks 2 and 3 are taken by themselves.
    One row is free, or holds request "last".
    """

    def __init__(self, *, is_row_free: bool = True):
        self.manager = make_manager(max_blocks=4, geometry={"max_seqs": 3})
        self.a, self.b = start(self.manager, "a", 4), start(self.manager, "b")
        write_tokens(self.manager, self.a, [1, 2, 3, 4])
        self.taken = self.manager.allocate_blocks(2)
        self.dead = start(self.manager, "dead")
        self.manager.deallocate("dead")
        self.last = None if is_row_free else start(self.manager, "last")
        self.foreign = start(make_manager(max_blocks=4, geometry={"max_seqs": 3}), "a", 1)

    def request(self, request_id="c", initial_tokens=1, **changes) -> fj.AllocationRequest:
        request = self.manager.new_request(request_id, min(initial_tokens, 15))
        return dataclasses.replace(request, initial_tokens=initial_tokens, **changes)

    def allocate(self, *args, **changes):
        return self.manager.allocate(self.request(*args, **changes))


GPU = fj.Device("gpu", 1)

# Each: how it is called, what it raises, and what the message says: asked, there, to do.
REFUSED_ALLOCATIONS = {
    "a duplicate": (
        lambda crowd: crowd.allocate("a"),
        DuplicateRequestError,
        ["'a'", "live already", "Deallocate it first"],
    ),
    "a row too long": (
        lambda crowd: crowd.allocate(max_sequence_length=16),
        SequenceTooLongError,
        ["'c'", "16 tokens", "15", "max_sequence_length"],
    ),
    "what never fits": (
        lambda crowd: crowd.allocate("c", 13),
        RequestTooLargeError,
        ["'c'", "5 blocks", "can have 4", "max_blocks"],
    ),
    "what does not fit now": (
        lambda crowd: crowd.allocate("c", 1),
        OutOfBlocksError,
        ["'c'", "1 blocks are needed", "0 of 4", "Deallocate", "max_blocks"],
    ),
    "other layers": (
        lambda crowd: crowd.allocate(num_layers=7),
        GeometryMismatchError,
        ["'c'", "7 layers", "the pool has 2 layers", "make a manager"],
    ),
    "other heads": (
        lambda crowd: crowd.allocate(num_heads=7),
        GeometryMismatchError,
        ["'c'", "7 heads", "1 heads", "make a manager"],
    ),
    "another head_dim": (
        lambda crowd: crowd.allocate(head_dim=7),
        GeometryMismatchError,
        ["'c'", "head_dim 7", "head_dim 2", "make a manager"],
    ),
    "another dtype": (
        lambda crowd: crowd.allocate(dtype="bfloat16"),
        GeometryMismatchError,
        ["'c'", "bfloat16", "float32", "make a manager"],
    ),
    "another device": (
        lambda crowd: crowd.allocate(device=GPU),
        GeometryMismatchError,
        ["'c'", "on gpu:1", "on cpu:0", "make a manager"],
    ),
    "one row too many": (
        lambda crowd: crowd.allocate("c", 0),
        OutOfRowsError,
        ["'c'", "all 3", "in use", "Deallocate", "max_seqs"],
    ),
}

OTHER_REFUSALS = {
    "an unknown request": (
        lambda crowd: crowd.manager.deallocate("z"),
        UnknownRequestError,
        ["'z'", "not live", "others that are: 2", "deallocated already"],
    ),
    "a request deallocated twice": (
        lambda crowd: crowd.manager.deallocate("dead"),
        UnknownRequestError,
        ["'dead'", "not live"],
    ),
    "a handle for a request": (
        lambda crowd: crowd.manager.deallocate(crowd.manager.get_handle("a")),
        UnknownRequestError,
        ["not live", "Pass its request_id"],
    ),
    "a dead handle": (
        lambda crowd: crowd.manager.extend(crowd.dead, 1),
        InvalidHandleError,
        ["'dead'", "after", "deallocated", "Allocate it again"],
    ),
    "another manager's handle": (
        lambda crowd: crowd.manager.extend(crowd.foreign, 1),
        InvalidHandleError,
        ["'a'", "another manager", "Use the one"],
    ),
    "no handle at all": (
        lambda crowd: crowd.manager.extend("a", 1),
        InvalidHandleError,
        ["'a'", "not a handle", "what allocate returned"],
    ),
    "another manager's handle in a step": (
        lambda crowd: crowd.manager.run(lambda state, rows: (state, None), [crowd.foreign]),
        InvalidHandleError,
        ["'a'", "another manager"],
    ),
    "a request named twice": (
        lambda crowd: crowd.manager.extend_all([crowd.b, crowd.b.clone_handle()], 1),
        InvalidHandleError,
        ["twice", "once"],
    ),
    "a sequence past its limit": (
        lambda crowd: crowd.manager.extend(crowd.a, 12),
        SequenceTooLongError,
        ["'a'", "holds 4", "12 more", "15", "Stop it"],
    ),
    "an extension for want of blocks": (
        lambda crowd: crowd.manager.extend(crowd.a, 3),
        OutOfBlocksError,
        ["'a'", "3 more tokens", "1 blocks are needed", "0 of 4", "Deallocate"],
    ),
    "several extensions of which one is too long": (
        lambda crowd: crowd.manager.extend_all([crowd.b, crowd.a], 12),
        SequenceTooLongError,
        ["'a'", "holds 4"],
    ),
    "several extensions of which one has a dead handle": (
        lambda crowd: crowd.manager.extend_all([crowd.a, crowd.dead], 1),
        InvalidHandleError,
        ["'dead'"],
    ),
    "several extensions for want of blocks": (
        lambda crowd: crowd.manager.extend_all([crowd.a, crowd.b], 2),
        OutOfBlocksError,
        ["'a', 'b'", "2 more tokens", "1 blocks are needed", "0 of 4"],
    ),
    "a layer past the last": (
        lambda crowd: crowd.a.key_cache(2),
        LayerOutOfRangeError,
        ["Layer 2", "'a'", "2 layers", "from 0"],
    ),
    "a layer before the first": (
        lambda crowd: crowd.a.value_cache(-1),
        LayerOutOfRangeError,
        ["Layer -1", "2 layers"],
    ),
    "blocks for want of blocks": (
        lambda crowd: crowd.manager.allocate_blocks(1),
        OutOfBlocksError,
        ["allocate_blocks", "1 blocks", "0 of 4"],
    ),
    "a block of a request": (
        lambda crowd: crowd.manager.free_blocks([*crowd.taken, 0]),
        ForeignBlockError,
        ["Block 0", "belongs to a request", "Deallocate"],
    ),
    "a block outside the pool": (
        lambda crowd: crowd.manager.free_blocks([*crowd.taken, 4]),
        ForeignBlockError,
        ["Block 4", "not in the pool", "4 blocks", "allocate_blocks"],
    ),
    "a block before the pool": (
        lambda crowd: crowd.manager.free_blocks([-1]),
        ForeignBlockError,
        ["Block -1", "not in the pool"],
    ),
    "a block named twice": (
        lambda crowd: crowd.manager.free_blocks([2, 3, 2]),
        DoubleFreeError,
        ["twice", "[2, 3, 2]", "once"],
    ),
}


def crowd_for(kind: str) -> Crowd:
    return Crowd(is_row_free=kind != "one row too many")


def check_refusal(crowd, call, error, fragments, num_failures):
    before, failures = whole(crowd.manager), crowd.manager.stats().allocation_failures
    with pytest.raises(errors.FerrumError) as caught:
        call(crowd)
    assert caught.type is error, "each wrong use has its own error"
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert whole(crowd.manager) == before
    assert crowd.manager.stats().allocation_failures == failures + num_failures
    crowd.manager.check()
    assert tokens_of(crowd.a) == [1, 2, 3, 4]


@pytest.mark.parametrize("kind", REFUSED_ALLOCATIONS)
def test_a_refused_allocation_changes_nothing_but_the_count_of_failures(kind):
    check_refusal(crowd_for(kind), *REFUSED_ALLOCATIONS[kind], num_failures=1)


@pytest.mark.parametrize("kind", OTHER_REFUSALS)
def test_any_other_refusal_changes_nothing_at_all(kind):
    check_refusal(Crowd(), *OTHER_REFUSALS[kind], num_failures=0)


def test_a_block_freed_twice_is_refused():
    crowd = Crowd()
    crowd.manager.free_blocks([2])
    told = ["Block 2", "free already", "once"]
    check_refusal(crowd, lambda crowd: crowd.manager.free_blocks([3, 2]), DoubleFreeError, told, 0)


def test_after_a_refusal_the_same_call_succeeds_once_there_is_room():
    crowd = Crowd()
    assert refused(crowd.allocate, "c", 3) is OutOfBlocksError
    crowd.manager.free_blocks(crowd.taken)
    assert crowd.allocate("c", 3).num_tokens() == 3
    assert refused(crowd.manager.extend, crowd.a, 6) is OutOfBlocksError
    crowd.manager.deallocate("c")
    crowd.manager.extend(crowd.a, 6)
    stats = crowd.manager.stats()
    assert (stats.allocation_count, stats.allocation_failures) == (4, 1)


def test_wrong_counts_are_wrong_values():
    crowd = Crowd()
    before = whole(crowd.manager)
    for count in (-1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="additional_tokens"):
            crowd.manager.extend(crowd.a, count)
        with pytest.raises(ValueError, match="num_blocks"):
            crowd.manager.allocate_blocks(count)
    assert whole(crowd.manager) == before


@pytest.mark.parametrize("kind", REFUSED_ALLOCATIONS)
def test_what_is_asked_before_is_refused_as_it_was_foretold(kind):
    call, error, _ = REFUSED_ALLOCATIONS[kind]
    crowd = crowd_for(kind)
    asked, allocate = [], crowd.manager.allocate

    def ask_first(request):
        asked.append(crowd.manager.can_allocate(request))
        return allocate(request)

    crowd.manager.allocate = ask_first
    assert refused(call, crowd) is error
    assert asked[-1] is False


SITUATIONS = st.fixed_dictionaries(
    {
        "initial_blocks": st.sampled_from([1, 4]),
        "lengths": st.lists(st.integers(0, 9), max_size=4),
        "num_taken": st.integers(0, 4),
        "gone": st.sets(st.integers(0, 3)),
    }
)
REQUESTS = st.fixed_dictionaries(
    {"request_id": st.integers(0, 5), "initial_tokens": st.integers(0, 15)},
    optional={
        "max_sequence_length": st.sampled_from([15, 16, 1000]),
        "num_layers": st.sampled_from([2, 2, 3]),
        "dtype": st.sampled_from(["float32", "float32", "float16"]),
        "device": st.sampled_from([fj.Device("cpu"), fj.Device("cpu"), GPU]),
    },
)


@settings(max_examples=300)
@given(situation=SITUATIONS, changes=REQUESTS)
def test_can_allocate_agrees_with_what_allocate_then_does(situation, changes):
    initial_blocks = situation["initial_blocks"]
    manager = make_manager(max_blocks=4, initial_blocks=initial_blocks, geometry={"max_seqs": 3})
    handles = [
        manager.allocate(request)
        for request in map(manager.new_request, range(4), situation["lengths"])
        if manager.can_allocate(request)
    ]
    refused(manager.allocate_blocks, situation["num_taken"])
    for handle in handles:
        if handle.request_id in situation["gone"]:
            manager.deallocate(handle.request_id)

    request = dataclasses.replace(manager.new_request(0), **changes)
    before, books = whole(manager), manager.stats()
    foretold = manager.can_allocate(request)
    assert whole(manager) == before
    error = refused(manager.allocate, request)
    event(f"{error.__name__ if error else 'allocated'}")
    assert foretold == (error is None)
    if error is None:
        assert manager.get_handle(request.request_id).num_tokens() == request.initial_tokens
        assert manager.stats().allocation_count == books.allocation_count + 1
    else:
        assert whole(manager) == before
        assert manager.stats().allocation_failures == books.allocation_failures + 1
    manager.check()


def test_every_error_is_a_ferrum_error_of_its_own():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(kind is fj.FerrumError or kind.__bases__[0] is fj.FerrumError for kind in kinds)
    tested = {error for _, error, _ in (*REFUSED_ALLOCATIONS.values(), *OTHER_REFUSALS.values())}
    elsewhere = {
        errors.CacheLostError,  # test_manager_run.py
        errors.CompressionError,  # test_manager_compression_sharing.py
        errors.CorruptFileError,  # test_tiers_files.py
        errors.OutOfHostMemoryError,  # test_tiers.py
        errors.PrefixMismatchError,  # test_prefix_cache.py
        errors.RefusedError,  # test_integrations_refusals.py
        errors.SwappedOutError,  # test_prefix_cache.py
        errors.UncountedTokensError,  # test_manager_run.py
        errors.WaitTimeoutError,  # test_async_manager.py
    }
    assert tested | elsewhere == set(kinds) - {fj.FerrumError}
