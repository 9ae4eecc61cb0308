"""What a device can do, asked where tests can answer for it."""

from __future__ import annotations

import functools
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

GRAPH_DEVICES = ("cuda",)


def autocast(amp_dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """What a model of plain PyTorch runs under; says once if ``device`` is slower for it."""
    if amp_dtype is None:
        return nullcontext()
    if device.type == "cpu":
        _warn_if_slow(amp_dtype)
    return torch.autocast(device.type, amp_dtype)


def has_instructions(dtype: torch.dtype) -> bool:
    """Whether the CPU computes in a type; where not, PyTorch's convolutions take many times as long as in float32."""
    if dtype == torch.float32 or not torch.backends.mkldnn.is_available():  # which has the operators, too
        return True
    operators = torch.ops.mkldnn
    return operators._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else operators._is_mkldnn_fp16_supported()


@functools.cache
def _warn_if_slow(dtype: torch.dtype) -> None:
    if not has_instructions(dtype):
        warnings.warn(
            f"this CPU has no instructions for {dtype}: what PyTorch runs in it is many times slower than in "
            "float32 (amp_dtype=None, --amp none)",
            stacklevel=5,
        )


def compute_dtype(amp_dtype: torch.dtype | None, images: torch.Tensor) -> torch.dtype:
    """``amp_dtype`` or, for None, what the surrounding autocast state says; without one the type of ``images``."""
    kind = images.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return amp_dtype or (torch.get_autocast_dtype(kind) if casts else images.dtype)


def has_graphs(device: torch.device) -> bool:
    """Whether what runs on ``device`` can be captured as a CUDA graph."""
    return device.type in GRAPH_DEVICES


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now becomes part of a CUDA graph instead of running."""
    return has_graphs(device) and torch.cuda.is_current_stream_capturing()
