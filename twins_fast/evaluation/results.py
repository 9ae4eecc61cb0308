"""What an evaluation has found: a table, CSV, and plain data for JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twins_fast.evaluation.named import NamedAttack
from twins_fast.options import fraction_of_255

WORST = "all"


def standard_error(part: float, images: int) -> float:
    """Of a part of ``images`` that were drawn at random."""
    return sqrt(part * (1 - part) / images)


def percent(part: float, images: int) -> str:
    """With the standard error that the number of images leaves."""
    return f"{100 * part:.1f} ± {100 * standard_error(part, images):.1f} %"


@dataclass(frozen=True)
class Column:
    """One attack with one radius.

    Attributes:
        attack: of the name ``all``, without a stage, for what all attacks together leave.
        eps: radius.
        right: bool [images], those that the network gets right in spite of it.
        after: of an attack of several stages: title and ``right`` of each.
        loss: mean cross-entropy of the images that the last stage attacked, clean and adversarial.
        seconds: it took, those of earlier processes included.
        images: adversarial [images, C, H, W], if they were kept.
    """

    attack: NamedAttack
    eps: float
    right: Tensor
    after: tuple[tuple[str, Tensor], ...] = ()
    loss: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    images: Tensor | None = None

    @property
    def name(self) -> str:
        return self.attack.name

    @property
    def title(self) -> str:
        return self.attack.title

    @property
    def accuracy(self) -> float:
        return float(self.right.double().mean())

    @property
    def standard_error(self) -> float:
        return standard_error(self.accuracy, len(self.right))

    @property
    def full_title(self) -> str:
        """With the radius."""
        return self.title if self.name == "clean" else f"{self.title}, eps {fraction_of_255(self.eps)}"


@dataclass(frozen=True)
class Results:
    """Accuracy under several attacks and radii.

    Attributes:
        columns: in the order asked for, radius by radius; where there are two attacks or more, what all of them leave
            (``all``) after them: an image counts if it withstands each.
        labels: int64 [images].
        norm: of the balls.
        classes: names; numbers where none were given.
        alarms: sentences about what may be wrong with the figures, or with the network's gradients.
        clean: images [images, C, H, W], if they were kept.
    """

    columns: tuple[Column, ...]
    labels: Tensor
    norm: str
    classes: tuple[str, ...]
    alarms: tuple[str, ...] = ()
    clean: Tensor | None = None

    def __getitem__(self, which: str | tuple[str, float]) -> Column:
        """By the name of the attack, and its radius where there are several."""
        name, eps = (which, None) if isinstance(which, str) else which
        found = [column for column in self.columns if column.name == name and eps in (None, column.eps)]
        if not found or (len(found) > 1 and name != "clean"):
            have = ", ".join(f"({column.name!r}, {fraction_of_255(column.eps)})" for column in self.columns)
            raise KeyError(f"{which!r} is not one of {have}")
        return found[0]

    @property
    def images(self) -> int:
        return len(self.labels)

    @property
    def radii(self) -> list[float]:
        return list(dict.fromkeys(column.eps for column in self.columns))

    def at(self, eps: float) -> list[Column]:
        return [column for column in self.columns if column.eps == eps]

    def __str__(self) -> str:
        """A Markdown table, a line for each radius, and the alarms."""
        titles = [column.title for column in self.at(self.radii[0])]
        rows = [
            [f"eps {fraction_of_255(eps)}", *(percent(column.accuracy, self.images) for column in self.at(eps))]
            for eps in self.radii
        ]
        return "\n\n".join([markdown([[f"{self.images} images, {self.norm}", *titles], *rows]), *self.warnings])

    @property
    def warnings(self) -> list[str]:
        return [f"warning: {alarm}" for alarm in self.alarms]

    def per_class(self) -> str:
        """A Markdown table for each radius, a line for each class."""
        tables = []
        for eps in self.radii:
            rows = [[f"eps {fraction_of_255(eps)}", "images", *(column.title for column in self.at(eps))]]
            for number, name in enumerate(self.classes):
                own = self.labels == number
                count = int(own.sum())
                parts = [float(column.right[own].double().mean()) if count else None for column in self.at(eps)]
                rows.append([name, str(count), *("none" if part is None else percent(part, count) for part in parts)])
            tables.append(markdown(rows))
        return "\n\n".join(tables)

    def to_csv(self) -> str:
        """A line for each attack, radius and class, and one for all classes."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["attack", "norm", "eps", "class", "images", "accuracy", "standard_error"])
        for column in self.columns:
            for name, right in self._by_class(column):
                part = float(right.double().mean())
                figures = [part, standard_error(part, len(right))] if len(right) else ["", ""]
                writer.writerow([column.name, self.norm, column.eps, name, len(right), *figures])
        return text.getvalue()

    def to_plain(self) -> dict[str, Any]:
        """JSON types."""
        return {
            "images": self.images,
            "norm": self.norm,
            "results": [
                {
                    "attack": column.name,
                    "title": column.title,
                    "eps": column.eps,
                    "accuracy": column.accuracy,
                    "standard_error": column.standard_error,
                    "classes": {
                        name: float(right.double().mean()) if len(right) else None
                        for name, right in self._by_class(column)[1:]
                    },
                    "after": {title: float(right.double().mean()) for title, right in column.after},
                    "seconds": round(column.seconds, 1),
                }
                for column in self.columns
            ],
            "alarms": list(self.alarms),
        }

    def to_npz(self) -> bytes:
        """Kept images as an ``.npz`` file: ``clean``, ``labels``, ``classes``, and ``ATTACK-epsRADIUS`` of each."""
        kept = {f"{c.name}-eps{c.eps:.6g}": c.images for c in self.columns if c.attack.attacks}
        kept |= {"clean": self.clean, "labels": self.labels}
        arrays: dict[str, Any] = {name: array.numpy() for name, array in kept.items() if array is not None}
        arrays["classes"] = np.array(self.classes)
        file = io.BytesIO()
        np.savez(file, **arrays)
        return file.getvalue()

    def _by_class(self, column: Column) -> list[tuple[str, Tensor]]:
        named = [(name, column.right[self.labels == number]) for number, name in enumerate(self.classes)]
        return [("all classes", column.right), *named]


def worst_case(columns: Sequence[Column]) -> Column:
    """What all attacks of one radius together leave."""
    right = torch.stack([column.right for column in columns]).all(0)
    return Column(NamedAttack(WORST, WORST, ()), columns[0].eps, right)


def markdown(rows: list[list[str]]) -> str:
    """A table, whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
