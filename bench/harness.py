"""Benchmarks and their peers: a peer is timed only if its results are right, and peers take turns.

A benchmark registers its peers with ``@peer(benchmark, name)``. A peer is built once per workload and gives a
:class:`Runner`. Each stage runs over all copies of the operands before the next stage starts, so that operands come
from memory, as they do in a network, and not from the cache.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from bench.header import ROOT, device_kind, header, last_level_cache

RESULTS = ROOT / "bench" / "results"
PARTIAL = ROOT / "runs" / "bench"  # measurements of a part, which must not replace those of the whole
COLD = 3  # times the last-level cache: what the rotated copies must exceed
MEMORY_SHARE = 0.25  # of the free memory, for the copies of one form
PRODUCTS = {"cpu": (1024, 2048), "cuda": (4096, 8192)}  # sides of the matrices whose product shows the peak


class Unavailable(Exception):
    """The peer cannot run here; the message says why."""


@dataclass(frozen=True)
class Workload:
    """One problem size; ``count`` is how often the whole that is summed over holds it."""

    name: str
    count: int


@dataclass
class Runner:
    """What a peer does with one workload.

    Attributes:
        operands: makes one set of tensors in the form that the peer takes.
        chains: each a sequence of named stages; a stage maps the operands, or what the stage before it returned,
            to the next state.
        results: what :attr:`Benchmark.check` compares, from operands.
        form: peers of the same form share their operands.
        around: entered once around many calls.
        more: what else to record of a peer that passed, from operands.
        check: instead of :attr:`Benchmark.check`.
    """

    operands: Callable[[], tuple[torch.Tensor, ...]]
    chains: list[dict[str, Callable[[Any], Any]]]
    results: Callable[[Any], Any]
    form: Any
    around: Callable[[], AbstractContextManager] = nullcontext
    more: Callable[[Any], dict] = lambda operands: {}
    check: Callable[[Any, Any, Any], dict[str, float]] | None = None


@dataclass(frozen=True)
class Peer:
    build: Callable[[Any, Any], Runner]
    devices: tuple[str, ...]


@dataclass(frozen=True)
class Benchmark:
    """A family of workloads.

    Attributes:
        inputs: (workload, device) -> fresh random inputs, from which peers make theirs.
        like: (inputs) -> the tensor whose plain copy is the yardstick of memory bandwidth.
        floor: (workload) -> for each stage, the bytes that no implementation can avoid moving.
        check: (workload, inputs, results) -> for each result, its worst error as a multiple of what is allowed.
        operations: (workload) -> for each stage, the arithmetic operations that no implementation can avoid; without
            it they are not part of the floor.
        long: calls take so long that the check warms up, one set of operands is cold, and a GPU's are timed by the
            wall clock, with the Python that launches them.
        memory: (workload, name, chain, operands, device) -> bytes, instead of :func:`memory`.
    """

    name: str
    inputs: Callable[[Any, str], Any]
    like: Callable[[Any], torch.Tensor]
    floor: Callable[[Any], dict[str, int]]
    check: Callable[[Any, Any, Any], dict[str, float]]
    operations: Callable[[Any], dict[str, int]] | None = None
    long: bool = False
    memory: Callable[..., dict] | None = None


PEERS: dict[str, dict[str, Peer]] = {}  # benchmark -> name -> peer; the first one is what others are compared with


def peer(benchmark: str, name: str, devices: tuple[str, ...] = ("cpu", "cuda")):
    """Register ``build(workload, inputs) -> Runner``; it raises :class:`Unavailable` where it cannot run."""

    def register(build):
        PEERS.setdefault(benchmark, {})[name] = Peer(build, devices)
        return build

    return register


def measure(
    benchmark: Benchmark, workload: Workload, device: str, names: list[str], rounds: int, stage: str | None = None
) -> dict:
    """Check, then time, the named peers on one workload: a row of the result file.

    With ``stage``, only what leads to that stage is timed.
    """
    torch.compiler.reset()  # compiled code of other sizes would only add guards
    if device == "cuda":
        torch.cuda.empty_cache()
    inputs = benchmark.inputs(workload, device)
    row = {**asdict(workload), "floor_bytes": benchmark.floor(workload), "peers": {}}
    if benchmark.operations:
        row["floor_operations"] = benchmark.operations(workload)
    runners: dict[str, Runner] = {}
    sets: dict[Any, list] = {}
    for name in names:
        outcome = row["peers"][name] = {"status": "ok"}
        try:
            known = PEERS[benchmark.name][name]
            if device not in known.devices:
                raise Unavailable(f"runs on {', '.join(known.devices)} only")
            runner = known.build(workload, inputs)
            if runner.form not in sets:
                sets[runner.form] = [runner.operands()] if benchmark.long else cold_sets(runner.operands, device)
            first = sets[runner.form][0]
            with runner.around():
                started = time.perf_counter()
                results = runner.results(first)
                synchronize(device)
                outcome["first_seconds"] = time.perf_counter() - started
                errors = (runner.check or benchmark.check)(workload, inputs, results)
            worst = max(errors, key=errors.get)
            finite = math.isfinite(errors[worst])
            outcome["error"] = {"result": worst, "times_allowed": errors[worst] if finite else None}
            if errors[worst] > 1:
                off = f"off by {errors[worst]:.3g} times what is allowed" if finite else "missing or not finite"
                outcome.update(status="wrong", reason=f"{worst} is {off}")
                continue
            with runner.around():
                measured = (runner.chains[0], first, device)
                used = benchmark.memory(workload, name, *measured) if benchmark.memory else memory(*measured)
                outcome["memory"] = used
                outcome |= runner.more(first)
            outcome["sets"] = len(sets[runner.form])
            runners[name] = replace(runner, chains=leading_to(stage, runner.chains))
        except Unavailable as reason:
            outcome.update(status="unavailable", reason=str(reason))
        except Exception as error:
            outcome.update(status="error", reason=one_line(error))
    try:
        time_all(row, runners, sets, benchmark.like(inputs), rounds, device, benchmark.long)
    except Exception as error:  # after a fault in one peer's kernel nothing runs on the device any more
        raise RuntimeError("; ".join([*fails([row]), f"{workload.name}: {one_line(error)}"])) from error
    return row


def time_all(
    row: dict, runners: dict[str, Runner], sets: dict, like: torch.Tensor, rounds: int, device: str, long: bool = False
) -> None:
    """Time the peers that passed, and a plain copy (and matrix products) among them, into ``row``."""
    counted = row.get("floor_operations")
    yardsticks, operands = yardsticks_of(like, device, counted is not None)
    sets |= operands
    samples, failures = interleave(runners | yardsticks, sets, rounds, device, long)
    missing = [f"{name}: {failures.pop(name)}" for name in yardsticks if name in failures]
    for name, reason in failures.items():
        row["peers"][name] = {"status": "error", "reason": reason}
    if missing:
        raise RuntimeError(f"a yardstick failed: {'; '.join(missing)}")
    limits = limits_of(like, {name: samples.pop(name)[name] for name in yardsticks})
    bandwidth, row["copy"] = limits["bandwidth"], limits["copy"] | {"sets": len(sets["copy"])}
    if counted is not None:
        row["peak"] = limits["peak"]
    for name, stages in samples.items():
        times = row["peers"][name]["times"] = {stage: spread(seconds) for stage, seconds in stages.items()}
        for stage, timing in times.items():
            floor = row["floor_bytes"][stage]
            timing["bandwidth"] = floor / timing["median"]
            least = floor / bandwidth
            if counted is not None:
                timing["operations"] = counted[stage] / timing["median"]
                least = max(least, counted[stage] / row["peak"]["operations"])
            timing["times_floor"] = timing["median"] / least


def yardsticks_of(like: torch.Tensor, device: str, products: bool) -> tuple[dict[str, Runner], dict[str, list]]:
    """A plain copy of ``like`` and, with ``products``, matrix products: runners and their operands."""
    runners = {"copy": Runner(tuple, [{"copy": lambda pair: pair[1].copy_(pair[0])}], dict, "copy")}
    sets = {"copy": cold_sets(lambda: (like.clone(), torch.empty_like(like)), device)}
    for dtype in (torch.float32, torch.bfloat16) if products else ():
        for side in PRODUCTS[device]:
            name = f"{str(dtype).removeprefix('torch.')} {side}"
            runners[name] = Runner(tuple, [{name: lambda pair: pair[0] @ pair[1]}], dict, name)
            sets[name] = [tuple(torch.randn(side, side, device=device).to(dtype) for _ in range(2))]
    return runners, sets


def limits_of(like: torch.Tensor, samples: dict[str, list[float]]) -> dict:
    """Limits of the device by the yardsticks: bytes per second, and operations per second of the best product."""
    copy = spread(samples["copy"])
    bandwidth = 2 * like.nbytes / copy["median"]
    rates = {name: 2 * int(name.split()[1]) ** 3 / min(seconds) for name, seconds in samples.items() if name != "copy"}
    best = max(rates, key=rates.get, default=None)
    peak = {"operations": rates[best], "of": best} if best else None
    return {"bandwidth": bandwidth, "copy": copy | {"bandwidth": bandwidth}, "peak": peak}


def limits(like: torch.Tensor, device: str, rounds: int = 5) -> dict:
    """Bandwidth of a copy and peak of matrix products alone; see :func:`limits_of`."""
    runners, sets = yardsticks_of(like, device, products=True)
    samples, failures = interleave(runners, sets, rounds, device)
    if failures:
        raise RuntimeError(f"a yardstick failed: {failures}")
    return limits_of(like, {name: stages[name] for name, stages in samples.items()})


def cold_sets(operands: Callable[[], tuple], device: str) -> list[tuple]:
    """Enough sets of operands to leave nothing of one in the cache when its turn comes again; at least two."""
    sets = [operands()]
    size = sum(tensor.nbytes for tensor in sets[0] if tensor is not None)
    # The results and what is kept for the backward pass take part of the free memory, too.
    most = int(free_memory(device) * MEMORY_SHARE) // (2 * size)
    enough = max(2, -(-COLD * last_level_cache(device) // size))
    while len(sets) < min(enough, max(1, most)):
        sets.append(operands())
    return sets


def leading_to(stage: str | None, chains: list[dict]) -> list[dict]:
    """The chains that reach ``stage``, cut after it; all of them for None."""
    if stage is None:
        return chains
    cut = [(list(chain), chain) for chain in chains if stage in chain]
    return [{name: chain[name] for name in names[: names.index(stage) + 1]} for names, chain in cut]


def free_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) << 10
    return 4 << 30


def interleave(runners: dict[str, Runner], sets: dict, rounds: int, device: str, long: bool = False):
    """Seconds of every call, per peer and stage, from peers that take turns; and the peers that failed.

    A first round of the same kind warms up and is left out, unless calls are ``long`` and have been warmed up.
    """
    clock = CudaClock() if device == "cuda" and not long else WallClock(device)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    failures: dict[str, str] = {}
    with collected_between() as collect:
        for round_ in range(1 if long else 0, rounds + 1):
            collect()
            for name, runner in runners.items():
                if name in failures:
                    continue
                try:
                    for stage, seconds in one_turn(runner, sets[runner.form], clock):
                        if round_:
                            samples[name].setdefault(stage, []).extend(seconds)
                except Exception as error:
                    failures[name] = one_line(error)
                    samples.pop(name)
    for name in [name for name, stages in samples.items() if not all(stages.values())]:
        failures[name] = "no call was queued before the device was idle"
        samples.pop(name)
    return samples, failures


def one_turn(runner: Runner, operands: list, clock: Callable) -> Iterator[tuple[str, list[float]]]:
    with runner.around():
        for chain in runner.chains:
            states = operands
            for stage, function in chain.items():
                seconds, states = clock(function, states)
                yield stage, seconds


@contextmanager
def collected_between() -> Iterator[Callable[[], int]]:
    """No garbage collection inside the block but by the function it gives, which looks at new objects only."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.enable()
        gc.unfreeze()


@dataclass
class WallClock:
    """Seconds of each call. What the calls return is freed outside the timed part."""

    device: str

    def __call__(self, function: Callable, states: list) -> tuple[list[float], list]:
        seconds, results = [], []
        for state in states:
            synchronize(self.device)
            start = time.perf_counter_ns()
            results.append(function(state))
            synchronize(self.device)
            seconds.append((time.perf_counter_ns() - start) * 1e-9)
        return seconds, results


def synchronize(device: str) -> None:
    """Wait for what is queued on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


class CudaClock:
    """Seconds of each call on the device, from events.

    The calls queue up behind a sleeping kernel, so that the device never waits for Python: what is timed is the
    kernels and the gaps that the device itself leaves between them. Calls that were late are not counted, and the
    next sleep is longer; from the longest one on they are, because such calls wait for the device themselves.
    """

    CHUNK = 16  # calls per sleep; the queue of launches must hold them all
    LONGEST = 1 << 26  # cycles, some 30 ms: 2 ms of Python per call

    def __init__(self):
        self.cycles = 1 << 21  # about a millisecond

    def __call__(self, function: Callable, states: list) -> tuple[list[float], list]:
        seconds, results = [], []
        for first in range(0, len(states), self.CHUNK):
            chunk = states[first : first + self.CHUNK]
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * len(chunk))]
            torch.cuda.synchronize()
            torch.cuda._sleep(self.cycles)
            awake = torch.cuda.Event()
            awake.record()
            for i, state in enumerate(chunk):
                marks[2 * i].record()
                results.append(function(state))
                marks[2 * i + 1].record()
            late = awake.query()
            torch.cuda.synchronize()
            took = [marks[i].elapsed_time(marks[i + 1]) * 1e-3 for i in range(0, len(marks), 2)]
            if late and self.cycles < self.LONGEST:
                self.cycles *= 2
            else:
                seconds += took
        return seconds, results


def memory(chain: dict[str, Callable], operands: Any, device: str) -> dict[str, int]:
    """Bytes beyond the operands: at the peak of the chain, and kept after its first stage.

    On CUDA as PyTorch's allocator counts them. On a CPU from the allocations in the profiler's trace, which leaves
    out what a kernel takes from the system itself.
    """
    state, held, peak, after_first = operands, 0, 0, None
    for function in chain.values():
        trace: list[int] = []
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            after = function(state)
            torch.cuda.synchronize()
            trace = [torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before]
        else:
            with profile(profile_memory=True, use_kineto=True) as recorded:
                after = function(state)
            events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
            total = 0
            for event in sorted(events, key=lambda e: e.start_ns()):
                total += event.nbytes()
                trace.append(total)
        peak = max([peak, *(held + change for change in trace)])
        held += trace[-1] if trace else 0
        after_first = held if after_first is None else after_first
        state = after
    return {"peak": peak, "kept": after_first}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
    return {"median": median, "q1": low, "q3": high, "samples": len(seconds)}


def keep(path: Path, benchmark: str, **values: Any) -> dict:
    """Write and return the record of a benchmark of one piece: where it ran, its command and what was measured."""
    command = " ".join([f"python -m bench.{benchmark}", *sys.argv[1:]])
    record = {"header": header(), "command": command, "device": "cpu", **values}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300]


def fails(rows: list[dict]) -> list[str]:
    """The peers whose results were wrong or that raised, one line each."""
    return [
        f"{row['name']}: {name} {outcome['status']}: {outcome['reason']}"
        for row in rows
        for name, outcome in row["peers"].items()
        if outcome["status"] in ("wrong", "error")
    ]


def table(row: dict) -> str:
    """The times of one workload, for the terminal."""
    first = next(iter(row["peers"].values()))
    lines = []
    for name, outcome in row["peers"].items():
        if "times" not in outcome:
            lines.append(f"  {name:22} {outcome['status']}: {outcome['reason']}")
            continue
        peak = outcome["memory"]["peak"]
        memory = "" if peak is None else f"{peak / 1e6:.1f} MB peak"
        if "kept" in outcome["memory"]:
            memory += f", {outcome['memory']['kept'] / 1e6:.1f} kept"
        for stage, t in outcome["times"].items():
            base = first.get("times", {}).get(stage)
            rate = f"{t['operations'] / 1e9:8.1f} GFLOP/s" if "operations" in t else f"{t['bandwidth'] / 1e9:8.1f} GB/s"
            lines.append(
                f"  {name:22} {stage:9} {t['median'] * 1e3:9.3f} ms  [{t['q1'] * 1e3:.3f}, {t['q3'] * 1e3:.3f}]  "
                f"{rate}  {t['times_floor']:6.2f} x floor"
                + (f"  {base['median'] / t['median']:6.2f} x faster" if base else "")
                + f"  {memory}"
            )
            name = memory = ""
    return "\n".join(lines)


@dataclass
class Record:
    """A result file that grows by one workload at a time, so that a killed run keeps what it has.

    It grows beside the file of an earlier run, which it replaces when it is complete (:meth:`finish`).
    """

    benchmark: str
    device: str
    command: str
    options: dict
    folder: Path
    file: Path | None = None  # instead of a file of the folder
    rows: list[dict] = field(default_factory=list)
    header: dict = field(default_factory=header)

    @property
    def path(self) -> Path:
        """A GPU's results and a CPU's lie side by side."""
        return self.file or self.folder / f"{self.benchmark}-{device_kind(self.device)}.json"

    @property
    def machine(self) -> str:
        return self.header["machine"]

    def resume(self, anywhere: bool = False) -> None:
        """Take over the rows of an earlier run with these options on this kind of machine, finished or not.

        Args:
            anywhere: of other kinds as well; each row gets its ``machine``.
        """
        for path in (self.unfinished, self.path):
            content = json.loads(path.read_text()) if path.exists() else {}
            machine = content["header"]["machine"] if content else None
            if content.get("options") == self.options and (anywhere or machine == self.machine):
                self.rows = [{"machine": machine} | row if anywhere else row for row in content["workloads"]]
                return

    def add(self, row: dict) -> None:
        self.rows.append(row)
        content = {"benchmark": self.benchmark, "device": device_kind(self.device), "header": self.header}
        content |= {"command": self.command, "options": self.options, "workloads": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.unfinished.write_text(json.dumps(content, indent=1) + "\n")

    @property
    def unfinished(self) -> Path:
        return self.path.with_suffix(".unfinished")

    def finish(self) -> None:
        if self.unfinished.exists():  # unless a resumed run had nothing left to do
            self.unfinished.replace(self.path)

    def conclude(self, problems: list[str]) -> int:
        """Finish, say where the record is and what failed; the exit status of the benchmark."""
        self.finish()
        print(f"\n{self.path}")
        print("\n".join(problems), file=sys.stderr)
        return 1 if problems else 0
