"""What functions read besides their arguments: closures, globals, defaults, and attributes of objects among these."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

LONGEST, DEEPEST = 64, 4  # items of a collection that are looked at, and collections inside each other

_FOREIGN = frozenset({*sys.stdlib_module_names, "torch", "numpy"} - {"__main__"})  # packages that are not followed
_EMPTY = CellType()
_LEAVES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, type, Tensor, numpy.ndarray, nn.Module)


class Read(NamedTuple):
    """A value, and where it was found."""

    source: Mapping[Any, Any] | CellType
    name: Any
    value: Any

    def holds(self) -> bool:
        """Whether the very same value is there."""
        if isinstance(self.source, CellType):
            return self.source != _EMPTY and self.source.cell_contents is self.value
        return self.source.get(self.name) is self.value


class Reads(list[Read]):
    """What the code of functions, methods, ``partial`` and callable objects names, and that of what they call.

    Not followed are PyTorch, NumPy and the standard library; what is looked up by a computed name is not seen.

    Attributes:
        names: globals and attributes that all this code names.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._seen: set[tuple[int, str]] = set()
        self._pending: list[tuple[Any, tuple[str, ...]]] = []  # values, and the names in the code that has read them

    def follow(self, function: Callable) -> None:
        """Add what it reads."""
        if isinstance(function, FunctionType):  # whatever package it is of
            self._function(function)
        else:
            self._pending.append((function, ()))
        while self._pending:
            self._visit(*self._pending.pop())

    def modules(self) -> list[nn.Module]:
        """Those among the values, each once."""
        return list(dict.fromkeys(module for read in self for module in _modules(read.value)))

    def _visit(self, value: Any, names: tuple[str, ...]) -> None:
        if isinstance(value, FunctionType):
            if (value.__module__ or "").partition(".")[0] not in _FOREIGN:
                self._function(value)
        elif isinstance(value, MethodType):
            self._read({"__self__": value.__self__}, "__self__", _names_in(value.__func__))
            self._pending.append((value.__func__, names))
        elif isinstance(value, functools.partial):
            parts = {"function": value.func} | value.keywords | dict(enumerate(value.args))
            for name in parts:
                self._read(parts, name, names)
        elif isinstance(value, (list, tuple, Mapping)):
            if not self._is_known(value, ""):
                self._pending += [(item, names) for item in _items(value)]
        elif not isinstance(value, _LEAVES):
            self._attributes(value, names)

    def _function(self, function: FunctionType) -> None:
        if self._is_known(function, ""):
            return
        names = _names_in(function)
        self.names.update(names)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if cell != _EMPTY:
                self._read(cell, name, names)
        defaults = dict(enumerate(function.__defaults__ or ())) | (function.__kwdefaults__ or {})
        for source, known in ((function.__globals__, names), (defaults, tuple(defaults))):
            for name in known:
                if name in source:
                    self._read(source, name, names)

    def _attributes(self, value: Any, names: tuple[str, ...]) -> None:
        """Of an object or a Python module, those that the code names; of its class the methods."""
        own = getattr(value, "__dict__", {})
        for name in (*names, "__call__"):
            if self._is_known(value, name):
                continue
            if name in own:
                self._read(own, name, names)
            elif not isinstance(value, ModuleType):
                kinds = (vars(kind) for kind in type(value).__mro__)
                method = next((function_in(kind[name]) for kind in kinds if name in kind), None)
                if method is not None:
                    self._pending += [(method, names), (value, _names_in(method))]

    def _is_known(self, value: Any, name: str) -> bool:
        key = (id(value), name)
        known = key in self._seen
        self._seen.add(key)
        return known

    def _read(self, source: Mapping | CellType, name: Any, names: tuple[str, ...]) -> None:
        value = source.cell_contents if isinstance(source, CellType) else source[name]
        self.append(Read(source, name, value))
        self._pending.append((value, names))


def function_in(entry: object) -> FunctionType | None:
    """The function of an entry of a class: a method of any kind, or a property."""
    entry = entry.fget if isinstance(entry, property) else getattr(entry, "__func__", entry)
    return entry if isinstance(entry, FunctionType) else None


def _names_in(function: object) -> tuple[str, ...]:
    """Globals and attributes that its code names."""
    code = getattr(function, "__code__", None)
    return tuple(dict.fromkeys(_names(code))) if isinstance(code, CodeType) else ()


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _items(value: object) -> list[object]:
    items = list(value.values()) if isinstance(value, Mapping) else value
    return list(items) if isinstance(items, (list, tuple)) and len(items) <= LONGEST else []


def _modules(value: object, depth: int = 0) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    for item in _items(value) if depth < DEEPEST else ():
        yield from _modules(item, depth + 1)
