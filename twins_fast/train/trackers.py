"""A run's figures for TensorBoard and Weights & Biases; neither is imported unless it is asked for."""

from __future__ import annotations

import importlib
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from twins_fast.checkpoints import write_atomically

_NOT_FIGURES = ("kind", "step", "layers", "wings")
_NEEDED = {"tensorboard": ("torch.utils.tensorboard", "SummaryWriter"), "wandb": ("wandb", "init")}


class TrackerError(ValueError):
    """A tracker that cannot be used here."""


class TensorBoard:
    """Writes into ``RUN/tensorboard``."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One run there for each run folder, which keeps its id; the project is ``$WANDB_PROJECT``, or twins-fast."""

    def __init__(self, folder: Path, config: dict[str, Any], step: int):
        import wandb

        known = folder / "wandb.id"
        if step < 0 or not known.exists():
            write_atomically(known, secrets.token_hex(4).encode())
        project = os.environ.get("WANDB_PROJECT", "twins-fast")
        name = "/".join(folder.resolve().parts[-2:])  # a baseline's own is that of its method
        about = {"project": project, "name": name, "id": known.read_text(), "resume": "allow"}
        try:
            self._run = wandb.init(dir=str(folder), config=config, **about)
        except wandb.Error as error:
            raise TrackerError(f"--log wandb: {error}") from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, figures: dict[str, float]) -> None:
        self._run.log(figures | {"step": step})  # its own steps never go back, those of a resumed run may

    def flush(self) -> None:
        """Nothing to do: a process of its own has the figures already."""

    def close(self) -> None:
        self._run.finish()


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """Those with these names, while entered.

    Args:
        names: keys of ``TRACKERS``.
        folder: of the run.
        config: what they are to show of the recipe.
        step: of the checkpoint that the run goes on from, -1 without one; what they know of later ones no longer holds.
    """

    def __init__(self, names: Sequence[str], folder: Path, config: dict[str, Any], step: int):
        self._about = names, folder, config, step
        self._open: list[Any] = []

    def __enter__(self) -> Trackers:
        names, *about = self._about
        with ExitStack() as stack:
            for name in names:
                self._open.append(TRACKERS[name](*about))
                stack.callback(self._open[-1].close)
            self._close = stack.pop_all().close
        return self

    def __exit__(self, *_) -> None:
        self._close()

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line of ``metrics.jsonl``."""
        figures = dict(scalars(line)) if self._open else {}
        for tracker in self._open:
            tracker.log(line["step"], figures)

    def flush(self) -> None:
        """Lose none of it, even if this process is killed."""
        for tracker in self._open:
            tracker.flush()


def check_trackers(names: Sequence[str]) -> None:
    """Require what they need to be installed.

    Raises:
        TrackerError: it is not, or it is broken.
    """
    for name in names:
        module, member = _NEEDED[name]
        try:
            getattr(importlib.import_module(module), member)  # a folder of that name can be imported, too
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise TrackerError(
                f"--log {name} needs the package {name} ({reason}): pip install 'twins-fast[{name}]'"
            ) from error


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Names such as ``train/loss`` and ``dynamics/weight_norms/conv1``, and their values."""
    for name, value in line.items():
        if name in _NOT_FIGURES:
            continue
        if isinstance(value, list):
            owners = line["wings" if name.endswith("_shifts") else "layers"]
            each = [(f"{line['kind']}/{name}/{owner}", one) for owner, one in zip(owners, value, strict=True)]
        else:
            each = [(f"{line['kind']}/{name}", value)]
        yield from ((path, one) for path, one in each if one is not None)
