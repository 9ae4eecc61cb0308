"""Types of recipe fields that the command line writes in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from tyro.conf import arg
from tyro.constructors import PrimitiveConstructorSpec

from twins_fast.options import fraction, fraction_of_255


def short(flag: str):
    """Annotation: a field that the command line also knows without the name of its section."""
    return arg(aliases=(flag,))


def _word(metavar: str, read: Callable[[str], Any], write: Callable[[Any], str] = str) -> PrimitiveConstructorSpec:
    """Annotation: a field that is one word on the command line."""
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: True,  # the dataclasses check their fields themselves
        str_from_instance=lambda value: [write(value)],
    )


def _several(metavar: str, read: Callable[[str], Any]) -> PrimitiveConstructorSpec:
    return _word(
        metavar,
        lambda word: tuple(read(part) for part in word.split(",") if part),
        lambda values: ",".join(map(str, values)),
    )


Fraction = Annotated[float, _word("X", fraction)]  # "1/3" or "0.03"
Pixels = Annotated[float, _word("N/255", fraction, fraction_of_255)]
OptionalPixels = Annotated[float | None, _word("N/255", fraction)]
SeveralPixels = Annotated[tuple[float, ...], _several("N/255,...", fraction)]
Names = Annotated[tuple[str, ...], _several("A,B,...", str)]
Integers = Annotated[tuple[int, ...], _several("I,J,...", int)]
OptionalInteger = Annotated[
    int | None,
    _word("N|none", lambda word: None if word == "none" else int(word), lambda n: "none" if n is None else str(n)),
]
