"""What is to be done after a CUDA graph could not be captured."""

from __future__ import annotations

from contextlib import suppress

import torch

# Before PyTorch 2.12 the allocator may still ask them whether their capture goes on.
_abandoned: list[torch.cuda.CUDAGraph] = []
_NEW, _OLD = "_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool"  # PyTorch 2.6 has the old one
END_OF_POOL = _NEW if hasattr(torch._C, _NEW) else _OLD


def abandon(graph: torch.cuda.CUDAGraph, device: int, pool: tuple[int, int] | None) -> None:
    """Tell the allocator that a capture into ``pool`` is over, which one that fails may leave open."""
    _abandoned.append(graph)
    with suppress(Exception):  # it has ended
        getattr(torch._C, END_OF_POOL)(device, pool)
