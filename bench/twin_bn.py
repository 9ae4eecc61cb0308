"""Two-wing batch norm on every batch norm layer of ResNet-50: ``python -m bench.twin_bn``."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet50

from bench.harness import (
    PARTIAL,
    PEERS,
    RESULTS,
    Benchmark,
    Record,
    Runner,
    Unavailable,
    Workload,
    fails,
    measure,
    peer,
    table,
)
from bench.header import ROOT
from twins_fast import ops
from twins_fast.ops import backend, oracle

NAME = "twin_bn"
RESOLUTIONS = (224, 32)
BATCH = {"cpu": 32, "cuda": 128}
ROUNDS = 5
EPS, MOMENTUM = 1e-5, 0.1


@dataclass(frozen=True)
class Layer(Workload):
    shape: tuple[int, int, int, int]  # [N, C, H, W]
    split: int
    add: bool
    relu: bool
    dtype: str = "bfloat16"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


def layers(resolution: int, batch: int, dtype: str = "bfloat16") -> list[Layer]:
    """The distinct batch norm layers of torchvision's ResNet-50, largest first, with how often each occurs."""
    with torch.device("meta"):
        model, images = resnet50(), torch.empty(2, 3, resolution, resolution)
    seen: dict[int, list] = {}  # id of an output -> it, its version, is something added, does a ReLU follow

    def after_norm(module, args, y):
        seen[id(y)] = [y, y._version, False, False]

    def before_relu(module, args):
        if entry := seen.get(id(args[0])):
            entry[2:] = [args[0]._version != entry[1], True]  # the residual is added in place

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(after_norm)
        elif isinstance(module, nn.ReLU):
            module.register_forward_pre_hook(before_relu)
    with torch.no_grad():
        model(images)
    counted = Counter((tuple(y.shape[1:]), add, relu) for y, _, add, relu in seen.values())
    distinct = []
    for (shape, add, relu), count in counted.items():
        name = f"{resolution}/{'x'.join(map(str, shape))}/bn{'+add' * add}{'+relu' * relu}"
        distinct.append(Layer(name, count, (batch, *shape), batch // 2, add, relu, dtype))
    return sorted(distinct, key=lambda layer: -torch.Size(layer.shape).numel())


@dataclass
class Inputs:
    """Vectors are (running_mean, running_var, weight, bias)."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    frozen: list[Tensor]
    adaptive: list[Tensor]


def inputs(layer: Layer, device: str, seed: int = 0, layout: torch.memory_format = torch.channels_last) -> Inputs:
    """Random inputs: unit spread about a mean within one spread."""
    generator = torch.Generator(device).manual_seed(seed)
    channels = layer.shape[1]

    def normal(*shape):
        return torch.randn(shape, generator=generator, device=device)

    def uniform(low, high):
        return torch.rand(channels, generator=generator, device=device) * (high - low) + low

    def image(tensor):
        return tensor.to(layer.torch_dtype).contiguous(memory_format=layout)

    x = image(normal(*layer.shape) + uniform(-1, 1).view(-1, 1, 1))
    residual = image(normal(*layer.shape)) if layer.add else None
    wings = [[uniform(-1, 1), uniform(0.5, 1.5), normal(channels), normal(channels)] for _ in range(2)]
    return Inputs(x, residual, image(normal(*layer.shape)), *wings)


def floor(layer: Layer) -> dict[str, int]:
    """Bytes: inputs read once, outputs written once, and the adaptive half, whose sums come first, read once more."""
    rows, channels = layer.shape[:2]
    image = torch.Size(layer.shape).numel() * layer.torch_dtype.itemsize
    adaptive = image // rows * (rows - layer.split)
    bits = torch.Size(layer.shape).numel() // 8 if layer.relu else 0  # the signs of y, for the backward pass
    # Both wings' four vectors and, written, the running statistics and the batch's mean and deviation.
    forward = (2 + layer.add) * image + adaptive + bits + 4 * 12 * channels
    # dy, x, bits -> dx and, where a ReLU masks it, the residual's gradient. Read: both wings' mean, deviation and
    # weight; written: the gradients of weights and biases.
    backward = (3 + (layer.add and layer.relu)) * image + 2 * adaptive + bits + 4 * 10 * channels
    return {"forward": forward, "backward": backward, "both": forward + backward}


def check(layer: Layer, inputs: Inputs, results: oracle.Results, **rounding: bool) -> dict[str, float]:
    """As :func:`twins_fast.ops.oracle.errors`; a peer may compute a half-precision layer in float32."""
    images = [inputs.x, inputs.residual, inputs.dy]
    if results.y.dtype == torch.float32:
        images = [image if image is None else image.float() for image in images]
    call = oracle.Call(*images, layer.split, inputs.frozen, inputs.adaptive, MOMENTUM, EPS, layer.relu)
    return oracle.errors(call, results, **rounding)


# What PyTorch's operations and its compiler round to half precision, and in which order they sum, is theirs to choose.
check_of_others = partial(check, rounded_between=True, long_sums=True)
BENCHMARK = Benchmark(NAME, inputs, lambda inputs: inputs.x, floor, check_of_others)


def runner(
    layer: Layer,
    inputs: Inputs,
    function,
    dtype: torch.dtype | None = None,
    layout: torch.memory_format | None = None,
    around=nullcontext,
) -> Runner:
    """The stages of ``function(x, residual, split, frozen, adaptive, relu) -> y``, two ``nn.BatchNorm2d`` its wings."""
    frozen, adaptive = (_module(vectors) for vectors in (inputs.frozen, inputs.adaptive))
    frozen.eval()
    parameters = [frozen.weight, frozen.bias, adaptive.weight, adaptive.bias]

    def operands():
        images = (None if t is None else t.detach().clone() for t in (inputs.x, inputs.residual, inputs.dy))
        images = [t if t is None or dtype is None else t.to(dtype) for t in images]
        x, residual, dy = (t if t is None or layout is None else t.contiguous(memory_format=layout) for t in images)
        return x.requires_grad_(), residual if residual is None else residual.requires_grad_(), dy

    def forward(operands):
        x, residual, dy = operands
        y = function(x, residual, layer.split, frozen, adaptive, layer.relu)
        return y, [t for t in (x, residual, *parameters) if t is not None], dy

    def backward(state):
        return state[0], torch.autograd.grad(*state)

    def both(operands):
        return backward(forward(operands))

    def results(operands):
        y, leaves, dy = forward(operands)
        grads = torch.autograd.grad(y, leaves, dy, materialize_grads=True)  # a wing without rows may have none
        grads = [grads[0], grads[1] if layer.add else None, *grads[-4:]]
        return oracle.Results(y.detach(), *grads, adaptive.running_mean.clone(), adaptive.running_var.clone())

    chains = [{"forward": forward, "backward": backward}, {"both": both}]
    return Runner(operands, chains, results, (dtype, layout), around)


def _module(vectors: list[Tensor]) -> nn.BatchNorm2d:
    bn = nn.BatchNorm2d(len(vectors[0]), EPS, MOMENTUM, device=vectors[0].device)
    bn.num_batches_tracked = None  # counted by nobody here, so that peers differ in the norm alone
    with torch.no_grad():
        for name, vector in zip(("running_mean", "running_var", "weight", "bias"), vectors, strict=True):
            getattr(bn, name).copy_(vector)
    return bn


def as_published(x, residual, split, frozen, adaptive, relu):
    """The published layer, and what a residual block does after it."""
    y = torch.cat([frozen(x[:split]), adaptive(x[split:])])
    if residual is not None:
        y += residual
    return F.relu(y, inplace=True) if relu else y


def _autocast(layer: Layer, inputs: Inputs):
    enabled = layer.torch_dtype != torch.float32
    return partial(torch.autocast, inputs.x.device.type, layer.torch_dtype if enabled else None, enabled=enabled)


@peer(NAME, "published")
def published(layer, inputs):
    return runner(layer, inputs, as_published, torch.float32, torch.contiguous_format)


@peer(NAME, "eager-amp")
def eager_amp(layer, inputs):
    return runner(layer, inputs, as_published, around=_autocast(layer, inputs))


@peer(NAME, "compile")
def compiled(layer, inputs, mode="default"):
    function = torch.compile(as_published, dynamic=False, mode=mode)
    return runner(layer, inputs, function, around=_autocast(layer, inputs))


@peer(NAME, "compile-max-autotune", devices=("cuda",))
def compiled_max_autotune(layer, inputs):
    # With CUDA graphs a second forward pass would overwrite the results that the first one's backward pass needs.
    return compiled(layer, inputs, "max-autotune-no-cudagraphs")


def twins_fast(x, residual, split, frozen, adaptive, relu):
    """This package's op, through whichever backend is forced."""
    wings = ((bn.running_mean, bn.running_var, bn.weight, bn.bias) for bn in (frozen, adaptive))
    return ops.twin_batch_norm(x, split, *wings, MOMENTUM, EPS, residual, relu)


def _with_backend(layer, inputs, name):
    try:
        with backend.use_backend(name):
            pass
    except RuntimeError as error:
        raise Unavailable(str(error)) from error
    built = runner(layer, inputs, twins_fast, around=partial(backend.use_backend, name))
    return replace(built, check=check)


for _name, _device in (("cuda", "cuda"), ("triton", "cuda"), ("cpp", "cpu")):
    peer(NAME, _name, devices=(_device,))(partial(_with_backend, name=_name))


def totals(rows: list[dict]) -> dict[str, dict]:
    """Per peer, over the given layers as often as they occur: seconds, multiples of the floor, bytes kept.

    A peer that did not pass everywhere has a ``failed`` instead, which says where.
    """
    sums = {}
    for name in rows[0]["peers"]:
        peers = [(row, row["peers"][name]) for row in rows]
        if failed := [(row["name"], of["status"]) for row, of in peers if "times" not in of]:
            sums[name] = {"failed": f"{failed[0][1]} on {len(failed)} of {len(rows)} layers"}
            continue
        stages = peers[0][1]["times"]
        seconds = {stage: sum(row["count"] * of["times"][stage]["median"] for row, of in peers) for stage in stages}
        floors = {
            stage: sum(row["count"] * row["floor_bytes"][stage] / row["copy"]["bandwidth"] for row in rows)
            for stage in stages
        }
        sums[name] = {
            "seconds": seconds,
            "times_floor": {stage: seconds[stage] / floors[stage] for stage in stages},
            "kept": sum(row["count"] * of["memory"]["kept"] for row, of in peers),
        }
    return sums


def summary_table(rows: list[dict], options: dict) -> str:
    """Sums over the given layers of each resolution, as Markdown."""
    tables = []
    for resolution in dict.fromkeys(row["name"].split("/")[0] for row in rows):
        part = [row for row in rows if row["name"].startswith(f"{resolution}/")]
        sums = totals(part)
        stages = next((list(of["seconds"]) for of in sums.values() if "seconds" in of), [])
        layers = sum(row["count"] for row in part)
        title = f"{layers} layers at {resolution} px, batch {options['batch']}, {options['dtype']}"
        columns = [title, *stages, "times the floor", "speed-up", "kept for backward"]
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        base = next(iter(sums.values()))
        for name, of in sums.items():
            if "failed" in of:
                lines.append(f"| {name} | {of['failed']}{' |' * (len(columns) - 1)}")
                continue
            times = [f"{of['seconds'][stage] * 1e3:.1f} ms" for stage in stages]
            last = stages[-1]
            faster = f"{base['seconds'][last] / of['seconds'][last]:.1f} x" if "seconds" in base else ""
            cells = [name, *times, f"{of['times_floor'][last]:.1f}", faster, f"{of['kept'] / 1e6:.0f} MB"]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def layer_table(rows: list[dict]) -> str:
    """Forward and backward together, layer by layer, as Markdown; times as multiples of the floor in brackets."""
    names = list(rows[0]["peers"])
    lines = [f"| layer | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in rows:
        cells = [f"{row['name']} x {row['count']}"]
        for name in names:
            timed = row["peers"][name].get("times", {}).get("both")
            cells.append(f"{timed['median'] * 1e3:.2f} ms ({timed['times_floor']:.1f})" if timed else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def quick(layers: list[Layer]) -> list[Layer]:
    """The layer that moves most, for each resolution and kind."""
    chosen = {}
    for layer in layers:
        kind = layer.name.split("/")[0], layer.name.split("/")[-1]
        best = chosen.get(kind)
        if best is None or layer.count * floor(layer)["both"] > best.count * floor(best)["both"]:
            chosen[kind] = layer
    return list(chosen.values())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m bench.twin_bn", description=__doc__)
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--shapes", metavar="SUBSTRING", help="only layers whose name holds it, e.g. 56x56/bn+add")
    part.add_argument("--quick", action="store_true", help="one layer for each resolution and kind")
    parser.add_argument("--resolution", choices=[*map(str, RESOLUTIONS), "both"], default="both")
    parser.add_argument("--batch", type=int, help=f"default: {BATCH['cpu']} on a CPU, {BATCH['cuda']} on a GPU")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--direction", choices=["forward", "backward", "both", "all"], default="all")
    parser.add_argument("--peers", help=f"comma-separated, of {', '.join(PEERS[NAME])}")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="turns of each peer, after one that warms up")
    parser.add_argument("--out", type=Path, help=f"folder of the results; default: {RESULTS.relative_to(ROOT)}, or "
                        f"{PARTIAL.relative_to(ROOT)} for a part of the whole or other than default sizes")  # fmt: skip
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    names = args.peers.split(",") if args.peers else [n for n, p in PEERS[NAME].items() if args.device in p.devices]
    if unknown := set(names) - set(PEERS[NAME]):
        parser.error(f"unknown peers: {', '.join(sorted(unknown))}")
    batch = args.batch or BATCH[args.device]
    if batch < 4 or args.rounds < 1:
        parser.error("needs a batch of at least 4 and at least one round")
    resolutions = RESOLUTIONS if args.resolution == "both" else [int(args.resolution)]
    chosen = [layer for resolution in resolutions for layer in layers(resolution, batch, args.dtype)]
    whole = not (args.shapes or args.quick or args.peers or args.batch) and args.resolution == "both"
    whole = whole and args.direction == "all" and args.dtype == "bfloat16" and args.rounds >= ROUNDS
    if args.quick:
        chosen = quick(chosen)
    chosen = [layer for layer in chosen if (args.shapes or "") in layer.name]
    if not chosen:
        parser.error(f"no layer has {args.shapes!r} in its name")
    command = " ".join(["python -m bench.twin_bn", *(sys.argv[1:] if arguments is None else arguments)])
    options = {"batch": batch, "dtype": args.dtype, "rounds": args.rounds, "direction": args.direction}
    stage = None if args.direction == "all" else args.direction
    record = Record(NAME, args.device, command, options, args.out or (RESULTS if whole else PARTIAL))
    for number, layer in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {layer.name} x {layer.count}", flush=True)
        row = measure(BENCHMARK, layer, args.device, names, args.rounds, stage)
        record.add(row)
        print(f"  copy {row['copy']['bandwidth'] / 1e9:.1f} GB/s\n{table(row)}", flush=True)
    print(f"\n{summary_table(record.rows, options)}")
    return record.conclude(fails(record.rows))


if __name__ == "__main__":
    sys.exit(main())
