"""The attack against its peers: ``python -m bench.attack``; other measurements with one of the options below."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import harness, peers
from bench.harness import PARTIAL, PEERS, RESULTS, Benchmark, Record, fails, limits, measure, table
from bench.header import ROOT
from bench.peers import ALPHA, ATTACK, ENGINES, EPS, TRAINING, engine_attack, published_attack
from bench.workloads import NETWORKS, Attack, Inputs, cost, inputs, own_copy, workload

SCALING, PRECISION, LAYERS, FEW = "attack_scaling", "attack_precision", "attack_layers", "attack_few"
ROUNDS, STEPS = 2, 10
ROUNDING = 1e-6  # of a pixel at the edge of the ball
ROUNDOFF_MULTIPLE = 3  # allowed change of the loss, as a multiple of what roundoff alone changes, up to MOST_ROUNDOFF
ROUNDOFF = 1e-7  # of a pixel
MOVED, MOVED_TRAINING = 6, 2  # starts moved by it that are tried
MOST_ROUNDOFF, MOST_ROUNDOFF_TRAINING = 1e-3, 1e-2
COPIED = 1 << 24  # float32 values of the copy that shows the bandwidth
MEMORY_STEPS = 2  # an attack's memory does not grow after its second step

TRAINED = ("resnet18-32", "resnet50-224")
SCALED = "resnet18-32"
SCALING_PEERS = ("autocast", "plan-bf16")
AXES = {  # what is varied -> the rest, and its values
    "batch": ("steps=10", (1, 8, 32, 128, 256)),
    "steps": ("batch=8", (1, 2, 5, 10, 20)),
    "side": ("batch=8:steps=10", (16, 32, 64, 96)),
    "width": ("batch=8:steps=10", (16, 32, 64, 128)),
    "chunk_size": ("batch=128:steps=10", (8, 16, 32, 64, 128)),
}
FEW_BATCHES, FEW_STEPS = (1, 2, 8), (1, 2, 3)
FEW_PAIRS = {"float32": ("eager", "plan-float32"), "bf16": ("eager-bf16", "plan-bf16")}  # what engine="auto" decides


def _loss(problem: Inputs, x: Tensor, rows: Tensor) -> float:
    with torch.no_grad():
        return F.cross_entropy(problem.model(x.contiguous()), problem.labels[rows]).item()


def _reference(attack: Attack, problem: Inputs, start: Tensor) -> tuple[float, float]:
    """The loss that the published loop reaches from ``start``, and its largest relative change by roundoff.

    Roundoff comes from another memory layout, and from the start moved by :data:`ROUNDOFF`.
    """
    reference = problem.references.get(id(start))
    if reference is None:
        rows, losses = problem.rows(), []
        runs = [(problem.model, first) for first in (start, *moved(start, MOVED))]
        runs.append((own_copy(problem.model, torch.channels_last), start))
        for model, first in runs:
            x = published_attack(model, problem.images[rows], problem.labels[rows], first[rows], attack.steps)
            losses.append(_loss(problem, x, rows))
        reference = problem.references[id(start)] = losses[0], max(abs(loss / losses[0] - 1) for loss in losses[1:])
    return reference


def moved(start: Tensor, times: int) -> list[Tensor]:
    """``start``, moved by about the roundoff of a pixel."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(start.shape, generator=generator).to(start) for _ in range(times)]
    return [(start + ROUNDOFF * n).clamp(0, 1) for n in noise]


def check(attack: Attack, problem: Inputs, results: dict[str, Tensor]) -> dict[str, float]:
    """Errors relative to what is allowed: distance outside the budget, and from the published loop's loss."""
    x, rows = results["x"].float(), problem.rows()
    outside = ((x - problem.images).abs() - EPS).amax().clamp_min(0) + (x - x.clamp(0, 1)).abs().amax()
    reference, roundoff = _reference(attack, problem, results["start"])
    allowed = max(results["allowed"].item(), min(ROUNDOFF_MULTIPLE * roundoff, MOST_ROUNDOFF))
    errors = {"budget": outside.item() / ROUNDING, "loss": abs(_loss(problem, x[rows], rows) / reference - 1) / allowed}
    return {name: error if error == error else float("inf") for name, error in errors.items()}


def check_training(attack: Attack, problem: Inputs, results: dict[str, Tensor]) -> dict[str, float]:
    """Error of the first two steps' losses against the published code's, relative to what is allowed."""
    if "training" not in problem.references:
        losses = []
        for start in (problem.start, *moved(problem.start, MOVED_TRAINING)):
            step = peers.published_training(attack, problem)
            losses.append(torch.stack([step((problem.images, problem.labels, start)) for _ in range(2)]))
        changes = [(loss / losses[0] - 1).abs().max().item() for loss in losses[1:]]
        problem.references["training"] = losses[0], max(changes)
    reference, roundoff = problem.references["training"]
    errors = (results["loss"] / reference - 1).abs()
    allowed = max(results["allowed"].item(), min(ROUNDOFF_MULTIPLE * roundoff, MOST_ROUNDOFF_TRAINING))
    return {"loss": float("inf") if errors.isnan().any() else errors.max().item() / allowed}


def floor(attack: Attack) -> dict[str, int]:
    return {"attack": cost(attack)[1]}


def operations(attack: Attack) -> dict[str, int]:
    return {"attack": cost(attack)[0]}


def training_floor(attack: Attack, what: int = 1) -> dict[str, int]:
    """The attack, then a step's forward pass, input gradient and weight gradient (half as much again)."""
    return {"step": cost(attack)[what] + cost(replace(attack, steps=1))[what] * 3 // 2}


def _yardstick(problem: Inputs) -> Tensor:
    return torch.zeros(COPIED, device=problem.images.device)


def in_child(benchmark: str, attack: Attack, name: str, chain, operands, device: str) -> dict:
    """Memory of one peer; see :func:`child_memory`. A compiled one would have to be compiled again for it."""
    if name.startswith("compile") and device == "cpu":
        return {"peak": None}
    return child_memory(benchmark, name, [replace(attack, steps=min(attack.steps, MEMORY_STEPS))], device)[0]


def child_memory(benchmark: str, name: str, attacks: list[Attack], device: str) -> list[dict]:
    """Bytes of a peer on each workload, from a process that does nothing else; see :func:`own_memory`."""
    command = [sys.executable, "-m", "bench.attack", "--device", device, "--memory", name]
    command += [json.dumps(asdict(attack)) for attack in attacks]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    run = subprocess.run(
        [*command, *["--training"] * (benchmark == TRAINING)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if run.returncode:
        raise RuntimeError(f"memory: {(run.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(run.stdout.splitlines()[-1])


def own_memory(benchmark: str, name: str, attack: Attack, device: str) -> dict[str, int]:
    """Bytes beyond a peer that is built and its operands, in this process.

    ``peak`` is that of a second call, with what the first one left behind; ``first`` that of the first call.
    """
    problem = inputs(attack, device)
    runner = PEERS[benchmark][name].build(attack, problem)
    operands, (chain,) = runner.operands(), runner.chains
    (function,) = chain.values()
    if name.startswith("compile"):  # what the compiler itself loads is no part of the network's memory
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    used, before = {}, memory_in_use(device, reset=True)
    for call in ("first", "peak"):
        memory_in_use(device, reset=True)
        with runner.around():
            function(operands)
        harness.synchronize(device)
        used[call] = memory_in_use(device, peak=True) - before
    return used


def memory_in_use(device: str, peak: bool = False, reset: bool = False) -> int:
    """Bytes in use now, or at the highest since the last ``reset``."""
    if reset:
        gc.collect()
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if reset:
        with suppress(OSError, AttributeError):  # without glibc: what was freed counts as used
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


BENCHMARK = Benchmark(ATTACK, inputs, _yardstick, floor, check, operations, True, partial(in_child, ATTACK))
STEP_BENCHMARK = Benchmark(
    TRAINING, inputs, _yardstick, training_floor, check_training, partial(training_floor, what=0), True,
    partial(in_child, TRAINING),
)  # fmt: skip


def compare(benchmark: Benchmark, attacks: list[Attack], names: list[str], rounds: int, record: Record) -> list[str]:
    """Measure all workloads into ``record``; returns what failed."""
    for number, attack in enumerate(attacks, 1):
        print(f"[{number}/{len(attacks)}] {attack.name}, batch {attack.batch}, {attack.steps} steps", flush=True)
        row = measure(benchmark, attack, record.device, names, rounds)
        record.add(row)
        print(f"  peak {row['peak']['operations'] / 1e9:.0f} GFLOP/s ({row['peak']['of']})\n{table(row)}", flush=True)
    return fails(record.rows)


def scaling(axes: dict, names: list[str], rounds: int, record: Record) -> list[str]:
    """Time and memory of the peers as one size at a time grows."""
    points = [
        (axis, value, workload(f"{SCALED}:{rest}:{axis}={value}", record.device))
        for axis, (rest, values) in axes.items()
        for value in values
    ]
    attacks = [attack for _, _, attack in points]
    used = {name: dict(zip(attacks, child_memory(ATTACK, name, attacks, record.device), strict=True)) for name in names}
    benchmark = replace(BENCHMARK, memory=lambda attack, name, *measured: used[name][attack])
    for axis, value, attack in points:
        record.add(measure(benchmark, attack, record.device, names, rounds) | {"axis": axis, "value": value})
        print(f"{axis} {value}\n{table(record.rows[-1])}", flush=True)
    return fails(record.rows)


def few(networks: list[str], rounds: int, record: Record) -> list[str]:
    """Both engines where so few steps are taken on so few images that packing weights may not pay; what auto takes."""
    names = [name for pair in FEW_PAIRS.values() for name in pair]
    benchmark = replace(BENCHMARK, memory=lambda *measured: {"peak": None})
    for network, batch, steps in product(networks, FEW_BATCHES, FEW_STEPS):
        attack = workload(f"{network}:batch={batch}:steps={steps}", record.device)
        row = measure(benchmark, attack, record.device, names, rounds)
        problem = inputs(attack, record.device)
        for precision, (_, plan) in FEW_PAIRS.items():
            chosen = engine_attack(problem.model, plan, steps, engine="auto").explain(problem.images)
            row.setdefault("auto", {})[precision] = chosen.engine
        record.add(row)
        print(f"{attack.name}\n{table(row)}\n  auto: {row['auto']}", flush=True)
    return fails(record.rows)


def embedded_images(device: str) -> list[tuple[Tensor, Tensor]]:
    """The embedded training images and their labels, and those for testing."""
    from twins_fast.train.datasets import load_datasets
    from twins_fast.train.loaders import eval_transform

    transform = eval_transform("cifar")
    return [
        (torch.stack([transform(image) for image, _ in part]).to(device), torch.from_numpy(part.labels).to(device))
        for part in load_datasets("embedded")[:2]
    ]


def embedded(device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The embedded robust network with a head fitted to the embedded training images, and the test images."""
    from twins_fast.train.build import make_network
    from twins_fast.train.recipes import get_recipe

    (images, labels), (test_images, test_labels) = embedded_images("cpu")
    model = make_network(get_recipe("mini").network, len(labels.unique())).eval().requires_grad_(False)
    features: list[Tensor] = []
    hook = model.fc_downstream.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    for part in images.split(250):
        model(part)
    hook.remove()
    head = model.fc_downstream.requires_grad_()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(head(torch.cat(features)), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    head.requires_grad_(False)
    return model.to(device), test_images.to(device), test_labels.to(device)


def precision(names: list[str], steps: int, images: int, record: Record) -> list[str]:
    """Robust accuracy and loss that each engine and dtype reaches on real images, judged by the float32 model."""
    model, x, labels = embedded(record.device)
    x, labels = x[:images], labels[:images]
    noise = torch.empty(x.shape).uniform_(-EPS, EPS, generator=torch.Generator().manual_seed(0))
    batches = list(zip(x.split(250), labels.split(250), (x + noise.to(x.device)).clamp(0, 1).split(250), strict=True))
    once = [published_attack(model, *batch, 1) for batch in batches]
    for name in names:
        correct, loss, same, seconds = 0, 0.0, 0.0, 0.0
        for (clean, batch_labels, start), first in zip(batches, once, strict=True):
            started = time.perf_counter()
            adversarial = engine_attack(model, name, steps)(clean, batch_labels, x_init=start)
            seconds += time.perf_counter() - started
            with torch.no_grad():
                logits = model(adversarial)
            correct += (logits.argmax(1) == batch_labels).sum().item()
            loss += F.cross_entropy(logits, batch_labels, reduction="sum").item()
            same += (engine_attack(model, name, 1)(clean, batch_labels, x_init=start) == first).float().mean().item()
        result = {"name": name, "images": len(x), "robust": correct / len(x), "loss": loss / len(x)}
        record.add(result | {"agreement": same / len(batches), "seconds": seconds})
        print(f"{name:14} robust {result['robust']:.1%}, loss {result['loss']:.4f}, one step {same / len(batches):.3%}")
    return []


def layers(attacks: list[Attack], names: list[str], record: Record) -> list[str]:
    """Each layer of a plan beside its floor: its bytes at the speed of a copy or its operations at the peak."""
    best = limits(torch.zeros(COPIED, device=record.device), record.device)
    for attack in attacks:
        problem = inputs(attack, record.device)
        for name in names:
            explain = engine_attack(problem.model, name, attack.steps, attack.chunk_size).explain
            report = explain(problem.images, problem.labels, timed=True)
            rows = [dict(layer) for layer in report.layers]
            for row in rows:
                least = max(row["bytes"] / best["bandwidth"], row["operations"] / best["peak"]["operations"])
                row["floor_ms"] = 1e3 * report.images * least
            record.add({**asdict(attack), "engine": name, "limits": best, "layers": rows})
            print(f"{attack.name}, {name}\n{layer_table(rows)}", flush=True)
    return []


def layer_table(rows: list[dict]) -> str:
    """Layers of :func:`layers` and their sum, as Markdown."""
    lines = ["| layer | op | runs | forward | backward | floor | times the floor |", "|---|---|---|---|---|---|---|"]
    total = [0.0, 0.0, 0.0]
    for row in rows:
        times = row["forward_ms"] or 0.0, row["backward_ms"] or 0.0, row["floor_ms"]
        total = [a + b for a, b in zip(total, times, strict=True)]
        lines.append(_layer_line((row["name"], row["op"], row["runs"]), times))
    return "\n".join([*lines, _layer_line(("all", "", ""), total)])


def _layer_line(words, times) -> str:
    forward, backward, least = times
    multiple = f"{(forward + backward) / least:.1f}" if least else ""
    return f"| {' | '.join(words)} | {forward:.3f} ms | {backward:.3f} ms | {least:.3f} ms | {multiple} |"


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Hide what an earlier run compiled or tuned, so that first calls cost what they cost a new user."""
    with tempfile.TemporaryDirectory() as folder:
        names = {name: f"{folder}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TWINS_FAST_CACHE")}
        before = {name: os.environ.get(name) for name in names}
        os.environ |= names
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.attack", description=__doc__)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--scaling", action="store_true", help=f"time and memory against {', '.join(AXES)}")
    kind.add_argument("--few", action="store_true", help="few steps on few images: whether the plan pays")
    kind.add_argument("--precision", action="store_true", help="robust accuracy of each engine on real images")
    kind.add_argument("--layers", nargs="+", metavar="WORKLOAD", help="each layer of the plan beside its floor")
    parser.add_argument("--training", action="store_true", help="the whole TWINS-AT training step")
    parser.add_argument("--memory", nargs="+", metavar=("PEER", "WORKLOAD"), help="print a peer's bytes as JSON")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workloads", help=f"comma-separated, of {', '.join(NETWORKS)}; NAME:batch=8:side=64 changes")
    parser.add_argument("--peers", help="comma-separated; default: all that run on the device")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each peer")
    parser.add_argument("--steps", type=int, default=STEPS, help="of an attack")
    parser.add_argument("--images", type=int, default=1000, help="of --precision")
    parser.add_argument("--json", type=Path, help=f"default: a file in {RESULTS.relative_to(ROOT)}, or in "
                        f"{PARTIAL.relative_to(ROOT)} for other than default sizes")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    if args.rounds < 1 or args.steps < 1 or args.images < 1:
        parser.error("needs at least one round, one step and one image")
    if args.memory:
        name, *texts = args.memory
        benchmark = TRAINING if args.training else ATTACK
        print(json.dumps([own_memory(benchmark, name, Attack(**json.loads(t)), args.device) for t in texts]))
        return 0
    part = next((p for p in ("scaling", "few", "precision", "layers", "training") if getattr(args, p)), None)
    name, known, default = {
        # "eager" is what "published" is, behind this package's checks, "eager-bf16" what "autocast" is
        None: (
            ATTACK,
            PEERS[ATTACK],
            [n for n, p in PEERS[ATTACK].items() if args.device in p.devices and not n.startswith("eager")],
        ),
        "training": (TRAINING, PEERS[TRAINING], list(PEERS[TRAINING])),
        "scaling": (SCALING, PEERS[ATTACK], list(SCALING_PEERS)),
        "few": (FEW, PEERS[ATTACK], []),
        "precision": (PRECISION, ENGINES, list(ENGINES)),
        "layers": (LAYERS, ENGINES, ["plan-bf16"]),
    }[part]
    names = args.peers.split(",") if args.peers else default
    if unknown := set(names) - set(known):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = args.layers or (args.workloads.split(",") if args.workloads else TRAINED if part else list(NETWORKS))
    try:
        attacks = [workload(text, args.device, steps=args.steps) for text in chosen]
    except ValueError as error:
        parser.error(str(error))
    whole = not (args.workloads or args.peers) and args.rounds >= ROUNDS and args.steps == STEPS
    whole = whole and args.images == 1000 and all(text in NETWORKS for text in chosen)
    command = " ".join(["python -m bench.attack", *(sys.argv[1:] if arguments is None else arguments)])
    options = {"rounds": args.rounds, "steps": args.steps, "eps": EPS, "alpha": ALPHA}
    record = Record(name, args.device, command, options, RESULTS if whole else PARTIAL, args.json)
    torch.backends.cudnn.benchmark = True  # for all peers
    with fresh_caches():
        if part == "scaling":
            problems = scaling(AXES, names, args.rounds, record)
        elif part == "few":
            problems = few(chosen, args.rounds, record)
        elif part == "precision":
            problems = precision(names, args.steps, args.images, record)
        elif part == "layers":
            problems = layers(attacks, names, record)
        else:
            problems = compare(STEP_BENCHMARK if part else BENCHMARK, attacks, names, args.rounds, record)
    return record.conclude(problems)


if __name__ == "__main__":
    sys.exit(main())
