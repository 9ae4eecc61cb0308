"""Settings of a sweep: which fields of a recipe take which values, as a grid or by random draws."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from twins_fast.methods import METHODS
from twins_fast.options import fraction, to_plain
from twins_fast.train.recipe import Recipe, RecipeError
from twins_fast.train.seeds import derived_seed

Setting = dict[str, Any]  # dotted name of a field -> plain value
_METHOD = "method.name"
_RANGE = re.compile(r"(uniform|log-uniform)\(([^,()]+),([^,()]+)\)")


@dataclass(frozen=True)
class Axis:
    """A field, and the values that it takes: some, or a range to draw from."""

    field: str
    values: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    logarithmic: bool = False

    @property
    def is_range(self) -> bool:
        return not self.values

    def draw(self, generator: random.Random) -> Any:
        """One of the values, or a number in the range, of three digits."""
        if not self.is_range:
            return generator.choice(self.values)
        if self.logarithmic:
            return float(f"{math.exp(generator.uniform(math.log(self.low), math.log(self.high))):.3g}")
        return float(f"{generator.uniform(self.low, self.high):.3g}")


def axis_of(text: str) -> Axis:
    """``FIELD=A,B,...``, where a list is ``[A,B]``, or ``FIELD=uniform(LOW,HIGH)`` or ``FIELD=log-uniform(LOW,HIGH)``.

    Raises:
        RecipeError: anything else.
    """
    field, equals, words = text.partition("=")
    field = _METHOD if field == "method" else field
    if not (equals and field and words.strip()):
        raise RecipeError(f"--over {text}: write FIELD=A,B,... or FIELD=log-uniform(LOW,HIGH)")
    if found := _RANGE.fullmatch(words.replace(" ", "")):
        kind, *ends = found.groups()
        try:
            low, high = map(fraction, ends)
        except ValueError as error:
            raise RecipeError(f"--over {text}: {error}") from None
        logarithmic = kind == "log-uniform"
        if not low < high < math.inf or (logarithmic and low <= 0):
            raise RecipeError(f"--over {text}: a range goes up{', from above 0' if logarithmic else ''}")
        return Axis(field, (), low, high, logarithmic)
    values = tuple(_value(word) for word in re.split(r",(?![^\[]*\])", words))
    return Axis(field, tuple(value for number, value in enumerate(values) if value not in values[:number]))


def _value(word: str) -> Any:
    try:
        return json.loads(word)
    except json.JSONDecodeError:
        return word.strip()


def settings_of(recipe: Recipe, axes: Sequence[Axis], draws: int = 0, seed: int = 0) -> list[Setting]:
    """The settings of a sweep, each once; a field that the method of a setting lacks is left out of it.

    Args:
        recipe: what they change.
        axes: what is varied.
        draws: how many are drawn at random; 0 for the grid of all values. More draws go on from fewer.
        seed: of the draws.

    Raises:
        RecipeError: an unknown field, a value that makes no sense, or a range in a grid.
    """
    fields = [axis.field for axis in axes]
    if len(set(fields)) < len(fields):
        raise RecipeError(f"each field can be varied once, got {', '.join(fields)}")
    if ranges := [axis.field for axis in axes if axis.is_range and not draws]:
        raise RecipeError(f"{', '.join(ranges)}: a range needs --draws N")
    if "run.seed" in fields:
        raise RecipeError("the seeds of a sweep are named by --seeds")
    if draws:
        generators = (random.Random(derived_seed("sweep", seed, number)) for number in range(draws))
        combinations: Iterable[tuple[Any, ...]] = [tuple(axis.draw(g) for axis in axes) for g in generators]
    else:
        combinations = itertools.product(*(axis.values for axis in axes))
    settings: list[Setting] = []
    used: set[str] = set()
    for values in combinations:
        setting = _of_its_method(recipe, dict(zip(fields, values, strict=True)))
        used |= setting.keys()
        applied(recipe, setting)
        if setting not in settings:
            settings.append(setting)
    if unused := [field for field in fields if field not in used]:
        raise RecipeError(f"no method of the sweep has the option {', '.join(unused)}")
    return settings


def _of_its_method(recipe: Recipe, setting: Setting) -> Setting:
    name = setting.get(_METHOD, recipe.method.name)
    if name not in METHODS:
        return setting  # which the recipe refuses
    options = {"method.name", *(f"method.{option}" for option in to_plain(METHODS[name]()))}
    return {field: value for field, value in setting.items() if not field.startswith("method.") or field in options}


def applied(recipe: Recipe, setting: Setting) -> Recipe:
    """The recipe of a setting.

    Raises:
        RecipeError: an unknown field, or a value that makes no sense.
    """
    sections: dict[str, dict[str, Any]] = {}
    for field, value in setting.items():
        section, dot, name = field.partition(".")
        if not dot:
            raise RecipeError(f"{field!r} is not the full name of a field, such as optimizer.lr")
        sections.setdefault(section, {})[name] = value
    return recipe.replaced(**sections)


def label_of(setting: Setting) -> str:
    """A short name: the last parts of the fields' names, and their values."""
    return " ".join(
        (f"{value}" if field == _METHOD else f"{field.rpartition('.')[2]}={_word(value)}")
        for field, value in setting.items()
    )


def _word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list) else str(value)
