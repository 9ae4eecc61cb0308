"""Pictures of evaluations: robustness over eps, adversarial images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import Tensor

from twins_fast.evaluation import Column, Results
from twins_fast.evaluation.results import WORST
from twins_fast.train.pictures import pyplot, save

_LARGEST_CHANGES = 8


def draw_robustness(results: Results, target: str | Path, title: str) -> None:
    """Draw accuracy over eps, a line for each attack with its standard errors, from the clean images on."""
    figure, axis = pyplot().subplots(figsize=(8, 5), layout="constrained")
    scale = 255 if results.norm == "linf" else 1
    clean = [column for column in results.columns if column.name == "clean"][:1]
    for name in dict.fromkeys(column.name for column in results.columns if column.name != "clean"):
        columns = [column for column in results.columns if column.name == name]
        points = [*((0.0, column) for column in clean), *((column.eps, column) for column in columns)]
        points.sort(key=lambda point: point[0])
        axis.errorbar(
            [scale * eps for eps, _ in points],
            [100 * column.accuracy for _, column in points],
            [100 * column.standard_error for _, column in points],
            fmt="--" if name == WORST else "o-",
            capsize=3,
            label="all attacks" if name == WORST else columns[0].title,
        )
    axis.set(title=title, xlabel=f"eps ({results.norm}{', of 255' if results.norm == 'linf' else ''})")
    axis.set(ylabel=f"accuracy on {results.images} images, %", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save(figure, target)


def draw_changes(
    results: Results, column: Column, probabilities: Callable[[Tensor], Tensor], target: str | Path
) -> None:
    """Draw the images whose loss an attack raised most, of those that were right: clean, adversarial, their difference.

    Args:
        results: with the clean images.
        column: with its adversarial ones.
        probabilities: of the classes, [N, classes], of images on the CPU.
        target: the PNG file to write.
    """
    before, after = probabilities(results.clean), probabilities(column.images)
    own = results.labels.view(-1, 1)
    rise = before.gather(1, own).log() - after.gather(1, own).log()
    rise = rise.flatten().masked_fill(before.argmax(1) != results.labels, 0)
    chosen = rise.argsort(descending=True)[: max(1, min(_LARGEST_CHANGES, int((rise > 0).sum())))]
    figure, axes = pyplot().subplots(
        3, len(chosen), figsize=(1.6 * len(chosen) + 0.6, 6), layout="constrained", squeeze=False
    )
    scale = max(float((column.images[chosen] - results.clean[chosen]).abs().max()), 1e-6)
    figure.suptitle(f"{column.full_title}: the largest rises of the loss")
    for place, index in enumerate(chosen.tolist()):
        clean, adversarial = results.clean[index], column.images[index]
        for row, (image, seen) in enumerate(((clean, before[index]), (adversarial, after[index]))):
            name = results.classes[int(seen.argmax())]
            axes[row][place].imshow(_pixels(image))
            axes[row][place].set_title(f"{name} {float(seen.max()):.0%}", fontsize="small")
        axes[2][place].imshow(_pixels(0.5 + (adversarial - clean) / (2 * scale)))
        axes[2][place].set_title(f"truly {results.classes[int(results.labels[index])]}", fontsize="small")
    for row, words in enumerate(("clean", "adversarial", f"difference x {0.5 / scale:.3g}")):
        axes[row][0].set_ylabel(words)
        for axis in axes[row]:
            axis.set(xticks=[], yticks=[])
    save(figure, target)


def _pixels(image: Tensor) -> np.ndarray:
    """[C, H, W] as matplotlib takes it."""
    colours = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    return colours.clamp(0, 1).permute(1, 2, 0).numpy()
