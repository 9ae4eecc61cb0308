"""What the dynamics of a run cost: ``python -m bench.dynamics``.

Whole TWINS-AT steps (PGD-10) with and without them take turns. As these differ less than two steps of a kind
may, all that only a watched run does is timed inside of its steps, and added up.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim.swa_utils import update_bn

from bench.harness import RESULTS, keep, spread
from twins_fast import PGD, TrainingStep
from twins_fast.methods import TwinsAT
from twins_fast.models import build_model
from twins_fast.train.build import AMP_DTYPES
from twins_fast.train.dynamics import Dynamics
from twins_fast.train.recipe import Log
from twins_fast.train.run_folder import RunFolder

RESULT = RESULTS / "dynamics.json"
WORKLOADS = {  # network, batch, side, precision
    "mini": ("cifar-resnet18-w16", 64, 32, "none"),
    "resnet50-224": ("resnet50", 4, 224, "bf16"),
}


class Watch:
    """Functions that remember how long they took."""

    def __init__(self):
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            result = function(*arguments, **options)
            self.seconds.setdefault(name, []).append(time.perf_counter() - started)
            return result

        return timed


def measure(arch: str, batch: int, side: int, amp: str, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of a step with and without the dynamics, of their parts, and what these are of a step."""
    watch, every = Watch(), Log().dynamics
    torch.manual_seed(0)
    images, labels = torch.rand(batch, 3, side, side), torch.arange(batch) % 5
    method, model = TwinsAT(), build_model(arch, 5)
    update_bn([images], model)  # without any statistics deep networks overflow in evaluation mode
    model = method.prepare(model).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    dtype = AMP_DTYPES[amp]
    attack = PGD(model, amp_dtype=dtype)
    step = TrainingStep(model, optimizer, method=method, attack=attack, amp_dtype=dtype, gradient_norms=True)
    step._norms_of_gradients = watch("gradients", step._norms_of_gradients)  # type: ignore[method-assign]
    dynamics = Dynamics(model, optimizer, every)
    dynamics.keep_start(folder / "start.safetensors")
    look = watch("gradients looked at", dynamics.look)
    record = watch("measurement", lambda: RunFolder(folder).log(**dynamics.measure(1e-6)))

    def train(watched: bool) -> None:
        step.gradient_norms = watched
        metrics = step(images, labels)
        if watched:
            look(metrics["gradient_norms"])
        if not metrics["loss"].isfinite():
            raise RuntimeError(f"{arch}: the loss is {metrics['loss']}, so that no step was made")

    for round_ in range(rounds + 1):
        for watched in (False, True):
            watch("watched step" if watched else "step", train)(watched)
        record()
        if round_ == 0:  # has made the plan and what is allocated once
            watch.seconds.clear()
    times = {name: spread(seconds) for name, seconds in watch.seconds.items()}
    middle = {name: statistics.median(seconds) for name, seconds in watch.seconds.items()}
    added = middle["gradients"] + middle["gradients looked at"] + middle["measurement"] / every
    return {"batch": batch, "amp": amp, "every": every, "times": times, "share": added / middle["step"]}


def table(workloads: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    every = next(iter(workloads.values()))["every"]
    lines = [f"| | a training step | gradients, each step | a measurement | in all, one every {every} steps |"]
    lines.append("|---|---|---|---|---|")
    for name, row in workloads.items():
        times = {part: 1e3 * timing["median"] for part, timing in row["times"].items()}
        gradients = times["gradients"] + times["gradients looked at"]
        cells = [f"{name}, batch {row['batch']}" + ("" if row["amp"] == "none" else f", {row['amp']}")]
        cells += [f"{times['step']:.0f} ms", f"{gradients:.2f} ms", f"{times['measurement']:.1f} ms"]
        lines.append("| " + " | ".join([*cells, f"{100 * row['share']:.2f} %"]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="steps of each kind (5)")
    rounds = parser.parse_args().rounds
    if rounds < 1:
        parser.error("needs at least one round")
    with tempfile.TemporaryDirectory() as folder:
        workloads = {name: measure(*what, rounds, Path(folder)) for name, what in WORKLOADS.items()}
    record = keep(RESULT, "dynamics", workloads=workloads)
    print(table(record["workloads"]))


if __name__ == "__main__":
    main()
