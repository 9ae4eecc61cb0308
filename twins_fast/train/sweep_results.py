"""What the runs of a sweep reached: means over seeds, the setting to choose, tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from twins_fast.evaluation.results import markdown
from twins_fast.train.run_folder import RunError
from twins_fast.train.settings import label_of
from twins_fast.train.sweep import MEASURES, Member

Row = dict[str, Any]


def rows_of(members: Iterable[Member]) -> list[Row]:
    """Plain values for each setting, with a figure for each seed; a run that failed is left out."""
    settings: dict[str, list[Member]] = {}
    for member in members:
        settings.setdefault(label_of(member.setting), []).append(member)
    return [_row(label, own) for label, own in settings.items()]


def _row(label: str, members: list[Member]) -> Row:
    row: Row = {
        "label": label,
        "method": members[0].recipe.method.name,
        "setting": members[0].setting,
        "asked": len(members),
        "seeds": [],
        "figures": {},
    }
    for member in members:
        try:
            validated, result = member.validated(), member.folder.read_result()
        except RunError:
            continue
        if validated is None:
            continue
        figures = {f"validation {name}": validated[name] for name in MEASURES}
        figures |= {f"{name}, {of}": result[key][name] for of, key in _TESTED.items() for name in MEASURES}
        figures["best minus last"] = result["robust_overfitting"]
        figures["seconds"] = result["seconds"]
        found = member.folder.read_evaluation()
        figures |= {f"{one['title']}, {found['images']} images": one["accuracy"] for one in found.get("results", ())}
        row["seeds"].append(member.seed)
        for name, value in figures.items():
            row["figures"].setdefault(name, []).append(value)
    return row


_TESTED = {"best": "best", "last": "after"}  # how a table calls it -> how result.json does


def chosen(rows: Sequence[Row], by: str = "robust") -> list[Row]:
    """Of each method the setting with the highest mean over the seeds, on validation images; the first of equals.

    A setting that lacks a run is not chosen.
    """
    best: dict[str, Row] = {}
    for row in rows:
        if len(row["seeds"]) == row["asked"] and _mean(row, by) > _mean(best.get(row["method"]), by):
            best[row["method"]] = row
    return list(best.values())


def _mean(row: Row | None, by: str) -> float:
    return -1.0 if row is None else statistics.fmean(row["figures"][f"validation {by}"])


def validation_table(rows: Sequence[Row], taken: Sequence[Row]) -> str:
    """Markdown, the chosen settings marked."""
    lines = [["setting", "seeds", *(f"{name}, validation" for name in MEASURES), "chosen"]]
    for row in rows:
        figures = [mean_and_deviation(row["figures"].get(f"validation {name}", ())) for name in MEASURES]
        lines.append([row["label"], f"{len(row['seeds'])} of {row['asked']}", *figures, "x" * (row in taken)])
    return markdown(lines)


def test_table(rows: Sequence[Row]) -> str:
    """Markdown: means and standard deviations over the seeds, on test images."""
    names = dict.fromkeys(name for row in rows for name in row["figures"] if not name.startswith("validation "))
    lines = [["setting", "seeds", *names]]
    for row in rows:
        cells = [_cell(name, row["figures"].get(name, ())) for name in names]
        lines.append([row["label"], str(len(row["seeds"])), *cells])
    return markdown(lines)


def _cell(name: str, values: Sequence[float]) -> str:
    if name == "seconds":
        return f"{statistics.fmean(values):.0f}" if values else ""
    return mean_and_deviation(values, "+.1f" if name == "best minus last" else ".1f")


def mean_and_deviation(values: Sequence[float], form: str = ".1f") -> str:
    """Of fractions, in percent; the standard deviation is that of a sample."""
    if not values:
        return ""
    deviation = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):{form}}{deviation} %"
