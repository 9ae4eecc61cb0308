"""What ``twins-fast info`` prints."""

from __future__ import annotations

import platform

import torch
import torchvision

import twins_fast
from twins_fast.ops import backend
from twins_fast.qualify.run import subjects
from twins_fast.verdicts import verdict


def print_info() -> None:
    """Print versions, devices, and which backend runs each op and why a better one does not."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    print(
        f"twins-fast {twins_fast.__version__}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}, Triton {triton_version}"
    )
    print(f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        print(f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}")
        for subject in subjects():
            found = verdict(torch.device("cuda", index), subject)
            print(f"    {subject}: {found.outcome} {found.reason}".rstrip())
    if not torch.cuda.is_available():
        print("cuda: no device")
    for row in backend.report():
        print(f"{row['op']} on {row['device']}: {row['backend']} runs")
        for better, why in row["reasons"].items():
            print(f"    {better} does not: {why}")
