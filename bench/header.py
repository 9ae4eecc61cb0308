"""Where and with what a measurement was made."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

import twins_fast

ROOT = Path(__file__).parent.parent
UNKNOWN_CACHE = 32 << 20  # bytes, assumed if the system does not tell


def header() -> dict:
    """Machine, tools, library versions, commit and date."""
    return {
        "machine": _processor(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cache": last_level_cache("cpu"),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "nvcc": _first_line("nvcc", "--version", containing="release"),
        "compiler": _first_line(os.environ.get("CXX") or shutil.which("c++") or "g++", "--version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "twins-fast": twins_fast.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def last_level_cache(device: str) -> int:
    """Bytes of the cache in front of the memory of ``device``."""
    if device == "cuda":
        return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            number = (index / "size").read_text().strip()
            sizes[int((index / "level").read_text())] = int(number[:-1]) << {"K": 10, "M": 20, "G": 30}[number[-1]]
        except (OSError, ValueError, KeyError):
            continue
    return sizes[max(sizes)] if sizes else UNKNOWN_CACHE


def device_kind(device: str) -> str:
    """``cpu``, or the name of the GPU as a part of a file name."""
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    return "-".join(name.lower().split())


def _commit() -> str:
    """The current commit, marked ``-dirty`` if files other than results differ from it."""
    code = (".", ":!bench/results", ":!docs/results")
    changed = _first_line("git", "status", "--porcelain", "--untracked-files=no", "--", *code)
    return (_first_line("git", "describe", "--always") or "unknown") + ("-dirty" if changed else "")


def _first_line(*command: str, containing: str = "") -> str | None:
    """The first line of output that holds ``containing``; None where the command is missing or fails."""
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = [line.strip() for line in run.stdout.splitlines() if containing in line and line.strip()]
    return lines[0] if lines and run.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
