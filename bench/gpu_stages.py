"""The stages of ``bench.gpu_check`` that are measurements: ``python -m bench.gpu_stages NAME``.

Each prints what it finds as it finds it, a line of JSON each, so that a crash or a limit loses only what follows.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bench.gpu_check import PREFIX
from bench.header import ROOT, header
from twins_fast import PGD, ops
from twins_fast.ops import backend, layout, native

LAYERS = ("64x112x112/bn+relu", "256x56x56/bn+add+relu", "512x28x28/bn+add+relu", "64x56x56/bn+relu",
          "1024x14x14/bn+add+relu", "512x7x7/bn+relu")  # fmt: skip
NETWORKS = {"resnet50-224": 128, "resnet18-32": 256}  # and how many images
CHUNKS = (16, 32, 64)
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
    print(PREFIX + json.dumps({"text": text, **values}), flush=True)


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
    seconds = _seconds(lambda: y.copy_(x), kind)
    report(f"copy {2 * x.nbytes / seconds / 1e9:.0f} GB/s", bandwidth=2 * x.nbytes / seconds)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a = torch.randn(SIDE // scale, SIDE // scale, device=kind, dtype=dtype)
        speed = 2 * len(a) ** 3 / _seconds(lambda: a @ a, kind)  # noqa: B023
        report(f"product {native.dtype_name(dtype)} {speed / 1e12:.1f} TFLOP/s", operations=speed)


@stage
def build(kind: str) -> None:
    """The compiled module, for this device alone."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=ROOT, check=True)
    said = "from twins_fast.ops import native; print(native.missing or ('' if native._C.has_cuda else 'without CUDA'))"
    missing = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    report(f"built in {time.perf_counter() - started:.0f} s {missing}", missing=missing)
    if missing and kind == "cuda":
        raise Wrong(f"the CUDA kernels are missing: {missing}; is nvcc on the PATH or in CUDA_HOME?")


@stage
def smoke(kind: str) -> None:
    """Every kernel once, into garbage; then a replayed graph and a small plan."""
    wrong = 0
    for name in _backends(kind):
        try:
            with backend.use_backend(name), _garbage():
                wrong += _two_wing_batch_norm(name, kind)
                if kind == "cuda":
                    wrong += _replayed(name)
        except Exception as error:
            report(f"{name}: {type(error).__name__}: {error}")
            wrong += 1
    for dtype in (None, torch.bfloat16, torch.float16):
        wrong += _small_plan(kind, dtype)
    if wrong:
        raise Wrong(f"{wrong} results are wrong")


def _backends(kind: str) -> tuple[str, ...]:
    return ("cuda", "triton") if kind == "cuda" else ("cpp",)


@contextmanager
def _garbage() -> Iterator[None]:
    """Results start as NaN, and bits as a pattern: what a kernel leaves out shows."""
    known = {name: getattr(layout, name) for name in ("forward_results", "backward_results", "empty_stats")}

    def spoilt(function: Callable) -> Callable:
        def spoil(*arguments: Any) -> Any:
            results = function(*arguments)
            for tensor in [results] if isinstance(results, Tensor) else results:
                tensor.fill_(float("nan") if tensor.is_floating_point() else 0xA5)
            return results

        return spoil

    for name, function in known.items():
        setattr(layout, name, spoilt(function))
    try:
        yield
    finally:
        for name, function in known.items():
            setattr(layout, name, function)


def _two_wing_batch_norm(name: str, kind: str) -> int:
    from bench.sanitize import DTYPES, EPILOGUES, LAYOUTS, SHAPES, errors_of, splits_of

    wrong = 0
    for dtype, memory in product(DTYPES, LAYOUTS):
        worst = 0.0
        for number, (shape, (add, relu)) in enumerate(product(SHAPES, EPILOGUES)):
            split = splits_of(shape)[number % len(splits_of(shape))]
            worst = max(worst, *errors_of(shape, dtype, memory, split, add, relu, kind, number).values())
        report(f"{name} {dtype} {memory}: at most {worst:.2f} of the error allowed", error=worst)
        wrong += not worst <= 1
    return wrong


def _replayed(name: str) -> int:
    """Whether a replayed graph gives what a call does, on new values."""
    x = torch.randn(16, 64, 28, 28, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    wings = [[torch.randn(64, device="cuda").abs() for _ in range(4)] for _ in range(2)]

    def call() -> Tensor:
        return ops.twin_batch_norm(x, 8, wings[0], [t.clone() for t in wings[1]], 0.1, 1e-5, None, True)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    x.copy_(torch.randn_like(x))
    graph.replay()
    same = torch.equal(y, call())
    report(f"{name}: a replayed graph is {'right' if same else 'wrong'}")
    return not same


def _small_plan(kind: str, dtype: torch.dtype | None) -> int:
    from bench.sanitize import network

    model = network().to(kind)
    images, labels = torch.rand(37, 3, 64, 64, device=kind), torch.arange(37, device=kind) % 10
    plan, eager = (PGD(model, steps=1, random_start=False, engine=e, amp_dtype=dtype) for e in ("plan", "eager"))
    name = f"a plan in {'float32' if dtype is None else native.dtype_name(dtype)}"
    try:
        same = (plan(images, labels) == eager(images, labels)).float().mean().item()
    except Exception as error:
        report(f"{name}: {type(error).__name__}: {error}")
        return 1
    report(f"{name}: {same:.2%} of the pixels as eager", same=same)
    return same < (0.99 if dtype is None else 0.9)


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


def _seconds(call: Callable[[], object], kind: str) -> float:
    """The fastest of some calls."""
    best = float("inf")
    for _ in range(6):
        if kind == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.gpu_stages", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and args.stage != "build" and not torch.cuda.is_available():
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
