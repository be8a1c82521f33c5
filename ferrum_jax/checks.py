"""Checks of configurations, requests and arguments. Each error names the field."""

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
"""Indices on the device are below this."""


def check_integer(name: str, value: object) -> int:
    """Refuses a value that is not an integer.

    Args:
      name: The field, for the message.
      value: The value.

    Returns:
      The value as a Python integer: a NumPy integer could overflow in later arithmetic.

    Raises:
      ValueError: If the value is not an integer (a bool is not).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    return int(value)


def check_count(name: str, value: object, minimum: int = 1, limit: int | None = None) -> int:
    """Refuses a value that is not an integer of at least `minimum` and below `limit`.

    Args:
      name: The field, for the message.
      value: The value.
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
    """Replaces a field of a frozen dataclass by a checked Python integer.

    Args:
      record: The instance; called in its `__post_init__`.
      name: The field.
      minimum: The least value allowed.
      limit: The value must be below this.

    Raises:
      ValueError: If the field is not an integer (a bool is not), too small or too large.
    """
    object.__setattr__(record, name, check_count(name, getattr(record, name), minimum, limit))


def check_number(name: str, value: object) -> float:
    """Refuses a value that is not a real number, is NaN, or is beyond the range of a float.

    Args:
      name: The field, for the message.
      value: The value.

    Returns:
      The value as a float.

    Raises:
      ValueError: If the value is not a number (a bool is not), NaN, or beyond a float's range.
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
    """Refuses a value that is not a bool.

    Args:
      name: The field, for the message.
      value: The value.

    Raises:
      ValueError: If the value is not True or False.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}.")


def check_type(name: str, value: object, wanted: type) -> None:
    """Refuses a value that is not an instance of a class.

    Args:
      name: The field, for the message.
      value: The value.
      wanted: The class.

    Raises:
      ValueError: If the value is of another class.
    """
    if not isinstance(value, wanted):
        article = "an" if wanted.__name__[0] in "AEIOU" else "a"
        raise ValueError(f"{name} must be {article} {wanted.__name__}, got {value!r}.")


def check_callable(name: str, value: object) -> None:
    """Refuses a value that cannot be called.

    Args:
      name: The field, for the message.
      value: The value.

    Raises:
      ValueError: If the value cannot be called.
    """
    if not callable(value):
        raise ValueError(f"{name} must be a function, got {value!r}.")


def check_items(name: str, value: Any) -> list[Any]:
    """Refuses a value that is not a collection of items; text and bytes are not.

    Args:
      name: The field, for the message.
      value: The value.

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
    """Refuses a value that cannot be a key of a dictionary.

    Args:
      name: The field, for the message.
      value: The value.

    Raises:
      ValueError: If the value is not hashable, or not equal to itself (as NaN).
    """
    try:
        hash(value)
        is_itself = bool(value == value)
    except TypeError as error:
        raise ValueError(f"{name} must be hashable, got {value!r}.") from error
    if not is_itself:
        raise ValueError(
            f"{name} must be equal to itself, got {value!r}. Use a key that a dictionary can find."
        )


def check_path(name: str, value: object) -> None:
    """Refuses a value that is not the name of a file or a directory.

    Args:
      name: The field, for the message.
      value: The value.

    Raises:
      ValueError: If the value is not text or a path, or is empty.
    """
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise ValueError(f"{name} must be a path, got {value!r}.")
    if not os.fspath(value):
        raise ValueError(f'{name} must not be empty. Write "." to name the working directory.')


def check_live(name: str, tree: Any) -> None:
    """Refuses a pytree with an array that was donated to an earlier call.

    Args:
      name: The argument, for the message.
      tree: The pytree. Traced arrays pass.

    Raises:
      ValueError: If an array was deleted.
    """
    for leaf in jax.tree.leaves(tree):
        is_array = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        if is_array and leaf.is_deleted():
            raise ValueError(
                f"This {name} was consumed: an operation that donates it took its arrays (write, "
                "fork, share, truncate, copy_blocks, prefill, generate, or your own program with "
                f"donate_argnums). Use the {name} that the operation returned."
            )


def check_writable(name: str, path: str | os.PathLike[str]) -> None:
    """Refuses a path to which a file cannot be written; creates no file.

    Args:
      name: The option, for the message.
      path: Path of the file; an existing file would be overwritten.

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
    """Context manager that adds the file's name to an OSError, for example of a full disk.

    Args:
      name: The option, for the message.
      path: The file that is written inside.

    Yields:
      None.

    Raises:
      OSError: An OSError was raised inside.
    """
    try:
        yield
    except OSError as error:
        raise OSError(f"{name} {path} cannot be written: {error.strerror}.") from error
