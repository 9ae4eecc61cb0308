"""Which backend runs an op, and why a better one does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("cuda", "triton", "cpp", "torch")  # best first; torch runs everywhere
KERNELS = {"twin_batch_norm": ("cuda", "cpp")}  # op -> backends that have a kernel for it
DTYPES = {
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
    "cpp": (torch.float32, torch.bfloat16),
}
DEVICE = {"cuda": "cuda", "triton": "cuda", "cpp": "cpu"}  # device type of the tensors each one takes
LANGUAGE = {"cuda": "CUDA", "triton": "Triton", "cpp": "C++"}

try:
    from twins_fast import _C  # after torch, whose OpenMP runtime it then shares

    _missing = ""
except ImportError as error:
    _C = None
    _note = Path(__file__).with_name("_build_failed.txt")  # written by setup.py
    _missing = _note.read_text().strip() if _note.exists() else f"no compiled module twins_fast._C ({error})"

cpu_isa = ""  # instruction set of the C++ kernels, one of _C.cpu_isas; "" is the best that this CPU has
_forced: str | None = os.environ.get("TWINS_FAST_BACKEND") or None


def choose(op: str, x: Tensor, vectors: tuple[Tensor | None, ...] = ()) -> str:
    """Name of the backend that runs ``op`` on ``x``: the forced one, else the best that can.

    Args:
        op: a key of ``KERNELS``.
        x: the tensor that decides about device and dtype.
        vectors: weights, biases and statistics, which the compiled kernels take as contiguous float32.

    Raises:
        ValueError: ``TWINS_FAST_BACKEND`` names no backend.
        RuntimeError: the forced backend cannot run.
    """
    if _forced is not None:
        _check_name(_forced)
        why = _obstacle(_forced, op, x.device.type) or _mismatch(_forced, x, vectors)
        if why:
            raise RuntimeError(f"backend {_forced!r} was asked for, but cannot run {op}: {why}")
        return _forced
    for backend in BACKENDS:
        if not (_obstacle(backend, op, x.device.type) or _reservation(backend) or _mismatch(backend, x, vectors)):
            return backend
    raise AssertionError("the torch backend always runs")


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
    reasons = [_obstacle(name, op, DEVICE.get(name, "cpu")) for op in KERNELS]
    if all(reasons):
        raise RuntimeError(f"backend {name!r} is not available: {reasons[0]}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def report() -> list[dict]:
    """One row per op and device type present: ``op``, ``device``, ``backend`` and ``reasons``.

    ``backend`` is what runs by default for float32; ``reasons`` maps each better backend to why it does not.
    """
    rows = []
    for op in KERNELS:
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            reasons = {}
            for backend in BACKENDS:
                why = _obstacle(backend, op, device) or _reservation(backend)
                if _forced is not None and backend != _forced:
                    why = f"{_forced} was asked for"
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
        return f"no {LANGUAGE[backend]} kernel for this op yet"
    if DEVICE[backend] != device:
        return f"runs on {DEVICE[backend]} tensors only"
    if DEVICE[backend] == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if _C is None:
        return _missing
    if backend == "cuda" and not _C.has_cuda:
        return "built without nvcc"
    return ""


def _reservation(backend: str) -> str:
    """Why a backend that could run is not chosen unless it is asked for by name."""
    return "not yet run on a GPU" if backend == "cuda" else ""


def _mismatch(backend: str, x: Tensor, vectors: tuple[Tensor | None, ...]) -> str:
    if backend == "torch":
        return ""
    if x.dtype not in DTYPES[backend]:
        return f"no kernel for {x.dtype}"
    for vector in vectors:
        if vector is not None and (vector.dtype != torch.float32 or not vector.is_contiguous()):
            return "weights and statistics must be contiguous float32"
    return ""
