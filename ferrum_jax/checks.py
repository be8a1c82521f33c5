"""The checks that configurations and requests share. Each names the field that is wrong."""

import math
import numbers


def check_integer(name: str, value: object) -> int:
    """Refuses what is not a whole number.

    Args:
      name: The field, for the message.
      value: What was given.

    Returns:
      The value.

    Raises:
      ValueError: If the value is no integer (a bool is none).
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}.")
    return int(value)


def check_count(name: str, value: object, minimum: int = 1) -> None:
    """Refuses what is not a whole number of at least `minimum`.

    Args:
      name: The field, for the message.
      value: What was given.
      minimum: The least value allowed.

    Raises:
      ValueError: If the value is no integer (a bool is none) or too small.
    """
    if check_integer(name, value) < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_number(name: str, value: object) -> float:
    """Refuses what is not a real number, or is NaN.

    Args:
      name: The field, for the message.
      value: What was given.

    Returns:
      The value.

    Raises:
      ValueError: If the value is no number (a bool is none) or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or math.isnan(value):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    return float(value)


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
