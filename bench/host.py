"""What an attack call costs beside its kernels: ``python -m bench.host``.

On a GPU a call replays a graph; all else is Python, which no kernel hides. Here the replay is left out, and the rest is
timed on one small image: checks of the arguments, the modes of all modules, the look whether the model has changed, the
random start.
"""

from __future__ import annotations

import argparse
import time

import torch
import torchvision
from torch import Tensor, nn

from bench.harness import RESULTS, keep, spread
from twins_fast import PGD
from twins_fast.attacks.engine.program import Program

RESULT = RESULTS / "host.json"
NETWORKS = ("resnet50", "resnet18")


def attack_without_kernels(model: nn.Module) -> tuple[PGD, Tensor, Tensor]:
    """An attack whose plan is made and takes no steps any more, an image, its label."""
    images, labels = torch.rand(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64)
    attack = PGD(model, engine="plan", steps=1)
    program = attack._program(images)
    assert isinstance(program, Program)
    results = torch.zeros_like(images), torch.zeros(1, dtype=torch.int64)
    program.graphed = lambda *arguments: results  # type: ignore[method-assign]
    return attack, images, labels


def milliseconds(call, calls: int) -> list[float]:
    for _ in range(calls // 10):
        call()
    times = []
    for _ in range(calls):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def measure(calls: int) -> dict[str, dict[str, dict[str, float]]]:
    """Network -> mode of the model -> median and quartiles of the milliseconds of a call."""
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name in NETWORKS:
        model = getattr(torchvision.models, name)()
        attack, images, labels = attack_without_kernels(model.eval())
        for mode in ("eval", "train"):
            model.train(mode == "train")
            times = milliseconds(lambda: attack(images, labels), calls)  # noqa: B023
            results.setdefault(name, {})[mode] = spread(times)
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Markdown."""
    lines = ["| host time of an attack call | model in eval mode | in train mode |", "|---|---|---|"]
    for name, modes in results.items():
        lines.append(
            " | ".join([f"| {name}", *(f"{modes[mode]['median']:.2f} ms" for mode in ("eval", "train"))]) + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=500, help="of each (500)")
    calls = parser.parse_args().calls
    torch.set_num_threads(1)
    record = keep(RESULT, "host", milliseconds=measure(calls))
    print(table(record["milliseconds"]))


if __name__ == "__main__":
    main()
