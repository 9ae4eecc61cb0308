"""What a GPU makes of this package, in one run that always ends: ``python -m bench.gpu_check``.

Every stage is a process of its own with a limit in seconds, and fails without the others. After each one the record, a
JSON file, is complete for all that has run so far. Installs nothing, needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.header import ROOT
from twins_fast.qualify import process

RESERVE = 1 << 22  # bytes of disk for the record, in case that it fills up
ENDING = 8.0  # seconds kept for the end of the whole

_KERNEL = re.compile(r"^def (\w+_kernel)\(", re.MULTILINE)


@dataclass(frozen=True)
class Stage:
    """A command that reports results, with the most seconds that it may take.

    Attributes:
        environment: what it adds to this one's.
    """

    name: str
    limit: float
    command: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def first_session(device: str) -> list[Stage]:
    """What tells the most, in the order of what it tells."""
    tests = ["-m", "gpu", "tests"] if device == "cuda" else ["tests/ops/test_twin_bn.py"]
    workers = str(min(8, os.cpu_count() or 1))
    limits = ["--timeout", "60", "--timeout-method", "thread", "--max-worker-restart", "40"]
    own_allocations = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # so that memcheck sees where a tensor ends
    return [
        _own("device", 40, device),
        _own("build", 100, device),
        _own("smoke", 140, device),
        _own("twin_bn", 70, device),
        _own("attack", 140, device),
        Stage("tests", 110, [sys.executable, "-m", "pytest", "-q", "-n", workers, *limits, *tests]),
        Stage("memcheck", 70, _sanitizer("memcheck"), environment=own_allocations),
        _own("compile", 150, device),
    ]


def second_session(device: str) -> list[Stage]:
    """What takes longer."""
    checks = [Stage(tool, 150, _sanitizer(tool)) for tool in ("racecheck", "synccheck")]
    benchmark = [
        Stage(name, 600, [sys.executable, "-m", f"bench.{name}", "--device", device]) for name in ("twin_bn", "attack")
    ]
    return [_own("device", 50, device), *checks, *benchmark]


def _own(name: str, limit: float, device: str) -> Stage:
    return Stage(name, limit, [sys.executable, "-m", "bench.gpu_stages", name, "--device", device])


def _sanitizer(tool: str) -> list[str]:
    """The tool on our kernels alone: PyTorch's would take most of the time."""
    triton = [
        name for source in sorted((ROOT / "kernels").glob("*.py")) for name in _KERNEL.findall(source.read_text())
    ]
    ours = f"regex=twins_fast|^({'|'.join(triton)})$"
    options = ["--error-exitcode", "9", "--print-limit", "20", "--kernel-name", ours]
    return ["compute-sanitizer", "--tool", tool, *options, sys.executable, "-m", "bench.sanitize"]


class Record:
    """The JSON file of a run.

    Attributes:
        lost: whether the file lacks something that could not be written.
    """

    def __init__(self, path: Path, command: str):
        self.path = path
        self.content: dict[str, Any] = {"command": command, "complete": False, "faults": [], "stages": {}}
        self.lost = False
        self._reserve = path.with_suffix(".reserve")
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)  # of another run
            self._reserve.write_bytes(bytes(RESERVE))

    def write(self) -> None:
        """Replace the file by one that is complete and on the disk; a fault is noted, and ends nothing."""
        self.lost = True
        try:
            self._replace()
            self.lost = False
        except OSError as error:
            self.content["faults"].append(f"{self.path} could not be written at first: {error}")
            with contextlib.suppress(OSError):
                self._reserve.unlink(missing_ok=True)
                self._replace()
                self.lost = False

    def finish(self) -> None:
        self.content["complete"] = True
        with contextlib.suppress(OSError):
            self._reserve.unlink(missing_ok=True)
        self.write()

    def _replace(self) -> None:
        part = self.path.with_suffix(".part")
        with part.open("w") as file:
            file.write(json.dumps(self.content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)


def run(stages: list[Stage], record: Record, seconds: float) -> bool:
    """Run the stages one after the other, all in ``seconds``; whether every one of them passed."""
    ends = time.monotonic() + seconds - ENDING
    for stage in stages:
        left = ends - time.monotonic()
        print(f"== {stage.name}, at most {min(stage.limit, left):.0f} s", flush=True)
        if left > process.GRACE:
            outcome = process.run(stage.command, min(stage.limit, left), ROOT, stage.environment, _say)
        else:
            outcome = process.Outcome("skipped", f"{seconds:.0f} s are over")
        record.content["stages"][stage.name] = asdict(outcome)
        record.write()
        _say(f"{outcome.status} {outcome.reason}")
    record.finish()
    return all(outcome["status"] == "passed" for outcome in record.content["stages"].values())


def _say(line: str) -> None:
    print(f"   {line}", flush=True)


def summary(content: dict[str, Any]) -> str:
    """The stages as a table, and what they found."""
    rows = [("stage", "became", "seconds", "")]
    rows += [(n, s["status"], f"{s['seconds']:.0f}", s["reason"]) for n, s in content["stages"].items()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    ]
    for name, stage in content["stages"].items():
        lines += ["", f"{name}:"] if stage["results"] else []
        lines += [f"  {_in_short(result)}" for result in stage["results"]]
    return "\n".join([*lines, *content["faults"]])


def _in_short(result: Any) -> str:
    text = result.get("text") if isinstance(result, dict) else None
    return text or json.dumps(result)[:200]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu_check", help="folder of the record")
    parser.add_argument("--seconds", type=float, default=560, help="for all stages together (560)")
    parser.add_argument("--second", action="store_true", help="what a first session leaves out, as it takes longer")
    parser.add_argument("--only", help="stages, comma-separated")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="a CPU stands in to try this program")
    args = parser.parse_args(arguments)
    stages = (second_session if args.second else first_session)(args.device)
    wanted = args.only.split(",") if args.only else [stage.name for stage in stages]
    if unknown := set(wanted) - {stage.name for stage in stages}:
        parser.error(f"no stage {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in stages)}")
    command = " ".join(["python -m bench.gpu_check", *(sys.argv[1:] if arguments is None else arguments)])
    record = Record(args.out / "gpu_check.json", command)
    passed = run([stage for stage in stages if stage.name in wanted], record, args.seconds)
    print(f"\n{summary(record.content)}\n\n{json.dumps(record.content) if record.lost else record.path}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
