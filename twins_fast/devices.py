"""What a device can do, asked where tests can answer for it."""

from __future__ import annotations

import torch

GRAPH_DEVICES = ("cuda",)


def compute_dtype(amp_dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    """``amp_dtype`` or, for None, what the surrounding autocast state says."""
    kind = device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return amp_dtype or (torch.get_autocast_dtype(kind) if casts else torch.float32)


def has_graphs(device: torch.device) -> bool:
    """Whether what runs on ``device`` can be captured as a CUDA graph."""
    return device.type in GRAPH_DEVICES


def capturing(device: torch.device) -> bool:
    """Whether what is launched on ``device`` now becomes part of a CUDA graph instead of running."""
    return has_graphs(device) and torch.cuda.is_current_stream_capturing()
