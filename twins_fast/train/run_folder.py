"""A run folder: config.json, metrics.jsonl, checkpoints and the picture of the curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from twins_fast.checkpoints import CheckpointError, read_meta, write_atomically
from twins_fast.checkpoints.write import naming
from twins_fast.json_text import parse
from twins_fast.train.recipe import Recipe, RecipeError


class RunError(ValueError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """The files of one run.

    ``config.json`` holds the recipe and where the data is; ``metrics.jsonl`` one line per step and
    per evaluation; ``last.safetensors`` everything to resume from; ``best.safetensors`` the network
    with the best robust accuracy; ``start.safetensors`` the weights before the first step;
    ``result.json`` the final figures; ``curves.png`` the picture; ``evaluation.jsonl`` what
    ``twins-fast eval`` knows already, ``evaluation.json`` what it found last about the best network;
    ``tensorboard/``, ``wandb/`` and ``wandb.id`` are those of :mod:`twins_fast.train.trackers`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = self.folder / "config.json"
        self.metrics = self.folder / "metrics.jsonl"
        self.last = self.folder / "last.safetensors"
        self.best = self.folder / "best.safetensors"
        self.start = self.folder / "start.safetensors"
        self.result = self.folder / "result.json"
        self.curves = self.folder / "curves.png"
        self.evaluation = self.folder / "evaluation.jsonl"
        self.evaluated = self.folder / "evaluation.json"

    def exists(self) -> bool:
        return self.config.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder, and let no other process write into it; the lock ends with this process at the latest.

        Raises:
            RunError: the folder cannot be written, or another process has it.
        """
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise RunError(f"another process is writing into run folder {str(self.folder)!r}") from None
        except OSError as error:
            raise RunError(f"run folder {str(self.folder)!r} cannot be written: {error}") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Values that its files lack, or that make no sense, become a RunError that names the folder."""
        try:
            yield
        except (RunError, CheckpointError):
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise RunError(
                f"run folder {str(self.folder)!r}: a value in its files is missing or makes no sense "
                f"({type(error).__name__}: {error})"
            ) from error

    def create(self, recipe: Recipe, data_root: str | None) -> None:
        """Write the configuration.

        Raises:
            RunError: the folder already holds a run.
            OSError: it cannot be written.
        """
        if self.exists() or self.last.exists():
            raise RunError(f"run folder {str(self.folder)!r} already holds a run; use --resume {self.folder}")
        self._write_config(recipe, data_root)

    def update(self, recipe: Recipe, data_root: str | None) -> None:
        """Take over what :meth:`check_recipe` lets a recipe change, and where the data is now."""
        if self.load_config() != (recipe, data_root):
            self._write_config(recipe, data_root)

    def _write_config(self, recipe: Recipe, data_root: str | None) -> None:
        root = None if data_root is None else str(Path(data_root).resolve())  # a resume may start elsewhere
        config = {"recipe": recipe.to_dict(), "data_root": root}
        write_atomically(self.config, json.dumps(config, indent=2).encode())

    def load_config(self) -> tuple[Recipe, str | None]:
        """The recipe and data root the run was made with."""
        try:
            config = parse(self.config.read_text())
            return Recipe.from_dict(config["recipe"]), config["data_root"]
        except RecipeError as error:
            raise RunError(f"run folder {str(self.folder)!r}, perhaps of another version: {error}") from error
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise RunError(f"{str(self.folder)!r} is not a run folder: cannot read config.json ({error})") from error

    def check_recipe(self, recipe: Recipe) -> None:
        """Require the run to be of this very recipe, or of one with fewer epochs, which extends it.

        How many processes load images, and what is logged, may change.

        Raises:
            RunError: it is not, or its learning rates depend on the number of epochs.
        """
        own_recipe = self.load_config()[0]
        own, asked = own_recipe.fields(), recipe.fields()
        differing = [name for name in {**own, **asked} if own.get(name) != asked.get(name)]
        differing = [name for name in differing if name != "data.workers" and not name.startswith("log.")]
        if differing == ["optimizer.epochs"] and own[differing[0]] < asked[differing[0]]:
            if own_recipe.optimizer.schedule == "multistep":
                return
            raise RunError(
                f"run folder {str(self.folder)!r} cannot be extended: the learning rates of "
                f"{own_recipe.optimizer.schedule!r} depend on the number of epochs"
            )
        if differing:
            said = "; ".join(f"{name} is {own.get(name)!r}, asked {asked.get(name)!r}" for name in differing)
            raise RunError(f"run folder {str(self.folder)!r} belongs to another recipe: {said}")

    def log(self, **line) -> None:
        with naming(self.metrics), self.metrics.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def read_result(self) -> dict:
        """The content of ``result.json``; empty if there is none that can be read."""
        return _read_if_possible(self.result)

    def read_evaluation(self) -> dict:
        """The content of ``evaluation.json``, likewise; empty, too, if it is of an earlier best network."""
        found = _read_if_possible(self.evaluated)
        return found if self.best.exists() and found.get("step") == read_meta(self.best).get("step") else {}

    def read_metrics(self) -> list[dict]:
        """All lines; a last one that a kill cut short is left out.

        Raises:
            RunError: another line is broken.
        """
        if not self.metrics.exists():
            return []
        lines, texts = [], self.metrics.read_bytes().splitlines()
        for number, text in enumerate(texts, 1):
            try:
                lines.append(_read_line(text))
            except ValueError as error:
                if number < len(texts):
                    raise RunError(
                        f"{str(self.metrics)!r}: line {number} is broken ({error}); once it is deleted the run goes on"
                    ) from error
        return lines

    def rewind_metrics(self, step: int, evaluated: int) -> list[dict]:
        """Drop what was logged after a checkpoint: of training after ``step``, evaluations after ``evaluated``.

        Returns:
            The lines that stay.
        """
        last = {"train": step, "dynamics": step}
        lines = [line for line in self.read_metrics() if line["step"] <= last.get(line["kind"], evaluated)]
        write_atomically(self.metrics, "".join(json.dumps(line) + "\n" for line in lines).encode())
        return lines


def labelled(folders: Sequence[str]) -> dict[str, RunFolder]:
    """Runs by the shortest ends of their paths that tell them apart.

    Raises:
        RunError: none, or a folder that holds no run.
    """
    if not folders:
        raise RunError("name the folder of a run, or those of several")
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for path in paths:
        if not RunFolder(path).exists():
            raise RunError(f"{str(path)!r} is not a run folder: it has no config.json")
    parts = next(
        labels
        for length in range(1, 1 + max(len(path.parts) for path in paths))
        if len(set(labels := ["/".join(path.parts[-length:]) for path in paths])) == len(paths)
    )
    return {label: RunFolder(path) for label, path in zip(parts, paths, strict=True)}


def _read_if_possible(file: Path) -> dict:
    try:
        found = parse(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_line(text: bytes) -> dict[str, Any]:
    line = parse(text)
    needed = {"kind": str, "step": int, "epoch": (int, float)}
    if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in needed.items()):
        raise ValueError("it has no kind, step and epoch")
    for name, value in line.items():
        if name != "kind" and value is not None and not isinstance(value, (int, float, list, dict)):
            raise ValueError(f"its {name} is no number")
    return line
