"""The contract of an attention backend, and reasons for a refusal that backends share."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ferrum_jax.attention.call import AttentionCall
from ferrum_jax.codecs import PackedCodec
from ferrum_jax.ops.platforms import traced_platforms

_INTEGER_BITS = {4, 8}


@runtime_checkable
class AttentionBackend(Protocol):
    """One implementation of paged attention: an object, or a module with these names.

    `paged_attention` calls the three methods in their order here, each time that it is traced.
    The arrays of a call are then tracers, so a backend decides by shapes, dtypes and options.

    Attributes:
      name: Name of the backend in error messages and in `explain_backend`.
    """

    name: str

    def accepts(self, call: AttentionCall) -> str | None:
        """Returns None if the backend computes a call, or the reason why not.

        The method is pure: it does not compile, register or warn.

        Args:
          call: Checked arguments. All rows are written in `call.token_format`;
            `call.token_formats` is None.
        """
        ...

    def prepare(self, call: AttentionCall) -> str | None:
        """Compiles or registers what a call needs; may warn.

        Args:
          call: A call that `accepts` accepted.

        Returns:
          None if the backend is ready, or the reason why it is not.
        """
        ...

    def attend(self, call: AttentionCall) -> jax.Array:
        """Computes attention.

        Args:
          call: A call that was accepted and prepared.

        Returns:
          [R, T, H, G, D], dtype `call.out_dtype`. Zero where a query sees no token.
        """
        ...


def first_unmet(*requirements: tuple[bool, str]) -> str | None:
    """Returns the text of the first requirement that is not met; None if all are met."""
    return next((text for is_met, text in requirements if not is_met), None)


def refuse_platform(platform: str) -> str | None:
    """Returns why a program cannot be for a platform; None if it can."""
    traced = sorted(traced_platforms())
    return first_unmet((platform in traced, f"this program is for {' or '.join(traced)}"))


def refuse_dtypes(call: AttentionCall, floats: Sequence[DTypeLike]) -> str | None:
    """Returns why a kernel of these dtypes cannot read a call's queries or pool, or None."""
    q, pool = call.q.dtype, call.pool
    names = ", ".join(jnp.dtype(dtype).name for dtype in floats)
    return first_unmet(
        (q in floats, f"the queries are {q}; the kernel takes {names}"),
        (pool.dtype in floats, f"the pool is {pool.dtype}; the kernel takes {names}"),
        (
            pool.stored_dtype == pool.dtype,
            f"the pool holds {pool.dtype} as {pool.stored_dtype}",
        ),
    )


def refuse_format(call: AttentionCall) -> str | None:
    """Returns why a kernel of native and integer formats cannot read a call's rows, or None."""
    codec = call.codec
    if call.is_native:
        return None
    if not isinstance(codec, PackedCodec):
        return f"the kernel does not know the token format {call.token_format.name}"
    unknown = sorted({codec.k.bits, codec.v.bits} - _INTEGER_BITS)
    return first_unmet((not unknown, f"the kernel does not read numbers of {unknown} bits"))
