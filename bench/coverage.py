"""The attack engine over the networks of torchvision, timm and RobustBench's zoo: ``python -m bench.coverage``."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import twins_fast.attacks.engine.capture  # noqa: F401 - here, and not in the process of every network
from bench.attack import memory_in_use, moved
from bench.children import Ended, Limits, alone, in_children
from bench.harness import PARTIAL, RESULTS, Record, Runner, interleave, one_line
from bench.header import ROOT
from bench.peers import ENGINES
from bench.workloads import ALPHA, EPS, own_copy, random_images
from bench.zoos import BATCH, ZOOS, enliven, has, interpreter, kept_catalogue, smallest, version
from twins_fast import PGD
from twins_fast.attacks.engine.program import Program
from twins_fast.devices import has_instructions

NAME = "coverage"
WAYS = {  # name -> engine, type and layout of what is timed; the first one is what the others are compared with
    "eager": (*ENGINES["eager"], torch.contiguous_format),
    "autocast": ("eager", torch.bfloat16, torch.channels_last),
    "plan-float32": (*ENGINES["plan-float32"], torch.contiguous_format),
    "plan-bf16": (*ENGINES["plan-bf16"], torch.contiguous_format),
}
PAIRS = {"float32": ("eager", "plan-float32"), "bf16": ("autocast", "plan-bf16")}  # type -> PyTorch's way, and ours
CHECKED, TIMED, REMEMBERED = 2, 8, 32  # images
MOVED, STARTS = 1, 5  # starts that are moved by roundoff, for each start that is tried
FEW, MANY = 1, 3  # steps of the two attacks whose difference is timed
ROUNDS, ENOUGH = 3, 6  # turns of each, or only one where the first has taken so many seconds
SMALL = (32, 64, 96, 128, 160, 192)  # sides that are tried by --small
EQUAL, ROUNDOFF_MULTIPLE, MOST = 1e-4, 3, 1e-2  # error of the gradient: allowed; as a multiple of roundoff; at most
PLANNED, UNEQUAL, REFUSED, BROKEN, ENDED = "planned", "unequal", "refused", "broken", "ended"
SHOWN = 5  # reasons of a line
NO_MEMORY = "can't allocate memory"  # within the limit


@dataclass(frozen=True)
class Depth:
    """What is measured of a network besides its plan."""

    small: bool = False
    times: bool = False
    memory: bool = False

    def lacking(self, row: dict) -> set[str]:
        """What of this can be added to the row."""
        asked = {"times": self.times, "memory": self.memory} if row["status"] == PLANNED else {}
        return {key for key in asked if asked[key] and key not in row}

    def stands(self, row: dict, machine: str, commit: str) -> bool:
        """Whether a row need not be made anew: all that it has is of one machine and one commit."""
        if row["machine"] != machine:
            return row["status"] == PLANNED and not (self.times or self.memory)
        if row["commit"] != commit:
            return row["status"] == PLANNED and not self.lacking(row)
        return row["status"] != ENDED

    @property
    def sides(self) -> tuple[int, ...]:
        """What the side of the images may be, instead of the network's own."""
        return SMALL if self.small else ()


@dataclass
class Problem:
    """A network in eval mode, images, where the attack starts, and labels."""

    model: nn.Module
    images: Tensor
    start: Tensor
    labels: Tensor


def problem_of(zoo: str, name: str, images: int, sides: Sequence[int]) -> Problem:
    """A network of a zoo with seeded random weights, and random images of the first side that works, or of its own."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model, own = ZOOS[zoo].build(name)
    model = model.requires_grad_(False)
    side = next((side for side in sides if side < own and _takes(model, side)), own)
    enliven(model, random_images(BATCH, side, generator))
    clean = random_images(images, side, generator)
    start = (clean + torch.empty_like(clean).uniform_(-EPS, EPS, generator=generator)).clamp_(0, 1)
    return Problem(model, clean, start, torch.arange(images) % 10)


def _takes(model: nn.Module, side: int) -> bool:
    try:
        with torch.no_grad():
            model.eval()(torch.rand(CHECKED, 3, side, side))
    except Exception:
        return False
    return True


def examine(zoo: str, name: str, depth: Depth) -> dict:
    """The row of a network; of one that is not planned for small images, that for its own size."""
    row = examined(zoo, name, depth.sides)
    return examined(zoo, name, ()) if depth.small and row["status"] in (UNEQUAL, REFUSED) else row


def examined(zoo: str, name: str, sides: Sequence[int]) -> dict:
    """Whether a network is planned, or why not; whether the plan computes what the network does."""
    try:
        problem = problem_of(zoo, name, CHECKED, sides)
        gradient_of(problem)
    except Exception as error:
        return failure(error, BROKEN)
    model = problem.model
    row = {
        "kind": "BatchNorm" if any(isinstance(module, _BatchNorm) for module in model.modules()) else "others",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "side": problem.images.shape[-1],
    }
    attack, started = attack_of(model, "plan-float32", 1), time.perf_counter()
    try:
        adversarial = attack(problem.images, problem.labels, x_init=problem.start)
        row["first_seconds"] = time.perf_counter() - started
        program = attack._program(problem.images)
        assert isinstance(program, Program)
        eager = attack_of(model, "eager", 1)(problem.images, problem.labels, x_init=problem.start)
        row["pixels"] = (adversarial != eager).float().mean().item()
        row |= errors(program, problem)
    except Exception as error:
        row |= failure(error, REFUSED)
        if row["status"] == REFUSED and (own := own_error(problem)) > MOST:
            row["reason"] += f"; its own gradient in float32 is off by {own:.2g}"
        return row
    segments = [stage for stage in program.plan.stages if stage.kind == "segment"]
    operations = [{node.call[0].__name__.partition(".")[0] for _, node in s.nodes if node.call} for s in segments]
    row |= {"stages": len(program.plan.stages), "segments": len(segments)}
    row["operations"] = dict(Counter(operation for segment in operations for operation in segment).most_common())
    if not row["error"] <= row["allowed"]:
        reason = f"the gradient is off by {row['error']:.2g}, {row['allowed']:.2g} allowed"
        return row | {"status": UNEQUAL, "reason": reason}
    return row | {"status": PLANNED}


def failure(error: Exception, status: str) -> dict:
    """Entries of the row of a network: the status, unless memory ran out, and why."""
    reason = one_line(error).removeprefix("RuntimeError: engine='plan': ")
    return {"status": ENDED if NO_MEMORY in reason else status, "reason": reason}


def own_error(problem: Problem) -> float:
    """How far the network's own gradient is from that in float64."""
    return distance(gradient_of(problem).double(), gradient_of(in_float64(problem)))


def in_float64(problem: Problem) -> Problem:
    exact = own_copy(problem.model, torch.contiguous_format).double()
    return replace(problem, model=exact, start=problem.start.double())


def errors(program: Program, problem: Problem) -> dict[str, float]:
    """How far the plan's gradient is from the exact one, how far the network's own are, and what is allowed.

    Exact is float64; the network's own are those of both memory layouts, and after roundoff in the images. Where a
    ReLU's input is zero within roundoff the gradient jumps; so these are medians over some starts.
    """
    exact, found = in_float64(problem), []
    for seed in range(STARTS):
        generator = torch.Generator().manual_seed(seed)
        start = problem.images + torch.empty_like(problem.images).uniform_(-EPS, EPS, generator=generator)
        own = replace(problem, start=start.clamp_(0, 1))
        expected = gradient_of(replace(exact, start=own.start.double()))
        roundoff = max(distance(other.double(), expected) for other in gradients_of(own))
        found.append((distance(planned_gradient(program, own).double(), expected), roundoff))
    error, roundoff = torch.tensor(found).median(0).values.tolist()
    return {"error": error, "roundoff": roundoff, "allowed": min(MOST, max(EQUAL, ROUNDOFF_MULTIPLE * roundoff))}


def attack_of(model: nn.Module, way: str, steps: int) -> PGD:
    engine, dtype, layout = WAYS[way]
    if layout is not torch.contiguous_format:
        model = own_copy(model, layout)
    return PGD(model, EPS, ALPHA, steps, engine=engine, amp_dtype=dtype)


def gradient_of(problem: Problem, start: Tensor | None = None) -> Tensor:
    """Of the cross-entropy at the start, by autograd."""
    x = (problem.start if start is None else start).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(problem.model(x), problem.labels, reduction="sum"), x)
    return gradient


def gradients_of(problem: Problem) -> Iterator[Tensor]:
    """In both memory layouts, and from a start moved by as much as roundoff does."""
    yield gradient_of(problem)
    yield gradient_of(problem, problem.start.contiguous(memory_format=torch.channels_last))
    for start in moved(problem.start, MOVED):
        yield gradient_of(problem, start)


def planned_gradient(program: Program, problem: Problem) -> Tensor:
    """The same by the plan."""
    gradient = torch.empty_like(problem.start)

    def work(network, rows):
        leaf = network.logits(problem.start[rows]).float().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(leaf, problem.labels[rows], reduction="sum")
        gradient[rows] = network.gradient(problem.start[rows], torch.autograd.grad(loss, leaf)[0])

    with torch.no_grad():
        program.fold(problem.model)
        program.in_parts(len(gradient), work)
    return gradient


def distance(gradient: Tensor, expected: Tensor) -> float:
    """L2, relative."""
    return ((gradient - expected).norm() / expected.norm()).item()


def timed() -> list[tuple[str, str]]:
    """The pairs in the types that the CPU computes in: in another, PyTorch takes minutes for a step."""
    return [pair for pair in PAIRS.values() if has_instructions(WAYS[pair[1]][1] or torch.float32)]


def times(zoo: str, name: str, side: int) -> dict:
    """Milliseconds of a step, by each way; they take turns."""
    problem = problem_of(zoo, name, TIMED, (side,))
    runners, failures = {}, {}
    for way in chain(*timed()):
        attacks = {part: attack_of(problem.model, way, steps) for part, steps in (("few", FEW), ("many", MANY))}
        chains = [{part: lambda _, a=a: a(problem.images, problem.labels, x_init=problem.start)}
                  for part, a in attacks.items()]  # fmt: skip
        try:
            for both in chains:
                for run in both.values():
                    run(())
            runners[way] = Runner(tuple, chains, dict, "")
        except Exception as error:
            failures[way] = one_line(error)
    started = time.perf_counter()
    samples, failed = interleave(runners, {"": [()]}, 1, "cpu", long=True)
    if time.perf_counter() - started < ENOUGH:
        samples, failed = interleave(runners, {"": [()]}, ROUNDS, "cpu", long=True)
    failures |= failed
    result = {way: 1e3 * (min(s["many"]) - min(s["few"])) / (MANY - FEW) for way, s in samples.items()}
    return {"milliseconds": result, "failures": failures}


def peak(zoo: str, name: str, side: int, way: str) -> int:
    """Bytes beyond network and images at the highest of a second attack, in this process."""
    problem = problem_of(zoo, name, REMEMBERED, (side,))
    attack = attack_of(problem.model, way, 1)
    before = memory_in_use("cpu", reset=True)
    for _ in range(2):
        memory_in_use("cpu", reset=True)
        attack(problem.images, problem.labels, x_init=problem.start)
    return memory_in_use("cpu", peak=True) - before


def sweep(zoo: str, names: dict[str, int], depth: Depth, limits: Limits, workers: int, record: Record) -> None:
    """Add a row for each name that has none; and to each planned one what this depth asks for.

    What was not ready is tried again, and whatever an earlier commit did not plan. A row stands for so many networks.
    """
    commit = record.header["commit"]
    kept = {row["name"]: row for row in record.rows if depth.stands(row, record.machine, commit)}
    new = [(zoo, name, depth) for name in names if name not in kept]
    deeper = [row for name, row in kept.items() if name in names and depth.lacking(row)]
    examined_rows = (
        {"name": name, "stands_for": names[name], "commit": commit, "machine": record.machine}
        | ({"status": ENDED, "reason": str(found)} if isinstance(found, Ended) else found)
        for (_, name, _), found in in_children(examine, new, limits, workers)
    )
    for number, row in enumerate(chain(examined_rows, deeper), 1):
        deepen(zoo, row, depth.lacking(row), limits)
        record.rows = [other for other in record.rows if other["name"] != row["name"]]
        record.add(row)
        print(f"[{number}/{len(new) + len(deeper)}] {in_words(row)}", flush=True)


def deepen(zoo: str, row: dict, lacking: set[str], limits: Limits) -> None:
    """Add what a row lacks."""
    if "times" in lacking:
        row["times"] = more(limits, times, zoo, row["name"], row["side"])
    if "memory" in lacking:
        row["memory"] = {way: more(limits, peak, zoo, row["name"], row["side"], way) for way in timed()[-1]}


def more(limits: Limits, function: Callable, *arguments: Any) -> Any:
    """A further measurement in a process of its own, or the reason why there is none."""
    try:
        return alone(limits, function, *arguments)
    except Ended as ended:
        return str(ended)


def in_words(row: dict) -> str:
    text = f"{row['name']}: {row['status']}"
    if "stages" in row:
        text += f", {row['stages']} stages, {row['segments']} segments, error {row['error']:.1e}"
        text += f", {row['first_seconds']:.1f} s"
    return text + (f": {row['reason']}" if "reason" in row else "") + (f", {row['times']}" if "times" in row else "")


def cause(reason: str) -> str:
    """A reason without the place in the network, and without numbers."""
    reason = re.sub(r"^(the model|[a-z]\w*(\.\w+)+|[a-z]\w*\d*): ", "", reason)
    return re.sub(r"\d+", "N", reason)[:120]


def summary(rows: dict[str, list[dict]]) -> list[list[str]]:
    """By zoo and kind: families, the networks that they stand for, and what became of them."""
    others = (UNEQUAL, REFUSED, BROKEN, ENDED)
    lines = [["", "kind", "families", "networks", PLANNED, "of them with PyTorch segments", *others]]
    for zoo, all_of_it in rows.items():
        for kind in ("BatchNorm", "others", None):
            part = [row for row in all_of_it if row.get("kind") == kind]
            counts = Counter(row["status"] for row in part)
            segmented = sum(row["status"] == PLANNED and row["segments"] > 0 for row in part)
            numbers = [len(part), sum(row["stands_for"] for row in part), counts[PLANNED], segmented]
            numbers += [counts[status] for status in others]
            if part:
                lines.append([zoo, kind or "not known", *map(str, numbers)])
    return lines


def reasons(rows: list[dict]) -> list[list[str]]:
    """Why networks are not planned: how many, and some of them."""
    lines = [["reason", "families", "such as"]]
    causes = Counter(cause(row["reason"]) for row in rows if "reason" in row)
    for text, count in causes.most_common():
        names = [row["name"] for row in rows if "reason" in row and cause(row["reason"]) == text]
        lines.append([text, str(count), ", ".join(names[:SHOWN])])
    return lines


def in_segments(rows: list[dict]) -> list[list[str]]:
    """Which operations PyTorch runs in the plans of networks with batch norms: in how many networks, and some."""
    lines = [["operation", "families", "such as"]]
    planned = [row for row in rows if row.get("kind") == "BatchNorm" and "operations" in row]
    counts = Counter(operation for row in planned for operation in row["operations"])
    for operation, count in counts.most_common():
        names = [row["name"] for row in planned if operation in row["operations"]]
        lines.append([operation, str(count), ", ".join(names[:SHOWN])])
    return lines


def not_planned(rows: list[dict]) -> list[list[str]]:
    lines = [["network", "kind", "status", "reason"]]
    for row in rows:
        if "reason" in row:
            lines.append([row["name"], row.get("kind", ""), row["status"], row["reason"]])
    return lines


def speedups(row: dict) -> dict[str, float]:
    """How much faster the plan is: in float32 than eager, in bfloat16 than the better of eager and autocast."""
    taken = row["times"]["milliseconds"] if isinstance(row.get("times"), dict) else {}
    gains = {}
    if {"eager", "plan-float32"} <= taken.keys():
        gains["float32"] = taken["eager"] / taken["plan-float32"]
    if {"eager", "plan-bf16"} <= taken.keys():
        gains["bf16"] = min(taken["eager"], taken.get("autocast", math.inf)) / taken["plan-bf16"]
    return gains


def saving(row: dict) -> float | None:
    """The plan's memory as a share of what PyTorch needs in the same type."""
    used = row.get("memory", {})
    for pytorch, ours in PAIRS.values():
        if all(isinstance(used.get(way), int) for way in (pytorch, ours)):
            return used[ours] / used[pytorch]
    return None


def time_summary(rows: list[dict]) -> list[list[str]]:
    """Over the networks of a kind: the least and the median of the speedups, how many are slower; memory."""
    gains = [speedups(row) for row in rows]
    types = [name for name in PAIRS if any(name in gain for gain in gains)]
    lines = [["kind", "timed", *(f"{name}: least, median" for name in types), "slower", "memory: median, most"]]
    for kind in ("BatchNorm", "others"):
        part = [gain for row, gain in zip(rows, gains, strict=True) if row.get("kind") == kind and gain]
        shares = [share for row in rows if row.get("kind") == kind and (share := saving(row))]
        if part:
            texts = [_least_and_median([gain[name] for gain in part if name in gain]) for name in types]
            slower = sum(min(gain.values()) < 1 for gain in part)
            memory = f"{statistics.median(shares):.2f}, {max(shares):.2f}" if shares else ""
            lines.append([kind, str(len(part)), *texts, str(slower), memory])
    return lines


def _least_and_median(values: list[float]) -> str:
    return f"{min(values):.2f}, {statistics.median(values):.2f}" if values else ""


def time_table(rows: list[dict]) -> list[list[str]]:
    """Milliseconds of a step, how much faster the plans are, and memory; the smallest gain first."""
    rows = sorted((row for row in rows if "times" in row), key=lambda row: min(speedups(row).values(), default=0))
    found = [row["times"]["milliseconds"] | row["times"]["failures"] for row in rows if isinstance(row["times"], dict)]
    ways = [way for way in WAYS if any(way in taken for taken in found)]
    types = [name for name, (_, ours) in PAIRS.items() if ours in ways]
    remembered = [way for way in WAYS if any(way in row.get("memory", {}) for row in rows)]
    lines = [[f"batch {TIMED}", "kind", "segments", *ways, *types, *(f"MB, {way}" for way in remembered)]]
    for row in rows:
        taken = row["times"]["milliseconds"] if isinstance(row["times"], dict) else {}
        gains, used = speedups(row), row.get("memory", {})
        line = [row["name"], row["kind"], str(row["segments"])]
        line += [f"{taken[way]:.0f} ms" if way in taken else "failed" for way in ways]
        line += [f"{gains[name]:.2f} x" if name in gains else "" for name in types]
        line += [f"{used[w] / 1e6:.0f}" if isinstance(used.get(w), int) else "failed" * (w in used) for w in remembered]
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.coverage", description=__doc__)
    parser.add_argument("--zoo", default=",".join(ZOOS), help="comma-separated (%(default)s)")
    parser.add_argument("--families", action="store_true", help="of networks whose modules are of the same types, only "
                        "the one with the fewest parameters")  # fmt: skip
    parser.add_argument("--only", metavar="REGEX", help="networks whose names it is found in")
    parser.add_argument("--first", type=int, metavar="N", help="only so many")
    parser.add_argument("--small", action="store_true", help=f"images of the smallest side that works, of {SMALL}")
    parser.add_argument("--time", action="store_true", help="also milliseconds of a step: eager, autocast, plans")
    parser.add_argument("--memory", action="store_true", help="also the memory of a plan and of PyTorch")
    parser.add_argument("--resume", action="store_true", help="keep what an earlier commit planned")
    parser.add_argument("--workers", type=int, default=1, help="networks at a time (%(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="for a network (%(default)s)")
    parser.add_argument("--gigabytes", type=float, default=8, help="for a network (%(default)s)")
    parser.add_argument("--prepare", action="store_true", help="only install what is missing")
    parser.add_argument(
        "--json", type=Path, help="of one zoo; default: a file in bench/results, or of runs/bench for a part"
    )
    args = parser.parse_args(arguments)
    zoos = args.zoo.split(",")
    if unknown := {*zoos} - {*ZOOS}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(ZOOS)}")
    given = sys.argv[1:] if arguments is None else arguments
    if args.prepare:
        print("\n".join(str(interpreter(zoo)) for zoo in zoos))
        return 0
    if args.time and args.workers > 1:
        parser.error("what is timed has to be alone: --workers 1")
    depth, limits = Depth(args.small, args.time, args.memory), Limits(args.seconds, args.gigabytes)
    status = 0
    for zoo in zoos:
        if not has(zoo):
            try:
                own = [interpreter(zoo), "-m", "bench.coverage", *given, "--zoo", zoo]
                status |= subprocess.run(own, cwd=ROOT).returncode
            except subprocess.CalledProcessError as error:
                print(f"{zoo} cannot be installed: {error}", file=sys.stderr)
                status |= 1
            continue
        command = " ".join(["python -m bench.coverage", *given])
        folder = PARTIAL if args.only else RESULTS
        options = {"small": args.small, "version": version(zoo)}
        record = Record(f"{NAME}-{zoo}", "cpu", command, options, folder, args.json)
        record.resume(anywhere=True)
        record.rows = [row for row in record.rows if args.resume or row["commit"] == record.header["commit"]]
        names = dict.fromkeys(ZOOS[zoo].names(), 1)  # imports the zoo here, and not in every process
        if args.families:
            names = smallest(kept_catalogue(zoo))
        names = {name: count for name, count in names.items() if re.search(args.only or "", name)}
        names = dict(islice(names.items(), args.first))
        torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
        sweep(zoo, names, depth, limits, args.workers, record)
        status |= record.conclude(
            [f"{row['name']}: {row['reason']}" for row in record.rows if row["status"] == UNEQUAL]
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
