"""Arguments of the operations, checked and converted on the host before a program is traced.

Ids, counts and lengths are int32 on the device. A number that does not fit is never another one:
from the host it is refused; on the device, where its value is not known in time, it becomes the
nearest int32, which is out of range for every row, block, slot and length.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Ids: TypeAlias = jax.Array | np.ndarray

_INT32 = np.iinfo(np.int32)


def as_ids(ids: ArrayLike) -> Ids:
    """Returns ids, counts or lengths as an int32 array, on the device if they are there already.

    Args:
      ids: Integers of any dtype: a number, a sequence, a NumPy array (which is copied) or an array
        of JAX. Does not wait for the device.

    Returns:
      The same numbers. One of a device array that is beyond int32 becomes the nearest int32.

    Raises:
      ValueError: The dtype is not an integer one (a bool is none), or a number on the host does
        not fit in an int32.
    """
    if isinstance(ids, jax.Array):
        if ids.dtype == jnp.int32:
            return ids
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(
                f"Ids and counts must be integers, got a device array of {ids.dtype}. Convert it "
                "where it is made."
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


def as_rows(**named: ArrayLike) -> list[Ids]:
    """Returns what describes R rows, blocks or pairs, each as i32[R].

    Args:
      **named: Ids and counts by the caller's name for each. The first is a vector, i32[R]; the
        others are i32[R] too, or i32[], one number for all rows.

    Raises:
      AssertionError: The first is not a vector, or another one fits no row by row.
      ValueError: What `as_ids` raises.
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


def as_scalars(**named: ArrayLike) -> list[Ids]:
    """Returns single ids, such as that of a layer or of one row, each as i32[].

    Args:
      **named: Ids by the caller's name for each.

    Raises:
      AssertionError: One is not a single number.
      ValueError: What `as_ids` raises.
    """
    arrays = {name: as_ids(given) for name, given in named.items()}
    for name, array in arrays.items():
        if array.ndim:
            raise AssertionError(f"{name} must be a single integer, got shape {array.shape}.")
    return list(arrays.values())


def _broadcast(array: Ids, shape: tuple[int, ...]) -> Ids:
    if array.shape == shape:
        return array
    return (np if isinstance(array, np.ndarray) else jnp).broadcast_to(array, shape)


@jax.jit
def _saturate(ids: jax.Array) -> jax.Array:
    """Returns integers as int32, those beyond it as the nearest one."""
    info = jnp.iinfo(ids.dtype)
    if info.max > _INT32.max:
        ids = jnp.minimum(ids, ids.dtype.type(_INT32.max))
    if info.min < _INT32.min:
        ids = jnp.maximum(ids, ids.dtype.type(_INT32.min))
    return ids.astype(jnp.int32)
