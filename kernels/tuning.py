"""Block sizes of the Triton kernels: measured once per kind of problem, remembered in memory and in a file.

``TWINS_FAST_CACHE`` names the folder of the files, one per device (default: ~/.cache/twins-fast). Nothing is
measured, and the first candidate is used, for small tensors, during CUDA graph capture, under
``torch.use_deterministic_algorithms`` (another choice means another order of the sums) and in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor


class Config(NamedTuple):
    values: int  # of a block
    width: int  # channels of a tile in channels-last memory
    warps: int
    programs: int  # per multiprocessor, about


# The first one of each list is the default. Not yet measured on a GPU.
_READ = [
    Config(4096, 64, 4, 4),
    Config(2048, 64, 4, 8),
    Config(4096, 32, 4, 4),
    Config(4096, 128, 8, 4),
    Config(8192, 64, 8, 4),
]
_WRITE = [
    Config(2048, 64, 4, 8),
    Config(4096, 64, 8, 8),
    Config(1024, 64, 4, 16),
    Config(2048, 32, 4, 16),
    Config(4096, 128, 8, 4),
]
CANDIDATES = {"moments": _READ, "apply": _WRITE, "sums": _WRITE, "apply_backward": _WRITE}
INTERPRETER = Config(256, 32, 4, 6)  # small, so that small tensors have several tiles and slabs
SMALL = 2**18  # values; below, launches take longer than what is to be tuned

_chosen: dict[str, dict[str, Config]] = {}  # device name -> problem -> configuration
_lock = threading.RLock()


def choose(phase: str, kind: str, x: Tensor, launch: Callable[[Config], object]) -> Config:
    """The configuration for a phase: remembered, or else measured with ``launch``, which may write scratch only.

    Problems of one ``kind`` share a configuration.
    """
    if x.device.type != "cuda" or x.numel() < SMALL or torch.are_deterministic_algorithms_enabled():
        return default(phase, x)
    import triton

    problem = f"triton {triton.__version__} {phase} {kind}"
    name = torch.cuda.get_device_name(x.device)
    with _lock:
        chosen = _chosen.get(name)
        if chosen is None:
            chosen = _chosen[name] = load(name)
        if problem in chosen:
            return chosen[problem]
        if torch.cuda.is_current_stream_capturing():
            return default(phase, x)
        chosen[problem] = fastest(CANDIDATES[phase], launch, _seconds)
        save(name, chosen)
        return chosen[problem]


def default(phase: str, x: Tensor) -> Config:
    return CANDIDATES[phase][0] if x.device.type == "cuda" else INTERPRETER


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fastest(candidates: list[Config], launch: Callable[[Config], object], seconds: Callable) -> Config:
    """The candidate that takes the fewest ``seconds(launch, candidate)``; one that fails is left out."""
    times = {}
    for config in candidates:
        try:
            times[config] = seconds(launch, config)
        except Exception:  # too large for this device; if it is anything else, the launch that follows fails, too
            continue
    return min(times, key=times.get, default=candidates[0])


def _seconds(launch: Callable[[Config], object], config: Config) -> float:
    for _ in range(2):  # the first one compiles
        launch(config)
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            launch(config)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 4e3)
    return min(times)


def path(name: str) -> Path:
    """The file for devices of this name."""
    folder = os.environ.get("TWINS_FAST_CACHE")
    folder = Path(folder) if folder else Path("~/.cache/twins-fast").expanduser()
    return folder / f"triton-{re.sub('[^A-Za-z0-9]+', '-', name)}.json"


def load(name: str) -> dict[str, Config]:
    """What the file holds; of an unreadable or foreign one nothing."""
    try:
        entries = json.loads(path(name).read_text())
        configs = {problem: Config(*values) for problem, values in entries.items()}
    except (OSError, RuntimeError, ValueError, TypeError, AttributeError):
        return {}
    known = {config for candidates in CANDIDATES.values() for config in candidates}
    return {problem: config for problem, config in configs.items() if config in known}


def save(name: str, configs: dict[str, Config]) -> None:
    """Merge into the file, which other processes may do at the same time: the last one wins. Never fails."""
    try:
        file = path(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**load(name), **configs}, indent=1, sort_keys=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, prefix=file.name, delete=False) as temporary:
            temporary.write(text)
        os.replace(temporary.name, file)
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return
