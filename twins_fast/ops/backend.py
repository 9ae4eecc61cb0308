"""Which backend runs an op, and why a better one does not."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from twins_fast.ops import native, phases
from twins_fast.verdicts import PASSED, tell_once, verdict

BACKENDS = ("cuda", "triton", "cpp", "torch")  # best first; torch runs everywhere
KERNELS = {"twin_batch_norm": ("cuda", "triton", "cpp")}  # op -> backends that have a kernel for it
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the kernels
_DEVICE = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu"}  # device type of the tensors each one takes
_LANGUAGE = {"cuda": "CUDA", "triton": "Triton", "cpp": "C++"}

_forced: str | None = os.environ.get("TWINS_FAST_BACKEND") or None


def choose(op: str, x: Tensor) -> str:
    """Name of the backend that runs ``op`` on ``x``: the forced one, else the best that can.

    Args:
        op: a key of ``KERNELS``.
        x: the tensor that decides about device and dtype.

    Raises:
        ValueError: ``TWINS_FAST_BACKEND`` names no backend.
        RuntimeError: the forced backend cannot run.
    """
    if _forced is not None:
        _check_name(_forced)
        why = _obstacle(_forced, op, x.device.type) or _mismatch(_forced, x)
        if why:
            raise RuntimeError(f"backend {_forced!r} was asked for, but cannot run {op}: {why}")
        return _forced
    for backend in BACKENDS:
        why = _obstacle(backend, op, x.device.type) or _mismatch(backend, x)
        if not (why or _reservation(backend, op, x.device, x.dtype, x.numel())):
            if backend == "torch" and x.is_cuda:
                tell_once(x.device, f"{op} cuda {native.dtype_name(x.dtype)}")
            return backend
    raise AssertionError("the torch backend always runs")


def implementation(name: str) -> ModuleType:
    """The module that holds a backend's phases, with the signatures of :mod:`twins_fast.ops.phases`."""
    if name == "torch":
        return phases
    if name == "triton":
        from twins_fast.ops import triton  # imports Triton

        return triton
    return native


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend for every op inside the ``with`` block (for all threads of the process).

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend has no kernel that can run here. An op that it cannot run for
            another reason (device or dtype of the tensors) raises when it is called.
    """
    global _forced
    _check_name(name)
    devices = (_DEVICE.get(name, "cpu"), "cpu")  # interpreted kernels run on the latter
    reasons = [_obstacle(name, op, device) for device in devices for op in KERNELS]
    if all(reasons):
        raise RuntimeError(f"backend {name!r} is not available: {reasons[0]}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def report() -> list[dict[str, Any]]:
    """One row per op and device type present: ``op``, ``device``, ``backend`` and ``reasons``.

    ``backend`` is what runs by default for float32; ``reasons`` maps each better backend to why it does not.
    """
    rows = []
    for op in KERNELS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = {}
            for backend in BACKENDS:
                if _forced is None:
                    why = _obstacle(backend, op, device)
                    why = why or _reservation(backend, op, torch.device(device), torch.float32)
                else:
                    why = _obstacle(backend, op, device) if backend == _forced else f"{_forced} was asked for"
                if not why:
                    break
                reasons[backend] = why
            rows.append({"op": op, "device": device, "backend": backend if not why else None, "reasons": reasons})
    return rows


def _check_name(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")


def _obstacle(backend: str, op: str, device: str) -> str:
    """Why ``backend`` cannot run ``op`` on tensors of this device type; empty when it can."""
    if backend == "torch":
        return ""
    if backend not in KERNELS[op]:
        return f"no {_LANGUAGE[backend]} kernel for this op yet"
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if _DEVICE[backend] != device and not interpreted:
        return f"runs on {_DEVICE[backend]} tensors only"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "triton":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    if native._C is None:
        return native.missing
    if backend == "cuda" and not native._C.has_cuda:
        return native.missing_cuda
    return ""


def _reservation(backend: str, op: str, device: torch.device, dtype: torch.dtype, values: int = sys.maxsize) -> str:
    """Why a backend that could run is not chosen, for a tensor of so many values, unless it is asked for by name."""
    if backend not in ("cuda", "triton"):
        return ""
    if device.type != "cuda":
        return "Triton's interpreter is for tests"
    found = verdict(device, f"{op} {backend} {native.dtype_name(dtype)}")
    if found.outcome != PASSED:
        return f"{found.outcome} on this device: {found.reason}"
    return "" if values >= found.smallest else f"slower than plain PyTorch below {found.smallest} values"


def _mismatch(backend: str, x: Tensor) -> str:
    return "" if backend == "torch" or x.dtype in _DTYPES else f"no kernel for {x.dtype}"
