"""The stages of ``bench.gpu_check`` that are measurements: ``python -m bench.gpu_stages NAME``.

Each prints what it finds as it finds it, a line of JSON each, so that a crash or a limit loses only what follows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import torch

from bench.header import ROOT, header
from twins_fast.ops import native
from twins_fast.qualify import process
from twins_fast.qualify.checks import CHECKS, wall_seconds
from twins_fast.qualify.run import LIMITS
from twins_fast.verdicts import PASSED, SLOWER

LAYERS = ("64x112x112/bn+relu", "256x56x56/bn+add+relu", "512x28x28/bn+add+relu", "64x56x56/bn+relu",
          "1024x14x14/bn+add+relu", "512x7x7/bn+relu")  # fmt: skip
NETWORKS = {"resnet50-224": 128, "resnet18-32": 256}  # and how many images
CHUNKS = (16, 32, 64)
CPU_CHECKS = ("twin_batch_norm cpp", "plan")
SHOWN = 30  # kernels of a replay
COPIED = 1 << 28  # float32 values
SIDE = 8192  # of the matrices whose product shows the peak

STAGES: dict[str, Callable[[str], None]] = {}


def stage(function: Callable[[str], None]) -> Callable[[str], None]:
    """Enter a stage under its name; it is given ``"cuda"`` or ``"cpu"``."""
    STAGES[function.__name__] = function
    return function


def report(text: str, **values: Any) -> None:
    """A result: a line for the reader, and its values."""
    process.report(text=text, **values)


class Wrong(Exception):
    """A stage has found something that is not right."""


@stage
def device(kind: str) -> None:
    """What runs here, and its limits."""
    report("versions", header=header())
    if kind == "cuda":
        p = torch.cuda.get_device_properties(0)
        report(
            f"{p.name}, sm_{p.major}{p.minor}, {p.multi_processor_count} multiprocessors, {p.total_memory >> 30} GiB",
            cache=p.L2_cache_size, memory=p.total_memory,
        )  # fmt: skip
    scale = 1 if kind == "cuda" else 16
    x = torch.empty(COPIED // scale, device=kind)
    y = torch.empty_like(x)
    seconds = wall_seconds(lambda: y.copy_(x), x.device)
    report(f"copy {2 * x.nbytes / seconds / 1e9:.0f} GB/s", bandwidth=2 * x.nbytes / seconds)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(SIDE // scale, SIDE // scale, device=kind, dtype=dtype)
        speed = 2 * len(a) ** 3 / wall_seconds(lambda: a @ a, a.device)  # noqa: B023
        report(f"product {native.dtype_name(dtype)} {speed / 1e12:.1f} TFLOP/s", operations=speed)


@stage
def build(kind: str) -> None:
    """The compiled module, for this device alone."""
    started = time.perf_counter()
    major, minor = torch.cuda.get_device_capability() if kind == "cuda" else (9, 0)
    environment = {**os.environ, "TWINS_FAST_CUDA": f"{major}{minor}"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True, env=environment)
    said = "from twins_fast.ops import native; print(native.missing or ('' if native._C.has_cuda else 'without CUDA'))"
    missing = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    report(f"built in {time.perf_counter() - started:.0f} s {missing}", missing=missing)
    if missing and kind == "cuda":
        raise Wrong(f"the CUDA kernels are missing: {missing}; is nvcc on the PATH or in CUDA_HOME?")


@stage
def smoke(kind: str) -> None:
    """The checks that a device has to pass before our kernels run on it by default."""
    wrong = []

    def found(subject: str, outcome: str, reason: str = "", **more: Any) -> None:
        measured = ", ".join(f"{name} {value}" for name, value in more.items())
        report(f"{subject}: {outcome} {reason}{measured}", subject=subject, outcome=outcome, **more)
        if outcome not in (PASSED, SLOWER):
            wrong.append(subject)

    for name in LIMITS if kind == "cuda" else CPU_CHECKS:
        CHECKS[name](torch.device(kind), found)
    if wrong:
        raise Wrong(f"{len(wrong)} of them are wrong or unknown: {', '.join(wrong)}")


@stage
def twin_bn(kind: str) -> None:
    """Two-wing batch norm on six layers."""
    from bench.harness import PEERS, fails, measure
    from bench.twin_bn import BATCH, BENCHMARK, NAME, layers

    batch, rounds = (BATCH[kind], 10) if kind == "cuda" else (4, 2)
    chosen = [layer for layer in layers(224, batch) if layer.name.removeprefix("224/") in LAYERS]
    names = [n for n, p in PEERS[NAME].items() if kind in p.devices and not n.startswith("compile")]
    rows = []
    for layer in chosen if kind == "cuda" else chosen[-1:]:
        rows.append(measure(BENCHMARK, layer, kind, names, rounds))
        _report_row(rows[-1])
    if problems := fails(rows):
        raise Wrong("; ".join(problems))


@stage
def attack(kind: str) -> None:
    """Attacks on two networks by plan and autocast, in chunks of several sizes, and the kernels of one call."""
    from bench.peers import engine_attack
    from bench.workloads import inputs

    problems = _attacks(kind, ["autocast", "plan-bf16", "plan-fp16"], [None])
    problems += _attacks(kind, ["plan-bf16"], CHUNKS)
    for workload in _workloads(kind):
        problem = inputs(workload, kind)
        call = engine_attack(problem.model, "plan-bf16", workload.steps)
        call(problem.images, problem.labels)
        report(f"{workload.name}: kernels of one call", kernels=_kernels(lambda: call(problem.images, problem.labels)))  # noqa: B023
    if problems:
        raise Wrong("; ".join(problems))


@stage
def compile(kind: str) -> None:
    """What torch.compile makes of the attack."""
    if problems := _attacks(kind, ["compile", "compile-folded", "compile-max"], [None]):
        raise Wrong("; ".join(problems))


def _workloads(kind: str) -> list[Any]:
    from bench.workloads import workload

    if kind == "cpu":
        return [workload("resnet18-32:batch=2:steps=2:width=16", kind)]
    return [workload(f"{name}:batch={batch}", kind) for name, batch in NETWORKS.items()]


def _attacks(kind: str, names: list[str], chunks: Any) -> list[str]:
    from bench.attack import BENCHMARK
    from bench.harness import fails, measure

    rows = []
    for workload, chunk in product(_workloads(kind), chunks):
        if chunk:
            workload = replace(workload, name=f"{workload.name}:chunk_size={chunk}", chunk_size=chunk)
        rows.append(measure(replace(BENCHMARK, memory=None), workload, kind, names, 3))
        _report_row(rows[-1])
    return fails(rows)


def _report_row(row: dict) -> None:
    """One workload's peers: their times, or what is wrong with them."""
    cells = []
    for name, peer in row["peers"].items():
        times = peer.get("times", {})
        shown = ", ".join(f"{stage} {spread['median'] * 1e3:.3f} ms" for stage, spread in times.items())
        cells.append(f"{name} {shown or peer['status']} {peer.get('reason', '')}".strip())
    report(f"{row['name']}: {'; '.join(cells)}", row=row)


def _kernels(call: Callable[[], object]) -> list[dict[str, Any]]:
    """The kernels of a call that take longest: name, launches, microseconds together."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]) as seen:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    rows = [(e.self_device_time_total or e.self_cpu_time_total, e.count, e.key) for e in seen.key_averages()]
    return [{"name": key, "launches": n, "us": round(us, 1)} for us, n, key in sorted(rows, reverse=True)[:SHOWN]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_stages", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device that PyTorch can use")
        return 1
    os.environ.setdefault("TWINS_FAST_CACHE", str(ROOT / "runs" / "gpu_check" / "cache"))
    try:
        STAGES[args.stage](args.device)
    except Wrong as wrong:
        print(wrong)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
