"""What each method of fine-tuning makes of a robust network, on real CIFAR-10: ``python -m bench.transfer``.

The network was adversarially pre-trained on airplane, automobile, bird, cat and horse; it is fine-tuned on 500 (or
2,500) images each of ship, truck, dog, deer and frog, and tested on all 5,000 test images of these. Learning rate,
weight decay and the method's own weight come from the same number of random draws for every method, chosen by accuracy
under attack on a fifth of the training images that is set apart.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.harness import RESULTS, keep
from bench.header import ROOT, header
from twins_fast.devices import has_instructions
from twins_fast.evaluation.results import markdown
from twins_fast.train.pictures import pyplot, save
from twins_fast.train.recipes import SOURCE_CLASSES, TARGET_CLASSES
from twins_fast.train.settings import label_of
from twins_fast.train.sweep_results import mean_and_deviation

NAME = "transfer"
FOLDER = ROOT / "runs" / "transfer"
PICTURES = ROOT / "docs" / "results"
SIZES = (500, 2500)  # training images of a class
DRAWS, EPOCHS = 8, 10
FEW, MANY = 3, 5  # seeds
ATTACKED, SEARCHED = 1000, 500  # test images for AutoAttack, and for the draws
BEST = ("clean, best", "robust, best")  # figures of a run
TITLES = (*BEST, "clean, last", "robust, last")
RATES = ("optimizer.lr=log-uniform(1e-3,1e-1)", "optimizer.weight_decay=log-uniform(1e-5,1e-2)")
AMP = "bf16" if torch.cuda.is_available() or has_instructions(torch.bfloat16) else "none"
COMMON = (
    f"--recipe mini --amp {AMP} --data.dataset npz --epochs {EPOCHS} --optimizer.milestones {4 * EPOCHS // 5}".split()
)
COMMON += ["--data.classes", ",".join(TARGET_CLASSES), "--evaluation.validation-part", "0.2"]
COMMON += ["--devices", "cuda" if torch.cuda.is_available() else "cpu,cpu"]  # two at a time
PUBLISHED_RATE = 1e-2  # the largest of the authors' grid
_PUBLISHED = f", lr up to {PUBLISHED_RATE:g}"
LAMBDA = "method.frozen_weight=uniform(0.2,1.5)"


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    method: str
    seeds: int = FEW
    axis: str = ""  # the method's own, which is searched too
    options: tuple[str, ...] = ()

    @property
    def slug(self) -> str:
        """As folders and the command line name it."""
        return self.name.replace(", ", "-")


_PROBED = ("--network.init-head", "adversarial-probe")
ROWS = (
    Row("standard", "standard"),
    Row("lwf", "lwf", axis="method.feature_weight=log-uniform(5e-4,5e-2)"),
    Row("at", "at", MANY),
    Row("twins-at", "twins-at", MANY, LAMBDA),
    Row("trades", "trades", MANY, "method.beta=uniform(2,8)"),
    Row("twins-trades", "twins-trades", MANY, LAMBDA),
    Row("mart", "mart", axis="method.kl_weight=uniform(2,8)"),
    Row("twins-mart", "twins-mart", axis=LAMBDA),
    Row("joint", "joint", axis="method.source_weight=uniform(0.1,1)"),
    Row("probe, at", "at", options=_PROBED),
    Row("probe, twins-at", "twins-at", axis=LAMBDA, options=_PROBED),
)
PLAIN, ABLATED = "at", "twins-at"
ABLATIONS_KEY = "ablations"  # on the command line, and in the record of ABLATED
ABLATIONS = (  # what is tried instead of the chosen setting's
    (),  # if that ran in another precision than the others are going to
    ("method.frozen_weight=0,0.25,0.5,1,2",),
    ("method.frozen_statistics=target", "method.warmup_epochs=1,2,4"),
    ("method.frozen_statistics=random",),
    ("method.affine=shared",),
)
PAIRS = (("twins-at", "at"), ("twins-trades", "trades"), ("twins-mart", "mart"), ("probe, twins-at", "probe, at"))


class Origin(NamedTuple):
    """Where a row is from."""

    machine: str
    commit: str
    amp: str

    @classmethod
    def here(cls) -> Origin:
        where = header()
        return cls(where["machine"], where["commit"], AMP)

    def __str__(self) -> str:
        return f"{self.machine}, commit {self.commit}, {'float32' if self.amp == 'none' else self.amp}"


class Found(NamedTuple):
    """The folder of a setting's runs, and what came of them."""

    folder: Path
    figures: dict[str, Any]


def subset(source: Path, size: int) -> Path:
    """CIFAR-10 with so many training images of each class, the same for every run."""
    path = FOLDER / f"cifar10-{size}.npz"
    if not path.exists():
        with np.load(source) as file:
            arrays = dict(file)
        order = np.random.default_rng(0).permutation(len(arrays["train"]))
        labels = arrays["train_labels"][order]
        chosen = np.sort(np.concatenate([order[labels == kind][:size] for kind in range(10)]))
        arrays |= {name: arrays[name][chosen] for name in ("train", "train_labels")}
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, **arrays)
    return path


def command(row: Row, data: Path, source: Path) -> list[str]:
    """What every run of a row has in common."""
    words = ["sweep", *COMMON, "--method", row.method, "--data-root", str(data), *row.options]
    if row.method == "joint":
        words += ["--data.source", str(source), "--data.source-classes", ",".join(SOURCE_CLASSES)]
    return words


def run(words: Sequence[str]) -> None:
    """A command of twins-fast; what it has done in an earlier run is not done again."""
    print("twins-fast", *words, flush=True)
    subprocess.run([sys.executable, "-m", "twins_fast", *words], cwd=ROOT, check=True)


def swept(
    row: Row, size: int, data: Path, source: Path, name: str, words: Sequence[str]
) -> tuple[Path, dict[str, Any]]:
    """The folder of a sweep of a row, and what it found; a run that failed has no figures there."""
    folder = FOLDER / str(size) / AMP / row.slug / name
    record = folder / "sweep.json"
    record.unlink(missing_ok=True)
    try:
        run([*command(row, data, source), *words, "--folder", str(folder)])
    except subprocess.CalledProcessError:
        if not record.exists():
            raise
    return folder, json.loads(record.read_text())


def seeds(count: int) -> list[str]:
    return ["--seeds", ",".join(map(str, range(count)))]


def searched(row: Row, size: int, data: Path, source: Path) -> dict[str, Any]:
    """The sweep over learning rate, weight decay and the method's own weight, with one seed."""
    axes = [*RATES, *([row.axis] if row.axis else [])]
    test = ["--evaluation.images", str(SEARCHED), "--evaluation.every", "2"]
    return swept(row, size, data, source, "search", [*axes, "--draws", str(DRAWS), *test])[1]


def trained(row: Row, size: int, data: Path, source: Path, setting: dict[str, Any], name: str = "seeds") -> Found:
    """A setting with every seed, on all test images."""
    axes = [f"{field}={value}" for field, value in setting.items()]
    folder, sweep = swept(row, size, data, source, name, [*axes, *seeds(row.seeds)])
    (found,) = sweep["settings"]
    if len(found["seeds"]) < row.seeds:
        raise SystemExit(f"{row.name}: {sweep['failures']}")
    kept = {key: found[key] for key in ("setting", "seeds", "figures")}
    return Found(folder / label_of(setting).replace(" ", ","), kept)


def published(search: dict[str, Any]) -> dict[str, Any]:
    """The best setting of a search with a learning rate like the authors'."""
    slow = [one for one in search["settings"] if one["seeds"] and one["setting"]["optimizer.lr"] <= PUBLISHED_RATE]
    return max(slow, key=lambda one: one["figures"]["validation robust"])["setting"]


def attacked(folder: Path) -> dict[str, Any]:
    """AutoAttack on the best network of the first seed."""
    file = folder / "autoattack.json"
    best = folder / "seed-0"
    run(["eval", str(best), "--attacks", "clean,pgd10,autoattack", "--n", str(ATTACKED), "--json", str(file)])
    return {one["title"]: one["accuracy"] for one in json.loads(file.read_text())["results"]}


def ablated(
    row: Row, size: int, data: Path, source: Path, setting: dict[str, Any], axes: Sequence[str]
) -> list[dict[str, Any]]:
    """The chosen setting with what one of the ablations changes."""
    changed = fields_of(axes)
    kept = [f"{field}={value}" for field, value in setting.items() if field not in changed]
    words = [*kept, *axes, *seeds(FEW)]
    name = "-".join(["ablation", *(field.rpartition(".")[2] for field in changed)])
    found, origin = swept(row, size, data, source, name, words)[1]["settings"], Origin.here()
    return [
        {
            "changed": {field: one["setting"][field] for field in changed},
            "seeds": one["seeds"],
            "figures": one["figures"],
            "origin": origin,
        }
        for one in found
    ]


def fields_of(axes: Sequence[str]) -> list[str]:
    return [axis.partition("=")[0] for axis in axes]


def measure(size: int, source: Path, names: Sequence[str], resume: bool = False) -> None:
    """The table of one size, row by row into its file, and the ablations."""
    path = RESULTS / f"{NAME}-{size}.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    data = subset(source, size)
    rows = record["rows"]
    for row in ROWS:
        if row.name not in names or (resume and "autoattack" in rows.get(row.name, {})):
            continue
        search = searched(row, size, data, source)
        chosen, slow = search["chosen"][0]["setting"], published(search)
        found = trained(row, size, data, source, chosen)
        grid = [{"setting": one["setting"], **one["figures"]} for one in search["settings"]]
        said = {"method": row.method, "origin": Origin.here(), "search": grid, "axes": search["axes"]}
        rows[row.name] = said | found.figures
        if row.seeds == MANY:
            slowly = found if slow == chosen else trained(row, size, data, source, slow, "published-rates")
            rows[row.name]["published rates"] = slowly.figures
        write(path, size, rows)
        rows[row.name]["autoattack"] = attacked(found.folder)
        write(path, size, rows)
    if ABLATIONS_KEY in names and size == SIZES[0]:
        if ABLATED not in rows:
            raise SystemExit(f"the ablations start from the row {ABLATED}, which is not in {path}")
        (row,) = (row for row in ROWS if row.name == ABLATED)
        found = rows[ABLATED].get(ABLATIONS_KEY, []) if resume else []
        same = Origin(*rows[ABLATED]["origin"]).amp == AMP
        for axes in ABLATIONS:
            if all([*one["changed"]] != fields_of(axes) for one in found) and (axes or not same):
                found = [*found, *ablated(row, size, data, source, rows[ABLATED]["setting"], axes)]
                rows[ABLATED][ABLATIONS_KEY] = found
                write(path, size, rows)


def write(path: Path, size: int, rows: dict[str, Any]) -> None:
    """The record and its picture."""
    rows = {row.name: rows[row.name] for row in ROWS if row.name in rows}
    record = keep(path, NAME, size=size, draws=DRAWS, epochs=EPOCHS, attacked=ATTACKED, rows=rows)
    draw(record, PICTURES / f"{NAME}-{size}.png")


def draw(record: dict[str, Any], path: Path) -> None:
    """Clean accuracy against that under attack, and both over the learning rate and the weight of the frozen wing."""
    rows, field = record["rows"], "method.frozen_weight"
    weighed = [
        one for one in rows.get(ABLATED, {}).get(ABLATIONS_KEY, []) if [*one["changed"]] == [field] and one["seeds"]
    ]
    figure, (plane, rates, *others) = pyplot().subplots(1, 3 if weighed else 2, figsize=(15 if weighed else 10, 4.2))
    for name, row in rows.items():
        (x, y), (dx, dy) = zip(*(_percent(row["figures"][title]) for title in BEST), strict=True)
        twins = "twins" in name
        plane.errorbar(x, y, dy, dx, fmt="o" if twins else "s", color="C3" if twins else "C0", capsize=2)
        plane.annotate(name, (x, y), xytext=(5, 4), textcoords="offset points", fontsize=8)
    plane.set(xlabel="clean accuracy, %", ylabel="PGD-10 accuracy, %", title="test images, over seeds")
    for name, style in ((ABLATED, "-o"), (PLAIN, "--s")):
        tried = [one for one in rows.get(name, {}).get("search", []) if BEST[0] in one]
        tried.sort(key=lambda one: one["setting"]["optimizer.lr"])
        at = [one["setting"]["optimizer.lr"] for one in tried]
        for title, colour in zip(BEST, ("C2", "C1"), strict=True):
            points = [100 * one[title][0] for one in tried]
            rates.plot(at, points, style, color=colour, label=f"{name}, {title.removesuffix(', best')}")
    rates.set(
        xscale="log", xlabel="learning rate", ylabel="accuracy, %", title=f"the draws, seed 0, {SEARCHED} test images"
    )
    rates.legend(fontsize=8)
    for weights in others:
        for title in BEST:
            means, deviations = zip(*(_percent(one["figures"][title]) for one in weighed), strict=True)
            at = [one["changed"][field] for one in weighed]
            weights.errorbar(at, means, deviations, fmt="-o", capsize=2, label=title)
        weights.set(xlabel="lambda, the weight of the frozen wing's loss", ylabel="accuracy, %", title=ABLATED)
        weights.legend()
    for axis in (plane, rates, *others):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    save(figure, path)


def _percent(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return 100 * statistics.fmean(values), 100 * statistics.stdev(values) if len(values) > 1 else 0.0


def paired(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean, standard error, and the two-sided p of Student's t for a mean of 0."""
    mean, count = statistics.fmean(differences), len(differences)
    error = statistics.stdev(differences) / math.sqrt(count)
    if error == 0:
        return mean, error, float(mean == 0)
    return mean, error, two_sided(abs(mean) / error, count - 1)


def two_sided(t: float, freedom: int) -> float:
    """P(|T| > t) of Student's distribution; with t = tan(a) * sqrt(freedom) it is an integral over an interval."""
    angle = torch.linspace(math.atan(t / math.sqrt(freedom)), math.pi / 2, 20001, dtype=torch.float64)
    whole = torch.linspace(0, math.pi / 2, 20001, dtype=torch.float64)
    part, total = (torch.trapezoid(a.cos() ** (freedom - 1), a) for a in (angle, whole))
    return float(part / total)


def table(record: dict[str, Any], brief: bool = False) -> str:
    """Markdown: means and standard deviations over the seeds."""
    titles = BEST if brief else (*TITLES, "best minus last")
    attacks = f"AutoAttack, seed 0, {record['attacked']} images"
    first = f"{record['size']:,} images a class"
    lines = [[first, "seeds", *_heads(titles), attacks, *([] if brief else ["setting"])]]
    for name, row in _with_published_rates(record).items():
        figures = [mean_and_deviation(row["figures"][t], "+.1f" if "minus" in t else ".1f") for t in titles]
        broken = f"{100 * row['autoattack']['AutoAttack']:.1f} %" if "autoattack" in row else ""
        setting = [] if brief else [label_of(row["setting"])]
        lines.append([name, str(len(row["seeds"])), *figures, broken, *setting])
    return markdown(lines)


def pairs_table(record: dict[str, Any]) -> str:
    """Markdown: differences between two methods, seed by seed, in percentage points."""
    lines = [["difference, same seeds", *_heads(TITLES)]]
    rows = _with_published_rates(record)
    for one, other in [(f"{one}{rates}", f"{other}{rates}") for one, other in PAIRS for rates in ("", _PUBLISHED)]:
        if one in rows and other in rows:
            pairs = [zip(rows[one]["figures"][t], rows[other]["figures"][t], strict=True) for t in TITLES]
            lines.append([f"{one} - {other}", *(_difference([a - b for a, b in values]) for values in pairs)])
    return markdown(lines)


def _heads(titles: Sequence[str]) -> list[str]:
    """Of columns: figures under attack are those of PGD-10."""
    return [title.replace("robust", "PGD-10") for title in titles]


def _with_published_rates(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows, each followed by what its method reaches with a learning rate like the authors'."""
    rows = {}
    for name, row in record["rows"].items():
        rows[name] = row
        if "published rates" in row:
            rows[f"{name}{_PUBLISHED}"] = row["published rates"]
    return rows


def _difference(values: Sequence[float]) -> str:
    mean, error, p = paired(values)
    return f"{100 * mean:+.2f} ± {100 * error:.2f}, p = {p:.2f}"


def ablations_table(record: dict[str, Any]) -> str:
    """Markdown: the ablations of one size, below the setting that was chosen."""
    lines = [[f"{ABLATED}, {record['size']:,} images a class", "seeds", *_heads(TITLES)]]
    row = record["rows"].get(ABLATED, {})
    ablations = row.get(ABLATIONS_KEY, [])
    chosen = [] if not ablations or any(not one["changed"] for one in ablations) else [{"changed": {}, **row}]
    for one in sorted([*chosen, *ablations], key=lambda one: bool(one["changed"])):
        figures = [mean_and_deviation(one["figures"].get(title, ())[:FEW]) for title in TITLES]
        lines.append([label_of(one["changed"]) or "as chosen", str(len(one["seeds"][:FEW])), *figures])
    return markdown(lines)


def origins(record: dict[str, Any]) -> str:
    """Where the rows of the tables are from."""
    rows = record["rows"]
    ablations = [(one["origin"], ABLATIONS_KEY) for one in rows.get(ABLATED, {}).get(ABLATIONS_KEY, ())]
    found: dict[str, dict[str, None]] = {}
    for origin, name in [*((row["origin"], name) for name, row in rows.items()), *ablations]:
        found.setdefault(str(Origin(*origin)), {})[name] = None
    places = [f"{', '.join(names)} on {origin}" for origin, names in found.items()]
    return f"Rows: {'; '.join(places)}."


def main(arguments: list[str] | None = None) -> None:
    names = {row.slug: row.name for row in ROWS} | {ABLATIONS_KEY: ABLATIONS_KEY}
    parser = argparse.ArgumentParser("python -m bench.transfer", description=__doc__)
    parser.add_argument("source", type=Path, help="CIFAR-10 as an .npz file")
    parser.add_argument("--sizes", default="500", help="training images of a class (%(default)s)")
    parser.add_argument("--rows", default=",".join(names), help="default: all, %(default)s")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the result file has")
    args = parser.parse_args(arguments)
    wanted = args.rows.split(",")
    if unknown := set(wanted) - names.keys():
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for size in map(int, args.sizes.split(",")):
        measure(size, args.source.resolve(), [names[slug] for slug in wanted], args.resume)


if __name__ == "__main__":
    main()
