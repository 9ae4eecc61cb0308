"""Calls every path of our kernels on small sizes and checks the results: for compute-sanitizer.

``compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m bench.sanitize``
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from itertools import product

import torch
from torch import nn

from bench.twin_bn import Inputs, Layer, check, inputs, runner, twins_fast
from twins_fast import PGD
from twins_fast.ops import backend, oracle

# Below, at and above a vector, a warp and a block; the last has several slices per channel.
SHAPES = [(2, 1, 1, 2), (3, 3, 7, 1), (2, 129, 1, 1), (5, 7, 3, 31), (4, 31, 7, 7), (3, 64, 8, 8), (6, 40, 29, 31)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = ("float32", "bfloat16", "float16")
EPILOGUES = [(False, False), (False, True), (True, True)]  # add, relu


def errors_of(
    shape: tuple[int, ...], dtype: str, layout: str, split: int, add: bool, relu: bool, device: str, seed: int
) -> dict[str, float]:
    """Two-wing batch norm and its gradient by the backend in use: result -> its error, 1 is what is allowed."""
    layer = Layer(
        f"{shape}, split {split}, {dtype}, {layout}, add {add}, relu {relu}", 1, shape, split, add, relu, dtype
    )
    tensors = inputs(layer, "cpu", seed=seed, layout=LAYOUTS[layout])  # where the oracle computes
    there = Inputs(*(moved(getattr(tensors, field.name), device) for field in fields(tensors)))
    run = runner(layer, there, twins_fast)
    results = oracle.Results(*(moved(tensor, "cpu") for tensor in run.results(run.operands())))
    return check(layer, tensors, results)


def splits_of(shape: tuple[int, ...]) -> list[int]:
    """Half, none and all of the images on the frozen wing, as far as the adaptive one has enough values."""
    images, _, height, width = shape
    return [s for s in (images // 2, 0, images) if s == images or images - s + height * width > 2]


def moved(value, device: str):
    """A tensor, a list of them or nothing, on another device."""
    if isinstance(value, list):
        return [tensor.to(device) for tensor in value]
    return None if value is None else value.to(device)


def network() -> nn.Module:
    """A step of every kind that a kernel runs: a stem, a pool, products of one pixel and of nine, strides."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 64, 1),
        nn.ReLU(), nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Conv2d(64, 64, 3, 1, 1), nn.ReLU(), nn.BatchNorm2d(64),
        nn.Conv2d(64, 40, 1, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 10),
    ).eval()  # fmt: skip


def attack(device: str) -> int:
    """Run a plan of every precision, whose own check looks at every step; how many are refused."""
    model = network().to(device)
    images, labels = torch.rand(5, 3, 36, 36, device=device), torch.arange(5, device=device)
    refused = 0
    for dtype in (None, torch.bfloat16, torch.float16):
        try:
            PGD(model, steps=2, engine="plan", amp_dtype=dtype)(images, labels)
        except RuntimeError as error:
            refused += 1
            print(f"a plan in {dtype or torch.float32} is refused: {error}")
    return refused


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--backends", help="comma-separated; default: cuda,triton, or cpp where there is no device")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrong, calls = 0, 0
    for name in (args.backends or ("cuda,triton" if device == "cuda" else "cpp")).split(","):
        with backend.use_backend(name):
            cases = enumerate(product(SHAPES, DTYPES, EPILOGUES, LAYOUTS))
            for number, (shape, dtype, (add, relu), layout) in cases:
                for split in splits_of(shape)[: 1 + number % 3]:
                    calls += 1
                    for key, error in errors_of(shape, dtype, layout, split, add, relu, device, number).items():
                        if not error <= 1:
                            wrong += 1
                            print(f"wrong by {name}: {shape}, {dtype}, {layout}: {key} is off by {error:.3g} times")
    wrong += attack(device)
    print(f"{calls} calls, forward and backward, and three plans: {wrong} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
