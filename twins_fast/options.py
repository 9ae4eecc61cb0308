"""Dataclasses of options: their checks, and the way to and from plain dictionaries."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from twins_fast.validation import check_choice, check_not_negative

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def check_options(options: DataclassInstance, least: Mapping[str, int] | None = None) -> None:
    """Require every field of the dataclass instance to hold what its annotation says, numbers finite and >= 0.

    Args:
        options: the dataclass instance.
        least: field -> smallest number that it may hold, where that is not 0.

    Raises:
        ValueError: a field does not; the message names it.
    """
    for name, kind in _kinds(type(options)).items():
        _check(name, kind, getattr(options, name))
    for name, smallest in (least or {}).items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")


def to_plain(options: DataclassInstance) -> dict[str, Any]:
    """The fields of a dataclass instance as JSON types."""
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def from_plain(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """The inverse of :func:`to_plain`; a field that is missing takes its default.

    As JSON and TOML lack some values, ``"none"`` is None where a field may be None, and ``"8/255"`` a number.

    Raises:
        ValueError: unknown fields, one that is needed and missing, or a wrong value; ``where`` says of what.
    """
    _check_fields(cls, values, where)
    needed = [
        field.name
        for field in dataclasses.fields(cls)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values
    ]
    if needed:
        raise ValueError(f"{where} lacks {', '.join(needed)}")
    return cls(**_read_values(cls, values, where))


def updated(options: T, values: Mapping[str, Any], where: str) -> T:
    """A copy of a dataclass instance with some fields read from ``values``, as :func:`from_plain` reads them."""
    _check_fields(type(options), values, where)
    return dataclasses.replace(options, **_read_values(type(options), values, where))


def known(cls: type[T], **values: Any) -> T:
    """``cls`` from those of ``values`` that it has a field for."""
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in values.items() if name in names})


def fraction(text: str) -> float:
    """A number, or a fraction such as ``8/255``.

    Raises:
        ValueError: neither.
    """
    above, _, below = text.partition("/")
    try:
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{text!r} is not a number or fraction") from None


def fraction_of_255(value: float) -> str:
    """A length in pixel values as everybody writes it, n/255, where that is the very same number."""
    levels = round(255 * value)
    return f"{levels}/255" if 0 < levels < 255 and levels / 255 == value else repr(value)


@functools.cache
def _kinds(cls: type) -> dict[str, Any]:
    """The type of every field."""
    resolved = typing.get_type_hints(cls)
    return {field.name: resolved[field.name] for field in dataclasses.fields(cls)}


def _check_fields(cls: type, values: Mapping[str, Any], where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a table of fields, got {values!r}")
    unknown = sorted(set(values) - set(_kinds(cls)))
    if unknown:
        raise ValueError(f"unknown {where} fields: {', '.join(unknown)}; choose from {', '.join(_kinds(cls))}")


def _read_values(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    try:
        return {name: _read(_kinds(cls)[name], value) for name, value in values.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read(kind: Any, value: Any) -> Any:
    if value == "none" and _optional(kind):
        return None
    if isinstance(value, list):
        return tuple(value)
    return fraction(value) if kind is float and isinstance(value, str) else value


def _optional(kind: Any) -> bool:
    return isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union


def _check(name: str, kind: Any, value: Any) -> None:
    if _optional(kind):
        (item,) = (part for part in typing.get_args(kind) if part is not type(None))
        if value is not None:
            _check(name, item, value)
    elif typing.get_origin(kind) is Literal:
        check_choice(name, value, typing.get_args(kind))
    elif typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple):
            raise ValueError(f"{name} must be a list (in Python a tuple), got {value!r}")
        for item in value:
            _check(name, typing.get_args(kind)[0], item)
    elif kind in (int, float):
        check_not_negative(**{name: value})
        if kind is int and not isinstance(value, int):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    elif not isinstance(value, kind):
        raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
