"""Errors: each can be copied and sent to another process, and says the same there."""

import copy
import inspect
import pickle

import pytest

from ferrum_jax import errors

CLASSES = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, BaseException)
]


def example_of(cls: type[BaseException]) -> BaseException:
    """An error with one text for each argument that its class names."""
    if not inspect.isfunction(cls.__init__):
        return cls("What was asked. What there is. What to do.")
    _, *names = inspect.signature(cls.__init__).parameters
    return cls(*names)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_an_error_survives_pickle_and_copy(cls):
    assert cls.__doc__ and cls.__name__.endswith("Error")
    error = example_of(cls)
    error.add_note("A note.")
    again = [pickle.loads(pickle.dumps(error, p)) for p in range(pickle.HIGHEST_PROTOCOL + 1)]
    for other in (*again, copy.copy(error), copy.deepcopy(error)):
        assert type(other) is cls and isinstance(other, errors.FerrumError)
        assert str(other) == str(error) and other.args == error.args
        assert vars(other) == vars(error)


def test_a_corrupt_file_error_names_the_file_and_what_is_wrong_with_it():
    error = errors.CorruptFileError("some/file", "it is empty")
    assert (error.path, error.reason) == ("some/file", "it is empty")
    assert str(error).startswith("some/file cannot be read back: it is empty. ")
