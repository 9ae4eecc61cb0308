"""Writes the README's tables from the measurements: ``python -m bench.report``."""

from __future__ import annotations

import json
import re

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


TABLES = {"mini": mini, "pretrain": pretrain}


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
