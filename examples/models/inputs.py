"""Reading arguments and files, with errors of one line that name the file and what is wrong."""

import argparse
import contextlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ferrum_jax.checks import (
    INT32_LIMIT,
    check_count,
    check_flag,
    check_number,
    check_writable,
    writing,
)

_ABSENT: Any = object()


def run_script(main: Callable[[], None]) -> None:
    """Runs a script; an expected error ends it with one line on stderr and status 1.

    Args:
      main: The script's main function.

    Raises:
      SystemExit: If `main` raises an error of a file, an argument or a missing package.
    """
    try:
        main()
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(one_line(error, 800)) from None


def one_line(error: BaseException, limit: int = 200) -> str:
    """Returns the text of an error, or its type if it has none, as one line.

    Args:
      error: The error.
      limit: Characters after which the text is cut.

    Returns:
      The text without line breaks.
    """
    return short(" ".join(str(error).split()) or type(error).__name__, limit)


def short(text: str, limit: int = 80) -> str:
    """Returns a text cut after some characters, with an ellipsis if it is."""
    return text if len(text) <= limit else f"{text[:limit]}…"


@contextlib.contextmanager
def naming(place: object) -> Iterator[None]:
    """Prefixes each `ValueError` raised inside with a file's name or another place."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


@contextlib.contextmanager
def foreign(what: str, remedy: str) -> Iterator[None]:
    """Turns each error of another library into a `ValueError`.

    Parsers raise many kinds of errors on a damaged file.

    Args:
      what: Name of the work inside, for the message: "... fails".
      remedy: What the user can do; a sentence.

    Raises:
      ValueError: If anything is raised inside.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} fails ({one_line(error)}). {remedy}") from error


def parse_count(text: str) -> int:
    """Reads a count of the command line, for `argparse`.

    Args:
      text: A whole number from 1 to 2**31 - 1.

    Returns:
      The number.

    Raises:
      ArgumentTypeError: If the text is not such a number.
    """
    try:
        value = int(text)
        check_count("it", value, limit=INT32_LIMIT)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from 1 to 2**31 - 1, got {short(repr(text))}"
        ) from None
    return value


def check_output(parser: argparse.ArgumentParser, option: str, path: pathlib.Path | None) -> None:
    """Ends the script with status 2 if its output file cannot be written."""
    if path is not None:
        try:
            check_writable(option, path)
        except ValueError as error:
            parser.error(one_line(error, 800))


def write_json(path: pathlib.Path, value: object) -> None:
    """Writes a value as JSON.

    Args:
      path: The file.
      value: What to write.

    Raises:
      OSError: If it cannot be written; the text names the file.
    """
    with writing("--json", path):
        path.write_text(json.dumps(value, indent=1))


def read_text(path: pathlib.Path) -> str:
    """Reads a UTF-8 file, with or without a byte order mark; line breaks stay as they are.

    Args:
      path: The file.

    Returns:
      Its text.

    Raises:
      ValueError: If it is not UTF-8; the text names the file and the line.
      OSError: If it cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}: line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}). "
            "Save the file as UTF-8."
        ) from error


def parse_json(text: str) -> Any:
    """Parses JSON.

    Args:
      text: The JSON.

    Returns:
      The value.

    Raises:
      ValueError: If it is not JSON, is nested too deeply, or has an integer of thousands of digits.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON that can be read ({one_line(error)})") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object; an absent file reads as an empty one.

    Args:
      path: The file.

    Returns:
      The object.

    Raises:
      ValueError: If the file holds something else; the text names the file.
      OSError: If it cannot be read.
    """
    if not path.exists():
        return {}
    text = read_text(path)
    with naming(path):
        try:
            value = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{error}. Download the file again.") from error
        if not isinstance(value, dict):
            raise ValueError("must hold a JSON object. Download the file again.")
    return value


def check_text(name: str, value: object) -> str:
    """Returns a text, or raises if UTF-8 cannot encode it.

    Args:
      name: Name of the value, for the message.
      value: What was given.

    Returns:
      The text.

    Raises:
      ValueError: If it is not a string, or has a lone surrogate.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, got {short(repr(value))}.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has the lone surrogate {value[error.start]!a} at position {error.start}, "
            "which is not a character. Remove it."
        ) from error
    return value


class Fields:
    """Fields of a model's config, each checked when it is read. Null counts as absent.

    Args:
      values: The fields by name.
      prefix: Prefix of every name.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = ""):
        self._values, self._prefix = values, prefix

    def get(self, name: str, default: Any = _ABSENT) -> Any:
        """Returns a field of any type.

        Args:
          name: The field, without the prefix.
          default: Its value if absent.

        Raises:
          ValueError: If it is absent and has no default.
        """
        value = self._values.get(self._prefix + name)
        if value is not None:
            return value
        if default is _ABSENT:
            raise ValueError(
                f"has no field {self._prefix}{name}. Download or convert the model again."
            )
        return default

    def count(self, name: str, default: Any = _ABSENT) -> Any:
        """Returns a whole number from 1 to 2**31 - 1, or the default."""
        return self._checked(name, default, _checked_count)

    def number(self, name: str, default: Any = _ABSENT) -> Any:
        """Returns a finite number above 0, or the default."""
        return self._checked(name, default, _checked_number)

    def flag(self, name: str, default: Any = _ABSENT) -> Any:
        """Returns a bool, or the default."""
        return self._checked(name, default, _checked_flag)

    def fields(self, *names: str) -> "Fields":
        """Returns the first nested object that exists among some fields."""
        name = next((name for name in names if self._values.get(name)), names[-1])
        values = self.get(name, {})
        if not isinstance(values, Mapping):
            raise ValueError(f"{self._prefix}{name} must be an object, got {short(repr(values))}.")
        return Fields(values)

    def _checked(self, name: str, default: Any, check: Callable[[str, Any], Any]) -> Any:
        value = self.get(name, default)
        return value if value is default else check(self._prefix + name, value)


def _checked_count(name: str, value: Any) -> int:
    check_count(name, value, limit=INT32_LIMIT)
    return int(value)


def _checked_number(name: str, value: Any) -> float:
    number = check_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be above 0 and finite, got {number}.")
    return number


def _checked_flag(name: str, value: Any) -> bool:
    check_flag(name, value)
    return value
