"""What a device has to show before our kernels run on it by default: right results, then speed.

A check looks at some subjects, one for each precision, and reports an outcome for each as soon as it has one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import product, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.attacks import PGD
from twins_fast.models import CifarResNet
from twins_fast.ops import backend, layout, oracle
from twins_fast.ops.native import dtype_name
from twins_fast.ops.twin_bn import twin_batch_norm
from twins_fast.ops.wing import Wing
from twins_fast.verdicts import FAILED, PASSED, SLOWER, UNKNOWN

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FASTER = 1.05  # than plain PyTorch: below, the old way stays
REPEATS = 20
# Below, at and above a vector, a warp and a block, odd and aligned; the last has many slabs for each channel.
SHAPES = [(2, 1, 1, 2), (3, 3, 7, 1), (2, 129, 1, 1), (5, 7, 3, 31), (4, 31, 7, 7), (6, 64, 8, 8), (6, 40, 29, 31)]
FULL = (32, 256, 56, 56)  # more than the caches hold, and all of the grid
TIMED = [(16, 64, 8, 8), (64, 256, 14, 14), (32, 256, 56, 56)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
MOMENTUM, EPS = 0.1, 1e-5
AGREEING = {torch.float32: 0.99, torch.bfloat16: 0.9, torch.float16: 0.9}  # pixels after a step


class Wrong(Exception):
    """Results are wrong; the message says which."""


class Slower(Exception):
    """Results are right, but plain PyTorch is as fast."""


Report = Callable[..., None]  # of a subject's outcome, reason and whatever was measured


def two_wing_batch_norm(how: str, device: torch.device, report: Report) -> None:
    """The backend ``how`` against the float64 oracle and against the torch backend's time."""
    for dtype in DTYPES:
        look = partial(_two_wing_batch_norm, how, device, dtype)
        _judge(f"twin_batch_norm {how} {dtype_name(dtype)}", look, report)


def plan(device: torch.device, report: Report) -> None:
    """Attacks by the plan against those in eager mode, and against the time of autocast."""
    for dtype in DTYPES:
        _judge(f"plan {dtype_name(dtype)}", partial(_plan, device, dtype), report)


CHECKS: dict[str, Callable[[torch.device, Report], None]] = {
    "twin_batch_norm cuda": partial(two_wing_batch_norm, "cuda"),
    "twin_batch_norm triton": partial(two_wing_batch_norm, "triton"),
    "twin_batch_norm cpp": partial(two_wing_batch_norm, "cpp"),
    "plan": plan,
}


def _judge(subject: str, look: Callable[[], dict[str, Any]], report: Report) -> None:
    """Report what becomes of one subject. After an error of CUDA nothing runs any more: that one is raised."""
    try:
        report(subject=subject, outcome=PASSED, **look())
    except Wrong as wrong:
        report(subject=subject, outcome=FAILED, reason=str(wrong))
    except Slower as slower:
        report(subject=subject, outcome=SLOWER, reason=str(slower))
    except torch.OutOfMemoryError as error:
        report(subject=subject, outcome=UNKNOWN, reason=f"memory ran out: {error}".splitlines()[0])
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no message"]
        report(subject=subject, outcome=FAILED, reason=f"{type(error).__name__}: {lines[0]}")
        if "CUDA error" in str(error) or isinstance(error, getattr(torch, "AcceleratorError", ())):
            raise


def _two_wing_batch_norm(how: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    worst = 0.0
    with backend.use_backend(how), garbage():
        cases = product(SHAPES, LAYOUTS, ((False, False), (False, True), (True, True)))
        for number, (shape, memory, (add, relu)) in enumerate(cases):
            split = splits_of(shape)[number % len(splits_of(shape))]
            both = number % 2 == 1 and split * shape[2] * shape[3] > 2
            case = TwinCase(shape, dtype, LAYOUTS[memory], split, add, relu, device, number, number % 3, both)
            for name, error in case.errors().items():
                worst = max(worst, error)
                if not error <= 1:
                    raise Wrong(f"{name} of {shape}, {memory}, split {split} is off by {error:.3g} times")
        full = TwinCase(FULL, dtype, torch.channels_last, FULL[0] // 2, True, True, device, 0)
        _check_repeats(full)
        _check_repeats(TwinCase(FULL, dtype, torch.channels_last, FULL[0] // 2, True, True, device, 0, 0, True))
        _check_nan(how, device, dtype)
        if device.type == "cuda":
            _check_graph(full)
            _check_streams(full)
    return {"error": worst, **_faster(how, device, dtype)}


def splits_of(shape: tuple[int, ...]) -> list[int]:
    """Half, none and all of the images on the frozen wing, as far as the adaptive one has enough values."""
    images, _, height, width = shape
    return [s for s in (images // 2, 0, images) if s == images or images - s + height * width > 2]


class TwinCase:
    """A call of two-wing batch norm on random operands, and its gradients."""

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        memory: torch.memory_format,
        split: int,
        add: bool,
        relu: bool,
        device: torch.device | str,
        seed: int,
        offset: int = 0,
        both_adaptive: bool = False,
    ):
        generator = torch.Generator().manual_seed(seed)
        channels = shape[1]

        def image() -> Tensor:
            values = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory)
            stored = torch.empty(values.numel() + offset, dtype=dtype, device=device)[offset:]  # may be misaligned
            return stored.as_strided(shape, values.stride(), offset).copy_(values)

        def wing() -> list[Tensor]:
            return [(torch.rand(channels, generator=generator) + s).to(device) for s in (-0.5, 0.5, 0.5, -0.5)]

        self.x, self.dy = image(), image()
        self.residual = image() if add else None
        self.split, self.relu, self.frozen, self.adaptive = split, relu, wing(), wing()
        self.both_adaptive = both_adaptive

    def run(self) -> oracle.Results:
        """By the backend that is in use."""
        leaves = [t.detach().requires_grad_() for t in (self.x, self.residual) if t is not None]
        frozen, adaptive = ([vector.clone() for vector in wing] for wing in (self.frozen, self.adaptive))
        vectors = [t.requires_grad_() for t in (*frozen[2:], *adaptive[2:])]
        residual = leaves[1] if len(leaves) > 1 else None
        y = twin_batch_norm(
            leaves[0], self.split, frozen, adaptive, MOMENTUM, EPS, residual, self.relu, None, self.both_adaptive
        )
        gradients: list[Any] = [*torch.autograd.grad(y, [*leaves, *vectors], self.dy, materialize_grads=True)]
        if residual is None:
            gradients.insert(1, None)
        return oracle.Results(y.detach(), *gradients, *adaptive[:2], *(frozen[:2] if self.both_adaptive else ()))

    def errors(self) -> dict[str, float]:
        """Of each result, as a multiple of what is allowed."""
        x, residual, dy = (_on_cpu(t) for t in (self.x, self.residual, self.dy))
        frozen, adaptive = (Wing(*map(_on_cpu, wing)) for wing in (self.frozen, self.adaptive))
        options = MOMENTUM, EPS, self.relu, self.both_adaptive
        call = oracle.Call(x, residual, dy, self.split, frozen, adaptive, *options)
        return oracle.errors(call, oracle.Results(*map(_on_cpu, self.run())))


def _on_cpu(tensor: Any) -> Any:
    return None if tensor is None else tensor.cpu()


@contextmanager
def garbage() -> Iterator[None]:
    """Results of the kernels start as NaN, and bits as a pattern: what a kernel leaves out shows."""
    known = {name: getattr(layout, name) for name in ("forward_results", "backward_results", "empty_stats")}

    def spoilt(function: Callable[..., Any]) -> Callable[..., Any]:
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


def _same(left: oracle.Results, right: oracle.Results) -> bool:
    pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    return all(torch.equal(a, b) for a, b in pairs)


def _check_repeats(case: TwinCase) -> None:
    first = case.run()
    if not all(_same(case.run(), first) for _ in range(REPEATS if case.x.is_cuda else 1)):
        raise Wrong("results differ from call to call")


def _check_nan(how: str, device: torch.device, dtype: torch.dtype) -> None:
    case = TwinCase((4, 16, 5, 5), dtype, torch.channels_last, 2, True, True, device, 0)
    case.x[0, 3, 2, 2] = case.x[3, 5, 1, 1] = torch.nan
    ours = case.run()
    with backend.use_backend("torch"):
        theirs = case.run()
    for name, a, b in zip(oracle.Results._fields, ours, theirs, strict=True):
        if a is not None and b is not None and not torch.equal(a.isnan(), b.isnan()):
            raise Wrong(f"{name} has NaN elsewhere than plain PyTorch")


def _check_graph(case: TwinCase) -> None:
    """Two replays of a captured call, on new values."""
    replay, results = captured(case.run)
    for seed in (1, 2):
        case.x.copy_(torch.randn(case.x.shape, generator=torch.Generator().manual_seed(seed)))
        replay()
        if not _same(results, case.run()):
            raise Wrong("a replayed graph gives other results than a call")


def _check_streams(case: TwinCase) -> None:
    """Beside work on other streams."""
    want = case.run()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for stream in streams:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**6)
            found.append(case.run())
    torch.cuda.synchronize()
    if not all(_same(results, want) for results in found):
        raise Wrong("results differ on several streams")


def captured(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """The replay of a graph of ``run``, which is called once before that, and the results that it writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph.replay, results


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least time of a call; on a GPU of its replays, as Python would take longer than most kernels."""
    if device.type != "cuda":
        return wall_seconds(run, device)
    replay: Callable[[], Any] = run
    with suppress(RuntimeError):  # what cannot be captured is timed as it is
        replay, _ = captured(run)
    times = []
    for _ in range(10):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)


def _faster(how: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """From how many values on it is faster than the torch backend."""
    gains: dict[int, float] = {}
    for shape in TIMED if device.type == "cuda" else TIMED[:2]:
        case = TwinCase(shape, dtype, torch.channels_last, shape[0] // 2, True, True, device, 0)
        times = {}
        for name in (how, "torch"):
            with backend.use_backend(name):
                case.run()
                times[name] = seconds(case.run, device)
        gains[case.x.numel()] = times["torch"] / times[how]
    fast = list(takewhile(lambda values: gains[values] >= FASTER, reversed(gains)))  # from the largest size down
    if not fast:
        raise Slower(f"{gains[max(gains)]:.2f} times the speed of plain PyTorch")
    return {"smallest": 0 if len(fast) == len(gains) else fast[-1], "gains": gains}


def network() -> nn.Module:
    """A step of every kind that a kernel runs: a stem, a pool, products of one pixel and of nine, strides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 64, 1),
        nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(64),
        nn.Conv2d(64, 40, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    ).eval()  # fmt: skip


def _plan(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    amp = None if dtype == torch.float32 else dtype
    model = network().to(device)
    images, labels = _batch(37, 64, device)
    attack, eager = (PGD(model, steps=1, random_start=False, amp_dtype=amp, engine=e) for e in ("plan", "eager"))
    try:
        adversarial = attack(images, labels)  # whose own check looks at every step
    except RuntimeError as error:
        if "gives other results" in str(error) or "not the model's" in str(error):
            raise Wrong(str(error)) from error
        raise
    same = (adversarial == eager(images, labels)).float().mean().item()
    if same < AGREEING[dtype]:
        raise Wrong(f"{same:.2%} of the pixels are those of eager mode after a step")
    if not all(torch.equal(attack(images, labels), adversarial) for _ in range(3)):
        raise Wrong("attacks differ from call to call")
    return {"same": same, **_attack_speed(device, dtype)}


def _attack_speed(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    blocks: tuple[int, ...]
    width, blocks, count = (64, (2, 2, 2, 2), 128) if device.type == "cuda" else (16, (1, 1), 4)
    torch.manual_seed(0)
    model = CifarResNet(10, width=width, blocks=blocks).to(device).to(memory_format=torch.channels_last).eval()
    images, labels = _batch(count, 32, device)
    images = images.contiguous(memory_format=torch.channels_last)
    context = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    times = {}
    for engine in ("plan", "eager"):
        attack = PGD(model, steps=5, engine=engine, random_start=False)
        with context:
            attack(images, labels)
            attack(images, labels)  # replays what the first has captured
            times[engine] = wall_seconds(partial(attack, images, labels), device)
    gain = times["eager"] / times["plan"]
    if gain < FASTER:
        raise Slower(f"{gain:.2f} times the speed of plain PyTorch")
    return {"gain": gain}


def wall_seconds(run: Callable[[], Any], device: torch.device) -> float:
    """The least time of a call and what it has launched."""
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best


def _batch(count: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1))
    return images.to(device), (torch.arange(count) % 10).to(device)
