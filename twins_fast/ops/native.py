"""The C++ and CUDA kernels of ``twins_fast._C``: pointers in, device and stream of the tensors.

The functions have the signatures of :mod:`twins_fast.ops.phases`, and :func:`forward` and :func:`backward` run
all phases in one go. Tensors are dense and of one layout, vectors contiguous float32: twin_bn.py sees to that.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twins_fast.ops import layout
from twins_fast.ops.group import several_processes
from twins_fast.ops.wing import Wing, vectors_of_backward

_note = Path(__file__).parent.parent / "_build_failed.txt"  # written by setup.py
_failure = _note.read_text().strip() if _note.exists() else ""
try:
    _C: Any = import_module("twins_fast._C")  # after torch, whose OpenMP runtime it then shares
    missing = ""
except ImportError as error:
    _C = None
    missing = _failure or f"no compiled module twins_fast._C ({error})"
missing_cuda = _failure or "built without nvcc"  # why, if _C has no CUDA kernels

cpu_isa = ""  # instruction set of the C++ kernels, one of _C.cpu_isas; "" is the best that this CPU has

_ALL, _REDUCE, _APPLY = range(3)  # enum Phase in csrc/include/twin_bn.h


def dtype_name(dtype: torch.dtype) -> str:
    """As the kernels know it: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def pointer_of(tensor: Tensor | None) -> int:
    """Address of the first value; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def check_status(name: str, status: str) -> None:
    """RuntimeError with what a kernel returned, unless that is empty."""
    if status:
        raise RuntimeError(f"{name}: {status}")


def forward(
    x, residual, split, frozen, adaptive, momentum, eps, relu, keep_bits, both_adaptive=False
) -> tuple[Tensor, Tensor, Tensor]:
    y, bits, stats = layout.forward_results(x, keep_bits, both_adaptive)
    _forward(x, residual, split, frozen, adaptive, y, bits, stats, momentum, eps, relu, _ALL)
    return y, bits, stats


def moments(x, split) -> Tensor:
    stats = layout.empty_stats(x)
    _forward(x, None, split, Wing(), Wing(), None, None, stats, 0.0, 0.0, False, _REDUCE)
    return stats


def apply(x, residual, split, frozen, adaptive, stats, eps, relu, keep_bits) -> tuple[Tensor, Tensor]:
    y, bits, _ = layout.forward_results(x, keep_bits)
    adaptive = Wing(weight=adaptive.weight, bias=adaptive.bias)
    _forward(x, residual, split, frozen, adaptive, y, bits, stats, 0.0, eps, relu, _APPLY)
    return y, bits


def backward(dy, x, bits, split, frozen, adaptive, stats, eps, wanted) -> tuple[Tensor, ...]:
    results = layout.backward_results(x, wanted)
    _backward(dy, x, bits, split, frozen, adaptive, stats, results, None, eps, _ALL)
    return tuple(results)


def sums(dy, x, bits, split, frozen, stats) -> Tensor:
    totals = layout.empty_stats(x, 4)
    frozen = Wing(running_mean=frozen.running_mean)
    _backward(dy, x, bits, split, frozen, Wing(), stats, (None,) * 6, totals, 0.0, _REDUCE)
    return totals


def apply_backward(dy, x, bits, split, frozen, adaptive, stats, means, eps, wanted) -> tuple[Tensor, Tensor]:
    results = layout.backward_results(x, [*wanted, *[False] * 4])
    frozen = frozen._replace(running_mean=None)
    _backward(dy, x, bits, split, frozen, adaptive, stats, results, means, eps, _APPLY)
    return results[0], results[1]


def _forward(x, residual, split, frozen, adaptive, y, bits, stats, momentum, eps, relu, phase) -> None:
    tensors = (x, residual, *frozen, *adaptive, y, bits, stats)
    _launch("forward", x, split, tensors, momentum, eps, relu, stats.shape[0] == 4, phase)


def _backward(dy, x, bits, split, frozen, adaptive, stats, results, sums, eps, phase) -> None:
    vectors = vectors_of_backward(frozen, adaptive)
    _launch("backward", x, split, (dy, x, bits, *vectors, stats, *results, sums), eps, stats.shape[0] == 4, phase)


def _launch(direction: str, x: Tensor, split: int, tensors: tuple, *scalars) -> None:
    images, channels, height, width = x.shape
    shape = (images, channels, height * width, split, layout.is_channels_last(x), dtype_name(x.dtype))
    pointers = [0 if t is None or t.numel() == 0 else _pointer(t) for t in tensors]
    launch = _launch_cpu if x.device.type == "cpu" else _launch_cuda
    check_status("twin_batch_norm", launch(direction, x, *shape, *pointers, *scalars))


def _launch_cpu(direction: str, x: Tensor, *arguments) -> str:
    return getattr(_C, f"twin_bn_{direction}_cpu")(*arguments, torch.get_num_threads(), cpu_isa)


def _launch_cuda(direction: str, x: Tensor, *arguments) -> str:
    with torch.cuda.device(x.device):
        # It may be reused as soon as this returns: by its owner's stream, after the kernels.
        size = _C.twin_bn_workspace_cuda(x.shape[1], layout.is_channels_last(x))
        workspace = x.new_empty(size, dtype=torch.float32)
        stream = torch.cuda.current_stream(x.device).cuda_stream
        # A cooperative launch would wait until NCCL's kernels leave it the whole device.
        cooperative = not several_processes()
        return getattr(_C, f"twin_bn_{direction}_cuda")(*arguments, workspace.data_ptr(), cooperative, stream)


def _pointer(tensor: Tensor) -> int:
    pointer = tensor.data_ptr()
    if pointer == 0:  # which the kernels would take for an absent tensor
        raise RuntimeError(f"twin_batch_norm: a {type(tensor).__name__} without memory of its own cannot be used here")
    return pointer
