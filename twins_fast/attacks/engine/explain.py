"""How an attack runs: a report, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from twins_fast.attacks.engine.plan import Stage
from twins_fast.attacks.engine.program import Program

REPETITIONS = 3
SHOWN = 4  # operations named of a segment


@dataclass(frozen=True)
class Explanation:
    """How an attack runs.

    Attributes:
        engine: ``"plan"`` or ``"eager"``.
        reason: why it is eager; empty for a plan.
        layers: one dictionary per stage: ``name`` (of the module), ``op``, ``runs`` (what computes it), ``operations``
            (multiplications and additions for one image, both passes), ``bytes`` (for one image, both passes: each
            tensor counted once per pass that reads or writes it, without weights), and if timed ``forward_ms`` and
            ``backward_ms`` for ``images`` images.
        notes: what a reader of the results should know.
        images: how many go through the steps at once.
        bytes_per_image: of the arena.
    """

    engine: str
    reason: str = ""
    layers: list[dict[str, Any]] = field(default_factory=list)
    images: int = 0
    bytes_per_image: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.engine == "eager":
            return "\n".join([f"eager: {self.reason}", *self.notes])
        timed = bool(self.layers) and "forward_ms" in self.layers[0]
        head = ["layer", "op", "runs", "MFLOP", "kB", *(["forward ms", "backward ms"] if timed else [])]
        rows = [head]
        for layer in self.layers:
            row = [layer["name"], layer["op"], layer["runs"], f"{layer['operations'] / 1e6:.1f}"]
            row.append(f"{layer['bytes'] / 1e3:.0f}")
            rows.append([*row, *([f"{layer['forward_ms']:.2f}", f"{layer['backward_ms']:.2f}"] if timed else [])])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        images = f"{self.images} image{'s' * (self.images != 1)}"
        about = f"plan: {images} at once, {self.bytes_per_image / 1e6:.2f} MB of memory for each"
        return "\n".join([about, *lines, *self.notes])


def explain(
    program: Program | str,
    model: nn.Module,
    images: Tensor,
    timed: bool,
    notes: tuple[str, ...],
    rounded: bool = False,
) -> Explanation:
    """The report of a program, or of the reason why there is none.

    Args:
        images: [N, C, H, W] float32; the steps are timed on them if ``timed``, else only their number counts.
        notes: added to the report.
        rounded: as in :meth:`Program.chunk`.
    """
    if isinstance(program, str):
        return Explanation("eager", program, notes=notes)
    plan = program.plan
    layers = [
        {
            "name": state.stage.where or "(model)",
            "op": _op(state.stage),
            "runs": _runs(program, state),
            "operations": 2 * _operations(state.stage),
            "bytes": 0,
        }
        for state in program.states
    ]
    for step in (*plan.forward, *plan.backward):
        for slot in step.tensors.values():
            for one in slot if isinstance(slot, list) else [slot]:
                layers[step.stage]["bytes"] += 0 if one is None else program.slot_bytes(one)
    size = program.chunk(len(images), rounded)
    if timed:
        with torch.no_grad():
            program.fold(model)
            for direction, times in _times(program, images[:size]).items():
                for layer, seconds in zip(layers, times, strict=True):
                    layer[f"{direction}_ms"] = seconds * 1e3
    return Explanation("plan", "", layers, size, program.bytes_per_image, notes)


def _times(program: Program, images: Tensor) -> dict[str, list[float]]:
    """Seconds per stage, forward and backward: the fastest of some repetitions."""
    bound = program.bound(len(images))
    program.input.prepare(images.contiguous(), bound.image)
    best: dict[str, list[float]] = {}
    for _ in range(REPETITIONS):
        for direction in ("forward", "backward"):
            sums = [0.0] * len(program.states)
            for step, run in zip(getattr(program.plan, direction), getattr(bound, direction), strict=True):
                sums[step.stage] += _seconds(run, images.device)
            best[direction] = [min(pair) for pair in zip(sums, best.get(direction, sums), strict=True)]
            bound.logits_gradient.fill_(1)
    return best


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _op(stage: Stage) -> str:
    names = {
        "conv": "convolution", "affine": "batch norm", "layer_norm": "layer norm", "pointwise": "",
        "max_pool": "max-pool", "avg_pool": "mean", "gather": "channels", "product": "product",
    }  # fmt: skip
    if stage.kind == "segment":
        listed = list(dict.fromkeys(n.call[0].__name__.partition(".")[0] for _, n in stage.nodes if n.call))
        return ", ".join(listed[:SHOWN]) + (f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else "")
    first = stage.nodes[0][1].op
    names |= {"avg_pool": first} if first in ("upsample", "pad", "crop") else {"gather": first}
    parts = [stage.options["activation"].kind if stage.kind == "activation" else names[stage.kind]]
    if stage.kind == "conv":
        g = stage.options["geometry"]
        parts[0] = f"{g.kernel[0]}x{g.kernel[1]} {g.in_channels}->{g.out_channels}"
        parts[0] += f" /{g.stride[0]}" if g.stride != (1, 1) else ""
        parts[0] += f" groups {g.groups}" if g.groups > 1 else ""
        parts[0] += f" of {g.upsample[0]}x upsampled" if g.upsample != (1, 1) else ""
    if stage.kind != "affine":
        parts += ["folded batch norm"] if "norm" in stage.options else []
    parts += ["arithmetic"] if "then" in stage.options else []
    parts += ["sum"] if stage.other is not None else []
    parts += ["ReLU"] if stage.relu else []
    return " + ".join(part for part in parts if part)


def _runs(program: Program, state) -> str:
    if state.stage.kind == "segment":
        return "PyTorch autograd (not planned)"
    return state.convolution.runs if state.convolution is not None else program.executor.name


def _operations(stage: Stage) -> int:
    return stage.options["geometry"].operations if stage.kind == "conv" else 0
