"""How the kernels see a dense tensor: a matrix of contiguous runs, and the results that go with it.

Channels-last memory is N * H * W rows of C channels, contiguous memory N * C rows of H * W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nearest(x: Tensor) -> torch.memory_format:
    """The memory format that the kernels give ``x``: its own if dense, else the nearer one."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.channels_last if x.shape[1] > 1 and x.stride(1) == 1 else torch.contiguous_format


def is_channels_last(x: Tensor) -> bool:
    """Whether the rows of a dense ``x`` are channels; with one pixel per image they are either way."""
    return not x.is_contiguous() or x.shape[2] * x.shape[3] == 1


def run(x: Tensor) -> int:
    """Length of a row."""
    return x.shape[1] if is_channels_last(x) else x.shape[2] * x.shape[3]


def empty_bits(x: Tensor, keep: bool) -> Tensor:
    """[rows, ceil(run / 8)] uint8, one bit per value of ``x`` in memory order, lowest first; [0, 0] unless ``keep``."""
    length = run(x)
    return x.new_empty((x.numel() // length, (length + 7) // 8) if keep else (0, 0), dtype=torch.uint8)


def vector_dtype(x: Tensor) -> torch.dtype:
    """Of the vectors and statistics that go with ``x``."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_stats(x: Tensor, rows: int = 2) -> Tensor:
    """[rows, C] float32."""
    return x.new_empty((rows, x.shape[1]), dtype=torch.float32)


def forward_results(x: Tensor, keep_bits: bool, both_adaptive: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """y, bits and stats, not yet written."""
    return torch.empty_like(x), empty_bits(x, keep_bits), empty_stats(x, 4 if both_adaptive else 2)


def backward_results(x: Tensor, wanted: list[bool]) -> list[Tensor]:
    """Gradients of x, residual and the four vectors, not yet written; empty where not wanted."""
    images = [torch.empty_like(x) if want else x.new_empty(0) for want in wanted[:2]]
    lengths = [x.shape[1] if want else 0 for want in wanted[2:]]
    return images + [x.new_empty(length, dtype=torch.float32) for length in lengths]
