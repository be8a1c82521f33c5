"""Imports of packages that use what is deprecated."""

import importlib
import types
import warnings


def import_quietly(name: str) -> types.ModuleType:
    """Imports a module; warnings, which are errors in tests, are ignored meanwhile."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
