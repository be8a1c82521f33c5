"""Layout of compressed blocks, which store tokens in fewer bits than the pool's dtype.

One layer and head of a block has two halves, one in the pool's `k` and one in its `v`. Each half is
B * D *words*: unsigned integers as wide as the pool's dtype. A compressed block is the same words,
with more tokens in them: first the keys, D numbers per token packed into words, then their scales,
one word per token; then the values and their scales. The values begin with the second half, unless
the keys extend into it. So a block has the same number of bytes in every format, scales included,
and code that copies, moves or stores blocks does not depend on the format.

Each vector x of a token and head is rounded by itself: the scale is max|x| / (2**(bits - 1) - 1),
and the integers are x / scale. Before it is rounded to 4 bits, a vector is rotated by a Hadamard
matrix, which spreads outliers over all numbers (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).
The matrix R is its own inverse, so that (q R) · (k R) = q · k: instead of rotating keys and values
back, attention rotates queries and its output.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from ferrum_jax.payload import KeysAndValues
from ferrum_jax.types import TokenFormat

_BITS = {
    TokenFormat.Int8: (8, 8),
    TokenFormat.Int8Int4: (8, 4),
    TokenFormat.Int4: (4, 4),
}
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
class BlockLayout:
    """Layout of one layer and head of a compressed block.

    Attributes:
      num_tokens: T, tokens per block.
      half_words: Words per half; a block has two halves.
      word_bytes: Bytes per word, 2 or 4.
      k: Place of the keys; their scales follow.
      v: Place of the values; their scales follow.

    Example:
      >>> layout = block_layout(TokenFormat.Int8, block_size=16, head_dim=64, dtype="bfloat16")
      >>> layout.num_tokens, layout.k.num_words, layout.v.start
      (31, 32, 1024)
    """

    num_tokens: int
    half_words: int
    word_bytes: int
    k: VectorLayout
    v: VectorLayout

    def decode(self, k_half: jax.Array, v_half: jax.Array) -> KeysAndValues:
        """Decodes whole blocks.

        Args:
          k_half: [..., B, D]. Blocks of the pool's `k`, as stored.
          v_half: [..., B, D]. The same blocks of the pool's `v`.

        Returns:
          Keys and values, each f32[..., T, D], still rotated if the layout `is_rotated`.
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
        words = self._arrange(self.pack(k, self.k), self.pack(v, self.v))
        return KeysAndValues(*(_as_stored(half, k.shape[-1], stored) for half in words))

    def replace(
        self,
        k_half: jax.Array,
        v_half: jax.Array,
        k: PackedVectors,
        v: PackedVectors,
        is_new: jax.Array,
    ) -> KeysAndValues:
        """Replaces some tokens of blocks; no bit of another token changes.

        Args:
          k_half: [..., B, D]. Blocks of the pool's `k`, as stored.
          v_half: [..., B, D]. The same blocks of the pool's `v`.
          k: Keys of all T tokens, from `pack`.
          v: Values of all T tokens, from `pack`.
          is_new: bool[..., T]. Tokens to replace.

        Returns:
          The two halves, each [..., B, D] as stored.
        """
        are_new = jax.tree.map(lambda x: jnp.broadcast_to(is_new[..., None], x.shape), (k, v))
        new, is_changed = self._arrange(k, v), self._arrange(*are_new)
        return KeysAndValues(
            *(
                _as_stored(jnp.where(changed, words, _as_words(half)), half.shape[-1], half.dtype)
                for changed, words, half in zip(is_changed, new, (k_half, v_half), strict=True)
            )
        )

    def pack(self, x: jax.Array, layout: VectorLayout) -> PackedVectors:
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


@functools.cache
def block_layout(
    token_format: TokenFormat, *, block_size: int, head_dim: int, dtype: DTypeLike
) -> BlockLayout:
    """Returns the layout of blocks of a compressed format.

    Args:
      token_format: Any format but the native one.
      block_size: B, tokens per native block.
      head_dim: D, numbers per head.
      dtype: The pool's dtype.

    Returns:
      The layout, the same object for equal arguments.

    Raises:
      ValueError: A number of the pool does not have 2 or 4 bytes, or a vector does not fill words.
    """
    word_bytes = jnp.dtype(dtype).itemsize
    if word_bytes not in _WORDS:
        raise ValueError(
            f"A pool of {jnp.dtype(dtype)} cannot store tokens as {token_format.name}, which needs "
            "numbers of 2 or 4 bytes. Drop tokens instead, or use a pool of another dtype."
        )
    bits = _BITS[token_format]
    if head_dim * min(bits) % (8 * word_bytes):
        raise ValueError(
            f"Heads of {head_dim} numbers in {min(bits)} bits do not fill words of {word_bytes} "
            f"bytes, as {token_format.name} requires. Use more bits, or a head_dim that "
            f"is a multiple of {8 * word_bytes // min(bits)}."
        )
    k_words, v_words = (head_dim * b // (8 * word_bytes) for b in bits)
    half_words = block_size * head_dim
    num_tokens = 2 * half_words // (k_words + v_words + 2)
    v_start = max(half_words, num_tokens * (k_words + 1))
    spare_words = 2 * half_words - v_start - num_tokens * (v_words + 1)
    # If there is room, align the values to 16 bytes, for wide loads.
    v_start += min(-v_start % (16 // word_bytes), spare_words)
    return BlockLayout(
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
    limit = min(_max_number(dtype) / (2 ** (bits - 1) - 1), float(scales.max))
    scale = np.asarray(limit, scales.dtype)
    return float(scale if float(scale) <= limit else np.nextafter(scale, np.zeros_like(scale)))


def _max_number(dtype: DTypeLike) -> float:
    """Returns the largest finite number of a dtype."""
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return float(info(dtype).max)


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


def rotate(x: jax.Array) -> jax.Array:
    """Multiplies vectors (f32[..., D]) by the Hadamard matrix, which is its own inverse."""
    # With lower precision, accelerators round float32 before they multiply.
    return jnp.matmul(x, jnp.asarray(_hadamard(x.shape[-1])), precision=lax.Precision.HIGHEST)


def unrotate(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rotates decoded vectors (f32[..., D]) back, and clips them to the finite range of `dtype`.

    Rounding can make a number near the largest one of the dtype larger than that.
    """
    return jnp.clip(rotate(x), -_max_number(dtype), _max_number(dtype))


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Returns f32[size, size], orthogonal and symmetric.

    If the size is not a power of two, the matrix is block-diagonal, with blocks of the largest
    power of two that divides it.
    """
    order = size & -size
    matrix = np.ones((1, 1))
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = np.kron(np.eye(size // order), matrix)
    return (matrix / np.sqrt(order)).astype(np.float32)


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
