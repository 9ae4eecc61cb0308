"""Packages that only the environment of ``make test-compat`` has."""

import importlib
from types import ModuleType

import pytest


def original(name: str) -> ModuleType:
    """The module; where it or what it imports is missing, a skip that says so."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{error}: run make test-compat", allow_module_level=True)
