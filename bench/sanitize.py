"""Calls every path of our kernels on small sizes and checks the results: for compute-sanitizer.

``compute-sanitizer --tool memcheck --error-exitcode 9 python3 -m bench.sanitize``
"""

from __future__ import annotations

import argparse
from itertools import product

import torch

from twins_fast import PGD
from twins_fast.ops import backend
from twins_fast.qualify.checks import DTYPES, LAYOUTS, SHAPES, TwinCase, network, splits_of

EPILOGUES = [(False, False), (False, True), (True, True)]  # add, relu


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
                    case = TwinCase(shape, dtype, LAYOUTS[layout], split, add, relu, device, number)
                    for key, error in case.errors().items():
                        if not error <= 1:
                            wrong += 1
                            print(f"wrong by {name}: {shape}, {dtype}, {layout}: {key} is off by {error:.3g} times")
    wrong += attack(device)
    print(f"{calls} calls, forward and backward, and three plans: {wrong} wrong results")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
