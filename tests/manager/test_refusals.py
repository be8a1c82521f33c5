"""Errors of a manager: each wrong call has its own, says what to do, and changes nothing."""

import dataclasses

import pytest

import ferrum_jax as fj
from ferrum_jax import errors
from tests.support.managers import make_manager, refused, start, tokens_of, whole, write_tokens


class FullManager:
    """A manager of 4 blocks, all in use, and of 3 rows.

    Request "a" holds 4 tokens in 2 blocks, "b" none; `allocate_blocks` has taken blocks 2 and 3.
    One row is free, or holds request "last".
    """

    def __init__(self, *, is_row_free: bool = True):
        self.manager = make_manager(max_blocks=4, geometry={"max_seqs": 3})
        self.predictions = []
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
        """Asks `can_allocate`, and allocates."""
        request = self.request(*args, **changes)
        self.predictions.append(self.manager.can_allocate(request))
        return self.manager.allocate(request)


GPU = fj.Device("gpu", 1)
REFUSALS = {
    errors.DuplicateRequestError: {
        "duplicate": ("'a'|live already|Deallocate it first", lambda c: c.allocate("a"))
    },
    errors.SequenceTooLongError: {
        "allocate": (
            "'c'|16 tokens|15|max_sequence_length",
            lambda c: c.allocate(max_sequence_length=16),
        ),
        "extend": ("'a'|holds 4|12 more|15|Stop it", lambda c: c.manager.extend(c.a, 12)),
        "one of several": ("'a'|holds 4", lambda c: c.manager.extend_all([c.b, c.a], 12)),
    },
    errors.RequestTooLargeError: {
        "pool": ("'c'|5 blocks|can have 4|max_blocks", lambda c: c.allocate("c", 13))
    },
    errors.OutOfBlocksError: {
        "allocate": (
            "'c'|1 blocks are needed|0 of 4|Deallocate|max_blocks",
            lambda c: c.allocate("c", 1),
        ),
        "extend": (
            "'a'|3 more tokens|1 blocks are needed|0 of 4|Deallocate",
            lambda c: c.manager.extend(c.a, 3),
        ),
        "extend_all": (
            "'a', 'b'|2 more tokens|1 blocks are needed|0 of 4",
            lambda c: c.manager.extend_all([c.a, c.b], 2),
        ),
        "allocate_blocks": (
            "allocate_blocks|1 blocks|0 of 4",
            lambda c: c.manager.allocate_blocks(1),
        ),
    },
    errors.OutOfRowsError: {
        "full rows": ("'c'|all 3|in use|Deallocate|max_seqs", lambda c: c.allocate("c", 0))
    },
    errors.GeometryMismatchError: {
        "layers": ("'c'|7 layers|has 2 layers|make a manager", lambda c: c.allocate(num_layers=7)),
        "heads": ("'c'|7 heads|1 heads|make a manager", lambda c: c.allocate(num_heads=7)),
        "head_dim": ("'c'|dim 7|dim 2|make a manager", lambda c: c.allocate(head_dim=7)),
        "dtype": ("bfloat16|float32|make a manager", lambda c: c.allocate(dtype="bfloat16")),
        "device": ("on gpu:1|on cpu:0|make a manager", lambda c: c.allocate(device=GPU)),
    },
    errors.UnknownRequestError: {
        "unknown": (
            "'z'|not live|others that are: 2|deallocated already",
            lambda c: c.manager.deallocate("z"),
        ),
        "twice": ("'dead'|not live", lambda c: c.manager.deallocate("dead")),
        "extend": ("'z'|not live", lambda c: c.manager.extend_all(["a", "z"], 1)),
    },
    errors.InvalidHandleError: {
        "dead": (
            "'dead'|after|deallocated|Allocate it again",
            lambda c: c.manager.extend(c.dead, 1),
        ),
        "foreign": ("'a'|another manager|Use the one", lambda c: c.manager.extend(c.foreign, 1)),
        "dead in run": ("'dead'", lambda c: c.manager.run(lambda *_: 1 / 0, [c.a, c.dead])),
        "foreign in run": (
            "'a'|another manager",
            lambda c: c.manager.run(lambda *_: 1 / 0, [c.foreign, None]),
        ),
        "dead, by deallocate": ("'dead'|after", lambda c: c.manager.deallocate(c.dead)),
        "named twice": ("twice|once", lambda c: c.manager.extend_all([c.b, "b"], 1)),
        "one of several": ("'dead'", lambda c: c.manager.extend_all([c.a, c.dead], 1)),
    },
    errors.LayerOutOfRangeError: {
        "last": ("Layer 2|'a'|2 layers|from 0", lambda c: c.a.key_cache(2)),
        "first": ("Layer -1|2 layers", lambda c: c.a.value_cache(-1)),
    },
    errors.ForeignBlockError: {
        "of a request": (
            "Block 0|belongs to a request|Deallocate",
            lambda c: c.manager.free_blocks([*c.taken, 0]),
        ),
        "past the pool": (
            "Block 4|not in the pool|4 blocks|allocate_blocks",
            lambda c: c.manager.free_blocks([*c.taken, 4]),
        ),
        "before the pool": ("Block -1|not in the pool", lambda c: c.manager.free_blocks([-1])),
    },
    errors.DoubleFreeError: {
        "named twice": ("twice|[2, 3, 2]|once", lambda c: c.manager.free_blocks([2, 3, 2]))
    },
}
"""Calls on a `FullManager` by the error that they raise, with parts of its message."""
CASES = [(error, kind) for error, calls in REFUSALS.items() for kind in calls]


@pytest.mark.parametrize(("error", "kind"), CASES, ids=lambda x: getattr(x, "__name__", x))
def test_a_refused_call_raises_its_own_error_and_changes_nothing(error, kind):
    told, call = REFUSALS[error][kind]
    case = FullManager(is_row_free=error is not errors.OutOfRowsError)
    before, num_failures = whole(case.manager), case.manager.stats().allocation_failures
    with pytest.raises(errors.FerrumError) as caught:
        call(case)
    assert caught.type is error
    for fragment in told.split("|"):
        assert fragment in str(caught.value)
    assert whole(case.manager) == before
    num_refused = case.manager.stats().allocation_failures - num_failures
    assert num_refused == len(case.predictions) and not any(case.predictions)
    case.manager.check()
    assert tokens_of(case.a) == [1, 2, 3, 4]


def test_free_blocks_refuses_a_block_that_is_free_already():
    case = FullManager()
    case.manager.free_blocks([2])
    before = whole(case.manager)
    with pytest.raises(errors.DoubleFreeError, match="Block 2.*free already.*once"):
        case.manager.free_blocks([3, 2])
    assert whole(case.manager) == before
    case.manager.check()


def test_allocate_and_extend_succeed_after_a_refusal_once_there_is_room():
    case = FullManager()
    assert refused(case.allocate, "c", 3) is errors.OutOfBlocksError
    case.manager.free_blocks(case.taken)
    assert case.allocate("c", 3).num_tokens() == 3
    assert refused(case.manager.extend, case.a, 6) is errors.OutOfBlocksError
    case.manager.deallocate("c")
    case.manager.extend(case.a, 6)
    stats = case.manager.stats()
    assert (stats.allocation_count, stats.allocation_failures) == (4, 1)


def test_extend_and_allocate_blocks_refuse_wrong_counts():
    case = FullManager()
    before = whole(case.manager)
    for count in (-1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="additional_tokens"):
            case.manager.extend(case.a, count)
        with pytest.raises(ValueError, match="num_blocks"):
            case.manager.allocate_blocks(count)
    assert whole(case.manager) == before


def test_every_error_is_a_ferrum_error_of_its_own():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert all(kind is fj.FerrumError or kind.__bases__[0] is fj.FerrumError for kind in kinds)
    elsewhere = {
        errors.CacheLostError,
        errors.CompressionError,
        errors.CorruptFileError,
        errors.OutOfHostMemoryError,
        errors.PrefixMismatchError,
        errors.RefusedError,
        errors.SwappedOutError,
        errors.UncountedTokensError,
        errors.WaitTimeoutError,
    }
    assert REFUSALS.keys() | elsewhere == set(kinds) - {fj.FerrumError}
