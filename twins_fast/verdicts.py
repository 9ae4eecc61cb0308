"""What is known of the kernels on a device: whether they are right there, and faster than plain PyTorch.

``twins-fast qualify`` finds it out (:mod:`twins_fast.qualify`) and keeps it in a file, for one model of device with one
set of software. Those of devices that we have measured come with the package. A process looks once and keeps to it,
since another kernel sums in another order. ``TWINS_FAST_CACHE`` names the folder of the files (default:
~/.cache/twins-fast).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
import threading
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch

from twins_fast.json_text import parse
from twins_fast.kernels.tuning import cache_folder

PACKAGE = Path(__file__).parent
SHIPPED = PACKAGE / "assets" / "verdicts"
QUALIFYING = "TWINS_FAST_QUALIFYING"  # set in the environment of a check, in which nothing is looked up
DRIVER = Path("/proc/driver/nvidia/version")

PASSED, FAILED, SLOWER, UNKNOWN = "passed", "failed", "slower", "unknown"


class Verdict(NamedTuple):
    """Of one subject, such as ``"plan bfloat16"``.

    Attributes:
        outcome: ``passed``, ``failed`` (wrong results), ``slower`` (than plain PyTorch) or ``unknown``.
        reason: why it has not passed.
        smallest: values from which on it is faster.
    """

    outcome: str
    reason: str = ""
    smallest: int = 0


_known: dict[int, dict[str, Verdict]] = {}  # device -> subject -> verdict
_lock = threading.Lock()
_told: set[str] = set()  # names of devices


def verdict(device: torch.device, subject: str) -> Verdict:
    """What is known of ``subject`` on a CUDA device; what this process has once been told stays."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with _lock:
        if index not in _known:
            _known[index] = {} if os.environ.get(QUALIFYING) else load(torch.device("cuda", index))
        verdicts = _known[index]
    return verdicts.get(subject) or Verdict(UNKNOWN, _why_unknown(index, bool(verdicts)))


def remember(device: torch.device, verdicts: dict[str, Verdict]) -> None:
    """Use these verdicts in this process, before anything has run."""
    with _lock:
        _known[device.index or 0] = verdicts


def tell_once(device: torch.device, subject: str) -> None:
    """Say once for each model of device that its kernels wait for a verdict."""
    found = verdict(device, subject)
    name = torch.cuda.get_device_name(device)
    if found.outcome == UNKNOWN and name not in _told and not os.environ.get(QUALIFYING):
        _told.add(name)
        warnings.warn(f"plain PyTorch runs on {name}: {found.reason}", stacklevel=5)


def _why_unknown(index: int, others: bool) -> str:
    if others:
        return "its check did not come to an end; `twins-fast qualify --again` repeats it"
    return f"`twins-fast qualify --device cuda:{index}` finds out whether the kernels are right and faster there"


def key_of(device: torch.device) -> dict[str, Any]:
    """All that a verdict depends on."""
    p = torch.cuda.get_device_properties(device)
    return {
        "device": p.name,
        "capability": [p.major, p.minor],
        "multiprocessors": p.multi_processor_count,
        "cache": p.L2_cache_size,
        "driver": DRIVER.read_text().partition("\n")[0] if DRIVER.exists() else "",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
        "package": _version("twins-fast"),
        "sources": sources(),
    }


def sources() -> str:
    """A hash of the compiled module and of the sources that are compiled at run time."""
    digest = hashlib.sha256()
    for path in sorted([*PACKAGE.glob("_C*.so"), *(PACKAGE / "kernels").glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def file_of(key: dict[str, Any]) -> Path:
    """Where the verdicts of a key are kept."""
    return cache_folder() / f"verdict-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"


def load(device: torch.device) -> dict[str, Verdict]:
    """Subject -> verdict, of the file or else of the package; of a broken or foreign file nothing."""
    try:
        key = key_of(device)
        return _read(file_of(key), key) or _shipped(key)
    except (OSError, RuntimeError):
        return {}


def _read(path: Path, key: dict[str, Any]) -> dict[str, Verdict]:
    try:
        content = parse(path.read_text())
        return {name: Verdict(*found) for name, found in content["verdicts"].items()} if content["key"] == key else {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _shipped(key: dict[str, Any]) -> dict[str, Verdict]:
    """Of the same capability with the same kernels, PyTorch and Triton."""
    for path in sorted(SHIPPED.glob("*.json")) if SHIPPED.exists() else ():
        known = json.loads(path.read_text())["key"]
        if all(known[name] == key[name] for name in ("capability", "sources", "torch", "triton")):
            return _read(path, known)
    return {}


def save(key: dict[str, Any], verdicts: dict[str, Verdict], **more: Any) -> Path:
    """Write what does not have to be tried again.

    Raises:
        OSError, RuntimeError: the folder cannot be made or written.
    """
    path = file_of(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: found for name, found in verdicts.items() if found.outcome != UNKNOWN}
    text = json.dumps({"key": key, "verdicts": kept, **more}, indent=1)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as part:
        part.write(text)
    os.replace(part.name, path)
    return path
