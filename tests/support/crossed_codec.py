"""A codec that the package does not have, as somebody would add it."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ferrum_jax.codecs import CODECS
from ferrum_jax.codecs.native import NativeCodec, native_codec
from ferrum_jax.payload import KeysAndValues, KeyValue


class MadeUpFormat(enum.IntEnum):
    """The number of the codec's token format, after those of `TokenFormat`."""

    Crossed = len(CODECS)


@dataclasses.dataclass(frozen=True)
class CrossedCodec:
    """Keys where values belong and values where keys belong, the last token first.

    The first slot of a block is not used. Numbers are those of the pool's dtype.
    """

    native: NativeCodec
    rotates_keys: bool = False
    rotates_values: bool = False

    @property
    def num_tokens(self) -> int:
        """One token fewer than a native block has."""
        return self.native.num_tokens - 1

    def decode(self, k_half: jax.Array, v_half: jax.Array) -> KeysAndValues:
        """Decodes whole blocks."""
        kv = self.native.decode(v_half, k_half)
        return KeysAndValues(*(x[..., :0:-1, :].astype(jnp.float32) for x in kv))

    def encode(self, k: jax.Array, v: jax.Array, stored: DTypeLike) -> KeysAndValues:
        """Encodes whole blocks."""
        v, k = self.native.encode(*map(_last_first, (k, v)), stored)
        return KeysAndValues(k, v)

    def pack(self, k: jax.Array, v: jax.Array) -> KeysAndValues:
        """Returns tokens as they are."""
        return KeysAndValues(k, v)

    def replace(
        self, k_half: jax.Array, v_half: jax.Array, packed: KeysAndValues, is_new: jax.Array
    ) -> KeysAndValues:
        """Replaces some tokens of blocks."""
        new = self.encode(*packed, k_half.dtype)
        is_new = _last_first(is_new[..., None])
        return KeysAndValues(jnp.where(is_new, new.k, k_half), jnp.where(is_new, new.v, v_half))


def crossed_codec(payload: KeyValue, block_size: int) -> CrossedCodec:
    """Makes the codec, as an entry of the registry does."""
    return CrossedCodec(native_codec(payload, block_size))


def _last_first(x: jax.Array) -> jax.Array:
    """Reverses tokens, [..., T, X], and puts zeros before them."""
    widths = [(0, 0)] * x.ndim
    widths[-2] = 1, 0
    return jnp.pad(x[..., ::-1, :], widths)
