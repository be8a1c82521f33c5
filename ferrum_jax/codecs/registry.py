"""The codecs by token format. A new codec is a file beside this one, and an entry here."""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from ferrum_jax.codecs.codec import Codec
from ferrum_jax.codecs.native import native_codec
from ferrum_jax.codecs.packed import packed_codec
from ferrum_jax.payload import KeyValue
from ferrum_jax.types import TokenFormat


@dataclasses.dataclass(frozen=True)
class CodecEntry:
    """A codec, and what is known of it without a pool.

    Attributes:
      make: Makes the codec of a payload and a number of tokens per native block. Raises
        `ValueError` if the codec cannot store them.
      is_native: Whether slots hold the numbers that a model writes, rounded to the pool's dtype:
        tokens are written one by one, and no kernel needs to know the codec.
      is_coarse: Whether rounding costs more than dropping tokens would, so that compression drops
        tokens instead where it may.
    """

    make: Callable[[KeyValue, int], Codec]
    is_native: bool = False
    is_coarse: bool = False


CODECS: dict[TokenFormat, CodecEntry] = {
    TokenFormat.Native: CodecEntry(native_codec, is_native=True),
    TokenFormat.Int8: CodecEntry(functools.partial(packed_codec, name="Int8", bits=(8, 8))),
    TokenFormat.Int8Int4: CodecEntry(functools.partial(packed_codec, name="Int8Int4", bits=(8, 4))),
    # Measured on a real model: to drop tokens, with 4-bit values, costs less than 4-bit keys.
    TokenFormat.Int4: CodecEntry(
        functools.partial(packed_codec, name="Int4", bits=(4, 4)), is_coarse=True
    ),
}
"""In the order of the formats' numbers, which index `PageTables.block_sizes`."""


def codec_for(token_format: TokenFormat, payload: KeyValue, block_size: int) -> Codec:
    """Returns the codec of a format; the same object for equal arguments.

    Args:
      token_format: The format.
      payload: Heads and dtype of the pool.
      block_size: B, tokens per native block.

    Raises:
      ValueError: The format cannot store the payload.

    Example:
      >>> codec_for(TokenFormat.Int8, KeyValue(2, 64, "bfloat16"), 16).num_tokens
      31
    """
    return _made(CODECS[token_format].make, payload, block_size)


def format_of(number: int) -> TokenFormat:
    """Returns the token format of a number.

    Args:
      number: A number, as tables have it, or the format itself.

    Raises:
      ValueError: No format has the number.
    """
    if isinstance(number, np.integer):
        number = int(number)  # Comparing it would be slow: 12 µs instead of 1.
    for token_format in CODECS:
        if token_format == number:
            return token_format
    names = ", ".join(f"{f.name} ({f.value})" for f in CODECS)
    raise ValueError(f"{number!r} is not a token format. There are {names}.")


@functools.cache
def _made(make: Callable[[KeyValue, int], Codec], payload: KeyValue, block_size: int) -> Codec:
    return make(payload, block_size)
