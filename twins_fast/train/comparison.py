"""What several runs reached, side by side."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from twins_fast.evaluation.results import markdown, percent
from twins_fast.options import fraction_of_255
from twins_fast.train.recipe import Recipe
from twins_fast.train.run_folder import RunFolder

_OF_NO_CONSEQUENCE = ("name", "data.workers", "evaluation.before", "run.baselines", "log.dynamics", "log.to")
_IN_COLUMNS_ANYWAY = ("method.name", "network.arch", "optimizer.epochs")
_ACCURACIES = ("clean", "robust")


def compared(runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """A row of plain values for each run; what is not known of it is left out.

    A run that has not ended has the figures of its evaluations so far, which may be on validation images.

    Args:
        runs: label -> folder.

    Raises:
        RunError: a folder that cannot be read.
    """
    recipes = {label: run.load_config()[0] for label, run in runs.items()}
    fields = _differing([recipe.fields() for recipe in recipes.values()])
    rows = []
    for label, run in runs.items():
        with run.reading():
            rows.append(_row(label, run, recipes[label], fields))
    return rows


def comparison_table(rows: list[dict[str, Any]]) -> str:
    """Markdown; accuracies with their standard errors, differences in percentage points."""
    within = ("images", "of")  # another cell
    shown = [{name: _cell(name, value, row) for name, value in row.items() if name not in within} for row in rows]
    names = _names(shown)
    return markdown([names, *([row.get(name, "") for name in names] for row in shown)])


def comparison_csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, _names(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _differing(recipes: list[dict[str, Any]]) -> list[str]:
    """Fields of which two recipes have different values; one that a method lacks does not count."""
    names = list(dict.fromkeys(name for fields in recipes for name in fields))
    values = {name: {json.dumps(fields[name]) for fields in recipes if name in fields} for name in names}
    return [name for name in names if len(values[name]) > 1 and name not in _OF_NO_CONSEQUENCE + _IN_COLUMNS_ANYWAY]


def _row(label: str, run: RunFolder, recipe: Recipe, fields: list[str]) -> dict[str, Any]:
    lines, result, own = run.read_metrics(), run.read_result(), recipe.fields()
    steps = [line["step"] for line in lines]
    if lines and result.get("step") != max(steps):  # of a run that was shorter, and is being extended
        result = {}
    row = {"run": label, "method": recipe.method.name, "network": recipe.network.arch}
    row |= {name: own[name] for name in fields if name in own}
    done = max((line["epoch"] for line in lines), default=recipe.optimizer.epochs if result else 0)
    row |= {"epochs": round(done, 2), "of": recipe.optimizer.epochs}
    row["seconds"] = float(result.get("seconds", lines[-1].get("seconds", 0.0) if lines else 0.0))
    best, last = (result.get("best"), result["after"]) if result else _evaluations(lines)
    if last:
        row |= {"images": _count(last["images"]), "of images": "test" if result else last["kind"]}
        row |= {f"{name}, last": _accuracy(last[name]) for name in _ACCURACIES}
    if best and last:
        row |= {"best epoch": int(best["epoch"])} | {f"{name}, best": _accuracy(best[name]) for name in _ACCURACIES}
        row["best minus last"] = row["robust, best"] - row["robust, last"]
    gaps = [float(line["robust_gap"]) for line in lines if line.get("robust_gap") is not None]
    row |= {"robust gap": gaps[-1]} if gaps else {}
    return row | _evaluated(run)


def _evaluations(lines: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The best and the last one of the images on which the best network is chosen."""
    measured = [line for line in lines if line["kind"] in ("validation", "test") and line["epoch"] > 0]
    best = max(measured, key=lambda line: line["robust"], default=None)
    return best and {**best, "epoch": round(best["epoch"])}, measured[-1] if measured else None


def _evaluated(run: RunFolder) -> dict[str, float]:
    """What ``twins-fast eval`` found last about the best network, clean accuracy apart."""
    found = run.read_evaluation()
    return {
        f"{one['title']}, {found['norm']} eps {fraction_of_255(one['eps'])}, {found['images']} images": _accuracy(
            one["accuracy"]
        )
        for one in found.get("results", [])
        if one["attack"] != "clean"
    }


def _accuracy(value: Any) -> float:
    if not 0 <= float(value) <= 1:
        raise ValueError(f"an accuracy of {value}")
    return float(value)


def _count(value: Any) -> int:
    if int(value) < 1:
        raise ValueError(f"{value} images")
    return int(value)


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _cell(name: str, value: Any, row: dict[str, Any]) -> str:
    if name.endswith((", last", ", best")):
        return percent(value, row["images"])
    if name in ("best minus last", "robust gap"):
        return f"{100 * value:+.1f}"
    if name == "epochs":
        return f"{value:g} of {row['of']}"
    if name == "of images":
        return f"{row['images']} {value}"
    if name == "seconds":
        return f"{value:.0f}"
    return f"{100 * value:.1f} %" if "eps " in name else str(value)
