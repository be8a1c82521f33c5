"""Token ids, packed so that long sequences compare and hash at the speed of memory."""

from __future__ import annotations

import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

TOKEN_BYTES = 4
"""Bytes of a packed token id, an int32."""


class TokenIds(Sequence[int]):
    """An immutable sequence of token ids.

    Args:
      ids: Integers from 0 to 2**31 - 1: a list, an integer array, or another `TokenIds`. Each byte
        of bytes is one id.

    Raises:
      ValueError: An item is not such an integer.

    Example:
      >>> prompt = TokenIds([5, 6, 7])
      >>> len(prompt), prompt[-1], prompt[:2] + [8]
      (3, 7, TokenIds([5, 6, 8]))
    """

    __slots__ = ("packed",)

    packed: bytes
    """The ids as int32, in order, in the machine's byte order."""

    def __init__(self, ids: Iterable[int]):
        self.packed = ids.packed if isinstance(ids, TokenIds) else _pack(ids)

    @classmethod
    def from_packed(cls, packed: bytes) -> TokenIds:
        """Returns the ids of another object's `packed` bytes, without checking them again.

        Args:
          packed: `packed` of a `TokenIds`, or a part of it that begins and ends between ids.
        """
        ids = cls.__new__(cls)
        ids.packed = packed
        return ids

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return len(self.packed) // TOKEN_BYTES

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> TokenIds: ...

    def __getitem__(self, index: int | slice) -> int | TokenIds:
        """Returns one id, or a slice of the ids."""
        view = memoryview(self.packed).cast("i")
        if isinstance(index, slice):
            return TokenIds.from_packed(view[index].tobytes())
        return view[index]

    def __iter__(self) -> Iterator[int]:
        """Yields the ids as Python integers."""
        return iter(memoryview(self.packed).cast("i"))

    def __add__(self, more: Iterable[int]) -> TokenIds:
        """Returns these ids, followed by more."""
        return TokenIds.from_packed(self.packed + TokenIds(more).packed)

    def __eq__(self, other: object) -> bool:
        """Returns whether another `TokenIds` has the same ids."""
        return isinstance(other, TokenIds) and self.packed == other.packed

    def __hash__(self) -> int:
        return hash(self.packed)

    def __repr__(self) -> str:
        return f"TokenIds({list(self)})"


def _pack(ids: Iterable[int]) -> bytes:
    try:
        if isinstance(ids, (bytes, bytearray, memoryview, array.array)):
            # An array of their own type: `array.array("i", b"...")` would join four bytes.
            ids = np.asarray(memoryview(ids))
        if isinstance(ids, Sequence):
            packed = array.array("i", ids).tobytes()
        else:
            packed = _pack_array(np.asarray(ids if hasattr(ids, "__array__") else list(ids)))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"Token ids must be a sequence of integers below 2**31: {error}."
        ) from error
    if packed and np.frombuffer(packed, np.int32).min() < 0:
        raise ValueError("Token ids must not be negative. Leave padding out.")
    return packed


def _pack_array(given: np.ndarray) -> bytes:
    if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
        raise ValueError(f"a {given.dtype} array of shape {given.shape}")
    kept = given.astype(np.int32)
    if not np.array_equal(kept, given):
        raise OverflowError("one is beyond int32")
    return kept.tobytes()
