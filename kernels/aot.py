"""Ahead-of-time compilation of every Triton kernel, and what the compilers say about it; needs no GPU.

A row is one kernel as one call of the op would launch it, on one architecture: registers per thread, bytes of local
memory per thread (spilled registers, mostly), bytes of shared memory, and the PTX.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from twins_fast.kernels import tuning, twin_bn

ARCHS = (80, 90, 100)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("moments_kernel", "merge_moments_kernel", "apply_kernel")
KERNELS += ("sums_kernel", "merge_sums_kernel", "apply_backward_kernel")
SIZES = {"aligned": (8, 64, 56, 56), "odd": (5, 67, 7, 7), "aligned 64-bit": (4096, 64, 96, 96)}  # [N, C, H, W]
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}


class Variant(NamedTuple):
    """A call of the op: forward with residual, ReLU and bits, as far as asked for, and its backward."""

    dtype: torch.dtype
    channels_last: bool
    size: str  # key of SIZES
    residual: bool
    relu: bool
    candidate: int | None = None  # number of the block sizes, the default if None

    def __str__(self) -> str:
        words = ["channels-last" if self.channels_last else "contiguous", self.size]
        words += ["residual"] * self.residual + ["relu+bits"] * self.relu
        return " ".join(words if self.candidate is None else [*words, f"candidate {self.candidate}"])


class Launch(NamedTuple):
    kernel: str
    signature: dict[str, str]
    constants: dict
    attributes: dict
    options: dict


def variants(candidates: bool = False, brief: bool = False) -> list[Variant]:
    """The calls that are compiled: both layouts, all dtypes.

    ``candidates`` adds all block sizes, ``brief`` leaves out what differs from another call in a few instructions.
    """
    fusions = [(True, True)] if brief else [(True, True), (False, False), (False, True)]
    calls = [
        Variant(dtype, last, "aligned", *fusion)
        for dtype, last, fusion in itertools.product(DTYPES, (True, False), fusions)
    ]
    dtypes = DTYPES[:1] if brief else DTYPES
    calls += [
        Variant(dtype, last, size, True, True)
        for size, dtype, last in itertools.product(("odd", "aligned 64-bit"), dtypes, (True, False))
    ]
    if candidates:
        count = max(len(configs) for configs in tuning.CANDIDATES.values())
        calls += [call._replace(candidate=i) for call in calls if call.residual for i in range(1, count)]
    return calls


def launches(variant: Variant) -> list[Launch]:
    """What the call would launch, as recorded from tensors without data."""
    shape = SIZES[variant.size]
    memory_format = torch.channels_last if variant.channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=variant.dtype, device="meta").contiguous(memory_format=memory_format)
    residual = torch.empty_like(x) if variant.residual else None
    wing = tuple(torch.empty(shape[1], device="meta") for _ in range(4))
    split, eps, wanted = shape[0] // 2, 1e-5, [True] * 6
    with _recording(variant.candidate) as calls:
        _, bits, stats = twin_bn.forward(x, residual, split, wing, wing, 0.1, eps, variant.relu, variant.relu)
        wanted[1] = variant.residual
        twin_bn.backward(x, x, bits, split, *wing[:3], wing[2], stats, eps, wanted)
        if not variant.relu:  # the phases of several processes
            twin_bn.moments(x, split)
            twin_bn.sums(x, x, bits, split, wing[0], stats)
            twin_bn.apply_backward(x, x, bits, split, wing[1], wing[2], wing[2], stats, stats, eps, [True, False])
    return list(calls)


class _Recorder:
    """Stands in for a kernel: notes what it would be compiled for."""

    def __init__(self, name: str, calls: list[Launch]):
        self.name, self.kernel, self.calls = name, getattr(twin_bn, name), calls

    def __getitem__(self, grid):
        return self._record

    def _record(self, *args, **kwargs) -> None:
        values = {**dict(zip(self.kernel.arg_names, args, strict=False)), **kwargs}
        constexprs = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(self.kernel.arg_names):
            value = values.pop(name)
            if value is None or name in constexprs:
                signature[name] = "constexpr"
                constants[name] = value
            elif isinstance(value, Tensor):  # as Triton sees one that starts at a multiple of 16 bytes
                signature[name] = _TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
        self.calls.append(Launch(self.name, signature, constants, attributes, values))  # what is left are options


@contextmanager
def _recording(candidate: int | None) -> Iterator[list[Launch]]:
    calls = []
    kernels, choose = {name: getattr(twin_bn, name) for name in KERNELS}, tuning.choose
    try:
        for name in KERNELS:
            setattr(twin_bn, name, _Recorder(name, calls))
        tuning.choose = lambda phase, *_: tuning.CANDIDATES[phase][candidate or 0]
        yield calls
    finally:
        tuning.choose = choose
        for name, kernel in kernels.items():
            setattr(twin_bn, name, kernel)


def compile_launch(launch: Launch, arch: int) -> dict:
    """Registers, spills, shared and ptx of a launch (see the module)."""
    kernel = getattr(twin_bn, launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = re.findall(r"REG:.*", usage)
    used = {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"],
    }


def table(calls: list[Variant], archs: tuple[int, ...] = ARCHS, processes: int | None = None) -> list[dict]:
    """One row per launch and architecture; launches that are the same for several calls are compiled once."""
    rows, jobs = [], {}
    for variant in calls:
        for launch in launches(variant):
            key = repr(launch)
            if key not in jobs:
                jobs[key] = launch
                rows.append({"kernel": launch.kernel.removesuffix("_kernel"), "variant": variant, "launch": key})
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        pairs = [(row, arch) for row in rows for arch in archs]
        results = pool.map(compile_launch, [jobs[row["launch"]] for row, _ in pairs], [arch for _, arch in pairs])
        return [
            {
                "kernel": row["kernel"],
                "arch": arch,
                "dtype": str(row["variant"].dtype).removeprefix("torch."),
                "variant": str(row["variant"]),
                **result,
            }
            for (row, arch), result in zip(pairs, results, strict=True)
        ]
