"""Libraries, without the packages that they import and we do not call (see tests/libraries.txt, bench/zoos.py)."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch.utils.data  # noqa: F401 - it asks whether there is a dill, and must not be told of a stand-in

ABSENT = {
    "torchattacks": ("scipy",),
    "foolbox": ("scipy", "git", "requests"),
    "art": ("scipy", "sklearn"),
    "robustness": ("cox", "dill", "pandas"),
    "robustbench": ("autoattack", "pkg_resources"),
}


def library(name: str) -> ModuleType:
    """``import name``; what is not installed of :data:`ABSENT` has an empty stand-in while that runs.

    What a library imports only when it is called is not there.

    Raises:
        ImportError: the library itself is not installed.
    """
    finder = _Finder(ABSENT.get(name.partition(".")[0], ()))
    sys.meta_path.append(finder)  # the last one: what is installed is taken
    try:
        return importlib.import_module(name)
    finally:
        sys.meta_path.remove(finder)
        for key in [key for key, module in sys.modules.items() if isinstance(module, _StandIn)]:
            del sys.modules[key]


class _Anything:
    """What a stand-in gives for every name: it can be called, and inherited from."""

    def __init__(self, *args, **options):
        pass


class _StandIn(ModuleType):
    __path__: list[str] = []
    __version__ = "1.0.0"  # some compare it

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything


class _Finder(MetaPathFinder, Loader):
    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in self.packages else None

    def create_module(self, spec):
        return _StandIn(spec.name)

    def exec_module(self, module):
        pass
