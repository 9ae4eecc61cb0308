"""Recipes as TOML files: one table for each section, every field optional but ``data.dataset``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from twins_fast.options import fraction_of_255
from twins_fast.train.recipe import Recipe, RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_PIXELS = ("eps", "alpha")


def read_recipe(path: str | Path) -> Recipe:
    """The recipe in a TOML file; an unnamed one takes the name of the file.

    Raises:
        RecipeError: not TOML, or no recipe.
        OSError: the file cannot be read.
    """
    try:
        tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"{str(path)!r} is not a TOML file: {error}") from error
    try:
        return Recipe.from_dict({"name": Path(path).stem, **tables})
    except RecipeError as error:
        raise RecipeError(f"{str(path)!r}: {error}") from None


def recipe_as_toml(recipe: Recipe) -> str:
    """What :func:`read_recipe` reads back as the same recipe."""
    tables = recipe.to_dict()
    lines = [f"name = {_value('name', tables.pop('name'))}"]
    for section, fields in tables.items():
        lines += ["", f"[{section}]", *(f"{name} = {_value(name, value)}" for name, value in fields.items())]
    return "\n".join(lines) + "\n"


def _value(name: str, value: Any) -> str:
    """JSON's numbers, strings and lists are TOML's, too."""
    if name in _PIXELS:
        value = fraction_of_255(value)
    return json.dumps("none" if value is None else value, ensure_ascii=False)
