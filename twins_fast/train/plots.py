"""The picture of one run or of several."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

from twins_fast.checkpoints import write_atomically

_SMOOTHED_POINTS = 40
_WINGS = {"frozen_accuracy": ("frozen wing", "--"), "adaptive_accuracy": ("adaptive wing", "-"), "accuracy": ("", "-")}


def draw_curves(runs: Mapping[str, list[dict]], target: str | Path, title: str) -> None:
    """Draw loss, training accuracy under attack (of ``standard``: without), evaluations and learning rate over epochs.

    Args:
        runs: method -> what ``RunFolder.read_metrics`` returns; each method has its colour.
        target: the PNG file to write.
        title: above the picture.
    """
    import matplotlib  # slow to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    plt.close(figure)
    write_atomically(target, picture.getvalue())


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over bins, so that the trend shows through the noise of the batches."""
    width = max(1, len(points) // _SMOOTHED_POINTS)
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [(bin_[-1][0], sum(value for _, value in bin_) / len(bin_)) for bin_ in bins]
