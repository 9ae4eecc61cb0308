"""Writes the tables of the README and of docs/kernels.md from the measurements: ``python -m bench.report``."""

from __future__ import annotations

import json
import re
from pathlib import Path

from bench import kernels as bench_kernels
from bench import twin_bn as bench_twin_bn
from bench.harness import RESULTS
from bench.header import ROOT
from bench.mini import RESULT as MINI
from twins_fast.train.assets import NETWORK
from twins_fast.train.tables import result_table

README = ROOT / "README.md"
DOCUMENTS = (README, ROOT / "docs" / "kernels.md")
VERSIONS = RESULTS / "cpu_versions.json"  # kept from trees that are no more


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


def twin_bn_layers() -> str:
    """The same layer by layer, forward and backward: one table per device."""
    parts = []
    for path in measurements(bench_twin_bn.NAME):
        rows = json.loads(path.read_text())["workloads"]
        parts.append(bench_twin_bn.layer_table(rows))
    return "\n\n".join(parts)


def cpu_versions() -> str:
    """The C++ kernel and what was tried on the way."""
    kept = json.loads(VERSIONS.read_text())
    where, versions = kept["header"], kept["versions"]
    columns = [name for name in versions[0] if name != "version"]
    lines = [
        "| " + " | ".join(["version", *columns]) + " |",
        "|---|" + "---|" * len(columns),
        *(f"| {row['version']} | " + " | ".join(f"{row[name]:.1f} ms" for name in columns) + " |" for row in versions),
    ]
    return "\n".join([*lines, "", f"{kept['what']}; {where['machine']}, torch {where['torch']}."])


def kernels() -> str:
    """What the compilers make of the GPU kernels."""
    kept = json.loads(bench_kernels.RESULT.read_text())
    where = kept["header"]
    return f"{bench_kernels.table(kept['kernels'])}\n\nnvcc {kept['nvcc']}, Triton {where['triton']}."


def measurements(benchmark: str) -> list[Path]:
    """The result files, one per kind of device."""
    return sorted(RESULTS.glob(f"{benchmark}-*.json"))


TABLES = {"mini": mini, "pretrain": pretrain, "cpu_versions": cpu_versions, "kernels": kernels}
if measurements(bench_twin_bn.NAME):  # the documents get their tables with the first measurement
    TABLES |= {"twin_bn": twin_bn, "twin_bn_layers": twin_bn_layers}


def filled(text: str) -> str:
    """``text`` with the part between each ``<!-- table NAME -->`` and ``<!-- end -->`` made anew."""
    return re.sub(
        r"(<!-- table (\w+) -->\n).*?(<!-- end -->)",
        lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}",
        text,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
