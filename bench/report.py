"""Writes the README's tables from the measurements: ``python -m bench.report``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench import twin_bn as bench_twin_bn
from bench.harness import RESULTS
from bench.header import ROOT
from bench.mini import RESULT as MINI
from twins_fast.train.assets import NETWORK
from twins_fast.train.tables import result_table

README = ROOT / "README.md"


def mini() -> str:
    """What ``make train`` reaches."""
    kept = json.loads(MINI.read_text())
    where = kept["header"]
    return (
        f"{result_table(kept['results'])}\n\n"
        f"`{kept['command']}`, seed {kept['results'][0]['seed']}: {kept['seconds']:.0f} s in all on {where['machine']} "
        f"({where['threads']} threads, {where['instructions']}), torch {where['torch']}."
    )


def pretrain() -> str:
    """What the embedded network reached on its own classes."""
    record = json.loads(NETWORK.with_suffix(".json").read_text())
    rows = [
        f"| {name} ({record[name]['epochs']} epochs) | {100 * record[name]['clean']:.1f} % "
        f"| {100 * record[name]['robust']:.1f} % | {record[name]['minutes']:.0f} min |"
        for name in ("robust", "standard")
    ]
    images, steps = record["robust"]["images"], record["recipe"]["eval_steps"]
    return "\n".join(
        [
            f"| {images} source test images | clean | PGD-{steps} | training |",
            "|---|---|---|---|",
            *rows,
            "",
            f"`{record['command']}`, seed {record['recipe']['seed']}, {record['threads']} threads, "
            f"torch {record['torch']}.",
        ]
    )


def twin_bn() -> str:
    """Two-wing batch norm against its peers, over a whole ResNet-50: one part per device."""
    parts = []
    for path in measurements(bench_twin_bn.NAME):
        kept = json.loads(path.read_text())
        where = kept["header"]
        machine = f"{where['machine']} ({where['threads']} threads, {where['instructions']})"
        if kept["device"] != "cpu":
            machine = f"{where['gpus'][0]} (driver {where['driver']}, CUDA {where['cuda']})"
        parts.append(
            f"{bench_twin_bn.summary_table(kept['workloads'], kept['options'])}\n\n"
            f"`{kept['command']}` on {machine}, torch {where['torch']}, commit {where['commit']}."
        )
    return "\n\n".join(parts)


def measurements(benchmark: str) -> list[Path]:
    """The result files, one per kind of device."""
    return sorted(RESULTS.glob(f"{benchmark}-*.json"))


TABLES = {"mini": mini, "pretrain": pretrain}
if measurements(bench_twin_bn.NAME):  # the README gets its table with the first measurement
    TABLES["twin_bn"] = twin_bn


def filled(text: str) -> str:
    """``text`` with the part between each ``<!-- table NAME -->`` and ``<!-- end -->`` made anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
