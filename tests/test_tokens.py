"""Token ids: which values are valid, and how sequences compare."""

import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ferrum_jax.tokens import TOKEN_BYTES, TokenIds

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=8)


@given(ids=IDS, more=IDS, begin=st.integers(-9, 9), end=st.integers(-9, 9))
def test_token_ids_behave_like_a_list(ids, more, begin, end):
    tokens = TokenIds(ids)
    assert list(tokens) == ids and len(tokens) == len(ids)
    assert list(tokens[begin:end]) == ids[begin:end] and list(tokens[::-2]) == ids[::-2]
    assert list(tokens + more) == list(tokens + TokenIds(more)) == ids + more
    assert [tokens[i] for i in range(-len(ids), len(ids))] == 2 * ids
    assert (tokens == TokenIds(more)) == (ids == more)
    assert repr(tokens) == f"TokenIds({ids})"
    with pytest.raises(IndexError):
        tokens[len(ids)]


@pytest.mark.parametrize(
    "ids",
    [
        [5, 0, 7],
        (5, 0, 7),
        range(5, 8),
        np.asarray([5, 0, 7], np.int64),
        np.asarray([5, 0, 7], np.uint8),
        np.asarray([[5, 0, 7], [1, 1, 1]], np.int32)[0],
        np.asarray([5, 1, 0, 1, 7], np.int32)[::2],
        iter([5, 0, 7]),
        TokenIds([5, 0, 7]),
    ],
    ids=lambda ids: type(ids).__name__,
)
def test_token_ids_take_any_sequence_of_integers(ids):
    want = [5, 6, 7] if isinstance(ids, range) else [5, 0, 7]
    tokens = TokenIds(ids)
    assert list(tokens) == want and all(type(token) is int for token in tokens)
    assert tokens == TokenIds(want) and hash(tokens) == hash(TokenIds(want))
    assert tokens.packed == np.asarray(want, np.int32).tobytes()


@settings(max_examples=100)
@given(text=st.binary(max_size=9))
def test_token_ids_take_each_byte_as_one_token(text):
    for ids in (text, bytearray(text), memoryview(text), array.array("B", text)):
        assert list(TokenIds(ids)) == list(TokenIds([]) + ids) == list(text)
    wide = array.array("q", list(text))
    assert list(TokenIds(wide)) == list(TokenIds(memoryview(wide)[::-1]))[::-1] == list(text)


def test_token_ids_may_be_empty():
    empty = np.zeros(0, np.int32)
    assert list(TokenIds([])) == list(TokenIds(())) == list(TokenIds(empty)) == []
    assert not TokenIds([]) and TokenIds([0])


@pytest.mark.parametrize(
    "ids",
    [
        [-1],
        [2**31],
        [2**63],
        [1.0],
        ["1"],
        [None],
        "12",
        5,
        None,
        [[1, 2]],
        np.asarray([1.0, 2.0]),
        np.asarray([[1, 2]]),
        np.asarray(3),
        np.asarray([2**31], np.int64),
        np.asarray([2**32 + 5], np.uint64),
        np.asarray([-1], np.int32),
        np.asarray([True]),
        np.asarray([float("nan")]),
        array.array("d", [1.0]),
        array.array("u", "1"),
        array.array("q", [-1]),
        array.array("Q", [2**31]),
    ],
    ids=repr,
)
def test_token_ids_refuse_what_is_not_a_token_id(ids):
    with pytest.raises(ValueError, match="Token ids must"):
        TokenIds(ids)


def test_token_ids_equal_only_token_ids():
    assert TokenIds([1]) != [1]
    assert TokenIds([1]) != TokenIds([1, 0])


def test_token_ids_from_packed_bytes_equal_the_originals():
    tokens = TokenIds([1, 2, 3])
    assert TokenIds.from_packed(tokens.packed) == tokens
    assert TokenIds.from_packed(tokens.packed[TOKEN_BYTES:]) == tokens[1:]
    assert TokenIds(tokens).packed is tokens.packed, "a copy costs nothing"
