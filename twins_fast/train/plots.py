"""Pictures: of one run or of several, of robustness over eps, of adversarial images."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from twins_fast.checkpoints import write_atomically
from twins_fast.evaluation import Column, Results
from twins_fast.evaluation.results import WORST

_SMOOTHED_POINTS = 40
_LARGEST_CHANGES = 8
_WINGS = {"frozen_accuracy": ("frozen wing", "--"), "adaptive_accuracy": ("adaptive wing", "-"), "accuracy": ("", "-")}


def draw_curves(runs: Mapping[str, list[dict]], target: str | Path, title: str) -> None:
    """Draw loss, training accuracy under attack (of ``standard``: without), evaluations and learning rate over epochs.

    Args:
        runs: method -> what ``RunFolder.read_metrics`` returns; each method has its colour.
        target: the PNG file to write.
        title: above the picture.
    """
    plt = _pyplot()
    figure, ((loss, rate), (training, tests)) = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    for number, (method, lines) in enumerate(runs.items()):
        color = f"C{number}"
        train = [line for line in lines if line["kind"] == "train"]
        raw = [(line["epoch"], line["loss"]) for line in train]
        if raw:
            loss.plot(*zip(*raw, strict=True), color=color, linewidth=0.6, alpha=0.3)
            loss.plot(*zip(*_smoothed(raw), strict=True), color=color, label=method)
            rate.plot(*zip(*[(line["epoch"], line["lr"]) for line in train], strict=True), color=color, label=method)
        for key, (wing, style) in _WINGS.items():
            points = [(line["epoch"], 100 * line[key]) for line in train if key in line]
            if points and not (key == "accuracy" and "frozen_accuracy" in train[0]):
                label = f"{method}, {wing}" if wing else method
                training.plot(*zip(*_smoothed(points), strict=True), style, color=color, label=label)
        for kind, marker in (("validation", "o"), ("test", "s")):
            measured = [line for line in lines if line["kind"] == kind]
            epochs = [line["epoch"] for line in measured]
            for key, label, style in (("clean", "clean", "--"), ("robust", "under attack", "-")):
                values = [100 * line[key] for line in measured]
                if measured:
                    tests.plot(epochs, values, style, marker=marker, color=color, label=f"{method}, {kind}, {label}")
            if len(measured) > 1:  # the gap that robustness costs
                clean, robust = ([100 * line[key] for line in measured] for key in ("clean", "robust"))
                tests.fill_between(epochs, robust, clean, color=color, alpha=0.08)
    loss.set(title="training loss, each step and smoothed", ylabel="loss, nats")
    rate.set(title="learning rate", ylabel="learning rate")
    training.set(
        title="accuracy on training batches, under the training attack, smoothed", ylabel="accuracy, %", ylim=(0, 100)
    )
    tests.set(title="accuracy, and the gap between clean and robust", ylabel="accuracy, %", ylim=(0, 100))
    for axis in (loss, rate, training, tests):
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize="small")
    _save(figure, target)


def draw_robustness(results: Results, target: str | Path, title: str) -> None:
    """Draw accuracy over eps, a line for each attack with its standard errors, from the clean images on."""
    figure, axis = _pyplot().subplots(figsize=(8, 5), layout="constrained")
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
    _save(figure, target)


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
    figure, axes = _pyplot().subplots(
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
    _save(figure, target)


def _pixels(image: Tensor) -> np.ndarray:
    """[C, H, W] as matplotlib takes it."""
    colours = image if len(image) == 3 else image[:1].expand(3, -1, -1)
    return colours.clamp(0, 1).permute(1, 2, 0).numpy()


def _pyplot() -> Any:
    import matplotlib  # slow to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, target: str | Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    _pyplot().close(figure)
    write_atomically(target, picture.getvalue())


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over bins, so that the trend shows through the noise of the batches."""
    width = max(1, len(points) // _SMOOTHED_POINTS)
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [(bin_[-1][0], sum(value for _, value in bin_) / len(bin_)) for bin_ in bins]
