"""Modules from files that are not imported by their name: setup.py, and what a test has compiled."""

import importlib.util
from pathlib import Path
from types import ModuleType


def load(name: str, path: Path) -> ModuleType:
    """A new one at each call, which ``sys.modules`` does not get."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
