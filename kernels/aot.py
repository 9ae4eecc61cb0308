"""Ahead-of-time compilation of every Triton kernel, and what the compilers say about it; needs no GPU.

A row is one kernel as one call of the op, or one step of an attack's plan, would launch it, on one architecture:
registers per thread, bytes of local memory per thread (spilled registers, mostly), bytes of shared memory, and the PTX.
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
from functools import partial
from math import gcd
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import attack, tuning, twin_bn

ARCHS = (80, 90, 100)
CUOBJDUMP = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
DTYPES = ("bfloat16", "float16", "float32")  # names in torch
TWIN_BN = ("moments_kernel", "merge_moments_kernel", "apply_kernel")
TWIN_BN += ("sums_kernel", "merge_sums_kernel", "apply_backward_kernel")
ATTACK = ("pointwise_kernel", "convolution_kernel", "pool_kernel", "pool_backward_kernel", "pixels_kernel")
KERNELS = {**dict.fromkeys(TWIN_BN, twin_bn), **dict.fromkeys(ATTACK, attack)}  # name -> module
SIZES = {"aligned": (8, 64, 56, 56), "odd": (5, 67, 7, 7), "aligned 64-bit": (4096, 64, 96, 96)}  # [N, C, H, W]
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
_TYPES |= {torch.int32: "*i32", torch.int64: "*i64"}


class Variant(NamedTuple):
    """A call of the op: forward with residual, ReLU and bits, as far as asked for, and its backward."""

    dtype: str
    channels_last: bool
    size: str  # key of SIZES
    residual: bool
    relu: bool
    candidate: int | None = None  # number of the block sizes, the default if None
    both_adaptive: bool = False

    def __str__(self) -> str:
        words = ["channels-last" if self.channels_last else "contiguous", self.size]
        words += ["residual"] * self.residual + ["relu+bits"] * self.relu + ["both adaptive"] * self.both_adaptive
        return " ".join(words if self.candidate is None else [*words, f"candidate {self.candidate}"])


class AttackVariant(NamedTuple):
    """A step of an attack's plan."""

    dtype: str
    size: str
    step: str  # key of ATTACK_STEPS

    def __str__(self) -> str:
        return f"{self.step}, {self.size}"


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
    calls += [
        Variant(dtype, last, size, True, True, both_adaptive=True)
        for size, dtype, last in itertools.product(("aligned", "odd"), dtypes, (True, False))
    ]
    if candidates:
        count = max(len(configs) for configs in tuning.CANDIDATES.values())
        calls += [call._replace(candidate=i) for call in calls if call.residual for i in range(1, count)]
    return calls


def attack_variants(brief: bool = False) -> list[AttackVariant]:
    """The steps that are compiled; convolutions are for half precision and whole vectors of channels.

    ``brief`` is as for :func:`variants`.
    """
    dtypes, sizes = (DTYPES[:1], ["aligned"]) if brief else (DTYPES, SIZES)
    steps = BRIEF_STEPS if brief else ATTACK_STEPS
    return [
        AttackVariant(dtype, size, step)
        for dtype, size, step in itertools.product(dtypes, sizes, steps)
        if (dtype != "float32" and size != "odd") or "convolution" not in step
    ]


def launches(variant: Variant | AttackVariant) -> list[Launch]:
    """What the call would launch, as recorded from tensors without data."""
    shape, dtype = SIZES[variant.size], getattr(torch, variant.dtype)
    if isinstance(variant, AttackVariant):
        with _recording(None) as calls:
            ATTACK_STEPS[variant.step](dtype, *shape)
        return list(calls)
    images, channels, *_ = shape
    geometry = twin_bn.Geometry.of(shape, images // 2, variant.channels_last, variant.dtype)
    x, wing, eps = _empty(*shape, dtype=dtype), (_empty(channels),) * 4, 1e-5
    stats = _empty(4 if variant.both_adaptive else 2, channels)
    residual = x if variant.residual else None
    bits = _empty(1, dtype=torch.uint8) if variant.relu else None
    with _recording(variant.candidate) as calls:
        twin_bn.forward(x, residual, geometry, wing, wing, x, bits, stats, 0.1, eps, variant.relu)
        twin_bn.backward(x, x, bits, geometry, wing, wing, stats, x, residual, wing, eps)
        if not variant.relu:  # the phases of several processes
            twin_bn.moments(x, geometry, stats)
            twin_bn.sums(x, x, bits, geometry, wing, stats, _empty(4, channels))
            twin_bn.apply_backward(x, x, bits, geometry, wing, wing, stats, stats, x, None, eps)
    return list(calls)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _values(dtype: torch.dtype, images: int, channels: int, height: int, width: int) -> tuple:
    pixels = images * height * width
    bits = _empty(pixels, -(-channels // 8), dtype=torch.uint8)
    return _empty(pixels, channels, dtype=dtype), _empty(channels), bits, (pixels, channels)


def _finish(*shape) -> None:
    x, vector, bits, size = _values(*shape)
    attack.pointwise(x, x, size, shift=vector, other=x, bits=bits)


def _gated(*shape) -> None:
    x, vector, bits, size = _values(*shape)
    attack.pointwise(x, x, size, gate=bits, scale=vector, other=x, mask=bits)


def _convolution(config: attack.ConvolutionConfig, backward: bool, *shape) -> None:
    """Of any kernel and stride, which are read at run time; with as many channels as the widest block."""
    dtype, images, channels, height, width = shape
    channels *= 4
    _, vector, bits, _ = _values(dtype, images, channels, height, width)
    image, weight = _empty(images, channels, height, width, dtype=dtype), _empty(channels, 3, 3, channels, dtype=dtype)
    product = attack.Product(weight, _taps(1, 1), (1, 1), (1, 1), (1, 1), gcd(channels, 16))
    options = dict(mask=bits) if backward else dict(shift=vector, bits=bits)
    attack.convolution(image, image, product, config, other=image, **options)


def _first_convolution(config: attack.ConvolutionConfig, backward: bool, *shape) -> None:
    """7 x 7 of stride 2 on an image: 8 pixels of each row are a tap; and its gradient, in blocks of 4 x 4 pixels."""
    _, vector, bits, _ = _values(*shape)
    dtype, images, channels, height, width = shape
    image = _empty(images, 3, 2 * height, 2 * width, dtype=dtype)
    y = _empty(images, channels, height, width, dtype=dtype)
    if backward:
        weight = _empty(48, 5, 5, channels, dtype=dtype)
        product = attack.Product(weight, _taps(1, 1), (1, 1), (2, 2), (4, 4), gcd(channels, 16), 12)
        attack.convolution(y, image, product, config)
    else:
        product = attack.Product(_empty(channels, 7, 1, 24, dtype=dtype), _taps(1, 1), (1, 1), (2, 2), (1, 1), 2)
        attack.convolution(image, y, product, config, shift=vector, bits=bits)


def _taps(down: int, across: int) -> Tensor:
    return _empty(down + across, 5, dtype=torch.int32)


def _pool(backward: bool, max: bool, *shape) -> None:
    x, _, bits, _ = _values(*shape)
    _, images, channels, height, width = shape
    window = (images, channels, height, width, height // 2, width // 2, 3, 3, 2, 2, 1, 1)
    small = x.new_empty(images * (height // 2) * (width // 2), channels)
    argmax = _empty(*small.shape, dtype=torch.uint8) if max else None
    attack.pool_backward(small, x, window, argmax, x, bits) if backward else attack.pool(x, small, window, argmax)


def _pixels(upsampled: bool, results: str, dtype: torch.dtype, images: int, _: int, height: int, width: int) -> None:
    x, out = _empty(images, 3, height, width), _empty(images, 3, height, width, dtype=dtype)
    starts = (_empty(n + 1, dtype=torch.int32) for n in (height, width))
    tables = attack.Tables(*starts, (height, width), (7, 7)) if upsampled else None
    arguments = {
        "prepare": dict(out=out),
        "gradient": dict(gradient=out, result=x),
        "step": dict(gradient=out, clean=x, nan=_empty(images, dtype=torch.int64), result=x, out=out),
    }[results]
    codes = [0, 8, 2, 4]  # clamp, clamp that passes gradients at its bounds, sub, div
    attack.pixels(x, _empty(8, 4), codes, tables, **arguments, alpha=0.1, eps=0.1)


ATTACK_STEPS = {
    "finish": _finish,
    "gated affine": _gated,
    **{
        f"{name}{' backward' * backward} {config.rows}x{config.width}x{config.inner}": partial(step, config, backward)
        for name, step in (("convolution", _convolution), ("first convolution", _first_convolution))
        for config in attack.CONVOLUTION_CONFIGS
        for backward in (False, True)
    },
    **{
        f"{'max' if max else 'mean'}{' backward' * backward}": partial(_pool, backward, max)
        for max in (True, False)
        for backward in (False, True)
    },
    **{
        f"{results}{' of the upsampled image' * upsampled}": partial(_pixels, upsampled, results)
        for upsampled in (False, True)
        for results in ("prepare", "gradient", "step")
    },
}
BRIEF_STEPS = ["finish", "gated affine", *[step for step in ATTACK_STEPS if step.startswith("convolution")]]
BRIEF_STEPS += ["max", "max backward", "step", "step of the upsampled image"]


class _Recorder:
    """Stands in for a kernel: notes what it would be compiled for."""

    def __init__(self, name: str, calls: list[Launch]):
        self.name, self.kernel, self.calls = name, getattr(KERNELS[name], name), calls

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
    kernels, choose = {name: getattr(module, name) for name, module in KERNELS.items()}, tuning.choose
    try:
        for name, module in KERNELS.items():
            setattr(module, name, _Recorder(name, calls))
        tuning.choose = lambda phase, *_: tuning.CANDIDATES[phase][candidate or 0]
        yield calls
    finally:
        tuning.choose = choose
        for name, kernel in kernels.items():
            setattr(KERNELS[name], name, kernel)


def compile_launch(launch: Launch, arch: int) -> dict:
    """Registers, spills, shared and ptx of a launch (see the module)."""
    kernel = getattr(KERNELS[launch.kernel], launch.kernel)
    source = ASTSource(kernel, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    (line,) = re.findall(r"REG:.*", usage)
    used = {name: int(value) for name, value in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", line)}
    return {
        "registers": used["REG"],
        "spills": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "ptx": compiled.asm["ptx"],
    }


def _is_for(launch: Launch, arch: int) -> bool:
    """Whether a device of this architecture may choose the block sizes."""
    if launch.kernel != "convolution_kernel":
        return True
    tiles = [(config.rows, config.width) for config in attack.convolution_configs(divmod(arch, 10))]
    return launch.constants["BLOCK_U"] * launch.constants["BLOCK_V"] <= max(rows * width for rows, width in tiles)


def table(
    calls: list[Variant | AttackVariant], archs: tuple[int, ...] = ARCHS, processes: int | None = None
) -> list[dict]:
    """One row per launch and architecture; launches that are the same for several calls are compiled once."""
    rows, jobs = [], {}
    for variant in calls:
        for launch in launches(variant):
            key = repr(launch)
            if key not in jobs:
                jobs[key] = launch
                rows.append({"kernel": launch.kernel.removesuffix("_kernel"), "variant": variant, "launch": key})
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        pairs = [(row, arch) for row in rows for arch in archs if _is_for(jobs[row["launch"]], arch)]
        results = pool.map(compile_launch, [jobs[row["launch"]] for row, _ in pairs], [arch for _, arch in pairs])
        return [
            {
                "kernel": row["kernel"],
                "arch": arch,
                "dtype": row["variant"].dtype,
                "variant": str(row["variant"]),
                **result,
            }
            for (row, arch), result in zip(pairs, results, strict=True)
        ]
