"""Pictures of runs: what their ``metrics.jsonl`` hold, over epochs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from twins_fast.train.pictures import pyplot, save

_SMOOTHED_POINTS = 40
_COLUMNS = 3
_WINGS = (("frozen", "--"), ("adaptive", "-"))

Lines = list[dict[str, Any]]
Points = list[tuple[float, float]]  # epoch, value


class Curve(NamedTuple):
    points: Points
    of: str = ""  # what it is of the run, where there are several
    style: str = "-"
    marker: str = ""
    band: list[tuple[float, float]] = []  # at each point, from where to where
    faint: bool = False  # behind another one that has the label


class Panel(NamedTuple):
    title: str
    unit: str
    curves: Callable[[Lines], Iterator[Curve]]  # of one run; empty ones are left out
    limits: tuple[float, float] | None = None
    logarithmic: bool = False


def draw_curves(runs: Mapping[str, Lines], target: str | Path, title: str) -> None:
    """Draw loss, training accuracy under attack (of ``standard``: without), evaluations and learning rate over epochs.

    Args:
        runs: method -> what ``RunFolder.read_metrics`` returns; each method has its colour.
        target: the PNG file to write.
        title: above the picture.
    """
    _draw(runs, (_LOSS, _RATE, _TRAINING, _TESTS), 2, target, title)


def draw_runs(runs: Mapping[str, Lines], target: str | Path, title: str) -> None:
    """Draw all that is known of one run or of several, each in its colour.

    Args:
        runs: label -> what ``RunFolder.read_metrics`` returns.
        target: the PNG or SVG file to write.
        title: above the picture.
    """
    _draw(runs, [panel for panel in _ALL if any(map(_curves_of(panel), runs.values()))], _COLUMNS, target, title)


def _draw(runs: Mapping[str, Lines], panels: Sequence[Panel], columns: int, target: str | Path, title: str) -> None:
    plt = pyplot()
    rows = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(6 * columns, 4 * rows), layout="constrained", squeeze=False)
    figure.suptitle(title)
    few = len(runs) <= 10
    colors = [f"C{n}" if few else plt.colormaps["turbo"](n / (len(runs) - 1)) for n in range(len(runs))]
    for place, axis in enumerate(axes.flat):
        if place < len(panels):
            _fill(axis, panels[place], dict(zip(runs, zip(colors, runs.values(), strict=True), strict=True)))
        else:
            axis.set_axis_off()
    save(figure, target)


def _fill(axis: Any, panel: Panel, runs: Mapping[str, tuple[Any, Lines]]) -> None:
    for run, (color, lines) in runs.items():
        for curve in _curves_of(panel)(lines):
            epochs, values = zip(*curve.points, strict=True)
            look = {"color": color, "linewidth": 0.6, "alpha": 0.3} if curve.faint else {"color": color}
            label = None if curve.faint else f"{run}, {curve.of}" if curve.of else run
            axis.plot(epochs, values, curve.style, marker=curve.marker, label=label, **look)
            if curve.band:
                axis.fill_between(epochs, *zip(*curve.band, strict=True), color=color, alpha=0.1, linewidth=0)
    axis.set(title=panel.title, ylabel=panel.unit, xlabel="epoch")
    axis.grid(alpha=0.3)
    if panel.limits:
        axis.set_ylim(*panel.limits)
    if panel.logarithmic:
        axis.set_yscale("log")
    if axis.get_legend_handles_labels()[1]:
        axis.legend(fontsize="small")


def _curves_of(panel: Panel) -> Callable[[Lines], list[Curve]]:
    return lambda lines: [curve for curve in panel.curves(lines) if curve.points]


def _points(lines: Lines, kind: str, key: str, factor: float = 1.0) -> Points:
    """Where it is known."""
    return [(line["epoch"], factor * line[key]) for line in lines if line["kind"] == kind and line.get(key) is not None]


def _loss(lines: Lines) -> Iterator[Curve]:
    raw = _points(lines, "train", "loss")
    yield Curve(raw, faint=True)
    yield Curve(_smoothed(raw))


def _wings_loss(lines: Lines) -> Iterator[Curve]:
    for wing, style in _WINGS:
        yield Curve(_smoothed(_points(lines, "train", f"{wing}_loss")), f"{wing} wing", style)


def _training(lines: Lines) -> Iterator[Curve]:
    wings = [
        Curve(_smoothed(_points(lines, "train", f"{wing}_accuracy", 100)), f"{wing} wing", style)
        for wing, style in _WINGS
    ]
    yield from wings
    if not wings[0].points:
        yield Curve(_smoothed(_points(lines, "train", "accuracy", 100)))


def _tests(lines: Lines) -> Iterator[Curve]:
    for kind, marker in (("validation", "o"), ("test", "s")):
        clean, robust = (_points(lines, kind, key, 100) for key in ("clean", "robust"))
        yield Curve(clean, f"{kind}, clean", "--", marker)
        gap = [(r, c) for (_, r), (_, c) in zip(robust, clean, strict=True)] if len(clean) > 1 else []
        yield Curve(robust, f"{kind}, under attack", "-", marker, gap)


def _gap(lines: Lines) -> Iterator[Curve]:
    for kind, marker in (("validation", "o"), ("test", "s")):
        yield Curve(_points(lines, kind, "robust_gap", 100), kind, "-", marker)


def _gradients(lines: Lines) -> Iterator[Curve]:
    measured = [line for line in lines if line["kind"] == "dynamics" and line.get("gradient_norm") is not None]
    means = _points(measured, "dynamics", "gradient_norm")
    spreads = [(line.get("gradient_variance") or 0.0) ** 0.5 for line in measured]
    band = [(mean - spread, mean + spread) for (_, mean), spread in zip(means, spreads, strict=True)]
    yield Curve(means, band=band)


def _effective(lines: Lines) -> Iterator[Curve]:
    measured = [line for line in lines if line["kind"] == "dynamics"]
    rates = [(line["epoch"], [rate for rate in line["effective_lrs"] if rate]) for line in measured]
    rates = [(epoch, each) for epoch, each in rates if each]  # zero has no logarithm
    quarters = [statistics.quantiles(each, n=4, method="inclusive") if each[1:] else 3 * each for _, each in rates]
    points = [(epoch, median) for (epoch, _), (_, median, _) in zip(rates, quarters, strict=True)]
    yield Curve(points, band=[(low, high) for low, _, high in quarters])


def _shifts(lines: Lines) -> Iterator[Curve]:
    yield Curve(_points(lines, "dynamics", "mean_shift"), "means")
    yield Curve(_points(lines, "dynamics", "variance_shift"), "ln of variances", "--")


def _single(kind: str, key: str) -> Callable[[Lines], Iterator[Curve]]:
    return lambda lines: iter([Curve(_points(lines, kind, key))])


_PERCENT = (0.0, 100.0)
_LOSS = Panel("training loss, each step and smoothed", "loss, nats", _loss)
_RATE = Panel("learning rate", "learning rate", _single("train", "lr"))
_TRAINING = Panel(
    "accuracy on training batches, under the training attack, smoothed", "accuracy, %", _training, _PERCENT
)
_TESTS = Panel("accuracy, and the gap between clean and robust", "accuracy, %", _tests, _PERCENT)
_ALL = (
    _LOSS,
    _TRAINING,
    _TESTS,
    Panel("training loss of each wing, smoothed", "loss, nats", _wings_loss),
    Panel("robust accuracy, training minus evaluation", "percentage points", _gap),
    Panel("running statistics, adaptive wing from frozen", "root mean square", _shifts),
    Panel("length of the weights", "|w|", _single("dynamics", "weight_norm")),
    Panel("distance from the start", "|w - w0|", _single("dynamics", "distance")),
    Panel("length of the gradient, and its deviation over batches", "|g|", _gradients),
    _RATE,
    Panel("effective learning rate of the layers, median and quartiles", "lr / |w|²", _effective, logarithmic=True),
)


def _smoothed(points: Points) -> Points:
    """Means over bins, so that the trend shows through the noise of the batches."""
    width = max(1, len(points) // _SMOOTHED_POINTS)
    bins = [points[i : i + width] for i in range(0, len(points), width)]
    return [(bin_[-1][0], sum(value for _, value in bin_) / len(bin_)) for bin_ in bins]
