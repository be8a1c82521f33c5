"""Checks and converts the arguments of operations, before a program is traced.

Ids, counts and lengths are int32 on the device. A number that does not fit never wraps around: on
the host it is refused; on the device, where the host does not know it, it becomes the nearest
int32, which is out of range for any row, block, slot and length.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from ferrum_jax.ops.buckets import pad_host_ids
from ferrum_jax.types import IdsLike

Ids: TypeAlias = jax.Array | np.ndarray
"""Ids, counts or lengths: int32, on the host or on a device."""

_INT32 = np.iinfo(np.int32)


def as_ids(ids: IdsLike) -> Ids:
    """Returns ids, counts or lengths as an int32 array; does not wait for the device.

    Args:
      ids: Integers of any dtype: a number, a sequence, a NumPy array (which is copied) or a JAX
        array, which stays on its device.

    Returns:
      The same numbers, except those of a JAX array beyond int32: the nearest int32.

    Raises:
      ValueError: The dtype is not an integer dtype (bool is not), or a number on the host does not
        fit in int32.
    """
    if isinstance(ids, jax.Array):
        if ids.dtype == jnp.int32:
            return ids
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"Ids and counts must be integers, got a device array of {ids.dtype}. Create it as "
                "int32."
            )
        return _saturate(ids)
    given = np.asarray(ids)
    if given.dtype == np.int32 or not given.size:  # NumPy calls an empty list float64.
        return given.astype(np.int32)
    narrow = given.astype(np.int32) if jnp.issubdtype(given.dtype, jnp.integer) else None
    if narrow is None or not np.array_equal(narrow, given):
        raise ValueError(
            f"Ids and counts must be integers within int32, got {given} ({given.dtype})."
        )
    return narrow


def as_rows(**named: IdsLike) -> list[Ids]:
    """Converts arguments that describe R rows, blocks or pairs.

    Args:
      **named: Ids and counts, by the name of the argument. The first is a vector, i32[R]; the
        others are i32[R], or i32[]: one number for all.

    Returns:
      The arguments, in order, each i32[R].

    Raises:
      AssertionError: The first is not a vector, or the shape of another does not fit it.
      ValueError: As in `as_ids`.
    """
    arrays = {name: as_ids(given) for name, given in named.items()}
    first, rows = next(iter(arrays.items()))
    if rows.ndim != 1:
        raise AssertionError(f"{first} must be a vector such as [0, 1], got shape {rows.shape}.")
    for name, array in arrays.items():
        if array.ndim and array.shape != rows.shape:
            raise AssertionError(
                f"{name} has shape {array.shape}, but {first} has {rows.shape}. Give one number "
                f"for each of {first}, or a single one, not in a list, for all."
            )
    return [_broadcast(array, rows.shape) for array in arrays.values()]


def as_padded_rows(**named: IdsLike) -> tuple[Ids, ...]:
    """Like `as_rows`, but padded to a power of two with `NULL_SEQ` if all are on the host."""
    return pad_host_ids(*as_rows(**named))


def as_scalars(**named: IdsLike) -> list[Ids]:
    """Converts arguments that are single ids, such as a layer or a row.

    Args:
      **named: Ids, by the name of the argument.

    Returns:
      The arguments, in order, each i32[].

    Raises:
      AssertionError: An argument is not a single number.
      ValueError: As in `as_ids`.
    """
    arrays = {name: as_ids(given) for name, given in named.items()}
    for name, array in arrays.items():
        if array.ndim:
            raise AssertionError(f"{name} must be a single integer, got shape {array.shape}.")
    return list(arrays.values())


def saturate(integers: Ids) -> jax.Array:
    """Returns integers of any dtype as int32; a number beyond int32 becomes the nearest int32."""
    info = jnp.iinfo(integers.dtype)
    if info.max > _INT32.max:
        lowest = _INT32.min if info.min < _INT32.min else None
        integers = integers.clip(lowest, _INT32.max)
    return jnp.asarray(integers.astype(np.int32))


def _broadcast(array: Ids, shape: tuple[int, ...]) -> Ids:
    if array.shape == shape:
        return array
    return (np if isinstance(array, np.ndarray) else jnp).broadcast_to(array, shape)


_saturate = jax.jit(saturate)
