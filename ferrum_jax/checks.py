"""The checks that configurations and requests share. Each names the field that is wrong."""

import contextlib
import math
import numbers
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
from jax.core import Tracer

INT32_LIMIT = 2**31
"""What an index on the device is below."""


def check_integer(name: str, value: object) -> int:
    """Refuses what is not a whole number.

    Args:
      name: The field, for the message.
      value: What was given.

    Returns:
      The value as a Python integer: a NumPy one could overflow in later arithmetic.

    Raises:
      ValueError: If the value is not an integer (a bool is not).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    return int(value)


def check_count(name: str, value: object, minimum: int = 1, limit: int | None = None) -> int:
    """Refuses what is not a whole number of at least `minimum`, or reaches `limit`.

    Args:
      name: The field, for the message.
      value: What was given.
      minimum: The least value allowed.
      limit: The value must be below this; `INT32_LIMIT` for an index on the device.

    Returns:
      The value as a Python integer.

    Raises:
      ValueError: If the value is not an integer (a bool is not), too small or too large.
    """
    count = check_integer(name, value)
    if count < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    if limit is not None and count >= limit:
        raise ValueError(f"{name} must be below {limit}, got {value}. Lower it.")
    return count


def settle_count(record: object, name: str, minimum: int = 1, limit: int | None = None) -> None:
    """Makes a field of a frozen dataclass a Python integer of at least `minimum`.

    Args:
      record: The instance, in its `__post_init__`.
      name: The field.
      minimum: The least value allowed.
      limit: The value must be below this.

    Raises:
      ValueError: If the field is not an integer (a bool is not), too small or too large.
    """
    object.__setattr__(record, name, check_count(name, getattr(record, name), minimum, limit))


def check_number(name: str, value: object) -> float:
    """Refuses what is not a real number, is NaN, or is beyond what a float holds.

    Args:
      name: The field, for the message.
      value: What was given.

    Returns:
      The value.

    Raises:
      ValueError: If the value is no number (a bool is none), NaN, or beyond a float's range.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{name} must be a number that a float can hold: {error}.") from error
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return number


def check_flag(name: str, value: object) -> None:
    """Refuses what is not a bool.

    Args:
      name: The field, for the message.
      value: What was given.

    Raises:
      ValueError: If the value is not True or False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")


def check_type(name: str, value: object, wanted: type) -> None:
    """Refuses what is not an instance of a class.

    Args:
      name: The field, for the message.
      value: What was given.
      wanted: The class.

    Raises:
      ValueError: If the value is of another class.
    """
    if not isinstance(value, wanted):
        raise ValueError(f"{name} must be a {wanted.__name__}, got {value!r}.")


def check_callable(name: str, value: object) -> None:
    """Refuses what cannot be called.

    Args:
      name: The field, for the message.
      value: What was given.

    Raises:
      ValueError: If the value cannot be called.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {value!r}.")


def check_items(name: str, value: Any) -> list[Any]:
    """Refuses what is not a row of items; text and bytes are not.

    Args:
      name: The field, for the message.
      value: What was given.

    Returns:
      The items.

    Raises:
      ValueError: If the value cannot be iterated over, or is text or bytes.
    """
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return list(value)
    except TypeError:
        pass
    raise ValueError(f"{name} must be a sequence, got {value!r}.")


def check_key(name: str, value: object) -> None:
    """Refuses what cannot be found again under its own name.

    Args:
      name: The field, for the message.
      value: What was given.

    Raises:
      ValueError: If the value is not hashable, or not equal to itself, as NaN.
    """
    try:
        hash(value)
        is_itself = bool(value == value)
    except TypeError as error:
        raise ValueError(f"{name} must be hashable, got {value!r}.") from error
    if not is_itself:
        raise ValueError(
            f"{name} must be equal to itself, got {value!r}. Use a key that can be found again."
        )


def check_path(name: str, value: object) -> None:
    """Refuses what does not name a file or a directory.

    Args:
      name: The field, for the message.
      value: What was given.

    Raises:
      ValueError: If the value is not text or a path, or is empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ValueError(f"{name} must be a path, got {value!r}.")
    if not os.fspath(value):
        raise ValueError(
            f'{name} must not be empty, which would be the working directory. Name it as "." if '
            "that is meant."
        )


def check_live(name: str, tree: Any) -> None:
    """Refuses a pytree of which an array was donated to an earlier call.

    Args:
      name: The argument, for the message.
      tree: What was given. Arrays that are being traced pass.

    Raises:
      ValueError: If an array of it was deleted.
    """
    for leaf in jax.tree.leaves(tree):
        is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if is_array and leaf.is_deleted():
            raise ValueError(
                f"This {name} was consumed: an operation that donates it took its arrays (write, "
                "fork, share, truncate, copy_blocks, prefill, generate, or a program of yours with "
                f"donate_argnums). Use the {name} which that operation returned."
            )


def check_writable(name: str, path: str | os.PathLike[str]) -> None:
    """Refuses a path to which a file cannot be written; leaves no file behind.

    Args:
      name: The option, for the message.
      path: Where a file is to be written, over an older one if there is one.

    Raises:
      ValueError: If the path is a folder, its folder does not exist, or writing is not permitted.
    """
    target = pathlib.Path(os.path.realpath(path))
    reason = None
    try:
        if target.is_dir():
            reason = "it is a folder"
        elif target.exists():
            reason = None if os.access(target, os.W_OK) else "it is read-only"
        else:
            target.open("xb").close()
            target.unlink()
    except OSError as error:
        reason = error.strerror
    if reason is not None:
        raise ValueError(
            f"{name} {path} cannot be written: {reason}. Name a file in a folder that exists."
        )


@contextlib.contextmanager
def writing(name: str, path: str | os.PathLike[str]) -> Iterator[None]:
    """Names the file in the error of a write inside that fails, as on a full disk.

    Args:
      name: The option, for the message.
      path: The file.

    Raises:
      OSError: If one is raised inside.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{name} {path} cannot be written: {error.strerror}.") from error
