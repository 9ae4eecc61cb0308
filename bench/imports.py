"""How much longer importing the package takes than importing PyTorch: ``python -m bench.imports``.

Every import happens in a process of its own, and the two take turns, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.harness import RESULTS, keep, spread
from bench.header import ROOT

RESULT = RESULTS / "imports.json"
# The second one imports the first; a mere "import twins_fast" would put everything off.
STATEMENTS = ("import torch", "from twins_fast import *")


def seconds(statement: str) -> float:
    """What one import takes in a fresh process, the start of Python not counted."""
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(run.stdout)


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """Median and quartiles of either import and of the difference between two neighbours."""
    for statement in STATEMENTS:
        seconds(statement)  # reads the files, and writes the byte code
    alone, ours = zip(*([seconds(statement) for statement in STATEMENTS] for _ in range(rounds)), strict=True)
    added = [ours - alone for alone, ours in zip(alone, ours, strict=True)]
    return {"torch": spread(list(alone)), "twins_fast": spread(list(ours)), "difference": spread(added)}


def table(times: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    names = {"torch": "`import torch`", "twins_fast": "`from twins_fast import *`", "difference": "difference"}
    lines = [f"| {names[key]} | {t['median']:.2f} s | {t['q1']:.2f} to {t['q3']:.2f} s |" for key, t in times.items()]
    return "\n".join(["| in a fresh process | median | quartiles |", "|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="imports of each (15)")
    rounds = parser.parse_args().rounds
    record = keep(RESULT, "imports", times=measure(rounds))
    print(table(record["times"]))


if __name__ == "__main__":
    main()
