"""Codec of blocks that store tokens in fewer bits than the pool's dtype.

One layer and head of a block has two halves, one in the pool's keys and one in its values. Each
half is B * D *words*: unsigned integers as wide as the pool's dtype. A packed block is the same
words, with more tokens in them: first the keys, D numbers per token packed into words, then their
scales, one word per token; then the values and their scales. The values begin with the second half,
unless the keys extend into it. So a block has the same number of bytes in every format, scales
included, and code that copies, moves or stores blocks does not depend on the format.

Each vector x of a token and head is rounded by itself: the scale is max|x| / (2**(bits - 1) - 1),
and the integers are x / scale. Before it is rounded to 4 bits, a vector is rotated
(`codecs.rotation`).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ferrum_jax.codecs.rotation import max_number, rotate
from ferrum_jax.payload import KeysAndValues, KeyValue

_WORDS = {2: jnp.uint16, 4: jnp.uint32}
_INTEGERS = {2: jnp.int16, 4: jnp.int32}
_SCALES = {2: jnp.float16, 4: jnp.float32}
_ROTATED_BITS = 4


class PackedVectors(NamedTuple):
    """Rounded vectors of D numbers, as a block stores them.

    Attributes:
      numbers: Words [..., W], the packed integers.
      scales: Words [..., 1], the bits of the scales.
    """

    numbers: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class VectorLayout:
    """Place of the keys, or of the values, in a block: T vectors of D numbers.

    Attributes:
      start: Index of the first word, counted over both halves.
      num_words: Words per vector, W.
      bits: Bits per number.
      max_scale: Largest scale. Any number that it yields is finite in the pool's dtype.
    """

    start: int
    num_words: int
    bits: int
    max_scale: float

    @property
    def is_rotated(self) -> bool:
        """Whether vectors are rotated before they are rounded."""
        return self.bits == _ROTATED_BITS


@dataclasses.dataclass(frozen=True)
class PackedCodec:
    """Codec of one layer and head of a packed block; see `Codec`.

    Attributes:
      num_tokens: T, tokens per block.
      half_words: Words per half; a block has two halves.
      word_bytes: Bytes per word, 2 or 4.
      k: Place of the keys; their scales follow.
      v: Place of the values; their scales follow.

    Example:
      >>> codec = packed_codec(KeyValue(1, 64, "bfloat16"), 16, name="Int8", bits=(8, 8))
      >>> codec.num_tokens, codec.k.num_words, codec.v.start
      (31, 32, 1024)
    """

    num_tokens: int
    half_words: int
    word_bytes: int
    k: VectorLayout
    v: VectorLayout

    @property
    def rotates_keys(self) -> bool:
        """Whether decoded keys are rotated."""
        return self.k.is_rotated

    @property
    def rotates_values(self) -> bool:
        """Whether decoded values are rotated."""
        return self.v.is_rotated

    def decode(self, k_half: jax.Array, v_half: jax.Array) -> KeysAndValues:
        """Decodes whole blocks.

        Args:
          k_half: [..., B, D]. Blocks of the pool's keys, as stored.
          v_half: [..., B, D]. The same blocks of the pool's values.

        Returns:
          Keys and values, each f32[..., T, D], still rotated.
        """
        halves = _as_words(k_half), _as_words(v_half)
        k, v = (self._unpack(self._extract(halves, x), x) for x in (self.k, self.v))
        return KeysAndValues(k, v)

    def encode(self, k: jax.Array, v: jax.Array, stored: DTypeLike) -> KeysAndValues:
        """Encodes whole blocks.

        Args:
          k: f32[..., T, D]. Keys.
          v: f32[..., T, D]. Values.
          stored: Dtype of the pool's arrays.

        Returns:
          The two halves, each [..., B, D] of that dtype.
        """
        words = self._arrange(*self.pack(k, v))
        return KeysAndValues(*(_as_stored(half, k.shape[-1], stored) for half in words))

    def replace(
        self,
        k_half: jax.Array,
        v_half: jax.Array,
        packed: tuple[PackedVectors, PackedVectors],
        is_new: jax.Array,
    ) -> KeysAndValues:
        """Replaces some tokens of blocks; no bit of another token changes.

        Args:
          k_half: [..., B, D]. Blocks of the pool's keys, as stored.
          v_half: [..., B, D]. The same blocks of the pool's values.
          packed: All T tokens, from `pack`.
          is_new: bool[..., T]. Tokens to replace.

        Returns:
          The two halves, each [..., B, D] as stored.
        """
        are_new = jax.tree.map(lambda x: jnp.broadcast_to(is_new[..., None], x.shape), packed)
        new, is_changed = self._arrange(*packed), self._arrange(*are_new)
        return KeysAndValues(
            *(
                _as_stored(jnp.where(changed, words, _as_words(half)), half.shape[-1], half.dtype)
                for changed, words, half in zip(is_changed, new, (k_half, v_half), strict=True)
            )
        )

    def pack(self, k: jax.Array, v: jax.Array) -> tuple[PackedVectors, PackedVectors]:
        """Rounds tokens and packs them into words.

        Args:
          k: f32[..., D]. Keys.
          v: f32[..., D]. Values.

        Returns:
          Words of the keys and of the values, with those of their scales.
        """
        return self._pack(k, self.k), self._pack(v, self.v)

    def _pack(self, x: jax.Array, layout: VectorLayout) -> PackedVectors:
        """Rounds vectors and packs them into words.

        A vector with a number that is not finite (after rotation, if any) is decoded as NaN
        throughout. A scale is as wide as a word, float16 or float32. So there is a largest number,
        and larger ones are decoded as that, with their sign: 65504 * 127 in a bfloat16 pool, the
        largest float16 in a float16 pool; in 4 bits, after rotation, 65504 * 7 in both.

        Args:
          x: f32[..., D]. Vectors, not rotated.
          layout: `self.k` or `self.v`.

        Returns:
          Words of the vectors and of their scales.
        """
        bits, word_bits = layout.bits, 8 * self.word_bytes
        if layout.is_rotated:
            x = rotate(x)
        largest = 2 ** (bits - 1) - 1
        dtype = jnp.finfo(_SCALES[self.word_bytes])
        peaks = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        # Finite numbers stay finite, though smaller: a row with one large number is still of use.
        exact = jnp.clip(peaks / largest, float(dtype.smallest_subnormal), layout.max_scale)
        # Not by `peaks`: XLA on CPU loses a NaN in the maximum of some shapes.
        is_finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
        exact = jnp.where(is_finite, exact, jnp.nan)
        scales = exact.astype(dtype.dtype)
        # Round up, so that the largest number is not cut off: the smallest scales have few bits.
        # The result is not above `max_scale`, which is representable.
        scales = jnp.where(scales.astype(jnp.float32) < exact, _next(scales), scales)
        numbers = jnp.clip(jnp.rint(x / scales.astype(jnp.float32)), -largest, largest)
        numbers = numbers.astype(_INTEGERS[self.word_bytes])
        # Word w holds numbers w, w + W, w + 2 W, and so on, the first in its lowest bits. So
        # packing shifts whole vectors of words.
        numbers = lax.bitcast_convert_type(numbers, _WORDS[self.word_bytes])
        planes = jnp.split(numbers & (2**bits - 1), word_bits // bits, axis=-1)
        packed = functools.reduce(
            jnp.bitwise_or, (plane << (bits * i) for i, plane in enumerate(planes))
        )
        return PackedVectors(packed, lax.bitcast_convert_type(scales, _WORDS[self.word_bytes]))

    def _unpack(self, vectors: PackedVectors, layout: VectorLayout) -> jax.Array:
        """Returns vectors as numbers, f32[..., D]: the inverse of `pack`, but still rotated."""
        bits, word_bits = layout.bits, 8 * self.word_bytes
        words = lax.bitcast_convert_type(vectors.numbers, _INTEGERS[self.word_bytes])
        top = word_bits - bits
        planes = [(words << (top - bits * i)) >> top for i in range(word_bits // bits)]
        numbers = jnp.concatenate(planes, axis=-1).astype(jnp.float32)
        scales = lax.bitcast_convert_type(vectors.scales, _SCALES[self.word_bytes])
        return numbers * scales.astype(jnp.float32)

    def _arrange(self, k: PackedVectors, v: PackedVectors) -> KeysAndValues:
        """Places the vectors of T tokens in two halves, each [..., B * D]."""
        regions = []
        for vectors, size in ((k, self.v.start), (v, 2 * self.half_words - self.v.start)):
            region = jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in vectors], axis=-1)
            spare = size - region.shape[-1]
            regions.append(jnp.pad(region, [(0, 0)] * (region.ndim - 1) + [(0, spare)]))
        return KeysAndValues(*jnp.split(jnp.concatenate(regions, axis=-1), 2, axis=-1))

    def _extract(self, halves: tuple[jax.Array, ...], layout: VectorLayout) -> PackedVectors:
        """Returns the vectors of T tokens from two halves, each [..., B * D]."""
        count = self.num_tokens * layout.num_words
        numbers = _region(halves, layout.start, count)
        scales = _region(halves, layout.start + count, self.num_tokens)
        shape = *numbers.shape[:-1], self.num_tokens, layout.num_words
        return PackedVectors(numbers.reshape(shape), scales[..., None])


def packed_codec(
    payload: KeyValue, block_size: int, *, name: str, bits: tuple[int, int]
) -> PackedCodec:
    """Returns the codec of blocks that hold keys and values in some bits.

    Args:
      payload: Heads and dtype of the pool.
      block_size: B, tokens per native block.
      name: Name of the token format, for errors.
      bits: Bits per number of a key, and of a value.

    Raises:
      ValueError: A number of the pool does not have 2 or 4 bytes, or a vector does not fill words.
    """
    head_dim, dtype = payload.head_dim, np.dtype(payload.dtype)
    word_bytes = dtype.itemsize
    if word_bytes not in _WORDS:
        raise ValueError(
            f"A pool of {dtype} cannot store tokens as {name}, which needs numbers of 2 or 4 "
            "bytes. Drop tokens instead, or use a pool of another dtype."
        )
    if head_dim * min(bits) % (8 * word_bytes):
        raise ValueError(
            f"Heads of {head_dim} numbers in {min(bits)} bits do not fill words of {word_bytes} "
            f"bytes, as {name} requires. Use more bits, or a head_dim that is a multiple of "
            f"{8 * word_bytes // min(bits)}."
        )
    k_words, v_words = (head_dim * b // (8 * word_bytes) for b in bits)
    half_words = block_size * head_dim
    num_tokens = 2 * half_words // (k_words + v_words + 2)
    v_start = max(half_words, num_tokens * (k_words + 1))
    spare_words = 2 * half_words - v_start - num_tokens * (v_words + 1)
    # If there is room, align the values to 16 bytes, for wide loads.
    v_start += min(-v_start % (16 // word_bytes), spare_words)
    return PackedCodec(
        num_tokens=num_tokens,
        half_words=half_words,
        word_bytes=word_bytes,
        k=VectorLayout(0, k_words, bits[0], _max_scale(bits[0], dtype)),
        v=VectorLayout(v_start, v_words, bits[1], _max_scale(bits[1], dtype)),
    )


def _max_scale(bits: int, dtype: DTypeLike) -> float:
    """Returns `VectorLayout.max_scale`."""
    scales = jnp.finfo(_SCALES[jnp.dtype(dtype).itemsize])
    if bits == _ROTATED_BITS:
        return float(scales.max)  # `unrotate` clips the numbers after it has rotated them back.
    limit = min(max_number(dtype) / (2 ** (bits - 1) - 1), float(scales.max))
    scale = np.asarray(limit, scales.dtype)
    return float(scale if float(scale) <= limit else np.nextafter(scale, np.zeros_like(scale)))


def _region(halves: tuple[jax.Array, ...], start: int, size: int) -> jax.Array:
    """Returns `size` words from `start` on, counted over all halves: [..., size]."""
    parts, half_start = [], 0
    for half in halves:
        half_end = half_start + half.shape[-1]
        first, end = max(start, half_start), min(start + size, half_end)
        if first < end:
            parts.append(half[..., first - half_start : end - half_start])
        half_start = half_end
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _next(x: jax.Array) -> jax.Array:
    """Returns the next larger number of each positive number of 2 or 4 bytes."""
    words = _WORDS[x.dtype.itemsize]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, words) + words(1), x.dtype)


def _as_words(half: jax.Array) -> jax.Array:
    """Returns a half [..., B, D], as stored, as words [..., B * D]."""
    words = _WORDS[half.dtype.itemsize]
    half = half if half.dtype == words else lax.bitcast_convert_type(half, words)
    return half.reshape(*half.shape[:-2], -1)


def _as_stored(words: jax.Array, head_dim: int, stored: DTypeLike) -> jax.Array:
    """Returns words [..., B * D] as a half [..., B, D] as stored; the inverse of `_as_words`."""
    half = words.reshape(*words.shape[:-1], -1, head_dim)
    return half if half.dtype == stored else lax.bitcast_convert_type(half, stored)
