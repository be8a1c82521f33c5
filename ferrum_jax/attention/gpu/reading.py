"""Vectors of a pool as the GPU kernels read them: native numbers, or numbers packed in words.

A packed vector is read as the words that hold it (`codecs.packed`). Each word holds one number
of every *plane*: plane i is numbers i * W to (i + 1) * W of a vector of W words. Products are taken
plane by plane, so that no number has to move to another thread's registers. A native vector is one
plane.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as pltriton

from ferrum_jax.arithmetic import next_power_of_two
from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.codecs import PackedCodec, VectorLayout

_WORDS = {16: jnp.int16, 32: jnp.int32}
_SCALES = {16: jnp.float16, 32: jnp.float32}


class Places(NamedTuple):
    """Places of the n tokens of a tile in the pool.

    Attributes:
      block: i32[n]. Index of the block of one layer and head, of N * L * H.
      offset: i32[n]. Index of the token in its block.
      held: bool[n]. Whether there is such a token.
    """

    block: jax.Array
    offset: jax.Array
    held: jax.Array


class Vectors(NamedTuple):
    """Keys or values of the n tokens of a tile, zero where no token is held.

    Attributes:
      planes: Planes of the vectors, each [n, W], padded with zeros.
      scales: f32[n]. Factors on the vectors; None if native.
    """

    planes: tuple[jax.Array, ...]
    scales: jax.Array | None


@dataclasses.dataclass(frozen=True)
class NativeReader:
    """Reads keys, or values, of native blocks from views [N * L * H * B, D] of a pool's arrays.

    Attributes:
      index: Index of the array: 0 for keys, 1 for values.
      block_size: B.
      width: D.
    """

    index: int
    block_size: int
    width: int

    @property
    def num_planes(self) -> int:
        """Planes of a vector."""
        return 1

    def load(self, arrays: tuple[Any, Any], places: Places) -> Vectors:
        """Reads the vectors of a tile."""
        index = places.block * self.block_size + places.offset
        return Vectors(load_planes(arrays[self.index], index, places.held, self), None)


@dataclasses.dataclass(frozen=True)
class PackedReader:
    """Reads keys, or values, of compressed blocks from views [N * L * H, B * D].

    Attributes:
      layout: Layout of a block.
      vectors: The part of the layout to read, its keys or its values.
    """

    layout: PackedCodec
    vectors: VectorLayout

    @property
    def width(self) -> int:
        """W, words per vector."""
        return self.vectors.num_words

    @property
    def num_planes(self) -> int:
        """Numbers per word."""
        return self._word_bits // self.vectors.bits

    @property
    def _word_bits(self) -> int:
        return 8 * self.layout.word_bytes

    def load(self, arrays: tuple[Any, Any], places: Places) -> Vectors:
        """Reads the vectors of a tile, and their scales."""
        block, offset, held = (x[:, None] for x in places)
        start, count = self.vectors.start, self.layout.num_tokens * self.width
        word = iota(padded(self.width))[None, :]
        first = start + offset * self.width
        held = held & (word < self.width)
        words = self._load_words(arrays, range(start, start + count), (block, first, word), held)
        # A shift up and down again extends the sign.
        bits, top = self.vectors.bits, self._word_bits - self.vectors.bits
        planes = tuple((words << (top - bits * i)) >> top for i in range(self.num_planes))
        start += count
        region = range(start, start + self.layout.num_tokens)
        address = places.block, start + places.offset, 0
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
        """Reads words of blocks, counted over both arrays: those of values follow those of keys.

        Args:
          arrays: Views of the pool's keys and values.
          region: Range of all words of a block that may be read.
          address: A block, the first word of a vector, and the distance from that word. The first
            word decides which array is read.
          held: Whether to read a word; the others are zero.

        Returns:
          Integers of the words' size, in the shape to which `address` and `held` broadcast.
        """
        block, first, further = address
        size, parts = self.layout.half_words, []
        for i, array in enumerate(arrays):
            start, stop = i * size, (i + 1) * size
            if region.stop <= start or region.start >= stop:
                continue
            is_here = held
            if region.stop > stop:
                is_here &= first < stop
            if region.start < start:
                is_here &= first >= start
            index = first - start + further
            stored = pltriton.load(array.at[block, index], mask=is_here, other=0)
            parts.append(lax.bitcast_convert_type(stored, _WORDS[self._word_bits]))
        return parts[0] if len(parts) == 1 else parts[0] | parts[1]


Reader = NativeReader | PackedReader


def readers_of(call: AttentionCall) -> tuple[Reader, Reader]:
    """Returns readers of the keys and of the values of a call's rows, from `views_of` the pool."""
    pool = call.pool
    if call.is_native:
        k, v = (NativeReader(index, pool.block_size, pool.head_dim) for index in range(2))
        return k, v
    layout = call.packed_codec
    return PackedReader(layout, layout.k), PackedReader(layout, layout.v)


def views_of(call: AttentionCall) -> tuple[jax.Array, jax.Array]:
    """Returns the pool's arrays in the shape that the readers take; nothing is copied.

    The shape has two axes: Pallas computes an index in 32 bits, and in 64 bits only the offset that
    follows from the indices of all axes.
    """
    pool = call.pool
    width = pool.head_dim if call.is_native else pool.block_size * pool.head_dim
    k, v = pool.payload.split(pool.arrays)
    return k.reshape(-1, width), v.reshape(-1, width)


def load_planes(
    array: Any, index: jax.Array, mask: jax.Array, reader: Reader
) -> tuple[jax.Array, ...]:
    """Reads vectors of an array [.., D] in the planes of a reader, zero where masked or padded."""
    return tuple(
        pltriton.load(
            array.at[index[:, None], column[None, :]],
            mask=mask[:, None] & is_inside[None, :],
            other=0,
        )
        for column, is_inside in columns(reader)
    )


def columns(reader: Reader) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Yields the indices of each plane's numbers in a vector, and whether they are not padding."""
    word = iota(padded(reader.width))
    for plane in range(reader.num_planes):
        yield word + plane * reader.width, word < reader.width


def iota(size: int) -> jax.Array:
    """Returns i32[size]: 0, 1, and so on."""
    return jnp.arange(size, dtype=jnp.int32)


def padded(width: int) -> int:
    """Returns a width that Triton takes: a power of two, and at least 16 for matrix products."""
    return max(16, next_power_of_two(width))
