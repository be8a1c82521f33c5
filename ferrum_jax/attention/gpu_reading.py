"""Vectors of a pool as a GPU's kernels read them: as they are, or packed in words.

A packed vector is read as the words that hold it (`ferrum_jax.formats`). Each word holds one number
of every *plane*: plane i is numbers i * W to (i + 1) * W of a vector of W words. Products are taken
plane by plane, so that no number has to move to another thread's registers. A vector that is not
packed is one plane.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from ferrum_jax.formats import BlockLayout, VectorLayout
from ferrum_jax.state import BlockPool
from ferrum_jax.types import TokenFormat

_WORDS = {16: jnp.int16, 32: jnp.int32}
_SCALES = {16: jnp.float16, 32: jnp.float32}


class Places(NamedTuple):
    """Where the n tokens of a tile are; one block of one layer and head has two halves.

    Attributes:
      half: i32[n]. Index of the half, below N * L * H, in the keys or in the values.
      offset: i32[n]. Which of its half's tokens each is.
      held: bool[n]. Which are there at all.
    """

    half: jax.Array
    offset: jax.Array
    held: jax.Array


class Vectors(NamedTuple):
    """Keys or values of the n tokens of a tile, all zero where no token is held.

    Attributes:
      planes: Each [n, W], padded with zeros.
      scales: f32[n]. Factors on the vectors, or None.
    """

    planes: tuple[jax.Array, ...]
    scales: jax.Array | None


@dataclasses.dataclass(frozen=True)
class NativeReader:
    """Reads keys, or values, of native blocks from views [N * L * H * B, D] of a pool's arrays.

    Attributes:
      half: Which of a block's two halves they are in.
      block_size: B.
      width: D.
    """

    half: int
    block_size: int
    width: int

    @property
    def num_planes(self) -> int:
        """Planes of a vector."""
        return 1

    def load(self, arrays: tuple[Any, Any], places: Places) -> Vectors:
        """Reads the vectors of a tile."""
        index = places.half * self.block_size + places.offset
        return Vectors(load_planes(arrays[self.half], index, places.held, self), None)


@dataclasses.dataclass(frozen=True)
class PackedReader:
    """Reads keys, or values, of compressed blocks from views [N * L * H, B * D].

    Attributes:
      layout: What is where in a block.
      vectors: The part of it that is read.
    """

    layout: BlockLayout
    vectors: VectorLayout

    @property
    def width(self) -> int:
        """W, words a vector."""
        return self.vectors.num_words

    @property
    def num_planes(self) -> int:
        """Numbers a word."""
        return self._word_bits // self.vectors.bits

    @property
    def _word_bits(self) -> int:
        return 8 * self.layout.word_bytes

    def load(self, arrays: tuple[Any, Any], places: Places) -> Vectors:
        """Reads the vectors of a tile, and their scales."""
        half, offset, held = (x[:, None] for x in places)
        start, count = self.vectors.start, self.layout.num_tokens * self.width
        word = iota(padded(self.width))[None, :]
        first = start + offset * self.width
        held = held & (word < self.width)
        words = self._load_words(arrays, range(start, start + count), (half, first, word), held)
        # Shifting up and down again widens the sign.
        bits, top = self.vectors.bits, self._word_bits - self.vectors.bits
        planes = tuple((words << (top - bits * i)) >> top for i in range(self.num_planes))
        start += count
        region = range(start, start + self.layout.num_tokens)
        address = places.half, start + places.offset, 0
        scales = self._load_words(arrays, region, address, places.held)
        scales = lax.bitcast_convert_type(scales, _SCALES[self._word_bits])
        return Vectors(planes, scales.astype(jnp.float32))

    def _load_words(
        self,
        arrays: tuple[Any, Any],
        region: range,
        address: tuple[jax.Array, jax.Array, jax.Array | int],
        held: jax.Array,
    ) -> jax.Array:
        """Reads words from the halves of keys and of values, which follow one another.

        Args:
          arrays: Both arrays.
          region: All words of a block that are ever asked for.
          address: A block, a word of it, and how much further. The half is that of the word.
          held: Which words are wanted; the others are zero.

        Returns:
          Integers of the words' size, in the shape to which all these are broadcast.
        """
        block, first, further = address
        size, parts = self.layout.half_words, []
        for half, array in enumerate(arrays):
            half_words = range(half * size, (half + 1) * size)
            if region.stop <= half_words.start or region.start >= half_words.stop:
                continue
            is_here = held
            if region.stop > half_words.stop:
                is_here &= first < half_words.stop
            if region.start < half_words.start:
                is_here &= first >= half_words.start
            index = first - half_words.start + further
            stored = pltriton.load(array.at[block, index], mask=is_here, other=0)
            parts.append(lax.bitcast_convert_type(stored, _WORDS[self._word_bits]))
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]


Reader = NativeReader | PackedReader


def readers_of(pool: BlockPool, token_format: TokenFormat) -> tuple[Reader, Reader]:
    """Returns how keys and values of a format are read from `views_of` the pool."""
    if token_format == TokenFormat.Native:
        k, v = (NativeReader(half, pool.block_size, pool.head_dim) for half in range(2))
        return k, v
    layout = pool.layout(token_format)
    return PackedReader(layout, layout.k), PackedReader(layout, layout.v)


def views_of(pool: BlockPool, token_format: TokenFormat) -> tuple[jax.Array, jax.Array]:
    """Returns a pool's arrays in the shape that its readers take; nothing is copied.

    Both shapes have two axes, since Pallas computes an index in 32 bits and only the offset that
    follows from all of them in 64.
    """
    is_native = token_format == TokenFormat.Native
    width = pool.head_dim if is_native else pool.block_size * pool.head_dim
    return pool.k.reshape(-1, width), pool.v.reshape(-1, width)


def load_planes(
    array: Any, index: jax.Array, mask: jax.Array, reader: Reader
) -> tuple[jax.Array, ...]:
    """Reads rows of an array [.., D] in the planes of a reader, zero beyond and where masked."""
    return tuple(
        pltriton.load(
            array.at[index[:, None], column[None, :]],
            mask=mask[:, None] & is_inside[None, :],
            other=0,
        )
        for column, is_inside in columns(reader)
    )


def columns(reader: Reader) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields, for each plane, which of a vector's numbers it has and which of these are real."""
    word = iota(padded(reader.width))
    for plane in range(reader.num_planes):
        yield word + plane * reader.width, word < reader.width


def iota(size: int) -> jax.Array:
    """Returns i32[size]: 0, 1, and so on."""
    return jnp.arange(size, dtype=jnp.int32)


def padded(width: int) -> int:
    """Triton's tiles are powers of two, and its matrix products take at least 16."""
    return max(16, pl.next_power_of_2(width))
