"""The picture of a run's curves."""

from __future__ import annotations

from pathlib import Path


def draw_curves(lines: list[dict], target: str | Path, title: str) -> None:
    """Draw loss, training accuracy per wing, and clean and robust test accuracy over steps.

    Args:
        lines: what ``Run.read_metrics`` returns.
        target: the PNG file to write.
    """
    import matplotlib  # slow to import, and only needed here

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [line for line in lines if line["kind"] == "train"]
    test = [line for line in lines if line["kind"] == "test"]
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    figure.suptitle(title)
    axes[0].plot([line["step"] for line in train], [line["loss"] for line in train], linewidth=0.8)
    axes[0].set(title="training loss", xlabel="step")
    for key, label in (
        ("frozen_accuracy", "frozen wing"),
        ("adaptive_accuracy", "adaptive wing"),
        ("accuracy", "batch"),
    ):
        points = [(line["step"], 100 * line[key]) for line in train if key in line]
        if points and not (key == "accuracy" and "frozen_accuracy" in train[0]):
            axes[1].plot(*zip(*_smoothed(points), strict=True), label=label)
    axes[1].set(title="accuracy on training batches, %", xlabel="step")
    for key, label in (("clean", "clean"), ("robust", "under attack")):
        axes[2].plot([line["step"] for line in test], [100 * line[key] for line in test], marker="o", label=label)
    axes[2].set(title="test accuracy, %", xlabel="step")
    for axis in axes[1:]:
        axis.set_ylim(0, 100)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
    axes[0].grid(alpha=0.3)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Means over at most 200 bins, so that the trend shows through the batch noise."""
    width = max(1, len(points) // 200)
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [(bin_[-1][0], sum(value for _, value in bin_) / len(bin_)) for bin_ in bins]
