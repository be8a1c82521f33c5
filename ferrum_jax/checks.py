"""The checks that configurations and requests share. Each names the field that is wrong."""

import contextlib
import math
import numbers
import os
import pathlib
from collections.abc import Iterator

INT32_LIMIT = 2**31
"""What an index on the device is below."""


def check_count(name: str, value: object, minimum: int = 1, limit: int | None = None) -> None:
    """Refuses what is not a whole number of at least `minimum`, or reaches `limit`.

    Args:
      name: The field, for the message.
      value: What was given.
      minimum: The least value allowed.
      limit: The value must be below this; `INT32_LIMIT` for an index on the device.

    Raises:
      ValueError: If the value is no integer (a bool is none), too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    if int(value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")
    if limit is not None and int(value) >= limit:
        raise ValueError(f"{name} must be below {limit}, got {value}. Lower it.")


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
        raise ValueError(f"{name} must be a number that a float holds, got {value!r}.") from error
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
