"""Blocks whose tokens are written in fewer bits than the pool's dtype has.

A block of one layer and head is two halves of *words*, that of keys and that of values: B * D
numbers of the pool's dtype, seen as unsigned integers of the same width. A compressed block is the
same words with more tokens in them: first the keys, D numbers a token packed into words, then
their scales, one word a token, then the same of the values, which begin with the second half
unless the keys reach into it. So every block has the same bytes in every format, its scales
included, and what copies, moves or stores blocks need not know what is in them.

Each vector x of a token and head is rounded on its own: the scale is max|x| / (2**(bits - 1) - 1),
and the integers are x / scale. Before rounding to 4 bits it is rotated by a Hadamard matrix, which
spreads outliers over all its numbers (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456). The matrix
R is its own inverse, so that (q R) · (k R) = q · k: attention rotates queries and output instead.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

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


class KeysAndValues(NamedTuple):
    """Something of keys, and the same of values.

    Attributes:
      k: Of keys.
      v: Of values.
    """

    k: jax.Array
    v: jax.Array


class PackedVectors(NamedTuple):
    """Vectors of D numbers as they are stored.

    Attributes:
      numbers: Words [..., W].
      scales: Words [..., 1].
    """

    numbers: jax.Array
    scales: jax.Array


@dataclasses.dataclass(frozen=True)
class VectorLayout:
    """Where a block keeps its keys, or its values: T vectors of D numbers.

    Attributes:
      start: Word at which the vectors begin, counted over both halves.
      num_words: Words a vector.
      bits: Bits a number.
      max_scale: Largest scale there may be: any number that it leads to is one of the pool's dtype.
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
    """What a compressed block holds of one layer and head.

    Attributes:
      num_tokens: T, tokens a block.
      half_words: Words a half, of which a block has two.
      word_bytes: Bytes a word, 2 or 4.
      k: Where the keys are; their scales follow them.
      v: Where the values are; their scales follow them.

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
        """Reads whole blocks.

        Args:
          k_half: [..., B, D]. Blocks of the pool's `k`, as they are stored.
          v_half: [..., B, D]. The same blocks of its `v`.

        Returns:
          Each f32[..., T, D], still rotated where the layout says so.
        """
        halves = _as_words(k_half), _as_words(v_half)
        k, v = (self._unpacked(self._found(halves, x), x) for x in (self.k, self.v))
        return KeysAndValues(k, v)

    def encode(self, k: jax.Array, v: jax.Array, stored: DTypeLike) -> KeysAndValues:
        """Writes whole blocks, rounded.

        Args:
          k: f32[..., T, D]. Keys.
          v: f32[..., T, D]. Values.
          stored: Dtype of the pool's arrays.

        Returns:
          Halves, each [..., B, D] of that dtype.
        """
        words = self._arranged(self.pack(k, self.k), self.pack(v, self.v))
        return KeysAndValues(*(_as_stored(half, k.shape[-1], stored) for half in words))

    def replace(
        self,
        k_half: jax.Array,
        v_half: jax.Array,
        k: PackedVectors,
        v: PackedVectors,
        is_new: jax.Array,
    ) -> KeysAndValues:
        """Writes some tokens of blocks, and leaves all others as they are.

        Args:
          k_half: [..., B, D]. Blocks of the pool's `k`, as they are stored.
          v_half: [..., B, D]. The same blocks of its `v`.
          k: Keys, `pack`ed, of all T tokens.
          v: Values.
          is_new: bool[..., T]. Which of these are written.

        Returns:
          The halves so changed.
        """
        are_new = jax.tree.map(lambda x: jnp.broadcast_to(is_new[..., None], x.shape), (k, v))
        new, is_changed = self._arranged(k, v), self._arranged(*are_new)
        return KeysAndValues(
            *(
                _as_stored(jnp.where(changed, words, _as_words(half)), half.shape[-1], half.dtype)
                for changed, words, half in zip(is_changed, new, (k_half, v_half), strict=True)
            )
        )

    def pack(self, x: jax.Array, layout: VectorLayout) -> PackedVectors:
        """Rounds vectors (f32[..., D]) and packs them.

        A vector with a number that is not finite, rotated where it is, comes back as NaN, all of
        it. Scales are numbers of the words' size, float16 or float32, so that there is a largest:
        what lies beyond 65504 * 127 in a pool of bfloat16, or beyond the largest number of one of
        float16, comes back as what is largest, with its sign. In 4 bits it is 65504 * 7 for both,
        once rotated.
        """
        bits, word_bits = layout.bits, 8 * self.word_bytes
        if layout.is_rotated:
            x = rotate(x)
        largest = 2 ** (bits - 1) - 1
        dtype = jnp.finfo(_SCALES[self.word_bytes])
        peaks = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
        # What is finite stays so, if smaller: a row with one number too large is still of use.
        exact = jnp.clip(peaks / largest, float(dtype.smallest_subnormal), layout.max_scale)
        # Not by `peaks`: XLA on CPU loses a NaN in the maximum of some shapes.
        is_finite = jnp.all(jnp.isfinite(x), axis=-1, keepdims=True)
        exact = jnp.where(is_finite, exact, jnp.nan)
        scales = exact.astype(dtype.dtype)
        # Upwards, so that the largest number is not cut: few bits are left of the smallest scales.
        # Not beyond `max_scale`, which is a scale itself.
        scales = jnp.where(scales.astype(jnp.float32) < exact, _next(scales), scales)
        numbers = jnp.clip(jnp.rint(x / scales.astype(jnp.float32)), -largest, largest)
        numbers = numbers.astype(_INTEGERS[self.word_bytes])
        # Word w holds numbers w, w + W, w + 2 W, and so on, the first in its lowest bits: so whole
        # vectors of words are shifted, and none is cut.
        numbers = lax.bitcast_convert_type(numbers, _WORDS[self.word_bytes])
        planes = jnp.split(numbers & (2**bits - 1), word_bits // bits, axis=-1)
        packed = functools.reduce(
            jnp.bitwise_or, (plane << (bits * i) for i, plane in enumerate(planes))
        )
        return PackedVectors(packed, lax.bitcast_convert_type(scales, _WORDS[self.word_bytes]))

    def _unpacked(self, vectors: PackedVectors, layout: VectorLayout) -> jax.Array:
        """Returns vectors as numbers, f32[..., D]: the inverse of `pack`, the rotation aside."""
        bits, word_bits = layout.bits, 8 * self.word_bytes
        words = lax.bitcast_convert_type(vectors.numbers, _INTEGERS[self.word_bytes])
        top = word_bits - bits
        planes = [(words << (top - bits * i)) >> top for i in range(word_bits // bits)]
        numbers = jnp.concatenate(planes, axis=-1).astype(jnp.float32)
        scales = lax.bitcast_convert_type(vectors.scales, _SCALES[self.word_bytes])
        return numbers * scales.astype(jnp.float32)

    def _arranged(self, k: PackedVectors, v: PackedVectors) -> KeysAndValues:
        """Puts the vectors of T tokens where a block has them: two halves, each [..., B * D]."""
        regions = []
        for vectors, size in ((k, self.v.start), (v, 2 * self.half_words - self.v.start)):
            region = jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in vectors], axis=-1)
            spare = size - region.shape[-1]
            regions.append(jnp.pad(region, [(0, 0)] * (region.ndim - 1) + [(0, spare)]))
        return KeysAndValues(*jnp.split(jnp.concatenate(regions, axis=-1), 2, axis=-1))

    def _found(self, halves: tuple[jax.Array, ...], layout: VectorLayout) -> PackedVectors:
        """Returns the vectors of T tokens; the halves follow one another."""
        count = self.num_tokens * layout.num_words
        numbers = _region(halves, layout.start, count)
        scales = _region(halves, layout.start + count, self.num_tokens)
        shape = *numbers.shape[:-1], self.num_tokens, layout.num_words
        return PackedVectors(numbers.reshape(shape), scales[..., None])


@functools.cache
def block_layout(
    token_format: TokenFormat, *, block_size: int, head_dim: int, dtype: DTypeLike
) -> BlockLayout:
    """Returns how blocks are laid out in a compressed format.

    Args:
      token_format: Any but the native one.
      block_size: B, native tokens a block.
      head_dim: D, numbers a head.
      dtype: The pool's.

    Raises:
      ValueError: The pool's numbers are not of 2 or 4 bytes, or a vector does not fill words.
    """
    word_bytes = jnp.dtype(dtype).itemsize
    if word_bytes not in _WORDS:
        raise ValueError(
            f"Blocks of {jnp.dtype(dtype)} cannot be written as {token_format.name}: numbers of 2 "
            "or 4 bytes can. Drop tokens instead, or use a pool of another dtype."
        )
    bits = _BITS[token_format]
    if head_dim * min(bits) % (8 * word_bytes):
        raise ValueError(
            f"Heads of {head_dim} numbers in {min(bits)} bits do not fill words of {word_bytes} "
            f"bytes, as {token_format.name} needs. Use a format of more bits, or a head_dim that "
            f"is a multiple of {8 * word_bytes // min(bits)}."
        )
    k_words, v_words = (head_dim * b // (8 * word_bytes) for b in bits)
    half_words = block_size * head_dim
    num_tokens = 2 * half_words // (k_words + v_words + 2)
    v_start = max(half_words, num_tokens * (k_words + 1))
    spare_words = 2 * half_words - v_start - num_tokens * (v_words + 1)
    # Where there is room for it, values begin where wide loads do: at 16 bytes.
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
        return float(scales.max)  # Turned back, the numbers are others: `unrotate` sees to them.
    limit = min(_max_number(dtype) / (2 ** (bits - 1) - 1), float(scales.max))
    scale = np.asarray(limit, scales.dtype)
    return float(scale if float(scale) <= limit else np.nextafter(scale, np.zeros_like(scale)))


def _max_number(dtype: DTypeLike) -> float:
    """Returns the largest finite number of a dtype."""
    info = jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo
    return float(info(dtype).max)


def _region(halves: tuple[jax.Array, ...], start: int, size: int) -> jax.Array:
    """Returns some of the words of halves that follow one another: [..., size]."""
    parts, half_start = [], 0
    for half in halves:
        half_end = half_start + half.shape[-1]
        first, end = max(start, half_start), min(start + size, half_end)
        if first < end:
            parts.append(half[..., first - half_start : end - half_start])
        half_start = half_end
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def rotate(x: jax.Array) -> jax.Array:
    """Multiplies vectors (f32[..., D]) by the Hadamard matrix; twice is not at all."""
    # Accelerators round float32 before they multiply, unless told not to.
    return jnp.matmul(x, jnp.asarray(_hadamard(x.shape[-1])), precision=lax.Precision.HIGHEST)


def unrotate(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Turns vectors (f32[..., D]) back that were rounded since they were rotated.

    What rounding has done to numbers near the largest of a dtype does not make them infinite.
    """
    return jnp.clip(rotate(x), -_max_number(dtype), _max_number(dtype))


@functools.cache
def _hadamard(size: int) -> np.ndarray:
    """Returns f32[size, size], orthogonal and symmetric.

    Where the size is no power of two, the matrix is blocks of the largest that divides it.
    """
    order = size & -size
    matrix = np.ones((1, 1))
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    matrix = np.kron(np.eye(size // order), matrix)
    return (matrix / np.sqrt(order)).astype(np.float32)


def _next(x: jax.Array) -> jax.Array:
    """Returns the next larger number of each positive one of 2 or 4 bytes."""
    words = _WORDS[x.dtype.itemsize]
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, words) + words(1), x.dtype)


def _as_words(half: jax.Array) -> jax.Array:
    """Returns halves [..., B, D] as they are stored as words [..., B * D]."""
    words = _WORDS[half.dtype.itemsize]
    half = half if half.dtype == words else lax.bitcast_convert_type(half, words)
    return half.reshape(*half.shape[:-2], -1)


def _as_stored(words: jax.Array, head_dim: int, stored: DTypeLike) -> jax.Array:
    """Undoes `_as_words`."""
    half = words.reshape(*words.shape[:-1], -1, head_dim)
    return half if half.dtype == stored else lax.bitcast_convert_type(half, stored)
