"""Dataclasses of options: their checks, and the way to and from plain dictionaries."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from twins_fast.validation import check_choice, check_not_negative

T = TypeVar("T")


def check_options(options: Any) -> None:
    """Require every field of the dataclass instance to hold what its annotation says, numbers finite and >= 0.

    Raises:
        ValueError: it does not; the message names the field.
    """
    for name, kind in hints(type(options)).items():
        _check(name, kind, getattr(options, name))


def to_plain(options: Any) -> dict[str, Any]:
    """The fields of a dataclass instance as JSON types, None included."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_plain(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """The inverse of :func:`to_plain`; a field that is missing takes its default.

    Raises:
        ValueError: unknown fields, or one that is needed and missing; ``where`` says of what.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of fields, got {values!r}")
    fields = dataclasses.fields(cls)
    unknown = sorted(set(values) - {field.name for field in fields})
    if unknown:
        raise ValueError(f"unknown {where} fields: {', '.join(unknown)}")
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values]
    if needed:
        raise ValueError(f"{where} lacks {', '.join(needed)}")
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def known(cls: type[T], **values: Any) -> T:
    """``cls`` from those of ``values`` that it has a field for."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


@functools.cache
def hints(cls: type) -> dict[str, Any]:
    """The resolved annotation of every field."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def _check(name: str, kind: Any, value: Any) -> None:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        (item,) = (part for part in typing.get_args(kind) if part is not type(None))
        if value is not None:
            _check(name, item, value)
    elif typing.get_origin(kind) is Literal:
        check_choice(name, value, typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a list, got {value!r}")
        for item in value:
            _check(name, typing.get_args(kind)[0], item)
    elif kind in (int, float):
        check_not_negative(**{name: value})
        if kind is int and not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    elif not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
