"""Block sizes of the Triton kernels: measured once per kind of problem, remembered in memory and in a file.

``TWINS_FAST_CACHE`` names the folder of the files, one per device (default: ~/.cache/twins-fast). Nothing is
measured, and the first candidate is used, for small tensors, during CUDA graph capture, under
``torch.use_deterministic_algorithms`` (another choice means another order of the sums) and in Triton's interpreter.

A launch from Python takes longer than most of these kernels. So what is timed is the replay of a CUDA graph of many
launches, which take turns with copies of their tensors: from a cache that holds all of them every choice looks fast.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from math import inf
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .capture import abandon


class Config(NamedTuple):
    values: int  # of a block
    width: int  # channels of a tile in channels-last memory
    warps: int
    programs: int  # per multiprocessor, about


# The first one of each list is the default: blocks of 16 KiB of half precision on each multiprocessor, by few programs,
# since each leaves partial results to merge; two where bits are loaded as well, which nobody loads ahead. Not yet
# measured on a GPU.
_ONE_TENSOR = [
    Config(8192, 64, 16, 1),
    Config(4096, 64, 8, 2),
    Config(8192, 64, 8, 2),
    Config(2048, 64, 4, 4),
    Config(8192, 128, 16, 1),
]
_SEVERAL = [
    Config(4096, 64, 8, 2),
    Config(8192, 64, 16, 1),
    Config(2048, 64, 4, 4),
    Config(2048, 64, 4, 8),
    Config(4096, 128, 8, 2),
]
CANDIDATES = {"moments": _ONE_TENSOR, "apply": _ONE_TENSOR, "sums": _SEVERAL, "apply_backward": _SEVERAL}
INTERPRETER = Config(256, 32, 4, 6)  # small, so that small tensors have several tiles and slabs
SMALL = 2**18  # values; below, launches take longer than what is to be tuned

_LAUNCHES = 16  # that are timed together, at least
_ROUNDS = 5
_MOST_COPIES = 64
_QUEUING = 2**22  # cycles, a few milliseconds: the device waits while Python queues what is timed

Candidate = TypeVar("Candidate")
Tensors = Sequence[Tensor | None]
_chosen: dict[str, dict[str, Config]] = {}  # device name -> problem -> configuration
_lock = threading.RLock()


def choose(phase: str, kind: str, x: Tensor, launch: Callable[..., object], tensors: Tensors) -> Config:
    """The configuration for a phase: remembered, or else the :func:`fastest`; ``launch`` may write scratch only.

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
        chosen[problem] = fastest(CANDIDATES[phase], launch, tensors)
        save(name, chosen)
        return chosen[problem]


def default(phase: str, x: Tensor) -> Config:
    return CANDIDATES[phase][0] if x.device.type == "cuda" else INTERPRETER


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def fastest(candidates: Sequence[Candidate], launch: Callable[..., object], tensors: Tensors = ()) -> Candidate:
    """The candidate whose ``launch(candidate, *tensors)`` takes the least time on the current device.

    One that fails is left out. Not to be called while the current stream is captured.

    Args:
        tensors: the large ones that a launch reads and writes, None among them; it gets these or copies of them.
    """
    copies = _rotated(tensors)
    runs = {}
    for candidate in candidates:
        with suppress(Exception):  # too large; if it is anything else, the launch that follows fails, too
            runs[candidate] = _repeated(partial(launch, candidate), copies)
    times = dict.fromkeys(runs, inf)
    for _ in range(_ROUNDS):  # side by side, since clocks change
        for candidate, run in runs.items():
            with suppress(Exception):
                times[candidate] = min(times[candidate], _milliseconds(run))
    return min(times, key=times.__getitem__, default=candidates[0])


def _rotated(tensors: Tensors) -> list[Tensors]:
    """The tensors and copies of them, together twice the second-level cache; fewer where memory is short."""
    size = sum(t.nbytes for t in tensors if t is not None)
    copies = [tensors]
    if size:
        cache_size = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        free, _ = torch.cuda.mem_get_info()
        with suppress(torch.OutOfMemoryError):
            for _ in range(min(2 * cache_size // size, free // (4 * size), _MOST_COPIES)):
                copies.append([None if t is None else t.clone() for t in tensors])
    return copies


def _repeated(launch: Callable[..., object], copies: list[Tensors]) -> Callable[[], None]:
    """What launches many times, with each of the copies in turn: as a graph if that can be captured."""

    def run() -> None:
        for i in range(max(_LAUNCHES, len(copies))):
            launch(*copies[i % len(copies)])

    for tensors in (copies[0], copies[-1]):  # addresses may differ in what Triton compiles for
        launch(*tensors)  # compiles and loads, which is forbidden during a capture
    torch.cuda.synchronize()
    return _captured(run) or run


def _captured(run: Callable[[], None]) -> Callable[[], None] | None:
    """The replay of a graph of ``run``; None if that cannot be captured."""
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):  # is left even if the capture cannot be ended
            # Other threads, such as those that load data, may keep calling CUDA.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
    except Exception:
        abandon(graph, torch.cuda.current_device(), pool)
        return None
    return graph.replay


def _milliseconds(run: Callable[[], None]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_QUEUING)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def cache_folder() -> Path:
    """Where files are kept from run to run; RuntimeError: there is no home folder."""
    folder = os.environ.get("TWINS_FAST_CACHE")
    return Path(folder) if folder else Path("~/.cache/twins-fast").expanduser()


def path(name: str) -> Path:
    """The file for devices of this name."""
    return cache_folder() / f"triton-{re.sub('[^A-Za-z0-9]+', '-', name)}.json"


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
