"""Calls every path of one backend's kernels on small sizes and checks the results: for compute-sanitizer.

``compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m bench.sanitize``
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from itertools import product

import torch

from bench.twin_bn import Inputs, Layer, check, inputs, runner, twins_fast
from twins_fast.ops import backend, oracle

# Below, at and above a vector, a warp and a block; the last has several slices per channel.
SHAPES = [(2, 1, 1, 2), (3, 3, 7, 1), (2, 129, 1, 1), (5, 7, 3, 31), (4, 31, 7, 7), (3, 64, 8, 8), (6, 40, 29, 31)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = ("float32", "bfloat16", "float16")
EPILOGUES = [(False, False), (False, True), (True, True)]  # add, relu


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench.sanitize", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["cuda", "triton", "cpp"], default="cuda")
    name = parser.parse_args().backend
    device = "cpu" if name == "cpp" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    wrong, calls = 0, 0
    with backend.use_backend(name):
        for number, (shape, dtype, (add, relu), layout) in enumerate(product(SHAPES, DTYPES, EPILOGUES, LAYOUTS)):
            splits = [
                s for s in (shape[0] // 2, 0, shape[0]) if s == shape[0] or shape[0] - s + shape[2] * shape[3] > 2
            ]
            for split in splits[: 1 + number % 3]:
                layer = Layer(f"{shape}, split {split}, {dtype}, {layout}", 1, shape, split, add, relu, dtype)
                tensors = inputs(layer, "cpu", seed=number, layout=LAYOUTS[layout])  # where the oracle computes
                there = Inputs(*(moved(getattr(tensors, field.name), device) for field in fields(tensors)))
                run = runner(layer, there, twins_fast)
                results = oracle.Results(*(moved(tensor, "cpu") for tensor in run.results(run.operands())))
                errors = check(layer, tensors, results)
                calls += 1
                for key, error in errors.items():
                    if not error <= 1:
                        wrong += 1
                        print(f"wrong: {layer.name}, add {add}, relu {relu}: {key} is off by {error:.3g} times")
    print(f"{calls} calls of {name}, forward and backward: {wrong} wrong results")
    return 1 if wrong else 0


def moved(value, device: str):
    if isinstance(value, list):
        return [tensor.to(device) for tensor in value]
    return None if value is None else value.to(device)


if __name__ == "__main__":
    raise SystemExit(main())
