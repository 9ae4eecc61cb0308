"""One check, in the process that :mod:`twins_fast.qualify.run` has started for it."""

from __future__ import annotations

import argparse
import sys

import torch

from twins_fast.qualify.checks import CHECKS
from twins_fast.qualify.process import report


def main() -> int:
    parser = argparse.ArgumentParser("python -m twins_fast.qualify", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("device", help="cpu, or the UUID or number of a CUDA device")
    args = parser.parse_args()
    if args.device == "cpu":
        CHECKS[args.check](torch.device("cpu"), report)
        return 0
    index = next((i for i in range(torch.cuda.device_count()) if args.device in (str(i), uuid_of(i))), None)
    if index is None:
        print(f"no CUDA device {args.device} here")
        return 2
    with torch.cuda.device(index):
        CHECKS[args.check](torch.device("cuda", index), report)
    return 0


def uuid_of(index: int) -> str:
    """Of a CUDA device, as it stays when others are made visible or invisible."""
    return str(getattr(torch.cuda.get_device_properties(index), "uuid", index))


if __name__ == "__main__":
    sys.exit(main())
