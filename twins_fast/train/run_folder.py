"""A run folder: config.json, metrics.jsonl, checkpoints and the picture of the curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from twins_fast.checkpoints import write_atomically
from twins_fast.train.recipe import Recipe


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """The files of one run.

    ``config.json`` holds the recipe and where the data is; ``metrics.jsonl`` one line per step and
    per evaluation; ``last.safetensors`` everything to resume from; ``best.safetensors`` the network
    with the best robust accuracy; ``result.json`` the final figures; ``curves.png`` the picture.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.last = self.folder / "last.safetensors"
        self.best = self.folder / "best.safetensors"
        self.result = self.folder / "result.json"
        self.curves = self.folder / "curves.png"

    def exists(self) -> bool:
        return self.config.exists()

    def create(self, recipe: Recipe, data_root: str | None) -> None:
        """Make the folder.

        Raises:
            RunError: it cannot be written, or already holds a run.
        """
        if self.exists() or self.last.exists():
            raise RunError(f"run folder {str(self.folder)!r} already holds a run; use --resume {self.folder}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            root = None if data_root is None else str(Path(data_root).resolve())  # a resume may start elsewhere
            config = {"recipe": recipe.to_dict(), "data_root": root}
            write_atomically(self.config, json.dumps(config, indent=2).encode())
        except OSError as error:
            raise RunError(f"run folder {str(self.folder)!r} cannot be written: {error}") from error

    def load_config(self) -> tuple[Recipe, str | None]:
        """The recipe and data root the run was made with."""
        try:
            config = json.loads(self.config.read_text())
            return Recipe.from_dict(config["recipe"]), config["data_root"]
        except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise RunError(f"{str(self.folder)!r} is not a run folder: cannot read config.json ({error})") from error

    def check_recipe(self, recipe: Recipe) -> None:
        """Require the run to be of this very recipe."""
        own, asked = _flat(self.load_config()[0].to_dict()), _flat(recipe.to_dict())
        differing = [
            f"{name} is {own.get(name)!r}, asked {asked.get(name)!r}"
            for name in {**own, **asked}
            if own.get(name) != asked.get(name)
        ]
        if differing:
            raise RunError(f"run folder {str(self.folder)!r} belongs to another recipe: {'; '.join(differing)}")

    def log(self, **line) -> None:
        with self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_metrics(self) -> list[dict]:
        """All lines; a last one that a kill cut short is left out."""
        if not self.metrics.exists():
            return []
        lines = []
        for text in self.metrics.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Drop what was logged after ``step``, because it will be computed again."""
        lines = [json.dumps(line) + "\n" for line in self.read_metrics() if line["step"] <= step]
        write_atomically(self.metrics, "".join(lines).encode())


def _flat(tables: dict[str, Any]) -> dict[str, Any]:
    """Dotted names -> values."""
    rows = {name: value if isinstance(value, dict) else {"": value} for name, value in tables.items()}
    return {f"{name}.{key}".rstrip("."): value for name, row in rows.items() for key, value in row.items()}
